//! Job: for tests: Kubernetes-like objects of about 1 KiB, updated as controllers and kubelets do; and what the wire makes of them.
//! Input: a seed. Output: revisions, and how much of each value really changed.
//! Pure: no clock, no I/O.
//! Always true: the same seed gives the same objects; what tells objects apart (uids, hashes, addresses) is random, as in a real cluster.

use crate::model::{Change, Revision, WholeRevision};
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const ZIPF_EXPONENT: f64 = 0.9;

/// A cluster whose objects are written one at a time.
pub struct Cluster {
    random: StdRng,
    objects: Vec<Object>,
    /// The share of the updates that goes to this object or one before it.
    shares: Vec<f64>,
    revision: u64,
    clock_ms: u64,
    /// Bytes of all updated values, and those of them that the update changed.
    pub updated_bytes: usize,
    pub changed_bytes: usize,
}

struct Object {
    key: Bytes,
    /// The value in pieces, in turns: what never changes, then what each update changes.
    fixed: Vec<String>,
    changing: Vec<String>,
    generation: u64,
    counter: u64,
    bytes_served: u64,
}

impl Cluster {
    pub fn new(seed: u64, objects: usize) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let weights: Vec<f64> = (1..=objects).map(|rank| f64::powf(rank as f64, -ZIPF_EXPONENT)).collect();
        let total: f64 = weights.iter().sum();
        let mut share = 0.0;
        let shares = weights.iter().map(|weight| {
            share += weight / total;
            share
        });
        let shares = shares.collect();
        let objects = (0..objects).map(|_| Object::new(&mut random)).collect();
        Self { random, objects, shares, revision: 48_211_904, clock_ms: 0, updated_bytes: 0, changed_bytes: 0 }
    }

    /// One revision for each object, which puts it as it is first.
    pub fn create_all(&mut self) -> Vec<WholeRevision> {
        (0..self.objects.len()).map(|object| self.write(object)).collect()
    }

    /// An update of one object; few of them get most of the updates.
    pub fn update(&mut self) -> WholeRevision {
        let share: f64 = self.random.random();
        let object = self.shares.partition_point(|s| *s < share).min(self.objects.len() - 1);
        let before = self.objects[object].changing.clone();
        let revision = self.write(object);
        let pairs = before.iter().zip(&self.objects[object].changing);
        self.changed_bytes += pairs.map(|(old, new)| bytes_changed(old, new)).sum::<usize>();
        self.updated_bytes += revision.bytes() - self.objects[object].key.len();
        revision
    }

    fn write(&mut self, object: usize) -> WholeRevision {
        // Other controllers write keys outside of the link's ranges meanwhile.
        self.revision += self.random.random_range(1..20);
        self.clock_ms += self.random.random_range(0..4_000);
        let object = &mut self.objects[object];
        object.change(self.revision, self.clock_ms, &mut self.random);
        let change = Change::Put { key: object.key.clone(), value: object.value() };
        WholeRevision { revision: Revision(self.revision), changes: vec![change] }
    }
}

/// Bytes that are not what they were at the same place, counted from the right, where numbers of other lengths agree.
fn bytes_changed(old: &str, new: &str) -> usize {
    let differ = old.bytes().rev().zip(new.bytes().rev()).filter(|(a, b)| a != b).count();
    differ + old.len().abs_diff(new.len())
}

const KINDS: [(&str, &str, [&str; 3]); 3] = [
    ("pods", "Pod", ["Initialized", "ContainersReady", "PodScheduled"]),
    ("nodes", "Node", ["MemoryPressure", "DiskPressure", "NetworkUnavailable"]),
    ("rollouts", "Rollout", ["Available", "Progressing", "Healthy"]),
];
const TEAMS: [&str; 6] = ["payments", "search", "checkout", "ledger-core", "identity", "observability"];

