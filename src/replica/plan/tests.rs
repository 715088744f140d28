//! Job: tests of the planner as a whole, against the modelled etcd.
//! Input: revisions. Output: the modelled etcd's content, compared with the revisions applied to a map one by one.
//! Pure: no clock, no I/O.
//! Always true: no transaction that was planned is refused.

use super::model_etcd::{
    InternalRaftRequest, ModelEtcd, PutRequest, Refused, TxnRequest, encoded_bytes, long_header, request,
};
use super::*;
use crate::model::FERRY_PREFIX;
use proptest::prelude::*;
use prost::Message;

pub(super) const NOTHING: Begun = Begun { part: 0, digest: None };

pub(super) fn etcd_defaults() -> RequestLimits {
    RequestLimits {
        ops_max: 128,
        bytes_max: 1_572_864,
        bytes_refused: None,
        position_key_bytes: 36,
        position_value_bytes_max: 700,
    }
}

pub(super) fn everything() -> Ranges {
    Ranges::new(&[], &[])
}

pub(super) fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Change {
    Change::Put { key: key.into(), value: value.into() }
}

fn delete(key: impl Into<Bytes>) -> Change {
    Change::Delete { key: key.into() }
}

pub(super) fn waiting(revisions: Vec<Vec<Change>>) -> Vec<Waiting> {
    let numbered = (1..).zip(revisions);
    let whole = |n: u64, changes| Arc::new(WholeRevision { revision: Revision(100 + n), changes });
    numbered.map(|(n, changes)| Waiting { seq: Seq(n), revision: whole(n, changes) }).collect()
}

fn deletes(prefix: &str, keys: usize) -> Vec<Change> {
    (0..keys).map(|i| delete(format!("{prefix}{i:06}"))).collect()
}

fn content(prefix: &str, keys: usize) -> BTreeMap<Bytes, Bytes> {
    (0..keys).map(|i| (Bytes::from(format!("{prefix}{i:06}")), Bytes::from_static(b"old"))).collect()
}

/// What the applier does with one plan: ask about the runs, settle, send.
fn apply(plan: Plan, model: &mut ModelEtcd, limits: &RequestLimits) -> Settled {
    let facts = read_facts(&plan, model);
    let settled = plan.settle(&facts, limits).unwrap();
    assert_eq!(model.apply(&settled.tree), Ok(true));
    settled
}

#[test]
fn what_is_deleted_beside_a_position_is_nested_where_etcd_takes_few_operations() {
    for ops_max in [16, 128] {
        let limits = RequestLimits { ops_max, ..etcd_defaults() };
        let content = content("/q/", 32);
        let mut model = ModelEtcd::new(&limits, content.clone());
        let tree = super::deletes(content.keys().cloned(), &limits).unwrap();
        assert_eq!(model.apply(&tree), Ok(true), "at most {ops_max}");
        assert!(model.content().is_empty());
    }
}

#[test]
fn what_waits_is_never_merged_across_a_mark() {
    for (count, mark) in (1..8_u64).flat_map(|count| (0..=count).map(move |mark| (count, mark))) {
        let all = waiting((0..count).map(|n| vec![put(format!("k{}", n % 3), format!("{n}"))]).collect());
        let planned = plan(up_to(all.iter(), Some(Seq(mark))), NOTHING, &everything(), &etcd_defaults()).unwrap();
        assert_eq!(planned.map_or(Seq(0), |plan| plan.seq), Seq(mark), "a mark after {mark} of {count}");
        let beyond = plan(all.iter(), NOTHING, &everything(), &etcd_defaults()).unwrap().unwrap();
        assert_eq!(beyond.seq, Seq(count), "all of them fit in one");
    }
}

fn read_facts(plan: &Plan, model: &ModelEtcd) -> Vec<RunFacts> {
    let read = |run: &DeleteRun| {
        let present: Vec<Bytes> = model.content().into_keys().filter(|key| run.range.contains(key)).collect();
        plan.run_facts(run, Revision::from_etcd(model.revision), &present)
    };
    plan.runs.iter().map(read).collect()
}

