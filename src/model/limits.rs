//! Job: whether the replica takes what the origin does: how large a transaction may be at both ends, compared, and what to raise.
//! Input: both ends' limits, as they were measured or configured. Output: a `LimitsStatus`.
//! Pure: no clock, no I/O, no async.
//! Always true: what is not known is never said to be enough; a limit that is to be raised is named with its side and its value.

use serde::Serialize;

/// What the replica's request holds beside the origin's largest one: the position's compare, put and get
/// (docs/operating.md#the-replicas-request-size).
pub const POSITION_REQUEST_BYTES: u64 = 4096;
/// A request of etcd's default size has no bytes for more changes than this, the shortest deletes among them.
const CHANGES_ENOUGH: u64 = 100_000;
/// As deep as the replica nests transactions.
const LEVELS_MAX: u64 = 8;

/// How large a transaction may be; `None`: not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TxnLimits {
    /// etcd's `--max-txn-ops`.
    pub txn_ops_max: Option<u64>,
    /// etcd's `--max-request-bytes`.
    pub request_bytes_max: Option<u64>,
}

impl TxnLimits {
    /// Both of them.
    pub fn is_known(self) -> bool {
        self.txn_ops_max.is_some() && self.request_bytes_max.is_some()
    }

    /// What both take.
    pub fn lesser(self, other: Self) -> Self {
        self.merged(other, u64::min)
    }

    /// What either takes.
    pub fn greater(self, other: Self) -> Self {
        self.merged(other, u64::max)
    }

    /// What one of both does not know is left to the other.
    fn merged(self, other: Self, choose: fn(u64, u64) -> u64) -> Self {
        let merge = |one: Option<u64>, other: Option<u64>| match (one, other) {
            (Some(one), Some(other)) => Some(choose(one, other)),
            (one, other) => one.or(other),
        };
        Self {
            txn_ops_max: merge(self.txn_ops_max, other.txn_ops_max),
            request_bytes_max: merge(self.request_bytes_max, other.request_bytes_max),
        }
    }
}

/// Where a replica's limit may have to be raised: at its etcd, and in `[limits]` of its sidecar.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReplicaLimits {
    /// The least that a member of its cluster takes.
    pub etcd: TxnLimits,
    pub sidecar: TxnLimits,
}

impl ReplicaLimits {
    /// What the replica takes. What only its sidecar is configured with says nothing of its etcd.
    pub fn taken(&self) -> TxnLimits {
        let known = |etcd: Option<u64>, sidecar: Option<u64>| etcd.map(|etcd| etcd.min(sidecar.unwrap_or(etcd)));
        TxnLimits {
            txn_ops_max: known(self.etcd.txn_ops_max, self.sidecar.txn_ops_max),
            request_bytes_max: known(self.etcd.request_bytes_max, self.sidecar.request_bytes_max),
        }
    }
}

/// What the comparison of both ends comes to, the better before the worse.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitsVerdict {
    Fine,
    #[default]
    #[serde(rename = "")]
    Unknown,
    /// The replica takes as much as the origin, and not what travels with it.
    Tight,
    Short,
}

impl LimitsVerdict {
    /// Empty while it is not known.
    pub fn as_str(self) -> &'static str {
        match self {
            LimitsVerdict::Fine => "fine",
            LimitsVerdict::Unknown => "",
            LimitsVerdict::Tight => "tight",
            LimitsVerdict::Short => "short",
        }
    }
}

/// How large a transaction may be at both ends of a link, and what to do about it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LimitsStatus {
    pub origin: TxnLimits,
    /// The lesser of its etcd's and its sidecar's.
    pub replica: TxnLimits,
    pub verdict: LimitsVerdict,
    /// What cannot be carried, and what to raise; empty where nothing is to be said.
    pub advice: String,
}

impl LimitsStatus {
    /// `origin`: the most that a member of its cluster takes. `None` while nothing is known of either end.
    pub fn of(origin: TxnLimits, replica: &ReplicaLimits) -> Option<Self> {
        let taken = replica.taken();
        if origin == TxnLimits::default() && taken == TxnLimits::default() {
            return None;
        }
        let (bytes, ops) = (judge_bytes(origin, replica), judge_ops(origin, replica));
        let advice = [bytes.1, ops.1].into_iter().filter(|said| !said.is_empty()).collect::<Vec<_>>().join("; ");
        Some(Self { origin, replica: taken, verdict: bytes.0.max(ops.0), advice })
    }
}

