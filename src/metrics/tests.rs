//! Job: tests of what a link's status becomes in /metrics.
//! Input: statuses. Output: passes or fails.
//! Always true: no test shares a link's name with another: the recorder is the process' own.

use super::*;
use crate::model::{CopyProgress, Seq, StageStatus, Verification};

/// The recorder is the process' own, so each test takes a link name that no other test uses.
fn status(link: &str) -> LinkStatus {
    LinkStatus::new(LinkName::new(link).unwrap_or_else(|rule| panic!("{rule}")), Side::Origin, String::new())
}

#[test]
fn a_snapshot_sets_gauges_counters_and_one_state() {
    let exporter = install().unwrap();
    let mut status = status("metrics-snapshot");
    status.state = LinkState::SpoolFull;
    status.lag_seconds = 2.5;
    status.seq = Seq(7);
    status.bytes_raw = 1000;
    status.counts.insert("repeated", 3);
    status.copy = Some(CopyProgress { keys_done: 5, keys_total: 9 });
    status.verification.outcome = Outcome::Failed;
    let stage = |queue_bytes| StageStatus::new("spool", true, String::new()).with_queue(queue_bytes, 100);
    status.stages = vec![stage(40), stage(2)];

    record_link(&status);

    let text = exporter.render();
    for line in [
        "etcd_ferry_link_state{link=\"metrics-snapshot\",side=\"origin\",state=\"spool_full\"} 1",
        "etcd_ferry_link_state{link=\"metrics-snapshot\",side=\"origin\",state=\"following\"} 0",
        "etcd_ferry_lag_seconds{link=\"metrics-snapshot\",side=\"origin\"} 2.5",
        "etcd_ferry_seq{link=\"metrics-snapshot\",side=\"origin\"} 7",
        "etcd_ferry_raw_bytes_total{link=\"metrics-snapshot\",side=\"origin\"} 1000",
        "etcd_ferry_repeated_total{link=\"metrics-snapshot\",side=\"origin\"} 3",
        "etcd_ferry_copy_done_keys{link=\"metrics-snapshot\",side=\"origin\"} 5",
        "etcd_ferry_verification_failed{link=\"metrics-snapshot\",side=\"origin\"} 1",
        "etcd_ferry_queue_bytes{link=\"metrics-snapshot\",side=\"origin\"} 42",
        "etcd_ferry_queue_limit_bytes{link=\"metrics-snapshot\",side=\"origin\"} 200",
        "# HELP etcd_ferry_lag_seconds Since when",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn what_a_standby_found_while_it_shipped_raises_no_alert() {
    let exporter = install().unwrap();
    let mut status = status("metrics-standby");
    status.verification = Verification { differing_keys: 3, outcome: Outcome::Different, ..Verification::default() };
    let shown = |status: &LinkStatus, metric: &str| {
        record_link(status);
        let start = format!("{metric}{{link=\"metrics-standby\",side=\"origin\"}} ");
        exporter.render().lines().find_map(|line| line.strip_prefix(&start).map(str::to_owned))
    };
    let both = |status: &mut LinkStatus, role| {
        status.role = Some(role);
        status.verification.outcome = Outcome::Different;
        let differing = shown(status, DIFFERING_KEYS);
        status.verification.outcome = Outcome::Failed;
        [differing, shown(status, VERIFICATION_FAILED)]
    };
    assert_eq!(both(&mut status, Role::Shipper), [Some("3".to_owned()), Some("1".to_owned())]);
    assert_eq!(both(&mut status, Role::Standby), [Some("0".to_owned()), Some("0".to_owned())]);
}

#[test]
fn a_counter_never_goes_back() {
    let exporter = install().unwrap();
    let mut status = status("metrics-monotonic");
    status.bytes_sent = 9;
    record_link(&status);
    status.bytes_sent = 4;
    record_link(&status);
    assert!(exporter.render().contains("sent_bytes_total{link=\"metrics-monotonic\",side=\"origin\"} 9"));
}

#[test]
fn a_link_that_was_removed_is_told_of_no_more_and_one_of_a_longer_name_is_another() {
    let exporter = install().unwrap();
    let (stays, gone) = (status("metrics-gone-not"), status("metrics-gone"));
    observe_lag(&gone.link, 0.04);
    assert!(exporter.render_links(&[stays.clone(), gone]).contains("seq{link=\"metrics-gone\",side=\"origin\"} 0"));
    let text = exporter.render_links(&[stays]);
    assert!(!text.contains("link=\"metrics-gone\""), "{text}");
    assert!(text.contains("etcd_ferry_seq{link=\"metrics-gone-not\",side=\"origin\"} 0"), "{text}");
    assert!(text.contains("# HELP etcd_ferry_revision_lag_seconds"), "{text}");
}

#[test]
fn observations_land_in_buckets_of_their_own_unit() {
    let exporter = install().unwrap();
    let link = LinkName::new("metrics-buckets").unwrap();
    observe_apply(&link, 0.002, 3);
    observe_lag(&link, 0.04);
    observe_round_trip(&link, 0.08);
    exporter.upkeep();
    let text = exporter.render();
    for line in [
        "etcd_ferry_apply_seconds_bucket{link=\"metrics-buckets\",side=\"replica\",le=\"0.001\"} 0",
        "etcd_ferry_apply_seconds_bucket{link=\"metrics-buckets\",side=\"replica\",le=\"0.0025\"} 1",
        "etcd_ferry_batch_revisions_bucket{link=\"metrics-buckets\",side=\"replica\",le=\"4\"} 1",
        "etcd_ferry_revision_lag_seconds_bucket{link=\"metrics-buckets\",side=\"origin\",le=\"0.05\"} 1",
        "etcd_ferry_round_trip_seconds_bucket{link=\"metrics-buckets\",side=\"origin\",le=\"0.1\"} 1",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn every_name_has_the_prefix() {
    for metric in all() {
        assert!(metric.name.starts_with("etcd_ferry_"), "{}", metric.name);
        assert_eq!(metric.name.ends_with("_total"), metric.kind == "counter", "{}", metric.name);
    }
}