fn begun_with(waiting: &Waiting, part: u64) -> Begun {
    Begun { part, digest: Some(digest::of_revision(&waiting.revision)) }
}

/// Everything that waits, transaction by transaction; returns them.
fn apply_all(
    waiting: &[Waiting],
    model: &mut ModelEtcd,
    ranges: &Ranges,
    limits: &RequestLimits,
) -> Result<Vec<Settled>, PlanError> {
    let (mut done, mut begun, mut sent) = (0, NOTHING, Vec::new());
    while let Some(planned) = plan(&waiting[done..], begun, ranges, limits)? {
        let settled = apply(planned, model, limits);
        match settled.extent {
            Extent::Part { to, of, .. } if to < of => begun = begun_with(&waiting[done], to),
            Extent::Part { .. } | Extent::Whole => {
                done += settled.revisions;
                begun = NOTHING;
            }
        }
        sent.push(settled);
    }
    Ok(sent)
}

fn one_by_one(waiting: &[Waiting], mut map: BTreeMap<Bytes, Bytes>) -> BTreeMap<Bytes, Bytes> {
    for change in waiting.iter().flat_map(|w| &w.revision.changes) {
        match change {
            Change::Put { key, value } => drop(map.insert(key.clone(), value.clone())),
            Change::Delete { key } => drop(map.remove(key)),
        }
    }
    map
}

#[test]
fn while_only_one_waits_it_is_planned_alone_and_nothing_waiting_is_no_plan() {
    let one = waiting(vec![vec![put("/a", "1"), delete("/b")]]);
    let planned = plan(&one, NOTHING, &everything(), &etcd_defaults()).unwrap().unwrap();
    assert_eq!((planned.revisions, planned.seq, planned.revision), (1, Seq(1), Revision(101)));
    assert_eq!(planned.extent, Extent::Whole);
    assert_eq!(plan(&[], NOTHING, &everything(), &etcd_defaults()), Ok(None));
}

#[test]
fn the_last_write_of_a_key_wins_when_revisions_are_merged() {
    let several = waiting(vec![vec![put("/a", "1"), put("/b", "1")], vec![delete("/a")], vec![put("/b", "3")]]);
    let planned = plan(&several, NOTHING, &everything(), &etcd_defaults()).unwrap().unwrap();
    assert_eq!((planned.revisions, planned.seq, planned.revision), (3, Seq(3), Revision(103)));
    let b = Op::Put { key: "/b".into(), value: "3".into() };
    assert_eq!(planned.ops, vec![Op::Delete { key: "/a".into() }, b]);
}

#[test]
fn a_plan_has_room_until_the_next_revision_does_not_fit() {
    let limits = etcd_defaults();
    let planned = |waiting: &[Waiting], begun| plan(waiting, begun, &everything(), &limits).unwrap().unwrap();
    let small = waiting(vec![vec![put("a", "1")], vec![put("b", "2")]]);
    let (one, two) = (planned(&small[..1], NOTHING), planned(&small, NOTHING));
    assert_eq!([one.has_room(1), one.has_room(2), two.has_room(2), two.has_room(3)], [false, true, false, true]);
    let large = waiting((0..3).map(|n| vec![put(format!("k{n}"), vec![7; 700_000])]).collect());
    let full = planned(&large, NOTHING);
    assert_eq!((full.revisions, full.has_room(3)), (2, false));
    let halves = waiting(vec![(0..3).map(|n| put(format!("k{n}"), vec![7; 700_000])).collect(), vec![put("z", "")]]);
    assert!(
        !planned(&halves, NOTHING).has_room(2) && !planned(&halves, begun_with(&halves[0], 1)).has_room(2),
        "a part stays alone"
    );
}

#[test]
fn a_delete_of_ten_thousand_keys_is_one_guarded_range_delete_in_one_transaction() {
    let mut model = ModelEtcd::new(&etcd_defaults(), content("/p/", 10_000));
    let sent = apply_all(&waiting(vec![deletes("/p/", 10_000)]), &mut model, &everything(), &etcd_defaults()).unwrap();
    assert_eq!((sent.len(), sent[0].tree.guards.len(), sent[0].tree.success.len()), (1, 1, 1));
    assert_eq!(model.content(), BTreeMap::new());
}

