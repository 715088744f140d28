//! Job: stand for election among the sidecars beside the origin's cluster, for one link.
//! Input: the link's keys in the origin's etcd, when the replica was last heard, `stop`. Output: an `ElectView`.
//! Edge: what to do next is decided in candidacy.rs.
//! Always true: while others stand by, `Shipper` is never said past the end of a lease; the key goes when the sidecar stops.

use super::candidacy::{
    self, Candidate, Enrolment, LEASE_TTL, LOOK_INTERVAL, Next, Own, PATIENCE_FIRST, Published, RENEW_INTERVAL,
    SHIPS_UNRENEWED_MAX, Unfit,
};
use crate::etcd::gate::Gate;
use crate::etcd::{Columns, Compare, CompareOp, Etcd, EtcdError, Lease, Renewals, Txn, TxnOp};
use crate::failpoint;
use crate::model::{KeyRange, LinkName, Revision, Term};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// One try at renewing and looking. Two of them fit before a shipper must stop.
const TRY_MAX: Duration = Duration::from_millis(1_500);
/// Creating a key, or replacing one, is followed by another look; more than a few in one try means a rival, and the next try sees it.
const STEPS_MAX: u32 = 5;
/// How long the sidecar's end may wait for etcd to take its key away.
const RESIGN_MAX: Duration = Duration::from_secs(1);
const RESIGN_AGAIN: Duration = Duration::from_millis(50);

/// Whether this sidecar ships the link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Not known yet, or not any more.
    Unknown {
        reason: String,
    },
    /// `reason`: what is wrong with that, if anything is.
    Standby {
        shipper: String,
        term: Term,
        reason: String,
    },
    Shipper {
        term: Term,
    },
}

impl Standing {
    pub fn term(&self) -> Option<Term> {
        match self {
            Standing::Unknown { .. } => None,
            Standing::Standby { term, .. } | Standing::Shipper { term } => Some(*term),
        }
    }
}

/// What the shipper tells the election of the replica.
#[derive(Debug, Clone, Copy)]
pub struct Heard {
    /// In which term: what was heard in an earlier one says nothing of this one.
    pub term: Term,
    /// When it said something last.
    pub at: Option<Instant>,
    /// The link waits for an operator, as it would in any sidecar's hands: silence means nothing.
    pub stopped: bool,
    pub unfit: Option<Unfit>,
}

