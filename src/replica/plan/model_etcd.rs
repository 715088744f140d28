//! Job: an etcd for the planner's tests: its rules on transactions, over a map.
//! Input: a `TxnTree`, put on the wire as the applier would. Output: committed or not, or etcd's refusal.
//! Pure: no clock, no I/O.
//! Always true: it reads only the encoded request, with etcd's own tags (api/etcdserverpb/rpc.proto, raft_internal.proto), so that sizes
//! and nesting are judged on what etcd would see.

use super::{Change, Condition, Node, Op, Request, RequestLimits, Revision, TxnTree};
use bytes::Bytes;
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, PartialEq, Message)]
pub struct InternalRaftRequest {
    #[prost(message, optional, tag = "100")]
    pub header: Option<RequestHeader>,
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(message, optional, tag = "4")]
    pub put: Option<PutRequest>,
    #[prost(message, optional, tag = "6")]
    pub txn: Option<TxnRequest>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RequestHeader {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(string, tag = "2")]
    pub username: String,
    #[prost(uint64, tag = "3")]
    pub auth_revision: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    pub compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    pub success: Vec<RequestOp>,
    #[prost(message, repeated, tag = "3")]
    pub failure: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Compare {
    #[prost(int32, tag = "1")]
    pub result: i32,
    #[prost(int32, tag = "2")]
    pub target: i32,
    #[prost(bytes = "bytes", tag = "3")]
    pub key: Bytes,
    #[prost(int64, optional, tag = "6")]
    pub mod_revision: Option<i64>,
    #[prost(bytes = "bytes", tag = "64")]
    pub range_end: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub struct RequestOp {
    #[prost(oneof = "OpKind", tags = "1, 2, 3, 4")]
    pub request: Option<OpKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum OpKind {
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    #[prost(message, tag = "2")]
    Put(PutRequest),
    #[prost(message, tag = "3")]
    DeleteRange(DeleteRangeRequest),
    #[prost(message, tag = "4")]
    Txn(TxnRequest),
}

#[derive(Clone, PartialEq, Message)]
pub struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub struct DeleteRangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub range_end: Bytes,
}

const EQUAL: i32 = 0;
const LESS: i32 = 2;
const MOD: i32 = 2;

/// As etcd would answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    TooManyOps,
    DuplicateKey,
    EmptyKey,
    TooLarge { bytes: usize },
}

pub struct ModelEtcd {
    limits: RequestLimits,
    pub revision: i64,
    keys: Keys,
    position_key: Bytes,
}

impl ModelEtcd {
    pub fn new(limits: &RequestLimits, content: BTreeMap<Bytes, Bytes>) -> Self {
        let keys = content.into_iter().map(|(key, value)| (key, (value, 1))).collect();
        // 0xff sorts after every key of the tests, and so outside of every run.
        let position_key = Bytes::from(vec![0xff; limits.position_key_bytes]);
        Self { limits: *limits, revision: 1, keys, position_key }
    }

    /// All keys but the position.
    pub fn content(&self) -> BTreeMap<Bytes, Bytes> {
        let keys = self.keys.iter().filter(|(key, _)| **key != self.position_key);
        keys.map(|(key, (value, _))| (key.clone(), value.clone())).collect()
    }

    pub fn put(&mut self, key: Bytes, value: Bytes) {
        self.revision += 1;
        self.keys.insert(key, (value, self.revision));
    }

    /// Sends the tree as the applier would, with the right position compare; `false`: a guard failed and nothing changed.
    pub fn apply(&mut self, tree: &TxnTree) -> Result<bool, Refused> {
        let position = self.keys.get(&self.position_key).map_or(0, |(_, modified)| *modified);
        let txn = request(tree, &self.position_key, position, self.limits.position_value_bytes_max);
        check(&txn, self.limits.ops_max, self.limits.bytes_max)?;
        let written = judged(&self.keys, &txn);
        if let Some(written) = &written {
            self.revision += 1;
            write(&mut self.keys, written, self.revision);
        }
        Ok(written.is_some())
    }
}

/// Key to value and `mod_revision`.
pub type Keys = BTreeMap<Bytes, (Bytes, i64)>;