#[test]
fn a_key_that_only_the_replica_holds_survives_a_long_delete_around_it() {
    let mut foreign = content("/p/", 10_000);
    foreign.insert("/p/000500x".into(), "mine".into());
    let mut model = ModelEtcd::new(&etcd_defaults(), foreign);
    let sent = apply_all(&waiting(vec![deletes("/p/", 10_000)]), &mut model, &everything(), &etcd_defaults()).unwrap();
    assert_eq!((sent.len(), sent[0].tree.guards.len()), (1, 0), "key by key, and still in one transaction");
    assert_eq!(model.content().into_keys().collect::<Vec<_>>(), vec![Bytes::from("/p/000500x")]);
}

#[test]
fn a_key_put_after_the_read_fails_the_guard_and_nothing_is_deleted() {
    let limits = etcd_defaults();
    let mut model = ModelEtcd::new(&limits, content("/p/", 100));
    let planned = plan(&waiting(vec![deletes("/p/", 100)]), NOTHING, &everything(), &limits).unwrap().unwrap();
    let facts = read_facts(&planned, &model);
    model.put("/p/000050x".into(), "mine".into());
    let before = model.content();
    let settled = planned.clone().settle(&facts, &limits).unwrap();
    assert_eq!(model.apply(&settled.tree), Ok(false));
    assert_eq!(model.content(), before);
    apply(planned, &mut model, &limits);
    assert_eq!(model.content().len(), 1, "asked again, it deletes key by key");
}

#[test]
fn a_delete_larger_than_a_request_is_whole_as_a_range_and_in_parts_where_the_replica_holds_more() {
    let limits = RequestLimits { bytes_max: 6_000, ..etcd_defaults() };
    let revisions = waiting(vec![deletes("/p/", 1_000)]);
    let mut model = ModelEtcd::new(&limits, content("/p/", 1_000));
    let sent = apply_all(&revisions, &mut model, &everything(), &limits).unwrap();
    assert_eq!((sent.len(), sent[0].extent), (1, Extent::Whole));
    let mut model = ModelEtcd::new(&limits, content("/p/", 1_001).into_iter().chain(content("/p/0005", 1)).collect());
    let sent = apply_all(&revisions, &mut model, &everything(), &limits).unwrap();
    assert!(sent.len() > 1 && matches!(sent[0].extent, Extent::Part { from: 0, of: 1_000, .. }));
    assert_eq!(model.content().len(), 2);
}

#[test]
fn a_run_of_deletes_never_crosses_the_edge_of_the_links_ranges_nor_a_put() {
    let ranges = Ranges::new(&["/a/".into(), "/b/".into()], &["/a/x/".into()]);
    let run = |prefix: &str| deletes(prefix, RUN_KEYS_MIN);
    let changes = [run("/a/c/"), run("/a/z/"), run("/b/"), vec![put("/b/1", "kept")], run("/b/2")].concat();
    let planned = plan(&waiting(vec![changes]), NOTHING, &ranges, &etcd_defaults()).unwrap().unwrap();
    assert_eq!(planned.runs.len(), 4, "{:?}", planned.runs);
    let excluded = KeyRange::prefix(b"/a/x/");
    assert!(planned.runs.iter().all(|run| !run.range.overlaps(&excluded) && !run.range.contains(b"/b/1")));
    assert!(
        planned.runs.iter().all(|run| ranges
            .pieces()
            .iter()
            .any(|piece| piece.contains(&run.range.from) && (run.range.to <= piece.to)))
    );
    let short =
        plan(&waiting(vec![deletes("/a/", RUN_KEYS_MIN - 1)]), NOTHING, &ranges, &etcd_defaults()).unwrap().unwrap();
    assert_eq!(short.runs, vec![]);
}