impl Object {
    fn new(random: &mut StdRng) -> Self {
        let (path, kind, conditions) = KINDS[random.random_range(0..KINDS.len())];
        let team = TEAMS[random.random_range(0..TEAMS.len())];
        let name = format!("{team}-{}-{}", letters(random, 10), letters(random, 5));
        let uid = format!("{}-{}-4{}-{}", hex(random, 8), hex(random, 4), hex(random, 3), hex(random, 12));
        let (image, address, node) = (hex(random, 64), random.random::<[u8; 3]>(), letters(random, 6));
        let created = timestamp(random.random_range(0..80_000_000), false);
        let ip = format!("10.{}.{}.{}", address[0], address[1], address[2]);
        let condition = |name| format!(r#""}},{{"type":"{name}","status":"True","lastHeartbeatTime":""#);
        let fixed = vec![
            format!(
                r#"{{"apiVersion":"v1","kind":"{kind}","metadata":{{"name":"{name}","namespace":"{team}","uid":"{uid}","resourceVersion":""#
            ),
            r#"","generation":"#.to_owned(),
            format!(
                r#","creationTimestamp":"{created}","labels":{{"app":"{team}","hash":"{}"}},"managedFields":[{{"manager":"kubelet","time":""#,
                letters(random, 10)
            ),
            format!(
                r#""}}]}},"spec":{{"nodeName":"ip-{node}","containers":[{{"name":"{team}","image":"registry.example.com/{team}@sha256:{image}"}}]}},"status":{{"podIP":"{ip}","observedGeneration":"#
            ),
            r#","requestsServed":"#.to_owned(),
            r#","bytesServed":"#.to_owned(),
            r#","renewTime":""#.to_owned(),
            r#"","conditions":[{"type":"Ready","status":"True","lastHeartbeatTime":""#.to_owned(),
            condition(conditions[0]),
            condition(conditions[1]),
            condition(conditions[2]),
            format!(r#""}}],"configHash":"{}"}}}}"#, letters(random, 10)),
        ];
        let key = Bytes::from(format!("/registry/{path}/{team}/{name}"));
        let counter = random.random_range(0..5_000_000);
        Self {
            key,
            fixed,
            changing: Vec::new(),
            generation: random.random_range(1..150),
            counter,
            bytes_served: counter * 9_000,
        }
    }

    /// A controller writes the object: another version and generation, a counter that went on, and the time of day in several places.
    fn change(&mut self, resource_version: u64, now_ms: u64, random: &mut StdRng) {
        self.generation += 1;
        let requests = random.random_range(1..50_000);
        self.counter += requests;
        self.bytes_served += requests * random.random_range(200..20_000);
        let now = timestamp(now_ms / 1_000, false);
        let renewed = timestamp(now_ms / 1_000, true) + &format!("{:06}Z", random.random_range(0..1_000_000));
        let generation = self.generation.to_string();
        self.changing = vec![
            resource_version.to_string(),
            generation.clone(),
            now.clone(),
            generation,
            self.counter.to_string(),
            self.bytes_served.to_string(),
            renewed,
            now.clone(),
            now.clone(),
            now.clone(),
            now,
        ];
    }

    fn value(&self) -> Bytes {
        let mut value = String::with_capacity(1_200);
        for (at, fixed) in self.fixed.iter().enumerate() {
            value.push_str(fixed);
            value.push_str(self.changing.get(at).map_or("", String::as_str));
        }
        Bytes::from(value)
    }
}

/// Seconds since some first of March, as a timestamp; `micros`: up to the point before the microseconds.
fn timestamp(seconds: u64, micros: bool) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    let end = if micros { '.' } else { 'Z' };
    let (month, day) = (3 + days / 30 % 10, 1 + days % 30);
    format!("2026-{month:02}-{day:02}T{:02}:{:02}:{:02}{end}", hours % 24, minutes % 60, seconds % 60)
}

fn hex(random: &mut StdRng, len: usize) -> String {
    (0..len).map(|_| char::from(b"0123456789abcdef"[random.random_range(0..16)])).collect()
}

/// As Kubernetes makes the ends of names.
fn letters(random: &mut StdRng, len: usize) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    (0..len).map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Digest, Epoch, Seq, Term};
    use crate::wire::digest;
    use crate::wire::frame::FrameLimits;
    use crate::wire::window::{Decoder, Encoder, WindowLimits};

    const OBJECTS: usize = 10_000;
    const UPDATES: usize = 20_000;

    /// The two ends of one stream, and how far it has come.
    struct Stream {
        encoder: Encoder,
        decoder: Decoder,
        seq: u64,
    }

    impl Stream {
        fn new() -> Self {
            let limits = WindowLimits { window_bytes_max: 16 << 20, frame: FrameLimits::new(4 << 20) };
            Self { encoder: Encoder::new(limits, 1), decoder: Decoder::new(limits), seq: 1 }
        }

        /// Ships all revisions and says how many bytes of keys and values there were for each byte sent, headers and all.
        fn ship(&mut self, revisions: &[WholeRevision], revisions_per_frame: usize) -> f64 {
            let (mut plain_bytes, mut frame_bytes) = (0, 0);
            for revisions in revisions.chunks(revisions_per_frame) {
                let digests: Vec<Digest> = revisions.iter().map(digest::of_revision).collect();
                let frame = self.encoder.encode(Epoch(3), Term(0), Seq(self.seq), revisions, &digests);
                let decoded = self.decoder.decode(&frame).unwrap();
                assert_eq!(decoded.revisions, revisions);
                self.seq += revisions.len() as u64;
                plain_bytes += decoded.plain_bytes;
                frame_bytes += frame.len();
            }
            plain_bytes as f64 / frame_bytes as f64
        }
    }

    /// The objects are made over the same stream first and not counted: a link meets each key for the first time only once.
    #[test]
    fn updates_take_less_than_an_eighth_of_their_bytes_alone_and_than_a_twelfth_64_a_frame() {
        let mut cluster = Cluster::new(7, OBJECTS);
        let created = cluster.create_all();
        let updates: Vec<WholeRevision> = (0..UPDATES).map(|_| cluster.update()).collect();
        let changed_share = cluster.changed_bytes as f64 / cluster.updated_bytes as f64;
        let value_bytes = cluster.updated_bytes / UPDATES;
        assert!((1_000..1_100).contains(&value_bytes), "values of {value_bytes} bytes");
        assert!(changed_share >= 0.04, "the updates change only {changed_share:.3} of the bytes");
        for (revisions_per_frame, ratio_min) in [(1, 8.0), (64, 12.0)] {
            let mut stream = Stream::new();
            stream.ship(&created, 64);
            let ratio = stream.ship(&updates, revisions_per_frame);
            println!(
                "{revisions_per_frame} revisions a frame: ratio {ratio:.2}, {changed_share:.4} of the bytes changed"
            );
            assert!(ratio >= ratio_min, "{revisions_per_frame} revisions a frame: ratio {ratio:.2}");
        }
    }
}
