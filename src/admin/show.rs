//! Job: print a sidecar's status as a table for people.
//! Input: a reply; the terminal's width. Output: text.
//! Pure: no clock, no I/O.
//! Always true: nothing printed holds a control character.

use super::limits;
use super::proto::{Canary, Certificates, Copy, EtcdMember, ForeignWrites, Link, Paused, StatusReply};
use super::quarantine::note;
use super::table::{aligned, line};
use super::verification::{counted, moment, verification_lines};

/// For people. `width` is that of the terminal, in columns; `None` when the output is not a terminal: then there are no bars.
pub fn status_table(reply: &StatusReply, width: Option<usize>) -> String {
    let mut text = line(&format!("{} in {}, etcd-ferry {}", reply.node, reply.region, reply.version));
    if reply.links.is_empty() {
        text.push_str("no links are configured\n");
        return text;
    }
    text.push('\n');
    text.push_str(&aligned(COLUMNS, reply.links.iter().map(row)));
    let links = reply.links.iter().map(|link| notes(link, width));
    let others = reply.etcd.iter().map(member_note).chain(reply.certificates.iter().map(certificates_note));
    let notes: String = links.chain(others).collect();
    if !notes.is_empty() {
        text.push('\n');
        text.push_str(&notes);
    }
    text
}

/// A reason may hold what a peer said: it must neither drive the terminal nor forge a line.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// When a link was paused.
pub fn since(paused: &Paused) -> String {
    moment(paused.at).unwrap_or_else(|| "some time".to_owned())
}

const COLUMNS: [&str; 9] = ["LINK", "SIDE", "STATE", "SEQ", "APPLIED", "LAG", "RPO", "RATIO", "PEER"];

fn row(link: &Link) -> [String; 9] {
    [
        link.link.clone(),
        link.side.clone(),
        if link.role == "standby" { format!("{} (standby)", link.state) } else { link.state.clone() },
        link.seq.to_string(),
        link.applied_seq.to_string(),
        behind(link.lag_seconds, link.lag_revisions),
        behind(link.rpo_seconds, link.rpo_revisions),
        ratio(link.bytes_raw, link.bytes_sent),
        link.peer.clone(),
    ]
}

/// What a link has to say beside its row: its reason, and how far its base copy is.
fn notes(link: &Link, width: Option<usize>) -> String {
    let mut text = String::new();
    let who = format!("{} ({})", link.link, link.side);
    if !link.reason.is_empty() {
        text.push_str(&line(&format!("{who}: {}", link.reason)));
    }
    if let Some(copy) = &link.copy {
        let columns = width.map(|columns| columns.saturating_sub(who.len() + 2));
        text.push_str(&line(&format!("{who}: {}", progress(copy, columns))));
    }
    if let Some(canary) = &link.canary {
        text.push_str(&line(&format!("{who}: {}", canary_words(canary))));
    }
    for said in link.limits.iter().map(limits::line).filter(|said| !said.is_empty()) {
        text.push_str(&line(&format!("{who}: {said}")));
    }
    for said in link.verification.iter().flat_map(verification_lines) {
        text.push_str(&line(&format!("{who}: {said}")));
    }
    if let Some(said) = note(link) {
        text.push_str(&line(&format!("{who}: {said}")));
    }
    for said in link.foreign_writes.iter().flat_map(|writes| foreign_lines(writes, &link.reason)) {
        text.push_str(&line(&format!("{who}: {said}")));
    }
    text
}

fn canary_words(canary: &Canary) -> String {
    let Canary { seconds, waiting_seconds } = *canary;
    if waiting_seconds > seconds.max(1.0) {
        return format!("a canary has been on its way to the replica for {}", duration(waiting_seconds));
    }
    format!("the last canary was applied {} after its write", duration(seconds))
}

/// Of a member whose version is no good; that one is down is said by the links that miss it.
fn member_note(member: &EtcdMember) -> String {
    let EtcdMember { endpoint, version, verdict, detail, .. } = member;
    match &verdict[..] {
        "" | "fine" => String::new(),
        _ => line(&format!("etcd {version} at {endpoint} ({verdict}): {detail}")),
    }
}

/// Of files that are not in use.
fn certificates_note(certificates: &Certificates) -> String {
    match &certificates.refused[..] {
        "" => String::new(),
        reason => line(&format!("certificates: new files are refused, the last ones stay in use: {reason}")),
    }
}