#[test]
fn deletes_around_the_ferrys_own_keys_are_two_runs() {
    let changes = [deletes("/etcd-ferrx", 64), deletes("/etcd-ferrz", 64)].concat();
    let planned = plan(&waiting(vec![changes]), NOTHING, &everything(), &etcd_defaults()).unwrap().unwrap();
    assert_eq!(planned.runs.len(), 2);
    assert!(planned.runs.iter().all(|run| !run.range.overlaps(&KeyRange::prefix(FERRY_PREFIX))));
}

#[test]
fn more_runs_than_the_top_has_room_for_leave_the_shorter_ones_key_by_key() {
    let limits = etcd_defaults();
    let run = |i: usize| [vec![put(format!("/{i:03}"), "v")], deletes(&format!("/{i:03}/"), 64 + i)].concat();
    let changes: Vec<Change> = (0..50).flat_map(run).collect();
    let old = (0..50).flat_map(|i| content(&format!("/{i:03}/"), 64 + i)).collect();
    let mut model = ModelEtcd::new(&limits, old);
    let sent = apply_all(&waiting(vec![changes]), &mut model, &everything(), &limits).unwrap();
    assert_eq!((sent.len(), sent[0].tree.guards.len()), (1, 32));
    assert_eq!(model.content().len(), 50);
}

#[test]
fn a_thousand_keys_of_one_revision_are_one_transaction_of_two_levels() {
    let changes: Vec<Change> = (0..1_000).map(|i| put(format!("/k/{i:04}"), vec![7; 1_000])).collect();
    let mut model = ModelEtcd::new(&etcd_defaults(), BTreeMap::new());
    let sent = apply_all(&waiting(vec![changes]), &mut model, &everything(), &etcd_defaults()).unwrap();
    assert_eq!((sent.len(), model.content().len()), (1, 1_000));
    assert!(matches!(&sent[0].tree.success[0], Node::Txn(nodes) if matches!(nodes[0], Node::Op(_))));
}

#[test]
fn fourteen_thousand_tiny_puts_are_one_transaction() {
    let revisions = (0..14_000).map(|i| vec![put(format!("/k/{i:05}"), "v")]).collect();
    let mut model = ModelEtcd::new(&etcd_defaults(), BTreeMap::new());
    let sent = apply_all(&waiting(revisions), &mut model, &everything(), &etcd_defaults()).unwrap();
    assert_eq!((sent.len(), sent[0].revisions, model.content().len()), (1, 14_000, 14_000));
}

#[test]
fn merging_stops_before_one_transaction_holds_up_the_replica_and_a_single_revision_stays_whole() {
    let several = waiting((0..17_000).map(|i| vec![put(format!("/{i:05}"), "")]).collect());
    let planned = plan(&several, NOTHING, &everything(), &etcd_defaults()).unwrap().unwrap();
    assert_eq!((planned.revisions, planned.ops.len()), (MERGED_OPS_MAX, MERGED_OPS_MAX));
    let one = waiting(vec![(0..17_000).map(|i| put(format!("/{i:05}"), "")).collect()]);
    let planned = plan(&one, NOTHING, &everything(), &etcd_defaults()).unwrap().unwrap();
    assert_eq!((planned.extent, planned.ops.len()), (Extent::Whole, 17_000));
}

#[test]
fn a_revision_of_three_mebibytes_goes_in_parts_as_full_as_fit_and_resumes_at_its_part() {
    let limits = etcd_defaults();
    let changes: Vec<Change> = (0..3_072).map(|i| put(format!("/k/{i:05}"), vec![1; 1_024])).collect();
    let revisions = waiting(vec![changes, vec![put("/later", "v")]]);
    let mut model = ModelEtcd::new(&limits, BTreeMap::new());
    let sent = apply_all(&revisions, &mut model, &everything(), &limits).unwrap();
    assert_eq!(sent.len(), 4, "three parts, and the next revision by itself");
    assert!(sent[0].request_bytes > limits.bytes_max - 2_048, "{}", sent[0].request_bytes);
    assert_eq!(model.content(), one_by_one(&revisions, BTreeMap::new()));
    let Extent::Part { to, of, .. } = sent[0].extent else { panic!("{:?}", sent[0].extent) };
    let resumed = plan(&revisions, begun_with(&revisions[0], to), &everything(), &limits).unwrap().unwrap();
    assert!(matches!(resumed.extent, Extent::Part { from, of: same, .. } if (from, same) == (to, of)));
    let beyond = plan(&revisions, begun_with(&revisions[0], of), &everything(), &limits);
    assert!(matches!(beyond, Err(PlanError::PartBeyond { part: 3_072, changes: 3_072, .. })));
}

