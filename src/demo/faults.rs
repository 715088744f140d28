//! Job: what goes wrong in the demo, and when: the link is cut, each sidecar is killed.
//! Input: running regions, the backlog as the board sees it. Output: what each fault cost.
//! Always true: a fault is over when everything that was written before its end is at the replica; each wait has a deadline.

use super::meter::Backlog;
use super::regions::{Region, Regions};
use super::show::{Seen, time};
use anyhow::bail;
use serde::Serialize;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

const CUT_MAX: Duration = Duration::from_secs(5);
const RECOVERY_DEADLINE: Duration = Duration::from_secs(60);
/// How often processes are looked after.
const LOOK: Duration = Duration::from_millis(250);

/// One fault, and what it cost.
#[derive(Debug, Clone, Serialize)]
pub struct FaultReport {
    pub fault: String,
    /// The most revisions that were written and not yet applied, meanwhile.
    pub waited_revisions_max: u64,
    /// From its end (a link is healed, a sidecar is started again) until the replica was as far as the origin had been then.
    pub caught_up_seconds: f64,
}

/// Who causes the faults and waits for the recoveries.
pub struct Faults<'a> {
    pub regions: &'a mut Regions,
    pub seen: mpsc::Sender<Seen>,
    pub backlog: watch::Receiver<Backlog>,
    pub reports: Vec<FaultReport>,
}

impl Faults<'_> {
    /// The whole show of `length`: quiet, a cut, quiet, a kill at each side, quiet.
    pub async fn run(&mut self, length: Duration) -> anyhow::Result<()> {
        let start = Instant::now();
        self.seen.send(Seen::Calm(Some(start))).await?;
        let cut = CUT_MAX.min(length / 6);
        self.pass(start + length / 6).await?;
        self.cut(cut).await?;
        self.pass(start + length / 2).await?;
        self.kill(|regions| &mut regions.origin, "origin").await?;
        self.pass(start + length * 3 / 4).await?;
        self.kill(|regions| &mut regions.replica, "replica").await?;
        self.pass(start + length).await
    }

    async fn cut(&mut self, length: Duration) -> anyhow::Result<()> {
        self.seen.send(Seen::Calm(None)).await?;
        self.happened(format!("the link is cut for {}", time(length))).await?;
        self.regions.proxy.cut();
        self.pass(Instant::now() + length).await?;
        self.regions.proxy.heal();
        self.happened("the link is healed".to_owned()).await?;
        self.recover(format!("link cut for {}", time(length))).await
    }

    async fn kill(&mut self, pick: fn(&mut Regions) -> &mut Region, side: &str) -> anyhow::Result<()> {
        self.seen.send(Seen::Calm(None)).await?;
        let region = pick(self.regions);
        region.kill_sidecar().await;
        region.start_sidecar()?;
        let name = region.name;
        self.happened(format!("kill -9 of the sidecar in {name} (the {side}); it is started again")).await?;
        self.recover(format!("kill -9 of the {side}'s sidecar")).await
    }

    /// Waits until the replica has everything that was written up to now, and the first of what came after.
    async fn recover(&mut self, fault: String) -> anyhow::Result<()> {
        let end = Instant::now();
        self.wait_for(|backlog| backlog.newest_applied.is_some_and(|newest| newest >= end)).await?;
        let took = end.elapsed();
        let waited = self.backlog.borrow().revisions_max;
        self.happened(format!("the replica has caught up after {}; up to {waited} revisions waited", time(took)))
            .await?;
        self.reports.push(FaultReport { fault, waited_revisions_max: waited, caught_up_seconds: took.as_secs_f64() });
        self.seen.send(Seen::Calm(Some(Instant::now()))).await?;
        Ok(())
    }

    /// Waits until the replica has everything that was ever written; to be called when nobody writes any more.
    pub async fn caught_up(&mut self) -> anyhow::Result<()> {
        self.all_told().await?;
        self.wait_for(|backlog| backlog.revisions == 0).await
    }

    async fn wait_for(&mut self, done: impl Fn(&Backlog) -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + RECOVERY_DEADLINE;
        loop {
            if tokio::time::timeout(LOOK, self.backlog.wait_for(&done)).await.is_ok() {
                return Ok(());
            }
            self.regions.check()?;
            if Instant::now() > deadline {
                let waiting = self.backlog.borrow().revisions;
                let logs = self.regions.log_ends();
                bail!("after {} s {waiting} revisions still wait\n{logs}", RECOVERY_DEADLINE.as_secs());
            }
        }
    }

    /// Returns when the board has taken in everything that it was told before.
    async fn all_told(&self) -> anyhow::Result<()> {
        let (answer, answered) = oneshot::channel();
        self.seen.send(Seen::Asked(answer)).await?;
        Ok(answered.await?)
    }

    /// Time passes; processes that end by themselves are noticed.
    async fn pass(&mut self, until: Instant) -> anyhow::Result<()> {
        loop {
            self.regions.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            tokio::time::sleep(left.min(LOOK)).await;
        }
    }

    async fn happened(&self, what: String) -> anyhow::Result<()> {
        Ok(self.seen.send(Seen::Happened(what)).await?)
    }
}
