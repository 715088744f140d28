//! Job: tests of what the applier takes from a stream.
//! Input: commands, without an etcd behind them. Output: passes or fails.
//! Always true: no test waits for time.

use super::*;
use crate::config::EtcdConfig;
use crate::model::{Change, ClusterId, WholeRevision};
use crate::replica::position::{HelloFacts, LEFT_TO_OTHERS, first_of};
use crate::segment::SegmentError;
use crate::segment::feed::FeedEntry;
use crate::wire::replicate::refusal::Kind;
use std::io::ErrorKind;
use std::net::TcpListener;
use tokio::sync::oneshot;

/// An applier that has not read a position, in its second session.
async fn applier(dir: &std::path::Path) -> Applier {
    applier_beside(dir, EtcdConfig::default()).await
}

async fn applier_beside(dir: &std::path::Path, etcd: EtcdConfig) -> Applier {
    let limits = Limits::default();
    let (journal, _) = Journal::open(&dir.join("journal"), &limits).await.unwrap_or_else(|error| panic!("{error}"));
    let (dedupe, _) = Dedupe::open(&dir.join("dedupe")).await.unwrap_or_else(|error| panic!("{error}"));
    let mut applier = Applier::new(ApplierParts {
        link: LinkName::new("config").unwrap_or_else(|error| panic!("{error}")),
        etcd: Arc::new(Gate::new(etcd, watch::channel(Arc::default()).1, Bytes::new())),
        limits,
        ranges: None,
        journal: Arc::new(journal),
        dedupe: Arc::new(dedupe),
        own: Arc::default(),
        on_poison: OnPoison::Stop,
        delete_shares: DeleteShares::default(),
        trial: Trial::default(),
        operator: mpsc::channel(1).1,
        told: watch::channel(Told::default()).1,
        closed: watch::channel(Revision(0)).1,
        hello_waiting: watch::channel(0).1,
        commands: mpsc::channel(1).1,
        view: watch::channel(ApplyView::default()).0,
    });
    applier.session = 2;
    applier
}

fn progress(session: u64, through: u64) -> ApplyCommand {
    let waymark = Waymark { counter: session, id: 7 };
    ApplyCommand::Progress { session, through: Revision(through), after: Seq(0), waymark, persist: true }
}

#[tokio::test]
async fn progress_that_an_earlier_stream_left_behind_is_not_taken_for_the_present_origins() {
    let dir = tempfile::tempdir().unwrap();
    let mut applier = applier(dir.path()).await;
    applier.command(progress(1, 900)).await;
    assert_eq!((applier.progress, applier.waymark), (None, Waymark::default()));
    applier.command(progress(2, 30)).await;
    assert_eq!(applier.progress, Some(Idle { through: Revision(30), after: Seq(0), persist: true }));
    assert_eq!(applier.waymark.counter, 2);
}

#[tokio::test]
async fn a_new_run_of_seqs_knows_nothing_of_the_progress_in_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut applier = applier(dir.path()).await;
    applier.command(progress(2, 900)).await;
    applier.start_afresh(Seq(0));
    assert_eq!(applier.progress, None);
}

/// Following at seq 40, with so many changes of the next revision in.
fn position(part: u64) -> Position {
    Position { part, ..Position::of_tests() }
}

#[tokio::test]
async fn each_transaction_counts_also_those_that_leave_the_seq_where_it_is_and_a_read_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut applier = applier(dir.path()).await;
    applier.held = Some(Held::now(Some(position(0)), Revision(10)));
    applier.publish(true);
    assert_eq!(applier.view.borrow().transactions, 0, "it was read");
    for part in [3, 6] {
        applier.committed(position(part), Revision(10 + part));
        applier.publish(true);
    }
    assert_eq!(applier.view.borrow().transactions, 2);
    applier.held = Some(Held::now(Some(Position { seq: Seq(41), ..position(0) }), Revision(20)));
    applier.publish(true);
    assert_eq!(applier.view.borrow().transactions, 2, "another applier brought it there");
}

#[tokio::test]
async fn what_waits_is_counted_with_what_it_takes_beside_its_keys_and_values() {
    let dir = tempfile::tempdir().unwrap();
    let mut applier = applier(dir.path()).await;
    let (mut bytes, count) = (0, 100);
    for seq in 1..=count {
        let changes = vec![Change::Put { key: Bytes::from_static(b"k"), value: Bytes::from_static(b"v") }];
        let revision = Arc::new(WholeRevision { revision: Revision(seq), changes });
        let entry = JournalEntry { epoch: Epoch(3), seq: Seq(seq), revision, digest: Digest::default() };
        bytes += entry.bytes();
        applier.enqueue(entry);
    }
    assert_eq!(applier.waiting_bytes, bytes, "as the journal counts what it gives");
    assert!(bytes > 100 * 100, "{bytes}");
    for _ in 0..count {
        applier.dequeue();
    }
    assert_eq!((applier.waiting_bytes, applier.waiting.len()), (0, 0));
}

fn hello(session: u64) -> HelloFacts {
    HelloFacts {
        session,
        node: "us-east-1-a".to_owned(),
        epoch: Epoch(3),
        term: Term(2),
        origin_cluster: ClusterId(1),
        ranges: Ranges::new(&[], &[]),
        link_back: false,
    }
}

