//! Job: the links of a running sidecar: open, start and stop them, one by one, and show them to whoever looks.
//! Input: a checked configuration; which of its links are to come and to go. Output: a task for each link; the lists that the services read.
//! Always true: a link is open in one task at most, so that its files have one owner; what is asked about one link touches no other;
//! every task is joined.

use crate::admin::{LinkHandle, refresh};
use crate::config::{Config, ReceiveConfig, SendConfig};
use crate::etcd::gate::Gate;
use crate::etcd::with_sources;
use crate::model::{LinkName, LinkState, LinkStatus, Side};
use crate::origin::OriginLink;
use crate::replica::ReplicaLink;
use crate::replica::compact::Reads;
use crate::replica::receive::LinkEnd;
use crate::tls::accept::LastTurnedAway;
use crate::tls::reload::InUse;
use anyhow::Context;
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// Within which a link that is to end has ended: as the sidecar itself.
const STOP_MAX: Duration = Duration::from_millis(4_500);

/// Runs a link until it is stopped.
type Runner = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

/// When an origin's spool is opened: a large one takes minutes, and others are not to wait for it.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// What is added has little in it, and whoever adds it is told if it cannot be opened.
    Now,
    InItsTask,
}

struct Entry {
    handle: LinkHandle,
    stop: CancellationToken,
    /// To be started.
    runner: Option<Runner>,
    /// Its task; `None`: not started yet, or ended.
    task: Option<Id>,
    /// Of a replica: what its streams and its compaction go by.
    replica: Option<(Arc<LinkEnd>, Arc<Reads>)>,
    /// Not one that a reload has brought.
    from_start: bool,
}

impl Entry {
    fn is(&self, link: &LinkName, side: Side) -> bool {
        self.handle.link == *link && self.handle.side == side
    }
}

/// A link whose task is over, though nobody had stopped it.
pub struct Ended {
    pub link: LinkName,
    pub side: Side,
    pub result: anyhow::Result<()>,
    /// It ran since the sidecar was started: no reload has brought it.
    pub from_start: bool,
}

/// All links, in the order of the configuration.
pub struct Links {
    etcd: Arc<Gate>,
    certificates: watch::Receiver<Arc<InUse>>,
    stop: CancellationToken,
    entries: Vec<Entry>,
    tasks: JoinSet<anyhow::Result<()>>,
    /// Ends that nobody was told of yet; at most one for each link.
    untold: VecDeque<Ended>,
    /// What earlier tasks of a link had counted.
    counted: BTreeMap<(LinkName, &'static str), Arc<LinkStatus>>,
    /// Who was turned away at the peer port, for the links that nobody has come to.
    turned_away: LastTurnedAway,
    shown: watch::Sender<Arc<[LinkHandle]>>,
    ends: watch::Sender<Vec<Arc<LinkEnd>>>,
    reads: watch::Sender<Vec<Arc<Reads>>>,
}

impl Links {
    pub fn new(etcd: Arc<Gate>, certificates: watch::Receiver<Arc<InUse>>, stop: CancellationToken) -> Self {
        Self {
            etcd,
            certificates,
            stop,
            entries: Vec::new(),
            tasks: JoinSet::new(),
            untold: VecDeque::new(),
            counted: BTreeMap::new(),
            turned_away: watch::channel(None).0,
            shown: watch::channel(Arc::from([])).0,
            ends: watch::channel(Vec::new()).0,
            reads: watch::channel(Vec::new()).0,
        }
    }

    /// For whoever turns a caller away.
    pub fn turned_away(&self) -> LastTurnedAway {
        self.turned_away.clone()
    }

    /// For whoever shows or commands them.
    pub fn shown(&self) -> watch::Receiver<Arc<[LinkHandle]>> {
        self.shown.subscribe()
    }

    /// For the services of the peer port.
    pub fn ends(&self) -> watch::Receiver<Vec<Arc<LinkEnd>>> {
        self.ends.subscribe()
    }

    /// For compaction.
    pub fn reads(&self) -> watch::Receiver<Vec<Arc<Reads>>> {
        self.reads.subscribe()
    }

    /// No task is left to join.
    pub fn is_over(&self) -> bool {
        self.tasks.is_empty() && self.untold.is_empty()
    }

    /// Opens every link of the configuration a sidecar starts with; [`Self::start`] starts them.
    pub async fn open_all(&mut self, config: &Config) -> anyhow::Result<()> {
        for send in &config.send {
            self.open_origin(config, send, When::InItsTask).await?;
        }
        for receive in &config.receive {
            self.open_replica(config, receive).await.with_context(|| format!("link {}", receive.link))?;
        }
        self.entries.iter_mut().for_each(|entry| entry.from_start = true);
        self.arrange(config);
        Ok(())
    }