#[test]
fn a_part_is_followed_by_the_rest_of_its_own_revision_and_of_no_other() {
    let limits = etcd_defaults();
    let of = |value: u8| waiting(vec![(0..3_072).map(|i| put(format!("/k/{i:05}"), vec![value; 1_024])).collect()]);
    let (one, another) = (of(1), of(2));
    let next = |revisions: &[Waiting], begun| plan(revisions, begun, &everything(), &limits);
    let begun = begun_with(&one[0], 1_000);
    assert!(matches!(next(&one, begun).unwrap().unwrap().extent, Extent::Part { from: 1_000, .. }));
    let refused = Err(PlanError::PartOfAnother { revision: another[0].revision.revision, part: 1_000 });
    assert_eq!(next(&another, begun), refused);
    // A position of the version that did not note it yet.
    assert!(next(&another, Begun { digest: None, ..begun }).is_ok());
}

#[test]
fn the_largest_value_fits_to_within_a_few_bytes_and_one_byte_more_is_an_error_before_anything_is_applied() {
    let limits = etcd_defaults();
    let fits = |value: usize| plan(&waiting(vec![vec![put("/key", vec![0; value])]]), NOTHING, &everything(), &limits);
    let largest = (1_570_000..1_573_000).rev().find(|value| fits(*value).is_ok()).unwrap();
    let settled = fits(largest).unwrap().unwrap().settle(&[], &limits).unwrap();
    let position_key = Bytes::from(vec![b'k'; limits.position_key_bytes]);
    let sent = encoded_bytes(request(&settled.tree, &position_key, i64::MAX, limits.position_value_bytes_max));
    assert!(limits.bytes_max - 16 <= sent && sent <= limits.bytes_max, "{sent}");
    let small_and_large = waiting(vec![vec![put("/a", "1"), put("/key", vec![0; largest + 1])]]);
    let error = plan(&small_and_large, NOTHING, &everything(), &limits).unwrap_err();
    assert!(matches!(error, PlanError::TooLarge { key_bytes: 4, request_bytes_max: 1_572_864, .. }), "{error}");
    assert!(error.to_string().contains("--max-request-bytes"), "{error}");
}

#[test]
fn the_envelope_is_at_least_what_etcd_was_measured_to_add_to_a_bare_put() {
    let bare = |value: usize| InternalRaftRequest {
        header: Some(super::model_etcd::RequestHeader { id: u64::MAX, username: String::new(), auth_revision: 0 }),
        id: 0,
        put: Some(PutRequest { key: "k".into(), value: vec![0; value].into() }),
        txn: None,
    };
    let encoded = bare(1_572_832).encoded_len();
    assert!((1_572_850..=1_572_864).contains(&encoded), "measured: the largest bare put; encoded: {encoded}");
    let empty = InternalRaftRequest { header: Some(long_header()), id: 0, put: None, txn: None }.encoded_len();
    let txn_tag_and_length = 1 + 5;
    assert!(empty + txn_tag_and_length <= size::ENVELOPE_BYTES && empty >= 80, "{empty}");
}

#[test]
fn each_operation_is_counted_as_protobuf_encodes_it() {
    let entry = |op: Op| {
        let tree = TxnTree { guards: Vec::new(), success: vec![Node::Op(op)] };
        let full = request(&tree, &Bytes::from_static(b"p"), 1, 1);
        TxnRequest { compare: Vec::new(), success: full.success[..1].to_vec(), failure: Vec::new() }.encoded_len()
    };
    for len in [0, 1, 100, 115, 121, 125, 127, 128, 16_370, 16_383, 16_384, 2_097_152] {
        let key = Bytes::from(vec![b'k'; 9]);
        let value = Bytes::from(vec![b'v'; len]);
        let exact = [
            Op::Put { key: key.clone(), value: value.clone() },
            Op::Delete { key: vec![b'k'; len + 1].into() },
            Op::DeleteRange { range: KeyRange { from: key.clone(), to: vec![b'z'; len + 1].into() } },
        ];
        for op in exact {
            assert_eq!(size::op_bytes(&op), entry(op.clone()), "{op:?}");
        }
        let create = Op::Create { key, value };
        let over = size::op_bytes(&create) - entry(create);
        assert!(over <= 16, "{over}");
    }
}

