//! Job: one run of a link by one seed: two regions in memory, stepped in any order through faults, then left to come to rest.
//! Input: a seed. Output: what happened, counted; or the first `Fault`, with the last steps.
//! Synchronous; its disks are folders that go with it.
//! Always true: the same seed makes the same run: no clock, no thread, no order of a hash map has a part in it.

mod disasters;
mod rest;

use super::dedupe::DedupeLog;
use super::disk::Disk;
use super::etcd::Etcd;
use super::judge::{Fault, Judge};
use super::origin::Origin;
use super::random::Random;
use super::region::Context;
use super::replica::{Replica, WAITING_BYTES_MAX};
use super::tail::Tail;
use bytes::Bytes;
use etcd_ferry::model::{Change, Epoch, LinkName, Ranges, Term};
use etcd_ferry::replica::plan::RequestLimits;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Rounds in which a link that is left alone must have come to rest: many times what the longest needs.
const ROUNDS_MAX: usize = 600;
/// What a spool may take, small enough to be full now and then.
const SPOOL_BYTES_MAX: u64 = 16 << 10;
/// The largest record beyond a limit: one batch that was taken below it.
const BATCH_BYTES_MAX: u64 = 64 << 10;
/// Seeds whose dedupe logs are on files.
const DEDUPE_FILES_PERCENT: usize = 25;

/// Which disasters a seed may bring.
struct May {
    foreign: bool,
    restore_replica: bool,
    restore_origin: bool,
    replace_origin: bool,
    change_ranges: bool,
    lose_disks: bool,
    elections: bool,
}

impl May {
    fn choose(random: &mut Random) -> Self {
        Self {
            foreign: random.percent(25),
            restore_replica: random.percent(25),
            restore_origin: random.percent(30),
            replace_origin: random.percent(7),
            change_ranges: random.percent(10),
            lose_disks: random.percent(15),
            elections: random.percent(25),
        }
    }
}

pub struct World {
    context: Context,
    origin: Etcd,
    origins: Vec<Origin>,
    replicas: Vec<Replica>,
    may: May,
    ranges: Vec<Ranges>,
    ranges_now: usize,
    dir: PathBuf,
    last_number: u64,
    last_value: u64,
    origin_snapshot: Option<Etcd>,
    /// With the keys that were somebody else's.
    replica_snapshot: Option<(Etcd, BTreeSet<Bytes>)>,
    /// Once the origin was restored nothing of what it lost may be compacted, until the link is in another epoch than at the restore: that it
    /// then cannot be told apart is a stated limit.
    compact_max: u64,
    restored_in: Option<Epoch>,
    /// The highest head before a restore.
    lost_through: u64,
    origin_changed: bool,
    replica_restored: bool,
}

pub struct Run {
    pub counts: BTreeMap<String, u64>,
    pub judged: u64,
    pub fault: Option<(Fault, u64, String)>,
}

/// Runs one seed in `dir`, which is made and removed.
pub fn run(seed: u64, dir: &Path) -> Run {
    let mut world = World::new(seed, dir);
    let finished = catch_unwind(AssertUnwindSafe(|| world.run()));
    if let Err(panic) = finished {
        let said =
            panic.downcast_ref::<String>().cloned().or(panic.downcast_ref::<&str>().map(|said| (*said).to_owned()));
        world.context.fail(Fault::new("free of panics", said.unwrap_or_default()));
    }
    let judged = world.context.judge.judged;
    let fault = world.context.fault.take().map(|fault| (fault, world.context.step, world.context.trace()));
    let counts = std::mem::take(&mut world.context.counts);
    drop(world);
    let _ = std::fs::remove_dir_all(dir);
    Run { counts, judged, fault }
}

fn key(text: String) -> Bytes {
    Bytes::from(text)
}

impl World {
    fn run(&mut self) {
        if self.context.random.percent(75) {
            self.begin_well();
        }
        let steps = self.context.random.between(200, 700);
        for _ in 0..steps {
            self.context.step += 1;
            self.step();
            self.check_bounds();
            self.check_stops();
            if self.context.fault.is_some() {
                return;
            }
        }
        if let Err(fault) = self.come_to_rest() {
            self.context.fail(fault);
        }
    }

    /// Most links follow before anything happens to them.
    fn begin_well(&mut self) {
        self.context.faults = false;
        for round in 0..ROUNDS_MAX {
            if self.is_at_rest() {
                break;
            }
            self.round(round);
        }
        self.context.faults = true;
    }