/// All that etcd refuses before it looks at a key.
pub fn check(txn: &TxnRequest, ops_max: usize, bytes_max: usize) -> Result<(), Refused> {
    check_ops(txn, ops_max)?;
    check_intervals(&txn.success)?;
    let bytes = encoded_bytes(txn.clone());
    if bytes > bytes_max { Err(Refused::TooLarge { bytes }) } else { Ok(()) }
}

/// What a transaction writes, in its order; `None`: a compare at the top failed, and nothing is written.
pub fn judged(keys: &Keys, txn: &TxnRequest) -> Option<Vec<Change>> {
    let mut written = Vec::new();
    hold_all(keys, &txn.compare).then(|| run(keys, &txn.success, &mut written))?;
    Some(written)
}

pub fn write(keys: &mut Keys, written: &[Change], revision: i64) {
    for change in written {
        match change {
            Change::Put { key, value } => keys.insert(key.clone(), (value.clone(), revision)),
            Change::Delete { key } => keys.remove(key),
        };
    }
}

fn run(keys: &Keys, ops: &[RequestOp], written: &mut Vec<Change>) {
    let delete = |key: &Bytes| Change::Delete { key: key.clone() };
    for op in ops {
        match &op.request {
            Some(OpKind::Put(put)) => written.push(Change::Put { key: put.key.clone(), value: put.value.clone() }),
            Some(OpKind::DeleteRange(one)) if one.range_end.is_empty() => {
                written.extend(keys.get(&one.key).map(|_| delete(&one.key)));
            }
            Some(OpKind::DeleteRange(range)) => {
                written.extend(keys.range(range.key.clone()..range.range_end.clone()).map(|(key, _)| delete(key)));
            }
            Some(OpKind::Txn(txn)) if hold_all(keys, &txn.compare) => run(keys, &txn.success, written),
            Some(OpKind::Txn(txn)) => run(keys, &txn.failure, written),
            Some(OpKind::Range(_)) | None => {}
        }
    }
}

/// etcd judges every compare, nested ones too, before the first write.
fn hold_all(keys: &Keys, compares: &[Compare]) -> bool {
    compares.iter().all(|compare| {
        assert_eq!(compare.target, MOD);
        let wanted = compare.mod_revision.unwrap();
        let holds = |modified: i64| match compare.result {
            EQUAL => modified == wanted,
            LESS => modified < wanted,
            other => panic!("a compare that is never sent: {other}"),
        };
        if compare.range_end.is_empty() {
            return holds(keys.get(&compare.key).map_or(0, |(_, modified)| *modified));
        }
        keys.range(compare.key.clone()..compare.range_end.clone()).all(|(_, (_, modified))| holds(*modified))
    })
}

/// The request that the applier makes of a tree, with a position of so many bytes.
pub fn request(tree: &TxnTree, position_key: &Bytes, position_mod: i64, position_value_bytes: usize) -> TxnRequest {
    let unmoved = Condition::Unmoved { key: position_key.clone(), mod_revision: Revision::from_etcd(position_mod) };
    let position = Op::Put { key: position_key.clone(), value: Bytes::from(vec![b'p'; position_value_bytes]) };
    let mut success = tree.success.clone();
    success.push(Node::Op(position));
    let conditions = std::iter::once(unmoved).chain(tree.guards.iter().cloned().map(Condition::Below)).collect();
    encode(&Request { conditions, success, or_read: position_key.clone() })
}

/// A request as etcd gets it.
pub fn encode(request: &Request) -> TxnRequest {
    let compare = |key: &Bytes, result, modified: Revision, range_end: &Bytes| Compare {
        result,
        target: MOD,
        key: key.clone(),
        mod_revision: Some(modified.to_etcd()),
        range_end: range_end.clone(),
    };
    let condition = |condition: &Condition| match condition {
        Condition::Unmoved { key, mod_revision } => compare(key, EQUAL, *mod_revision, &Bytes::new()),
        Condition::Below(guard) => compare(&guard.range.from, LESS, guard.below, &guard.range.to),
    };
    let get = RangeRequest { key: request.or_read.clone() };
    TxnRequest {
        compare: request.conditions.iter().map(condition).collect(),
        success: request.success.iter().map(request_op).collect(),
        failure: vec![RequestOp { request: Some(OpKind::Range(get)) }],
    }
}