/// What the link's reason says already is not said again.
fn foreign_lines(foreign: &ForeignWrites, reason: &str) -> Vec<String> {
    let ForeignWrites { revisions, keys, first_revision, last_revision, first_keys, trouble, .. } = foreign;
    let mut lines = Vec::new();
    if *revisions > 0 {
        let more = if *keys > first_keys.len() as u64 { ", ..." } else { "" };
        let at = if first_revision == last_revision {
            format!("revision {first_revision}")
        } else {
            format!("revisions {first_revision} to {last_revision}")
        };
        let (count, names) = (counted(*keys), first_keys.join(", "));
        lines
            .push(format!("somebody else wrote {count} here, in {at}: {names}{more}; `repair` at the origin mends it"));
    }
    if !trouble.is_empty() && !reason.contains(trouble) {
        lines.push(format!("foreign writes cannot be looked for: {trouble}"));
    }
    lines
}

const BAR_COLUMNS_MIN: usize = 10;
const BAR_COLUMNS_MAX: usize = 40;

/// `columns` is the room for the line; without it, or with too little, the words stand alone.
fn progress(copy: &Copy, columns: Option<usize>) -> String {
    if copy.keys_total == 0 {
        return format!("{} keys copied", copy.keys_done);
    }
    let done = copy.keys_done.min(copy.keys_total);
    let share = done as f64 / copy.keys_total as f64;
    let words = format!("{:3.0} %, {} of {} keys copied", (share * 100.0).floor(), done, copy.keys_total);
    let room = columns.unwrap_or(0).saturating_sub(words.len() + 3).min(BAR_COLUMNS_MAX);
    if room < BAR_COLUMNS_MIN {
        return words;
    }
    let filled = (0..room).filter(|column| ((column + 1) as f64) <= share * room as f64).count();
    format!("[{}{}] {words}", "#".repeat(filled), ".".repeat(room - filled))
}

/// How far behind: a time, and revisions if there are any.
pub fn behind(seconds: f64, revisions: u64) -> String {
    let time = duration(seconds);
    if revisions == 0 { time } else { format!("{time}, {revisions} rev") }
}

/// Two units at most: enough to judge, short enough for a column.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    if seconds < 1.0 {
        return format!("{:.0} ms", (seconds * 1000.0).floor());
    }
    if seconds < 60.0 {
        return format!("{seconds:.1} s");
    }
    let whole = |unit: f64| (seconds / unit).floor();
    if seconds < 3600.0 {
        return format!("{} min {:.0} s", whole(60.0), (seconds % 60.0).floor());
    }
    if seconds < 86_400.0 {
        return format!("{} h {:.0} min", whole(3600.0), (seconds % 3600.0 / 60.0).floor());
    }
    format!("{} d {:.0} h", whole(86_400.0), (seconds % 86_400.0 / 3600.0).floor())
}

