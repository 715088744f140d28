//! Job: what is recorded of the protocol: a few revisions and one message of each kind, chosen so that every form of the bytes comes.
//! Input: none. Output: the samples by name; a recording is these, as bytes.
//! Pure: no clock, no I/O.
//! Always true: a sample is never changed once it is recorded; what a later version adds gets a name of its own.

use bytes::Bytes;
use etcd_ferry::model::{Change, Epoch, Revision, Seq, Term, WholeRevision};
use etcd_ferry::wire::frame::FrameLimits;
use etcd_ferry::wire::replicate::{
    Ack, CopyAck, CopyBegin, CopyEnd, DifferingKey, HelloReply, HelloRequest, KeyList, KeyListAnswer, KeyLists,
    KeyListsAnswer, KeysWanted, Mark, MarkFailed, Page, Part, PartAnswer, Parts, PartsAnswer, Progress, Range, Receipt,
    Refusal, Repair, Repaired, ReplicaLimits, Reset, Shipment, TxnLimits, Verified, Waymark, differing_key,
    part_answer, receipt, refusal, shipment,
};
use etcd_ferry::wire::window::WindowLimits;

pub const FRAME_LIMITS: FrameLimits = FrameLimits { plain_bytes_max: 1 << 20, revisions_max: 1_000 };

/// The frames of one Ship stream, in their order, or one frame that stands alone.
pub struct Stream {
    /// `None`: standalone.
    pub window: Option<WindowLimits>,
    pub frames: Vec<Frame>,
}

pub struct Frame {
    pub name: &'static str,
    pub epoch: Epoch,
    pub term: Term,
    pub seq_first: Seq,
    pub revisions: Vec<WholeRevision>,
    /// The window starts afresh before it, as after a Reset.
    pub restart: bool,
}

fn put(key: &'static str, value: &str) -> Change {
    Change::Put { key: Bytes::from_static(key.as_bytes()), value: Bytes::copy_from_slice(value.as_bytes()) }
}

fn delete(key: &'static str) -> Change {
    Change::Delete { key: Bytes::from_static(key.as_bytes()) }
}

fn revision(revision: u64, changes: Vec<Change>) -> WholeRevision {
    WholeRevision { revision: Revision(revision), changes }
}

fn frame(name: &'static str, seq_first: u64, revisions: Vec<WholeRevision>) -> Frame {
    Frame { name, epoch: Epoch(3), term: Term(41), seq_first: Seq(seq_first), revisions, restart: false }
}

fn window(window_bytes_max: usize) -> Option<WindowLimits> {
    Some(WindowLimits { window_bytes_max, frame: FRAME_LIMITS })
}

pub fn streams() -> Vec<Stream> {
    let standalone = vec![revision(7001, vec![put("/app/a", "one"), delete("/app/b")]), revision(7003, vec![])];
    let ready = r#"{"ready":true,"replicas":3}"#;
    let scaled = r#"{"ready":true,"replicas":12}"#;
    let fresh = vec![revision(7004, vec![put("/app/a", ready), put("/app/b", "two"), delete("/app/c")])];
    let changed = vec![revision(7006, vec![put("/app/a", scaled), put("/app/b", "2")])];
    // The slot of a deleted key is given to the next new one.
    let deleted = vec![revision(7007, vec![delete("/app/b"), put("/app/d", ready)])];
    let reused = vec![revision(7008, vec![put("/app/d", scaled)])];
    let restarted =
        Frame { restart: true, ..frame("restarted", 307, vec![revision(7009, vec![put("/app/a", ready)])]) };
    // 450 bytes hold two entries of 192 and a few each. /app/2 was put last but one, so that /app/1 makes room for /app/3.
    let filled = vec![revision(7010, vec![put("/app/1", "one"), put("/app/2", "two")])];
    let evicted = vec![revision(7011, vec![put("/app/3", "three")])];
    let after = vec![revision(7012, vec![put("/app/1", "1"), put("/app/3", "3")])];
    vec![
        Stream { window: None, frames: vec![frame("standalone", 300, standalone)] },
        Stream {
            window: window(16 << 20),
            frames: vec![
                frame("fresh", 302, fresh),
                frame("changed", 303, changed),
                frame("deleted", 304, deleted),
                frame("reused", 305, reused),
                restarted,
            ],
        },
        Stream {
            window: window(450),
            frames: vec![frame("filled", 308, filled), frame("evicted", 309, evicted), frame("after", 310, after)],
        },
    ]
}