#[test]
fn a_plan_of_several_revisions_that_shrunken_limits_no_longer_take_asks_to_be_planned_again() {
    let several = waiting((0..100).map(|i| vec![put(format!("/{i:03}"), vec![0; 100])]).collect());
    let planned = plan(&several, NOTHING, &everything(), &etcd_defaults()).unwrap().unwrap();
    let shrunk = RequestLimits { bytes_max: 5_000, ..etcd_defaults() };
    assert_eq!(planned.settle(&[], &shrunk), Err(PlanError::LimitsShrank));
}

#[test]
fn revisions_that_no_origin_can_have_sent_are_errors() {
    let limits = etcd_defaults();
    let planned = |revisions| plan(&waiting(revisions), NOTHING, &everything(), &limits).unwrap_err();
    let twice = vec![put("/a", "1"), delete("/a")];
    assert!(matches!(planned(vec![twice.clone()]), PlanError::Malformed { revision: Revision(101), .. }));
    assert!(matches!(planned(vec![vec![put("/a", "1")], twice]), PlanError::Malformed { revision: Revision(102), .. }));
    assert!(matches!(planned(vec![vec![put("", "1")]]), PlanError::Malformed { .. }));
    let mut gap = waiting(vec![vec![put("/a", "1")], vec![put("/b", "1")]]);
    gap[1].seq = Seq(3);
    let expected = PlanError::OutOfOrder { expected: Seq(2), got: Seq(3) };
    assert_eq!(plan(&gap, NOTHING, &everything(), &limits), Err(expected));
}

#[test]
fn a_tree_that_would_write_a_key_twice_is_never_built() {
    let limits = etcd_defaults();
    let range = Op::DeleteRange { range: KeyRange { from: "/a".into(), to: "/c".into() } };
    for ops in [vec![range, Op::Put { key: "/b".into(), value: "".into() }], vec![Op::Delete { key: "/a".into() }; 2]] {
        let load = Load::of(&ops);
        assert_eq!(runs::arrange(ops, Vec::new(), &load, &limits), Err(PlanError::Overlap));
    }
}

#[test]
fn the_modelled_etcd_has_the_rule_on_widths_that_was_measured() {
    let mut model = ModelEtcd::new(&etcd_defaults(), BTreeMap::new());
    let leaf = |i: usize| Node::Op(Op::Put { key: format!("/{i}").into(), value: "".into() });
    let mut nested = |top: usize, inside: usize| {
        let txn = Node::Txn((0..inside).map(leaf).collect());
        // The position's put is one more at the top.
        let success = std::iter::once(txn).chain((0..top - 2).map(|i| leaf(1_000 + i))).collect();
        model.apply(&TxnTree { guards: Vec::new(), success })
    };
    assert_eq!(nested(9, 119), Ok(true));
    assert_eq!(nested(9, 120), Err(Refused::TooManyOps));
    assert_eq!(nested(64, 64), Ok(true));
    assert_eq!(nested(65, 64), Err(Refused::TooManyOps));
    let twice = TxnTree { guards: Vec::new(), success: vec![Node::Txn(vec![leaf(1)]), Node::Txn(vec![leaf(1)])] };
    assert_eq!(model.apply(&twice), Err(Refused::DuplicateKey));
}

const POOL: usize = 220;

fn pool_key(i: usize) -> Bytes {
    let piece = ["/a/", "/b/", "/c/"][i * 3 / POOL];
    Bytes::from(format!("{piece}{i:03}"))
}