fn request_op(node: &Node) -> RequestOp {
    let put = |key: &Bytes, value: &Bytes| OpKind::Put(PutRequest { key: key.clone(), value: value.clone() });
    let delete =
        |key: &Bytes, end: &Bytes| OpKind::DeleteRange(DeleteRangeRequest { key: key.clone(), range_end: end.clone() });
    let request = match node {
        Node::Txn(nodes) => OpKind::Txn(TxnRequest {
            compare: Vec::new(),
            success: nodes.iter().map(request_op).collect(),
            failure: Vec::new(),
        }),
        Node::Op(Op::Put { key, value }) => put(key, value),
        Node::Op(Op::Delete { key }) => delete(key, &Bytes::new()),
        Node::Op(Op::DeleteRange { range }) => delete(&range.from, &range.to),
        Node::Op(Op::Create { key, value }) => OpKind::Txn(TxnRequest {
            compare: vec![Compare {
                result: EQUAL,
                target: MOD,
                key: key.clone(),
                mod_revision: Some(0),
                range_end: Bytes::new(),
            }],
            success: vec![RequestOp { request: Some(put(key, value)) }],
            failure: Vec::new(),
        }),
    };
    RequestOp { request: Some(request) }
}

/// What etcd compares with `--max-request-bytes`, with ids and a user name as long as they get.
pub fn encoded_bytes(txn: TxnRequest) -> usize {
    InternalRaftRequest { header: Some(long_header()), id: 0, put: None, txn: Some(txn) }.encoded_len()
}

pub fn long_header() -> RequestHeader {
    RequestHeader { id: u64::MAX, username: "u".repeat(64), auth_revision: u64::MAX }
}

/// `checkTxnRequest` in etcd's server/etcdserver/api/v3rpc/key.go.
fn check_ops(txn: &TxnRequest, ops_max: usize) -> Result<(), Refused> {
    let width = txn.compare.len().max(txn.success.len()).max(txn.failure.len());
    let left = ops_max.checked_sub(width).ok_or(Refused::TooManyOps)?;
    if txn.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Refused::EmptyKey);
    }
    for op in txn.success.iter().chain(&txn.failure) {
        match &op.request {
            Some(OpKind::Txn(nested)) => check_ops(nested, left)?,
            Some(OpKind::Put(put)) if put.key.is_empty() => return Err(Refused::EmptyKey),
            Some(OpKind::DeleteRange(delete)) if delete.key.is_empty() => return Err(Refused::EmptyKey),
            Some(OpKind::Put(_) | OpKind::DeleteRange(_) | OpKind::Range(_)) | None => {}
        }
    }
    Ok(())
}

/// Keys that are put; keys that are deleted one by one; ranges that are deleted.
type Written = (BTreeSet<Bytes>, BTreeSet<Bytes>, Vec<(Bytes, Bytes)>);

/// `checkIntervals` of the same file, only stricter: etcd lets a delete pass that comes after a put in an earlier nested transaction.
fn check_intervals(ops: &[RequestOp]) -> Result<Written, Refused> {
    let (mut puts, mut deletes, mut ranges): Written = Default::default();
    let mut put = |key: &Bytes| if puts.insert(key.clone()) { Ok(()) } else { Err(Refused::DuplicateKey) };
    for op in ops {
        match &op.request {
            Some(OpKind::Txn(txn)) => {
                for branch in [&txn.success, &txn.failure] {
                    let (nested_puts, nested_deletes, nested_ranges) = check_intervals(branch)?;
                    nested_puts.iter().try_for_each(&mut put)?;
                    deletes.extend(nested_deletes);
                    ranges.extend(nested_ranges);
                }
            }
            Some(OpKind::Put(request)) => put(&request.key)?,
            Some(OpKind::DeleteRange(delete)) if delete.range_end.is_empty() => {
                deletes.insert(delete.key.clone());
            }
            Some(OpKind::DeleteRange(delete)) => ranges.push((delete.key.clone(), delete.range_end.clone())),
            Some(OpKind::Range(_)) | None => {}
        }
    }
    let in_range = |key: &Bytes| ranges.iter().any(|(from, to)| key >= from && key < to);
    let clash = puts.iter().any(|key| deletes.contains(key) || in_range(key));
    if clash { Err(Refused::DuplicateKey) } else { Ok((puts, deletes, ranges)) }
}