    fn new(seed: u64, dir: &Path) -> Self {
        let _ = std::fs::remove_dir_all(dir);
        let mut random = Random::new(seed);
        let link = LinkName::new("config").expect("a name");
        let prefix = [Bytes::from_static(b"/app/")];
        let ranges = vec![Ranges::new(&prefix, &[Bytes::from_static(b"/app/x/")]), Ranges::new(&prefix, &[])];
        let origin = Etcd::new(0xa);
        let mut replica = Etcd::new(0xb);
        replica.ops_max = [8, 16, 32, 128][random.below(4)];
        replica.bytes_max = [4 << 10, 6 << 10, 16 << 10, 1 << 20][random.below(4)];
        let told = random.percent(50);
        let configured = RequestLimits {
            ops_max: if told { replica.ops_max } else { 128 },
            bytes_max: if told { replica.bytes_max } else { 1_572_864 },
            bytes_refused: None,
            position_key_bytes: link.position_key().len(),
            position_value_bytes_max: 700,
        };
        let may = May::choose(&mut random);
        let mut judge = Judge::new(&link, &ranges, origin.cluster);
        judge.origin_wrote(origin.head(), &[], origin.state());
        let mut context = Context::new(random, replica, judge);
        if context.random.percent(15) {
            context.frames_damaged = 300;
        }
        let (senders, receivers) = (context.random.between(1, 2), context.random.between(1, 2));
        let writes_waymarks = !context.random.percent(8);
        let dedupe_on_files = context.random.percent(DEDUPE_FILES_PERCENT);
        let mut world = Self {
            origins: Vec::new(),
            replicas: Vec::new(),
            may,
            ranges,
            ranges_now: 0,
            dir: dir.to_owned(),
            last_number: 0,
            last_value: 0,
            origin_snapshot: None,
            replica_snapshot: None,
            compact_max: u64::MAX,
            restored_in: None,
            lost_through: 0,
            origin_changed: false,
            replica_restored: false,
            origin,
            context,
        };
        for at in 0..senders {
            let spool = Disk::open(world.dir.join(format!("spool{at}")), SPOOL_BYTES_MAX);
            let tail = Tail::start(link.clone(), world.ranges[0].clone(), spool);
            let name = format!("sender {at}");
            // Of its own, as a candidate's create revision is.
            let term = Term(at as u64 + 1);
            world.origins.push(Origin::start(name, link.clone(), term, tail, writes_waymarks));
        }
        for at in 0..receivers {
            let journal = world.dir.join(format!("journal{at}"));
            let dedupe = DedupeLog::new(world.dir.join(format!("dedupe{at}")), dedupe_on_files);
            let name = format!("receiver {at}");
            world.replicas.push(Replica::start(name, link.clone(), journal, dedupe, configured));
        }
        for _ in 0..world.context.random.below(12) {
            world.write();
        }
        // From before the link had a waymark.
        world.origin_snapshot = Some(world.origin.clone());
        world
    }

    fn step(&mut self) {
        let random = &mut self.context.random;
        let (origin, replica) = (random.below(self.origins.len()), random.below(self.replicas.len()));
        match random.below(104) {
            0..14 => self.write(),
            14..32 => self.origins[origin].tail.step(&self.origin, &mut self.context),
            32..38 => step_disk(&mut self.origins[origin].tail.spool, &mut self.context),
            38..56 => (0..2).for_each(|_| self.ship(origin)),
            56..64 => (0..2).for_each(|_| self.origins[origin].take_receipt(&mut self.origin, &mut self.context)),
            64..76 => (0..2).for_each(|_| self.receive(replica)),
            76..80 => self.tell(replica),
            80..91 => (0..2).for_each(|_| self.replicas[replica].apply(&mut self.context)),
            91..95 => self.context.commit_pending(),
            95..99 => step_disk(&mut self.replicas[replica].journal, &mut self.context),
            99 => self.replicas[replica].look_again(),
            101..104 => self.origins[origin].stand_by(&mut self.origin, &mut self.context),
            _ => self.replicas[replica].dedupe.sync(),
        }
        self.end_restore();
        self.disturb(origin, replica);
    }

    fn write(&mut self) {
        let mut changes = self.some_changes();
        let deletes_alone = changes.iter().all(|change| matches!(change, Change::Delete { .. }));
        if deletes_alone && self.origin.revision < self.lost_through {
            // The same deletes at the same revision, before and after a restore, tell nothing: a stated limit.
            let value = Bytes::from(self.last_value.to_string());
            changes.push(Change::Put { key: key("/app/restored".to_owned()), value });
        }
        self.write_changes(changes);
    }

    fn write_changes(&mut self, changes: Vec<Change>) {
        if self.origin.write(changes).is_some() {
            let written = self.origin.written_at(self.origin.revision).to_vec();
            self.context.judge.origin_wrote(self.origin.head(), &written, self.origin.state());
        }
    }