impl Heard {
    pub fn nothing(term: Term) -> Self {
        Self { term, at: None, stopped: false, unfit: None }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElectView {
    pub standing: Standing,
    /// What the shipper published last.
    pub published: Option<Published>,
    /// How often this sidecar became the shipper.
    pub won: u64,
}

impl Default for ElectView {
    fn default() -> Self {
        Self { standing: Standing::Unknown { reason: String::new() }, published: None, won: 0 }
    }
}

pub struct Election {
    pub link: LinkName,
    pub node: String,
    pub etcd: Arc<Gate>,
    pub view: watch::Sender<ElectView>,
    pub heard: watch::Receiver<Heard>,
    run: u64,
    enrolled: bool,
    connection: Option<Etcd>,
    lease: Option<Lease>,
    /// Over `connection`, as what follows.
    renewals: Option<Renewals>,
    /// What the last look at the candidates came to, while nobody else stands.
    looked: Option<Looked>,
    /// When the last renewal was sent that was answered, together with a look that showed our key, or with word that nothing has changed.
    renewed: Option<Instant>,
    /// How many others stood then.
    others: usize,
    patience: Duration,
    led_since: Instant,
    /// The last reason that was logged: one that repeats is logged once.
    logged: String,
}

/// What a look came to, and at which head.
#[derive(Debug, Clone, Copy)]
struct Looked {
    head: Revision,
    term: Term,
    published: Option<Published>,
}

/// What the link's keys say.
struct Seen {
    head: Revision,
    candidates: Vec<Candidate>,
    published: Option<Published>,
}

impl Election {
    pub fn new(
        link: LinkName,
        node: String,
        etcd: Arc<Gate>,
        view: watch::Sender<ElectView>,
        heard: watch::Receiver<Heard>,
    ) -> Self {
        Self {
            link,
            node,
            etcd,
            view,
            heard,
            run: rand::random(),
            enrolled: false,
            connection: None,
            lease: None,
            renewals: None,
            looked: None,
            renewed: None,
            others: 0,
            patience: PATIENCE_FIRST,
            led_since: Instant::now(),
            logged: String::new(),
        }
    }

    /// Stands until `stop`, then resigns, so that another one need not wait for the lease to end.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let wait = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                wait = self.turn() => wait,
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = tokio::time::sleep(wait) => {}
            }
        }
        self.say(Standing::Unknown { reason: String::new() });
        self.resign().await;
    }

    /// One try; how long to wait before the next one.
    async fn turn(&mut self) -> Duration {
        let leads = matches!(self.view.borrow().standing, Standing::Shipper { .. });
        let mut limit = Instant::now() + TRY_MAX;
        if let (Some(renewed), true) = (self.renewed, leads && self.others > 0) {
            limit = limit.min(renewed + SHIPS_UNRENEWED_MAX).max(Instant::now());
        }
        let reason = match tokio::time::timeout_at(limit, Box::pin(self.renew_and_look())).await {
            Ok(Ok((next, published))) => {
                self.view.send_if_modified(|view| std::mem::replace(&mut view.published, published) != published);
                return self.act(next).await;
            }
            Ok(Err(e)) => format!("the election in the origin's etcd: {e}"),
            Err(_) => {
                let at = self.etcd.config().endpoints.join(", ");
                format!("the election in the origin's etcd: no answer within {} ms at {at}", TRY_MAX.as_millis())
            }
        };
        (self.connection, self.renewals, self.looked) = (None, None, None);
        self.log(&reason);
        let since = self.renewed.map(|renewed| renewed.elapsed());
        if !leads || since.is_none_or(|since| candidacy::stops_unrenewed(since, self.others)) {
            self.say(Standing::Unknown { reason });
        }
        LOOK_INTERVAL
    }

    /// Renews the lease, then looks at the candidates, and stands if need be. Where others stand, only both together say that the key lives:
    /// a renewal alone may be answered by a member that has lost its cluster and does not know it yet. A shipper that is alone looks once
    /// etcd has made a revision.
    async fn renew_and_look(&mut self) -> Result<(Next, Option<Published>), EtcdError> {
        let sent = Instant::now();
        let etcd = match &self.connection {
            Some(etcd) => etcd.clone(),
            None => self.connection.insert(self.etcd.connect().await?).clone(),
        };
        let renewed = match self.lease {
            Some(lease) => etcd.renew(lease, self.renewals.take()).await?.map(|renewed| (lease, renewed)),
            None => None,
        };
        let lease = match renewed {
            Some((lease, (renewals, head))) => {
                self.renewals = Some(renewals);
                self.looked = self.looked.filter(|looked| head == Some(looked.head));
                if let Some(Looked { term, published, .. }) = self.looked {
                    self.renewed = Some(sent);
                    return Ok((Next::Lead { term, others: 0 }, published));
                }
                lease
            }
            None => {
                (self.lease, self.looked) = (None, None);
                *self.lease.insert(etcd.grant(LEASE_TTL).await?)
            }
        };
        for _ in 0..STEPS_MAX {
            let seen = look(&etcd, &self.link).await?;
            let own = Own { node: &self.node, run: self.run, enrolled: self.enrolled };
            let key = self.link.candidate_key(&self.node);
            let txn = match candidacy::next(own, &seen.candidates) {
                Next::Enrol => {
                    let value = serde_json::to_vec(&Enrolment { run: self.run }).unwrap_or_default();
                    let absent = Compare::create_revision(key.to_vec(), CompareOp::Equal, 0);
                    Txn::new().when([absent]).and_then([lease.put(&key, value)])
                }
                Next::Replace { mod_revision } => {
                    tracing::warn!(link = %self.link, node = %self.node, "taking the place of an earlier process under this node's name, which has not resigned; \
                        if it still runs, give each sidecar its own `node`");
                    delete_if(&key, Compare::mod_revision(key.to_vec(), CompareOp::Equal, mod_revision.to_etcd()))
                }
                next @ (Next::Lead { .. } | Next::StandBy { .. } | Next::NameTaken { .. }) => {
                    self.enrolled = true;
                    self.renewed = Some(sent);
                    if let Next::Lead { term, others: 0 } = next {
                        self.looked = Some(Looked { head: seen.head, term, published: seen.published });
                    }
                    return Ok((next, seen.published));
                }
            };
            etcd.txn(txn, &self.right()).await?;
            failpoint::reach("candidate-written");
        }
        Err(EtcdError::Other("the candidates' keys change all the time".to_owned()))
    }

    fn right(&self) -> String {
        format!("write the prefix {}", self.link.folder().escape_ascii())
    }

    /// Says what this sidecar is now; a shipper whom the replica does not hear gives way.
    async fn act(&mut self, next: Next) -> Duration {
        match next {
            Next::Lead { term, others } => {
                self.others = others;
                if self.say(Standing::Shipper { term }) {
                    self.led_since = Instant::now();
                    self.view.send_modify(|view| view.won += 1);
                    tracing::info!(link = %self.link, node = %self.node, %term, others, "elected: this sidecar ships the link");
                }
                self.logged.clear();
                let heard = Some(*self.heard.borrow()).filter(|heard| heard.term == term);
                let at = heard.and_then(|heard| heard.at);
                if at.is_some() {
                    self.patience = PATIENCE_FIRST;
                }
                let silent =
                    (!heard.is_some_and(|heard| heard.stopped)).then(|| at.unwrap_or(self.led_since).elapsed());
                let unfit = heard.and_then(|heard| heard.unfit);
                if candidacy::gives_way(silent, self.patience, others, unfit) {
                    return self.give_way(term, unfit).await;
                }
                let left = silent.map_or(RENEW_INTERVAL, |silent| self.patience.saturating_sub(silent));
                // With nobody to give way to, what is left of the patience is nothing to wake for.
                if others > 0 { RENEW_INTERVAL.min(left) } else { RENEW_INTERVAL }
            }
            Next::StandBy { shipper, term } => {
                self.logged.clear();
                let standing = Standing::Standby { shipper: shipper.clone(), term, reason: String::new() };
                if self.say(standing) {
                    tracing::info!(link = %self.link, node = %self.node, %shipper, %term, "standing by: another sidecar ships the link");
                }
                LOOK_INTERVAL
            }
            Next::NameTaken { shipper, term } => {
                let reason = format!(
                    "another sidecar stands for election under the node name {}: give each its own `node`",
                    self.node
                );
                self.log(&reason);
                self.say(Standing::Standby { shipper, term, reason });
                LOOK_INTERVAL
            }
            // Steps on the way, never where a try ends.
            Next::Enrol | Next::Replace { .. } => LOOK_INTERVAL,
        }
    }

    /// Takes the key away and comes back as the last of the candidates.
    async fn give_way(&mut self, term: Term, unfit: Option<Unfit>) -> Duration {
        let silent_s = self.patience.as_secs();
        let reason = match unfit {
            Some(unfit) => unfit.reason().to_owned(),
            None => format!("nothing was heard from the replica for {silent_s} s: another sidecar's turn"),
        };
        // Who was heard a moment ago has nothing to be more patient about.
        if unfit != Some(Unfit::Compacted) {
            self.patience = candidacy::patience_after(self.patience);
        }
        tracing::warn!(link = %self.link, node = %self.node, %term, %reason, "giving way to another sidecar");
        self.say(Standing::Unknown { reason });
        let Some(etcd) = self.connection.clone() else { return LOOK_INTERVAL };
        let key = self.link.candidate_key(&self.node);
        let mine = Compare::create_revision(key.to_vec(), CompareOp::Equal, Revision(term.0).to_etcd());
        let given = tokio::time::timeout(TRY_MAX, etcd.txn(delete_if(&key, mine), &self.right())).await;
        if !matches!(given, Ok(Ok(_))) {
            self.connection = None;
        }
        Duration::ZERO
    }

    /// False if nothing changed but the reason.
    fn say(&mut self, standing: Standing) -> bool {
        let mut other = false;
        self.view.send_if_modified(|view| {
            let same = |a: &Standing, b: &Standing| {
                std::mem::discriminant(a) == std::mem::discriminant(b) && a.term() == b.term()
            };
            other = !same(&view.standing, &standing);
            std::mem::replace(&mut view.standing, standing.clone()) != standing
        });
        other
    }

    /// A failure that repeats is logged once.
    fn log(&mut self, reason: &str) {
        if self.logged != reason {
            tracing::warn!(link = %self.link, %reason, "the election waits; trying again");
            reason.clone_into(&mut self.logged);
        }
    }

    /// More than one try: a pod's member of etcd is stopped together with its sidecar, and another one takes what that one refuses.
    async fn resign(&mut self) {
        let Some(lease) = self.lease else { return };
        let resigning = async {
            while let Err(error) = self.revoke(lease).await {
                tracing::debug!(link = %self.link, %error, "etcd did not take the resignation; trying again");
                self.connection = None;
                tokio::time::sleep(RESIGN_AGAIN).await;
            }
        };
        match tokio::time::timeout(RESIGN_MAX, resigning).await {
            Ok(()) => tracing::info!(link = %self.link, node = %self.node, "resigned"),
            Err(_) => {
                tracing::warn!(link = %self.link, "etcd did not take the resignation: another sidecar waits for the lease to end");
            }
        }
    }

    async fn revoke(&mut self, lease: Lease) -> Result<(), EtcdError> {
        let etcd = match &self.connection {
            Some(etcd) => etcd.clone(),
            None => self.connection.insert(self.etcd.connect().await?).clone(),
        };
        etcd.revoke(lease).await
    }
}

