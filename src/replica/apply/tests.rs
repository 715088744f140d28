//! Job: tests of what the applier takes from a stream.
//! Input: commands, without an etcd behind them. Output: passes or fails.
//! Always true: no test waits for time.

use super::*;
use crate::config::EtcdConfig;

/// An applier that has not read a position, in its second session.
async fn applier(dir: &std::path::Path) -> Applier {
    let limits = Limits::default();
    let (journal, _) = Journal::open(&dir.join("journal"), &limits).await.unwrap_or_else(|error| panic!("{error}"));
    let (dedupe, _) = Dedupe::open(&dir.join("dedupe")).await.unwrap_or_else(|error| panic!("{error}"));
    let mut applier = Applier::new(ApplierParts {
        link: LinkName::new("config").unwrap_or_else(|error| panic!("{error}")),
        etcd: Arc::new(Gate::new(EtcdConfig::default(), Bytes::new())),
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