fn judge_bytes(origin: TxnLimits, replica: &ReplicaLimits) -> (LimitsVerdict, String) {
    let (Some(wanted), Some(taken)) = (origin.request_bytes_max, replica.taken().request_bytes_max) else {
        return (LimitsVerdict::Unknown, String::new());
    };
    let needed = wanted.saturating_add(POSITION_REQUEST_BYTES);
    if taken >= needed {
        return (LimitsVerdict::Fine, String::new());
    }
    let verdict = if taken >= wanted { LimitsVerdict::Tight } else { LimitsVerdict::Short };
    let fits = taken.saturating_sub(POSITION_REQUEST_BYTES);
    let raise = raise(
        ("--max-request-bytes", replica.etcd.request_bytes_max),
        ("request_bytes_max", replica.sidecar.request_bytes_max),
        needed,
    );
    let said = format!(
        "the replica takes requests of {taken} bytes, the origin of {wanted}: a value of more than about {fits} bytes cannot be carried; {raise}"
    );
    (verdict, said)
}

fn judge_ops(origin: TxnLimits, replica: &ReplicaLimits) -> (LimitsVerdict, String) {
    let (Some(wanted), Some(taken)) = (origin.txn_ops_max, replica.taken().txn_ops_max) else {
        return (LimitsVerdict::Unknown, String::new());
    };
    let changes = changes_max(taken);
    if taken >= wanted || changes >= CHANGES_ENOUGH {
        return (LimitsVerdict::Fine, String::new());
    }
    let raise =
        raise(("--max-txn-ops", replica.etcd.txn_ops_max), ("txn_ops_max", replica.sidecar.txn_ops_max), wanted);
    let said = format!(
        "the replica takes transactions of {taken} operations, the origin of {wanted}: a revision of more than {changes} changes is applied in \
         parts; {raise}"
    );
    (LimitsVerdict::Short, said)
}

/// Which of both is below what is needed, etcd's flag before the sidecar's key.
fn raise(flag: (&str, Option<u64>), key: (&str, Option<u64>), needed: u64) -> String {
    let low = |limit: Option<u64>| limit.is_some_and(|limit| limit < needed);
    let flag = low(flag.1).then(|| format!("{} of the replica's etcd", flag.0));
    let key = low(key.1).then(|| format!("{} in [limits] of the replica's sidecar", key.0));
    let both: Vec<String> = flag.into_iter().chain(key).collect();
    format!("raise {} to at least {needed}", both.join(", and "))
}