/// What the shipper of a link writes at the origin is written only if it is still a candidate, under the same term: nobody else can lead
/// before its key is gone.
pub(super) fn still_elected(link: &LinkName, node: &str, term: Term) -> Compare {
    Compare::create_revision(link.candidate_key(node).to_vec(), CompareOp::Equal, Revision(term.0).to_etcd())
}

/// Whether `node` is the elected one, with this term, by a linearizable read.
pub(super) async fn leads(etcd: &Etcd, link: &LinkName, node: &str, term: Term) -> Result<bool, EtcdError> {
    let seen = look(etcd, link).await?;
    let first = seen.candidates.iter().min_by_key(|candidate| candidate.term);
    Ok(first.is_some_and(|first| first.node == node && first.term == term))
}

/// How many others stand, by a linearizable read.
pub(super) async fn others(etcd: &Etcd, link: &LinkName, node: &str) -> Result<usize, EtcdError> {
    Ok(look(etcd, link).await?.candidates.iter().filter(|candidate| candidate.node != node).count())
}

fn delete_if(key: &[u8], condition: Compare) -> Txn {
    Txn::new().when([condition]).and_then([TxnOp::delete(key, None)])
}

/// All keys of a link, in one linearizable read.
async fn look(etcd: &Etcd, link: &LinkName) -> Result<Seen, EtcdError> {
    let folder = link.folder();
    let right = || format!("read the prefix {}", folder.escape_ascii());
    let page = etcd.page(&KeyRange::prefix(&folder), 0, None, Columns::KeysAndValues).await;
    let page = page.map_err(|e| e.needing(right))?;
    let (candidates, applied) = (link.candidate_key(""), link.applied_key());
    let mut seen = Seen { head: page.head, candidates: Vec::new(), published: None };
    for kv in page.kvs {
        if let Some(node) = kv.key.strip_prefix(&candidates[..]) {
            let enrolment = serde_json::from_slice::<Enrolment>(&kv.value).ok();
            seen.candidates.push(Candidate {
                node: String::from_utf8_lossy(node).into_owned(),
                run: enrolment.map(|enrolment| enrolment.run),
                term: Term(kv.create_revision.0),
                mod_revision: kv.mod_revision,
            });
        } else if kv.key == applied {
            seen.published = Published::from_json(&kv.value);
        }
    }
    Ok(seen)
}