    /// Opens a link of the configuration, once an earlier one of its name and side has ended; [`Self::start`] starts it. An error says why
    /// not, and is shown as the link's.
    pub async fn open(&mut self, config: &Config, link: &LinkName, side: Side, when: When) -> anyhow::Result<()> {
        let send = config.send.iter().find(|send| side == Side::Origin && send.link == *link);
        let receive = config.receive.iter().find(|receive| side == Side::Replica && receive.link == *link);
        let opened = match (self.end(link, side).await, send, receive) {
            (Ok(()), Some(send), _) => self.open_origin(config, send, when).await,
            (Ok(()), None, Some(receive)) => self.open_replica(config, receive).await,
            (ended, _, _) => ended,
        };
        if let Err(error) = &opened
            && !self.entries.iter().any(|entry| entry.is(link, side))
        {
            self.show_failed(
                config,
                link,
                side,
                format!("it could not be opened: {}; mend that, and reload", with_sources(error.as_ref())),
            );
        }
        opened
    }

    /// Starts what is open, and shows all links in the order of the configuration.
    pub fn start(&mut self, config: &Config) {
        for entry in &mut self.entries {
            if let Some(runner) = entry.runner.take() {
                entry.task = Some(self.tasks.spawn(runner).id());
            }
        }
        self.arrange(config);
    }

    /// Stops links in order: no stream of theirs begins any more, their tasks end, and what they have on disk stays there. An error names
    /// those that went on.
    pub async fn stop(&mut self, links: &[(LinkName, Side)]) -> Result<(), Vec<(LinkName, Side)>> {
        let is_meant = |entry: &Entry| links.iter().any(|(link, side)| entry.is(link, *side));
        // From here on the services answer for what they still know of them that it stops.
        self.entries.iter().filter(|entry| is_meant(entry)).for_each(|entry| entry.stop.cancel());
        let mut went_on = Vec::new();
        let deadline = tokio::time::Instant::now() + STOP_MAX;
        for (link, side) in links {
            let ending = Box::pin(self.end(link, *side));
            if !matches!(tokio::time::timeout_at(deadline, ending).await, Ok(Ok(()))) {
                went_on.push((link.clone(), *side));
            }
        }
        if went_on.is_empty() { Ok(()) } else { Err(went_on) }
    }

    /// Stops one link, and waits for its task and its stream. Its entry is gone then.
    async fn end(&mut self, link: &LinkName, side: Side) -> anyhow::Result<()> {
        let Some(entry) = self.entries.iter().find(|entry| entry.is(link, side)) else { return Ok(()) };
        entry.stop.cancel();
        let replica = entry.replica.as_ref().map(|(end, _)| end.clone());
        let ending = async {
            while self.entries.iter().any(|entry| entry.is(link, side) && entry.task.is_some()) {
                self.join().await;
            }
            if let Some(end) = replica {
                end.stream_ended().await;
            }
        };
        tokio::time::timeout(STOP_MAX, ending).await.map_err(|_| {
            anyhow::anyhow!("it has not stopped within {} s: restart the sidecar", STOP_MAX.as_secs_f32())
        })?;
        self.untold.retain(|ended| (&ended.link, ended.side) != (link, side));
        if let Some(at) = self.entries.iter().position(|entry| entry.is(link, side)) {
            let entry = self.entries.remove(at);
            self.counted.insert((link.clone(), side.as_str()), Arc::new(entry.handle.snapshot()));
        }
        Ok(())
    }

    /// The next link whose task ends by itself; `None`: none runs. Cancel-safe.
    pub async fn next_end(&mut self) -> Option<Ended> {
        while self.untold.is_empty() && !self.tasks.is_empty() {
            self.join().await;
        }
        self.untold.pop_front()
    }

    /// Notes the next end of a task. Cancel-safe.
    async fn join(&mut self) {
        let (id, result) = match self.tasks.join_next_with_id().await {
            None => return,
            Some(Ok((id, result))) => (id, result),
            Some(Err(error)) => (error.id(), Err(failed(&error))),
        };
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.task == Some(id)) {
            entry.task = None;
            let LinkHandle { link, side, .. } = &entry.handle;
            if let (Err(error), true) = (&result, entry.stop.is_cancelled()) {
                tracing::warn!(%link, side = side.as_str(), error = with_sources(error.as_ref()), "the link has not ended well");
            }
            self.untold.push_back(Ended { link: link.clone(), side: *side, result, from_start: entry.from_start });
        }
    }