/// Single writes, writes of many keys, and range deletes over many keys.
fn revision() -> impl Strategy<Value = Vec<Change>> {
    let value = prop_oneof![8 => 0_usize..20, 1 => 0_usize..400];
    let write = (0..POOL, prop::option::weighted(0.7, value));
    let writes =
        prop_oneof![4 => prop::collection::vec(write.clone(), 1..4), 1 => prop::collection::vec(write, 1..120)];
    let deletes =
        (0..POOL, 1..POOL).prop_map(|(from, len)| (from..(from + len).min(POOL)).map(|i| (i, None)).collect());
    prop_oneof![3 => writes, 1 => deletes].prop_map(|writes: Vec<(usize, Option<usize>)>| {
        let by_key: BTreeMap<usize, Option<usize>> = writes.into_iter().collect();
        let change = |(i, value): (usize, Option<usize>)| match value {
            Some(len) => put(pool_key(i), vec![u8::try_from(len % 251).unwrap_or(0); len]),
            None => delete(pool_key(i)),
        };
        by_key.into_iter().map(change).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn planned_transactions_are_never_refused_and_equal_the_revisions_one_by_one(
        revisions in prop::collection::vec(revision(), 1..12),
        old in prop::collection::btree_set(0..POOL, 0..POOL),
        foreign in prop::option::of("/[abc]/[0-9]{3}x"),
        ops_max in 2_usize..40,
        bytes_max in 1_500_usize..8_000,
    ) {
        let limits = RequestLimits { ops_max, bytes_max, ..etcd_defaults() };
        let ranges = Ranges::new(&["/a/".into(), "/b/".into(), "/c/".into()], &["/b/x".into()]);
        let mut old: BTreeMap<Bytes, Bytes> = old.into_iter().map(|i| (pool_key(i), Bytes::from_static(b"old"))).collect();
        old.extend(foreign.map(|key| (Bytes::from(key), Bytes::from_static(b"foreign"))));
        let waiting = waiting(revisions);
        let mut model = ModelEtcd::new(&limits, old.clone());
        let sent = apply_all(&waiting, &mut model, &ranges, &limits).unwrap();
        prop_assert_eq!(model.content(), one_by_one(&waiting, old));
        for settled in &sent {
            prop_assert!(settled.request_bytes <= limits.bytes_max);
            if let Extent::Part { of, .. } = settled.extent {
                let index = usize::try_from(settled.seq.0).unwrap_or(0) - 1;
                let whole: Vec<Op> = waiting[index].revision.changes.iter().map(Op::of).collect();
                prop_assert_eq!(as_u64(whole.len()), of);
                prop_assert!(!limits.fits(&Load::of(&whole)), "only a revision larger than a request goes in parts");
            }
        }
    }
}

#[test]
fn only_a_plan_that_would_be_refused_again_stops_the_link() {
    let revision = Revision(9);
    let reaction = |error: PlanError| error.reaction();
    let too_large =
        PlanError::TooLarge { revision, key_bytes: 1, value_bytes: 2, request_bytes_needed: 4, request_bytes_max: 3 };
    let advice = "to at least 4100, or better to what the origin's etcd has and 4096 more";
    assert!(too_large.to_string().contains(advice), "{too_large}");
    assert_eq!(reaction(too_large), PlanReaction::Stop(Kind::TooLarge));
    assert_eq!(reaction(PlanError::Malformed { revision, rule: "" }), PlanReaction::Stop(Kind::Outside));
    assert_eq!(reaction(PlanError::Overlap), PlanReaction::Stop(Kind::Outside));
    let beyond = PlanError::PartBeyond { revision, part: 3, changes: 2 };
    assert_eq!(reaction(beyond), PlanReaction::Stop(Kind::Conflict));
    assert_eq!(reaction(PlanError::PartOfAnother { revision, part: 3 }), PlanReaction::Stop(Kind::Conflict));
    assert_eq!(reaction(PlanError::OutOfOrder { expected: Seq(4), got: Seq(6) }), PlanReaction::HelloAgain);
    assert_eq!(reaction(PlanError::LimitsShrank), PlanReaction::PlanAgain);
}