fn ratio(bytes_raw: u64, bytes_sent: u64) -> String {
    if bytes_sent == 0 {
        return "-".to_owned();
    }
    format!("{:.1}", bytes_raw as f64 / bytes_sent as f64)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::admin) fn link() -> Link {
        Link {
            link: "config".to_owned(),
            side: "origin".to_owned(),
            state: "following".to_owned(),
            peer: "spiffe://etcd-ferry.dev/region/cn-hangzhou".to_owned(),
            epoch: 2,
            seq: 120,
            applied_seq: 118,
            origin_revision: 4000,
            head_revision: 4002,
            durable_seq: 119,
            lag_revisions: 2,
            lag_seconds: 0.0421,
            rpo_revisions: 1,
            rpo_seconds: 0.0209,
            bytes_raw: 14_000,
            bytes_sent: 1000,
            ..Link::default()
        }
    }

    pub(in crate::admin) fn member(version: &str, verdict: &str, detail: &str) -> EtcdMember {
        EtcdMember {
            endpoint: "http://127.0.0.1:2379".to_owned(),
            ok: true,
            version: version.to_owned(),
            leader: true,
            verdict: verdict.to_owned(),
            detail: detail.to_owned(),
        }
    }

    pub(in crate::admin) fn reply(links: Vec<Link>) -> StatusReply {
        let (region, node) = ("us-east-1".to_owned(), "us-east-1-a".to_owned());
        StatusReply { region, node, version: "0.1.0".to_owned(), links, etcd: Vec::new(), certificates: None }
    }

    #[test]
    fn the_table_is_aligned_and_reasons_stand_below_it() {
        let stopped = Link {
            link: "orders-of-the-shop".to_owned(),
            side: "replica".to_owned(),
            state: "stopped".to_owned(),
            reason: "the origin was restored: run `etcd-ferry resync`".to_owned(),
            ..Link::default()
        };
        assert_eq!(
            status_table(&reply(vec![link(), stopped]), None),
            "us-east-1-a in us-east-1, etcd-ferry 0.1.0\n\
             \n\
             LINK                SIDE     STATE      SEQ  APPLIED  LAG           RPO           RATIO  PEER\n\
             config              origin   following  120  118      42 ms, 2 rev  20 ms, 1 rev  14.0   spiffe://etcd-ferry.dev/region/cn-hangzhou\n\
             orders-of-the-shop  replica  stopped    0    0        0 ms          0 ms          -\n\
             \n\
             orders-of-the-shop (replica): the origin was restored: run `etcd-ferry resync`\n"
        );
        assert!(status_table(&reply(Vec::new()), None).ends_with("no links are configured\n"));
    }

    #[test]
    fn a_member_of_a_version_that_is_no_good_stands_below_the_table_and_any_other_does_not() {
        let mut reply = reply(vec![link()]);
        reply.etcd =
            vec![member("3.5.30", "fine", ""), member("", "", "no answer"), member("3.5.16", "warned", "upgrade it")];
        let table = status_table(&reply, None);
        let below = table.rsplit("\n\n").next();
        assert_eq!(below, Some("etcd 3.5.16 at http://127.0.0.1:2379 (warned): upgrade it\n"), "{table}");
    }

    #[test]
    fn what_the_reason_says_is_not_said_again_of_foreign_writes() {
        let trouble = "etcd cannot be reached at http://127.0.0.1:2379".to_owned();
        let writes = ForeignWrites { trouble: trouble.clone(), ..ForeignWrites::default() };
        assert_eq!(foreign_lines(&writes, &format!("the replica's etcd: {trouble}: timed out")), Vec::<String>::new());
        assert_eq!(foreign_lines(&writes, ""), [format!("foreign writes cannot be looked for: {trouble}")]);
    }

    #[test]
    fn a_canary_is_told_by_the_time_that_it_took_unless_one_has_been_on_its_way_for_longer() {
        let words = |seconds, waiting_seconds| canary_words(&Canary { seconds, waiting_seconds });
        assert_eq!(words(0.044, 0.02), "the last canary was applied 44 ms after its write");
        assert_eq!(words(0.044, 0.9), "the last canary was applied 44 ms after its write");
        assert_eq!(words(0.044, 12.0), "a canary has been on its way to the replica for 12.0 s");
        assert_eq!(words(0.0, 61.0), "a canary has been on its way to the replica for 1 min 1 s");
    }

    #[test]
    fn a_copy_shows_a_bar_on_a_terminal_and_words_elsewhere() {
        let mut copying = link();
        copying.copy = Some(Copy { keys_done: 45_000, keys_total: 100_000 });
        let note = |width| status_table(&reply(vec![copying.clone()]), width).lines().last().map(str::to_owned);
        assert_eq!(note(None).unwrap(), "config (origin):  45 %, 45000 of 100000 keys copied");
        assert_eq!(note(Some(40)), note(None), "too narrow for a bar");
        let bar = note(Some(80)).unwrap();
        assert_eq!(bar, "config (origin): [###########...............]  45 %, 45000 of 100000 keys copied");
        assert_eq!(bar.len(), 80);
        assert_eq!(note(Some(500)).unwrap().matches(['#', '.']).count(), BAR_COLUMNS_MAX);

        copying.copy = Some(Copy { keys_done: 7, keys_total: 0 });
        assert_eq!(notes(&copying, Some(80)), "config (origin): 7 keys copied\n");
    }

    #[test]
    fn what_a_peer_says_neither_drives_the_terminal_nor_forges_a_line() {
        let mut hostile = link();
        hostile.reason = "\u{1b}[2Jgone\nconfig (origin): all is well".to_owned();
        let table = status_table(&reply(vec![hostile]), None);
        assert!(table.ends_with("\nconfig (origin):  [2Jgone config (origin): all is well\n"), "{table}");
    }

    #[test]
    fn a_time_has_two_units_at_most() {
        let shown = [-1.0, f64::NAN, 0.9999, 59.94, 61.0, 3599.0, 3661.0, 90_000.0].map(duration);
        assert_eq!(shown, ["0 ms", "0 ms", "999 ms", "59.9 s", "1 min 1 s", "59 min 59 s", "1 h 1 min", "1 d 1 h"]);
    }
}