/// The most changes that the replica can nest into one transaction of so many operations: the sum of the levels' widths is bounded, so that
/// even ones have the largest product. One place at the top is the position's.
pub fn changes_max(ops_max: u64) -> u64 {
    let budget = ops_max.saturating_sub(1);
    let changes = |levels: u64| {
        (0..levels)
            .map(|level| (budget + levels - 1 - level) / levels)
            .fold(1_u64, |all, width| all.saturating_mul(width))
    };
    (1..=LEVELS_MAX).map(changes).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT_BYTES: u64 = 1_572_864;

    fn limits(ops: u64, bytes: u64) -> TxnLimits {
        TxnLimits { txn_ops_max: Some(ops), request_bytes_max: Some(bytes) }
    }

    fn judged(origin: TxnLimits, etcd: TxnLimits, sidecar: TxnLimits) -> LimitsStatus {
        LimitsStatus::of(origin, &ReplicaLimits { etcd, sidecar }).unwrap()
    }

    #[test]
    fn a_replica_that_takes_the_origins_largest_request_with_the_position_is_fine() {
        let (origin, room) = (limits(128, DEFAULT_BYTES), limits(128, DEFAULT_BYTES + POSITION_REQUEST_BYTES));
        let fine = judged(origin, room, room);
        assert_eq!((fine.verdict, &fine.advice[..]), (LimitsVerdict::Fine, ""));
        assert_eq!((fine.origin, fine.replica), (origin, room));
        let larger = judged(origin, limits(1_000, 64 << 20), limits(1_000, 64 << 20));
        assert_eq!(larger.verdict, LimitsVerdict::Fine);
    }

    #[test]
    fn equal_limits_are_tight_down_to_the_last_byte_and_the_advice_names_both_places() {
        let defaults = limits(128, DEFAULT_BYTES);
        let tight = judged(defaults, defaults, defaults);
        assert_eq!(tight.verdict, LimitsVerdict::Tight);
        assert_eq!(
            tight.advice,
            "the replica takes requests of 1572864 bytes, the origin of 1572864: a value of more than about 1568768 bytes cannot be carried; \
             raise --max-request-bytes of the replica's etcd, and request_bytes_max in [limits] of the replica's sidecar to at least 1576960"
        );
        let last = limits(128, DEFAULT_BYTES + POSITION_REQUEST_BYTES - 1);
        assert_eq!(judged(defaults, last, last).verdict, LimitsVerdict::Tight);
        let less = limits(128, DEFAULT_BYTES - 1);
        assert_eq!(judged(defaults, less, less).verdict, LimitsVerdict::Short);
    }

    #[test]
    fn only_what_is_too_low_is_to_be_raised() {
        let (origin, room) = (limits(128, 1 << 20), limits(128, 2 << 20));
        let by_etcd = judged(origin, limits(128, 1 << 19), room);
        assert_eq!(by_etcd.verdict, LimitsVerdict::Short);
        assert!(
            by_etcd.advice.ends_with("; raise --max-request-bytes of the replica's etcd to at least 1052672"),
            "{}",
            by_etcd.advice
        );
        let by_sidecar = judged(origin, room, limits(128, 1 << 19));
        assert!(
            by_sidecar
                .advice
                .ends_with("; raise request_bytes_max in [limits] of the replica's sidecar to at least 1052672"),
            "{}",
            by_sidecar.advice
        );
        assert_eq!(by_sidecar.replica.request_bytes_max, Some(1 << 19), "the lesser counts");
    }

    #[test]
    fn fewer_operations_are_told_only_where_nesting_does_not_make_up_for_them() {
        let (origin, room) = (limits(128, 1 << 20), 2 << 20);
        let short = judged(origin, limits(16, room), limits(128, room));
        assert_eq!(short.verdict, LimitsVerdict::Short);
        assert_eq!(
            short.advice,
            "the replica takes transactions of 16 operations, the origin of 128: a revision of more than 243 changes is applied in parts; \
             raise --max-txn-ops of the replica's etcd to at least 128"
        );
        let by_sidecar = judged(origin, limits(128, room), limits(16, room));
        assert!(
            by_sidecar.advice.contains("raise txn_ops_max in [limits] of the replica's sidecar"),
            "{}",
            by_sidecar.advice
        );
        assert_eq!(judged(origin, limits(64, room), limits(64, room)).verdict, LimitsVerdict::Fine);
        assert_eq!(judged(limits(16, 1 << 20), limits(16, room), limits(16, room)).verdict, LimitsVerdict::Fine);
        let both = judged(origin, limits(16, 1 << 19), limits(16, 1 << 19));
        assert_eq!(both.advice.matches("raise").count(), 2, "{}", both.advice);
    }

    #[test]
    fn what_is_not_known_is_neither_fine_nor_short() {
        let (known, unknown) = (limits(128, 2 << 20), TxnLimits::default());
        assert_eq!(LimitsStatus::of(unknown, &ReplicaLimits { etcd: unknown, sidecar: known }), None);
        for (origin, etcd) in [(known, unknown), (unknown, known)] {
            let half = judged(origin, etcd, known);
            assert_eq!((half.verdict, &half.advice[..]), (LimitsVerdict::Unknown, ""));
        }
        // Of one of the two all is known, and it is bad.
        let no_bytes = TxnLimits { txn_ops_max: Some(16), request_bytes_max: None };
        assert_eq!(judged(known, no_bytes, known).verdict, LimitsVerdict::Short);
        let enough = TxnLimits { txn_ops_max: Some(128), request_bytes_max: None };
        assert_eq!(judged(known, enough, known).verdict, LimitsVerdict::Unknown);
    }

    #[test]
    fn of_members_that_take_different_sizes_the_least_and_the_most_are_known() {
        let (one, other) = (limits(64, 9), limits(128, 5));
        assert_eq!(one.lesser(other), limits(64, 5));
        assert_eq!(one.greater(other), limits(128, 9));
        assert_eq!(one.lesser(TxnLimits::default()), one);
        assert_eq!(TxnLimits::default().greater(one), one);
    }
}