    async fn open_origin(&mut self, config: &Config, send: &SendConfig, when: When) -> anyhow::Result<()> {
        let (status, watching) = watch::channel(LinkStatus::new(send.link.clone(), Side::Origin, send.peer.clone()));
        let (commands, incoming) = mpsc::channel(1);
        let (refresh, asked) = refresh::channel();
        let origin = OriginLink {
            etcd: self.etcd.clone(),
            limits: config.limits.clone(),
            dir: config.data_dir.join("origin").join(send.link.as_str()),
            certificates: self.certificates.clone(),
            region: config.region.clone(),
            node: config.node.clone(),
            link_back: config.link_back(send),
            send: send.clone(),
        };
        let (link, stop) = (send.link.clone(), self.stop.child_token());
        let context = format!("link {link}");
        let until = stop.clone();
        let runner: Runner = match when {
            When::Now => {
                let task = Box::pin(origin.open()).await?;
                Box::pin(async move { task.run(status, asked, incoming, until).await.context(context) })
            }
            When::InItsTask => {
                Box::pin(async move { origin.run(status, asked, incoming, until).await.context(context) })
            }
        };
        let before = self.before(&link, Side::Origin);
        let handle = LinkHandle::new((link, Side::Origin), watching, refresh, stop.clone());
        let handle = LinkHandle { before, commands: Some(commands), ..handle };
        let (runner, task, replica) = (Some(runner), None, None);
        self.entries.push(Entry { handle, stop, runner, task, replica, from_start: false });
        Ok(())
    }

    async fn open_replica(&mut self, config: &Config, receive: &ReceiveConfig) -> anyhow::Result<()> {
        let (status, watching) =
            watch::channel(LinkStatus::new(receive.link.clone(), Side::Replica, receive.peer.clone()));
        let (commands, incoming) = mpsc::channel(1);
        let (refresh, asked) = refresh::channel();
        let (link, stop) = (receive.link.clone(), self.stop.child_token());
        let replica = ReplicaLink {
            etcd: self.etcd.clone(),
            limits: config.limits.clone(),
            dir: config.data_dir.join("replica").join(link.as_str()),
            sends_back: config.sends_back(receive),
            receive: receive.clone(),
            commands: incoming,
            turned_away: self.turned_away.subscribe(),
            stop: stop.clone(),
        };
        let (end, task) = Box::pin(replica.open()).await?;
        let reads = Arc::new(task.reads());
        let runner = {
            let (link, stop) = (link.clone(), stop.clone());
            async move { task.run(status, asked, stop).await.with_context(|| format!("link {link}")) }
        };
        let before = self.before(&link, Side::Replica);
        let handle = LinkHandle::new((link, Side::Replica), watching, refresh, stop.clone());
        let handle = LinkHandle { before, replica_commands: Some(commands), ..handle };
        let (runner, task, replica): (Option<Runner>, _, _) = (Some(Box::pin(runner)), None, Some((end, reads)));
        self.entries.push(Entry { handle, stop, runner, task, replica, from_start: false });
        Ok(())
    }

    /// A link that could not be opened is shown as stopped, with the reason.
    fn show_failed(&mut self, config: &Config, link: &LinkName, side: Side, reason: String) {
        let sent = config.send.iter().filter(|_| side == Side::Origin).find(|send| send.link == *link);
        let received = config.receive.iter().filter(|_| side == Side::Replica).find(|receive| receive.link == *link);
        let peer = sent.map(|send| &send.peer).or(received.map(|receive| &receive.peer));
        let mut status = LinkStatus::new(link.clone(), side, peer.cloned().unwrap_or_default());
        (status.state, status.reason) = (LinkState::Stopped, reason);
        let stop = self.stop.child_token();
        let (status, refresh) = (watch::channel(status).1, refresh::channel().0);
        let handle = LinkHandle::new((link.clone(), side), status, refresh, stop.clone());
        let handle = LinkHandle { before: self.before(link, side), ..handle };
        self.entries.push(Entry { handle, stop, runner: None, task: None, replica: None, from_start: false });
    }

    fn before(&self, link: &LinkName, side: Side) -> Option<Arc<LinkStatus>> {
        self.counted.get(&(link.clone(), side.as_str())).cloned()
    }

    /// Shows what there is, in the order of the configuration.
    fn arrange(&mut self, config: &Config) {
        // Last what does not run: it is not among what is configured to.
        let place = |entry: &Entry| match entry.handle.side {
            Side::Origin => config.send.iter().position(|send| send.link == entry.handle.link),
            Side::Replica => config.receive.iter().position(|receive| receive.link == entry.handle.link),
        };
        let place = |entry: &Entry| (entry.handle.side == Side::Replica, place(entry).unwrap_or(usize::MAX));
        self.entries.sort_by_key(place);
        let replicas = || self.entries.iter().filter_map(|entry| entry.replica.as_ref());
        self.ends.send_replace(replicas().map(|(end, _)| end.clone()).collect());
        self.reads.send_replace(replicas().map(|(_, reads)| reads.clone()).collect());
        self.shown.send_replace(self.entries.iter().map(|entry| entry.handle.clone()).collect());
    }
}

fn failed(error: &JoinError) -> anyhow::Error {
    anyhow::anyhow!("a link's task failed: {error}")
}
