//! Job: how large a transaction may be at both ends of a link, as the admin service tells it and as it is printed.
//! Input: a link's `LimitsStatus`, then the message made of it. Output: the message, its JSON, a line for a terminal.
//! Pure: no clock, no I/O, no async.
//! Always true: what is not known is 0 in the message, `null` in JSON, and named as not known in words.

use super::proto::{Limits, TxnLimits};
use crate::model::limits as model;
use serde::Serialize;

pub(super) fn message(limits: model::LimitsStatus) -> Limits {
    let model::LimitsStatus { origin, replica, verdict, advice } = limits;
    let one = |limits: model::TxnLimits| TxnLimits {
        txn_ops_max: limits.txn_ops_max.unwrap_or(0),
        request_bytes_max: limits.request_bytes_max.unwrap_or(0),
    };
    Limits { origin: Some(one(origin)), replica: Some(one(replica)), verdict: verdict.as_str().to_owned(), advice }
}

#[derive(Serialize)]
pub(super) struct LimitsJson<'a> {
    origin: OneJson,
    replica: OneJson,
    verdict: &'a str,
    advice: &'a str,
}

/// `null`: not known.
#[derive(Serialize)]
struct OneJson {
    txn_ops_max: Option<u64>,
    request_bytes_max: Option<u64>,
}

impl<'a> LimitsJson<'a> {
    pub fn of(limits: &'a Limits) -> Self {
        let known = |limit: u64| Some(limit).filter(|limit| *limit > 0);
        let one = |limits: &Option<TxnLimits>| {
            let TxnLimits { txn_ops_max, request_bytes_max } = limits.unwrap_or_default();
            OneJson { txn_ops_max: known(txn_ops_max), request_bytes_max: known(request_bytes_max) }
        };
        Self {
            origin: one(&limits.origin),
            replica: one(&limits.replica),
            verdict: &limits.verdict,
            advice: &limits.advice,
        }
    }
}

/// Empty as long as it is not known of both ends.
pub(super) fn line(limits: &Limits) -> String {
    if !limits.advice.is_empty() {
        return limits.advice.clone();
    }
    if limits.verdict.is_empty() {
        return String::new();
    }
    let (origin, replica) = (limits.origin.unwrap_or_default(), limits.replica.unwrap_or_default());
    format!(
        "a transaction may have {} bytes and {} operations at the origin, {} and {} at the replica",
        origin.request_bytes_max, origin.txn_ops_max, replica.request_bytes_max, replica.txn_ops_max
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(origin: (u64, u64), etcd: (u64, u64)) -> Limits {
        let known = |limit| Some(limit).filter(|limit| *limit > 0);
        let limits = |(ops, bytes)| model::TxnLimits { txn_ops_max: known(ops), request_bytes_max: known(bytes) };
        let replica = model::ReplicaLimits { etcd: limits(etcd), sidecar: model::TxnLimits::default() };
        message(model::LimitsStatus::of(limits(origin), &replica).unwrap())
    }

    #[test]
    fn limits_are_told_in_figures_where_they_are_fine_and_with_advice_where_they_are_not() {
        let fine = told((128, 1_572_864), (256, 1_576_960));
        assert_eq!(
            line(&fine),
            "a transaction may have 1572864 bytes and 128 operations at the origin, 1576960 and 256 at the replica"
        );
        assert_eq!(
            serde_json::to_string(&LimitsJson::of(&fine)).unwrap(),
            "{\"origin\":{\"txn_ops_max\":128,\"request_bytes_max\":1572864},\"replica\":{\"txn_ops_max\":256,\"request_bytes_max\":1576960},\
             \"verdict\":\"fine\",\"advice\":\"\"}"
        );
        let short = told((128, 1_572_864), (128, 65_536));
        assert_eq!((&short.verdict[..], line(&short)), ("short", short.advice.clone()));
        assert!(short.advice.contains("raise"));
    }

    #[test]
    fn what_is_not_known_is_null_and_no_line() {
        let half = told((128, 1_572_864), (0, 0));
        assert_eq!(line(&half), "");
        let json = serde_json::to_string(&LimitsJson::of(&half)).unwrap();
        assert!(
            json.contains("\"replica\":{\"txn_ops_max\":null,\"request_bytes_max\":null},\"verdict\":\"\""),
            "{json}"
        );
    }
}