#[tokio::test]
async fn a_hello_whose_caller_has_gone_is_not_even_looked_at() {
    let (dir, etcd) = (tempfile::tempdir().unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    etcd.set_nonblocking(true).unwrap();
    let endpoints = vec![format!("http://{}", etcd.local_addr().unwrap())];
    let mut applier = applier_beside(dir.path(), EtcdConfig { endpoints, ..EtcdConfig::default() }).await;
    let (reply, gone) = oneshot::channel();
    drop(gone);
    applier.command(ApplyCommand::Hello { facts: hello(3), reply }).await;
    assert_eq!((applier.session, applier.hello_taken), (2, 3), "and no base copy waits for it to be answered");
    let asked = etcd.accept().map(|_| ()).map_err(|e| e.kind());
    assert_eq!(asked, Err(ErrorKind::WouldBlock), "etcd is not asked");
}

#[tokio::test]
async fn whose_hello_is_answered_has_the_link_and_the_earlier_stream_ends_unless_the_caller_has_gone() {
    let dir = tempfile::tempdir().unwrap();
    let mut applier = applier(dir.path()).await;
    let (reply, gone) = oneshot::channel();
    drop(gone);
    let refused = applier.open_session(hello(3), None, &reply);
    assert!(refused.is_err() && applier.session == 2 && applier.view.borrow().refusal.is_none());
    let (reply, _waits) = oneshot::channel();
    assert!(applier.open_session(hello(4), Some((Epoch(3), Term(2))), &reply).is_ok());
    let told = applier.view.borrow().refusal.clone().map(|(session, kind, _)| (session, kind));
    assert_eq!((applier.session, told), (4, Some((2, Kind::Closing))));
    // One that another sender has fenced hears that, and not that it was its own later hello.
    applier.fence((Epoch(3), Term(5)));
    assert!(applier.stopped && applier.open_session(hello(5), Some((Epoch(3), Term(5))), &reply).is_ok());
    let told = applier.view.borrow().refusal.clone().map(|(session, kind, _)| (session, kind));
    assert_eq!((applier.session, applier.stopped, told), (5, false, Some((4, Kind::Fenced))));
}

#[tokio::test]
async fn a_refusal_that_the_next_hello_cures_is_no_stop_and_one_that_needs_a_person_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut applier = applier(dir.path()).await;
    let mut refused = |kind| {
        applier.refuse(kind, "a reason".to_owned());
        assert_eq!(applier.view.borrow().waiting, "a reason");
        applier.view.borrow().stopped
    };
    assert_eq!([refused(Kind::PositionMoved), refused(Kind::Gap), refused(Kind::Conflict)], [false, false, true]);
}

#[tokio::test]
async fn what_a_refused_stream_left_in_the_journal_is_applied_once_nobody_comes_back_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut applier = applier(dir.path()).await;
    let position = position(0);
    applier.journal.reset(position.run(), position.seq).await.unwrap();
    let changes = vec![Change::Delete { key: Bytes::from_static(b"k") }];
    let revision = Arc::new(WholeRevision { revision: Revision(101), changes });
    let (epoch, seq) = (position.epoch, position.seq.next());
    applier.journal.append(vec![JournalEntry { epoch, seq, revision, digest: Digest::default() }]).await.unwrap();
    (applier.held, applier.retry_at) = (Some(Held::now(Some(position), Revision(10))), None);
    // It was to begin the next epoch.
    applier.claim = Some((epoch.next(), Term(3)));
    applier.refuse(Kind::PositionMoved, "another applier wrote the position".to_owned());
    applier.forget_ended_stream();
    assert!(!applier.follows(), "whoever says hello next goes on with it");
    applier.left_to_others = applier.left_to_others.map(|(since, seq)| (since - LEFT_TO_OTHERS, seq));
    applier.forget_ended_stream();
    assert!(applier.follows() && applier.claim.is_none());
}

#[tokio::test]
async fn what_was_known_of_the_position_before_a_sleep_is_read_again_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut applier = applier(dir.path()).await;
    for (slept, waits, read_again) in
        [(LOOK_EVERY * 2, false, false), (LOOK_EVERY, true, false), (LOOK_EVERY * 2, true, true)]
    {
        if waits && applier.waiting.is_empty() {
            let revision = Arc::new(WholeRevision { revision: Revision(101), changes: Vec::new() });
            applier.enqueue(JournalEntry { epoch: Epoch(3), seq: Seq(41), revision, digest: Digest::default() });
        }
        let held = Held::now(Some(position(0)), Revision(10));
        (applier.held, applier.retry_at) = (Some(Held { at: held.at - slept, ..held }), None);
        assert!(applier.follows());
        applier.advance().await;
        // No etcd is there.
        let seen = (applier.held.is_none(), applier.retry_at.is_some());
        assert_eq!(seen, (read_again, read_again), "{slept:?}, {waits}");
    }
}

#[test]
fn a_read_of_the_journal_that_fails_for_want_of_a_descriptor_says_nothing_of_what_it_holds() {
    let failed = |code| {
        let (what, path, source) = ("reading", "journal".into(), std::io::Error::from_raw_os_error(code));
        Err(JournalError::Feed(FeedError::Segment(SegmentError::Io { what, path, source })))
    };
    let (without_a_descriptor, of_the_disk) = (24, 5);
    assert!(first_of(failed(without_a_descriptor), false).is_err());
    assert_eq!(first_of(failed(without_a_descriptor), true).unwrap(), None, "its disk has failed for good");
    assert_eq!(first_of(failed(of_the_disk), false).unwrap(), None);
    assert_eq!(first_of(Ok(Vec::new()), false).unwrap(), None);
}