    /// A revision of the origin's users.
    fn some_changes(&mut self) -> Vec<Change> {
        self.last_value += 1;
        let value = self.last_value;
        let random = &mut self.context.random;
        let filler = "the same in all values of this test; ".repeat(random.below(7));
        let put = |key: Bytes| Change::Put { key, value: Bytes::from(format!("{value}: {filler}")) };
        let some = |random: &mut Random| key(format!("/app/k{:02}", random.below(12)));
        let run = |count: usize| (0..count).map(|at| key(format!("/app/run/{at:03}")));
        match random.below(20) {
            0..9 => vec![put(some(random))],
            9..12 => (0..random.between(2, 5)).map(|at| put(key(format!("/app/k{at:02}")))).collect(),
            12..14 => vec![Change::Delete { key: some(random) }],
            14 => vec![
                put(key("/app/a".to_owned())),
                Change::Delete { key: some(random) },
                put(key("/other/b".to_owned())),
            ],
            15 => vec![put(key(format!("/other/{}", random.below(3))))],
            16 => vec![put(key(format!("/app/x/{}", random.below(3)))), put(key("/app/z".to_owned()))],
            17 => run(random.between(30, 90)).map(put).collect(),
            18 => run(66).map(|key| Change::Delete { key }).collect(),
            _ => {
                let count = random.between(60, 90);
                run(count).map(|key| Change::Delete { key }).collect()
            }
        }
    }

    fn ship(&mut self, at: usize) {
        let origin = &mut self.origins[at];
        if let Some(session) = &origin.session {
            let stream = self.replicas[session.replica].stream.as_ref();
            if stream.is_none_or(|stream| stream.number != session.number) && session.line.receipts.is_empty() {
                origin.session = None;
                return;
            }
            return origin.ship(&mut self.origin, &mut self.context);
        }
        if origin.stopped.is_none() {
            self.last_number += 1;
            let to = self.context.random.below(self.replicas.len());
            origin.connect(self.last_number, to, &mut self.replicas[to], &mut self.origin, &mut self.context);
            if self.origins.iter().filter(|origin| origin.session.is_some()).count() > 1 {
                self.context.count("two senders");
            }
        }
    }

    fn receive(&mut self, at: usize) {
        let replica = &mut self.replicas[at];
        let number = replica.stream.as_ref().map(|stream| stream.number);
        let sessions = self.origins.iter_mut().filter_map(|origin| origin.session.as_mut());
        if let Some(session) = sessions.into_iter().find(|s| Some(s.number) == number && s.replica == at) {
            replica.receive(&mut session.line, &mut self.context);
        }
    }

    fn tell(&mut self, at: usize) {
        let replica = &mut self.replicas[at];
        let number = replica.stream.as_ref().map(|stream| stream.number);
        let sessions = self.origins.iter_mut().filter_map(|origin| origin.session.as_mut());
        if let Some(session) = sessions.into_iter().find(|s| Some(s.number) == number && s.replica == at) {
            replica.tell(&mut session.line, &mut self.context);
        }
    }

    fn check_bounds(&mut self) {
        let spools = self.origins.iter().map(|origin| ("spool", origin.tail.spool.bytes(), SPOOL_BYTES_MAX));
        let journals = self.replicas.iter().map(|replica| ("journal", replica.journal.bytes(), 24 << 10));
        let beyond = spools.chain(journals).find(|(_, bytes, max)| *bytes > max + BATCH_BYTES_MAX);
        if let Some((what, bytes, max)) = beyond {
            self.context.fail(Fault::new("bounded", format!("a {what} of {bytes} B, where {max} are allowed")));
        }
        if let Some(replica) = self.replicas.iter().find(|r| r.waiting_bytes() > 2 * WAITING_BYTES_MAX + (64 << 10)) {
            let bytes = replica.waiting_bytes();
            self.context.fail(Fault::new("bounded", format!("{bytes} B wait to be applied")));
        }
    }

    /// A link stops only for what happened in this run.
    fn check_stops(&mut self) {
        for at in 0..self.origins.len() {
            let Some(reason) = &self.origins[at].stopped else { continue };
            let is = |words: &[&str]| words.iter().any(|word| reason.contains(word));
            let deletes = is(&["would delete"]);
            let history = is(&["restored", "history", "head", "replaced"]);
            let justified = if deletes {
                self.has_surplus()
            } else {
                history && (self.origin_changed || (self.replica_restored && is(&["waymark"])))
            };
            if !justified {
                let what = format!("the link stopped without a cause in this run: {reason}");
                return self.context.fail(Fault::new("complete", what));
            }
        }
    }

    /// The replica holds keys that the origin has not, or had not until somebody wrote.
    fn has_surplus(&self) -> bool {
        let pieces = self.ranges.iter().flat_map(Ranges::pieces);
        let mut surplus = 0;
        for piece in pieces {
            let page = self.context.replica.page(piece, 0, None).expect("the head");
            surplus += page.kvs.iter().filter(|(key, _)| self.origin.get(key).is_none()).count();
        }
        surplus > 0 || self.context.counts.contains_key("operator's resync") || self.origin.revision > 1
    }
}

fn step_disk<T: etcd_ferry::segment::feed::FeedEntry>(disk: &mut Disk<T>, context: &mut Context) {
    if context.random.percent(55) { disk.write(&mut context.random) } else { disk.sync() }
}