/// A message of either peer service, of any kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    Hello(Box<HelloRequest>),
    Reply(Box<HelloReply>),
    Shipment(Box<Shipment>),
    Receipt(Box<Receipt>),
}

const WAYMARK: Waymark = Waymark { counter: 12, id: 17_460_298_882_374_151_968 };

fn bytes(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

fn digest(byte: u8) -> Bytes {
    Bytes::from(vec![byte; 16])
}

fn part(from: &'static str, to: &'static str) -> Part {
    Part { from: bytes(from), to: bytes(to), keys: 1_000, digest: digest(0xd1) }
}

fn limits(txn_ops_max: u64) -> TxnLimits {
    TxnLimits { txn_ops_max, request_bytes_max: 1_572_864 }
}

/// Every message by the name of its kind in proto/replicate.proto, every field with a value that is not its default.
pub fn messages() -> Vec<(String, Message)> {
    let mut messages = vec![
        ("hello_request".to_owned(), Message::Hello(Box::new(hello()))),
        ("hello_reply".to_owned(), Message::Reply(Box::new(reply()))),
    ];
    for (name, what) in shipments() {
        messages.push((format!("shipment.{name}"), Message::Shipment(Box::new(Shipment { what: Some(what) }))));
    }
    for (name, what) in receipts() {
        messages.push((format!("receipt.{name}"), Message::Receipt(Box::new(Receipt { what: Some(what) }))));
    }
    messages
}

fn hello() -> HelloRequest {
    HelloRequest {
        protocol_version: 1,
        link: "config".to_owned(),
        epoch: 3,
        term: 41,
        origin_cluster: 0x1c45_a069_f3a1_d796,
        waymark: Some(WAYMARK),
        ranges: vec![Range { from: bytes("/app/"), to: bytes("/app0") }],
        window_bytes_max: 16 << 20,
        frame_bytes_max: 1 << 20,
        link_back: true,
        region: "us-east-1".to_owned(),
        node: "us-east-1-a".to_owned(),
        software: "0.1.0".to_owned(),
    }
}

fn reply() -> HelloReply {
    HelloReply {
        protocol_version: 1,
        session: digest(0x5e),
        replica_cluster: 0xcdf8_181e_3266_cf8a,
        position: bytes("{}"),
        received_seq: 300,
        received_revision: 7_000,
        received_digest: digest(0xfc),
        durable_seq: 299,
        window_bytes_max: 8 << 20,
        frame_bytes_max: 1 << 20,
        ranges_empty: true,
        link_back: true,
        region: "cn-hangzhou".to_owned(),
        node: "cn-hangzhou-a".to_owned(),
        software: "0.1.0".to_owned(),
        fenced: true,
    }
}

fn shipments() -> Vec<(&'static str, shipment::What)> {
    use shipment::What;
    let page = Page { from: bytes("/app/"), to: bytes("/app/m"), revision: 7_000, frame: bytes("frame"), last: true };
    let progress = Progress {
        origin_revision: 7_020,
        head_revision: 7_024,
        waymark: Some(WAYMARK),
        lag_ms: 41,
        rpo_ms: 40,
        lag_revisions: 3,
        rpo_revisions: 2,
        persist: true,
        after_seq: 310,
        limits: Some(limits(128)),
        trouble: String::new(),
    };
    let blind = Progress { trouble: "etcd did not answer within 10 s".to_owned(), ..progress.clone() };
    let begin = CopyBegin {
        epoch: 4,
        term: 41,
        anchor_revision: 7_000,
        waymark: Some(WAYMARK),
        allow_deletes: true,
        origin_empty: true,
        guard_pass: true,
        keys_total: 77_720,
        resume: true,
        deletes_share_max: 0.1,
        repair: true,
    };
    let list = KeyList { from: bytes("/app/"), to: bytes("/app0"), keys: vec![bytes("/app/a")], values: vec![7] };
    let verified = Verified {
        origin_revision: 7_000,
        at_ms: 1_795_700_000_000,
        differing_keys: 5,
        expected_keys: 2,
        mended_keys: 0,
    };
    vec![
        ("frame", What::Frame(bytes("frame"))),
        ("progress", What::Progress(progress)),
        ("progress_in_trouble", What::Progress(blind)),
        ("copy_begin", What::CopyBegin(begin)),
        ("keys_page", What::KeysPage(page.clone())),
        ("page", What::Page(page)),
        ("copy_end", What::CopyEnd(CopyEnd { anchor_revision: 7_000 })),
        ("mark", What::Mark(Mark { mark: 9, after_seq: 310, origin_revision: 7_012 })),
        ("parts", What::Parts(Parts { mark: 9, parts: vec![part("/app/", "/app0")] })),
        ("key_lists", What::KeyLists(KeyLists { mark: 9, lists: vec![list] })),
        ("verified", What::Verified(verified)),
        ("verified_after_repair", What::Verified(Verified { mended_keys: 3, ..verified })),
        ("repair", What::Repair(Repair { repair: 2, after_seq: 310, frame: bytes("frame"), last: true, wanted: 8 })),
    ]
}

fn receipts() -> Vec<(&'static str, receipt::What)> {
    use receipt::What;
    let ack = Ack {
        received_seq: 310,
        durable_seq: 309,
        applied_seq: 308,
        applied_origin_revision: 7_010,
        waymark: Some(WAYMARK),
        following: true,
        waiting: "the replica's etcd: no leader".to_owned(),
        repeated: 4,
        transactions: 300,
        conflicts: 1,
        position_revision: 7_009,
        verified_revision: 7_000,
        verified_at_ms: 1_795_700_000_000,
        repairing: true,
        repair_wanted: true,
        held: true,
        quarantined: 2,
        limits: Some(ReplicaLimits { etcd: Some(limits(128)), sidecar: Some(limits(64)) }),
        paused: false,
    };
    let copy_ack = CopyAck {
        cursor: bytes("/app/m"),
        pages: 78,
        keys_written: 70_000,
        keys_equal: 7_000,
        keys_deleted: 20,
        conflicts: 3,
        guard_passed: true,
        complete: true,
    };
    let answer = PartAnswer {
        outcome: part_answer::Outcome::Differs.into(),
        subs: vec![part("/app/", "/app/m"), part("/app/m", "/app0")],
        edges: vec![bytes("/app/m")],
    };
    let differing = DifferingKey {
        key: bytes("/app/a"),
        difference: differing_key::Difference::OtherValue.into(),
        origin_value: 7,
        replica_value: 8,
        quarantined: true,
    };
    let lists = vec![KeyListAnswer { compacted: true, keys: vec![differing] }];
    let refused = Refusal { kind: refusal::Kind::Guard.into(), reason: "why".to_owned() };
    vec![
        ("ack", What::Ack(ack)),
        ("ack_paused", What::Ack(Ack { paused: true, ..Ack::default() })),
        ("reset", What::Reset(Reset { after_seq: 309, reason: "why".to_owned() })),
        ("refusal", What::Refusal(refused)),
        ("copy_ack", What::CopyAck(copy_ack)),
        ("parts_answer", What::PartsAnswer(PartsAnswer { mark: 9, parts: vec![answer] })),
        ("key_lists_answer", What::KeyListsAnswer(KeyListsAnswer { mark: 9, lists })),
        ("mark_failed", What::MarkFailed(MarkFailed { mark: 9, reason: "why".to_owned() })),
        ("repaired", What::Repaired(Repaired { repair: 2, puts: 5, deletes: 1, refused: "why".to_owned() })),
        ("keys_wanted", What::KeysWanted(KeysWanted { wanted: 8, keys: vec![bytes("/app/a")] })),
    ]
}
