//! Job: the certificates in use, and their change while connections stand.
//! Input: the configured files, looked at when their folders change and every few seconds. Output: the last sound set, to whoever shakes hands
//! or holds a connection; what is known of it, for status and metrics.
//! Edge: reads files, watches folders.
//! Always true: what is in use was loaded whole and fits together; a set that is not sound leaves the last one in use, and is told.

use super::recheck::{As, Peer};
use super::stamps::Stamps;
use super::{EtcdFiles, PeerIdentity, TlsError, client_verifier, server_config_from, server_verifier};
use crate::certs::load::{self, Credentials, TlsFiles, rfc3339};
use crate::config::{EtcdConfig, TlsConfig};
use crate::metrics;
use crate::model::CertificatesStatus;
use notify::event::AccessKind;
use notify::{EventKind, RecursiveMode, Watcher};
use rustls::ServerConfig;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{ServerName, UnixTime};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Also where no change was told: some file systems tell none, and a folder may be replaced as a whole.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Several files change one after the other.
const SETTLE: Duration = Duration::from_millis(200);
/// Whoever answers to a peer by name: the names that count are SANs, which are compared apart.
const ANY_NAME: &str = "localhost";

/// One sound set of files, and what handshakes need of it.
pub struct InUse {
    pub credentials: Credentials,
    pub server: Arc<ServerConfig>,
    fingerprint: Fingerprint,
}

/// Each file's hash, in the order of `files_of`; the CRL has none where none is configured.
type Fingerprint = Vec<(&'static str, blake3::Hash)>;

impl InUse {
    /// Judges a peer that is connected as a new handshake would, but for its certificate's end: a connection outlives that.
    pub fn judge(&self, peer: &Peer) -> Result<(), TlsError> {
        let Some((leaf, intermediates)) = peer.chain.split_first() else {
            return Err(TlsError::Rustls(rustls::Error::NoCertificatesPresented));
        };
        let ends = PeerIdentity::from_der(leaf).ok().and_then(|i| u64::try_from(i.not_after.unix_timestamp()).ok());
        let now = UnixTime::now().as_secs().min(ends.unwrap_or(u64::MAX));
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
        match &peer.of {
            As::Client => client_verifier(&self.credentials)?.verify_client_cert(leaf, intermediates, now).map(drop)?,
            As::Server(names) => {
                let name = ServerName::try_from(ANY_NAME).map_err(|e| TlsError::Name(e.to_string()))?;
                let verifier = server_verifier(&self.credentials, names.clone())?;
                verifier.verify_server_cert(leaf, intermediates, &name, &[], now).map(drop)?;
            }
        }
        Ok(())
    }
}

/// The files of one sidecar, and the sets of them in use: one for peers and operators, one for its etcd. A set that is not sound does not keep
/// the other from being taken.
pub struct Certificates {
    files: TlsConfig,
    etcd: EtcdConfig,
    in_use: watch::Sender<Arc<InUse>>,
    etcd_in_use: watch::Sender<Arc<EtcdFiles>>,
    status: watch::Sender<CertificatesStatus>,
}

/// What the last looks at one set found.
#[derive(Default)]
struct Looks {
    /// Why the files are not sound; told once a second look says so too, since files are replaced one after the other.
    refused: Option<String>,
    told: Option<String>,
}

impl Looks {
    /// What was found last is not in use.
    fn refuses(&self) -> bool {
        self.refused.is_some()
    }

    /// `outcome`: whether something new was taken. True if so.
    fn saw(&mut self, outcome: Result<bool, TlsError>) -> bool {
        let error = match outcome {
            Ok(taken) => {
                *self = Self::default();
                return taken;
            }
            Err(error) => error,
        };
        let reason = error.to_string();
        let again = self.refused.as_ref() == Some(&reason);
        self.refused = Some(reason.clone());
        if again && self.told.replace(reason.clone()).as_ref() != Some(&reason) {
            tracing::warn!(%reason, "new certificates are refused; the last ones stay in use");
        }
        false
    }
}

impl Certificates {
    /// Loads the files for the first time. That they are what peers would talk to is checked with the configuration.
    pub fn load(files: &TlsConfig, etcd: &EtcdConfig) -> Result<Self, TlsError> {
        let in_use = unchanged(|| read(files))?;
        let etcd_in_use = unchanged(|| EtcdFiles::load(etcd))?;
        let status = watch::channel(status_of(&in_use.credentials, &etcd_in_use)).0;
        Ok(Self {
            files: files.clone(),
            etcd: etcd.clone(),
            in_use: watch::channel(Arc::new(in_use)).0,
            etcd_in_use: watch::channel(Arc::new(etcd_in_use)).0,
            status,
        })
    }

    /// What connections to etcd are made with, and each set that follows.
    pub fn etcd_in_use(&self) -> watch::Receiver<Arc<EtcdFiles>> {
        self.etcd_in_use.subscribe()
    }

    /// The set in use, and each that follows.
    pub fn in_use(&self) -> watch::Receiver<Arc<InUse>> {
        self.in_use.subscribe()
    }

    pub fn status(&self) -> watch::Receiver<CertificatesStatus> {
        self.status.subscribe()
    }

    /// Takes new files into use until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        let (changed, changes) = watch::channel(());
        let watcher = watch_folders(&self.paths(), changed);
        if let Err(error) = &watcher {
            tracing::warn!(%error, "the folders of the certificates cannot be watched; their files are read every {} s", LOOK_EVERY.as_secs());
        }
        self.follow(changes, LOOK_EVERY, stop).await;
    }

    /// Looks whenever a change is told, and each so often.
    async fn follow(&self, mut changes: watch::Receiver<()>, every: Duration, stop: CancellationToken) {
        let mut looks = [Looks::default(), Looks::default()];
        let stamps = Arc::new(Mutex::new(Stamps::new(self.paths())));
        metrics::record_certificates(&self.status.borrow());
        loop {
            let next = async {
                let told = tokio::select! {
                    Ok(()) = changes.changed() => {
                        tokio::time::sleep(SETTLE).await;
                        true
                    }
                    () = tokio::time::sleep(every) => false,
                };
                changes.mark_unchanged();
                self.look(&mut looks, &stamps, told).await;
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = next => {}
            }
        }
    }

    fn paths(&self) -> Vec<PathBuf> {
        let paths = files_of(&self.files).map(|(_, path)| path).chain(EtcdFiles::paths(&self.etcd));
        paths.map(Path::to_owned).collect()
    }

    /// Refuses what peers would not talk to. They know this sidecar by its names: a certificate without them would be refused everywhere.
    fn successor(&self, before: &Credentials, found: &Credentials) -> Result<(), TlsError> {
        let (files, now): (TlsFiles<'_>, _) = ((&self.files).into(), OffsetDateTime::now_utc());
        found.check(files, now)?;
        // A list that has gone out of date keeps no new pair out.
        if let Some(crl) = files.crl
            && (&found.crls, &found.authorities) != (&before.crls, &before.authorities)
        {
            found.check_lists(crl, now)?;
        }
        let lost = before.identity.telling_sans().into_iter().find(|san| !found.identity.bears(san));
        lost.map_or(Ok(()), |san| Err(TlsError::NameLost { san }))
    }

    /// `told`: of a change. Otherwise files that are the ones that were read, and taken, are not read again.
    async fn look(&self, [peers, to_etcd]: &mut [Looks; 2], stamps: &Arc<Mutex<Stamps>>, told: bool) {
        let (files, etcd, stamps) = (self.files.clone(), self.etcd.clone(), stamps.clone());
        let in_any_case = told || peers.refuses() || to_etcd.refuses();
        let read = tokio::task::spawn_blocking(move || {
            let may_be_new = stamps.lock().unwrap_or_else(PoisonError::into_inner).ask_to_read();
            (may_be_new || in_any_case).then(|| (read(&files), EtcdFiles::load(&etcd)))
        });
        let Ok(Some((found, of_etcd))) = read.await else { return };
        let before = self.in_use.borrow().clone();
        let found = found.and_then(|found| self.successor(&before.credentials, &found.credentials).map(|()| found));
        let taken = [
            peers.saw(found.map(|found| self.take(&before, found))),
            to_etcd.saw(of_etcd.map(|found| self.take_for_etcd(found))),
        ];
        let refused: Vec<&str> = [&*peers, &*to_etcd].into_iter().filter_map(|looks| looks.told.as_deref()).collect();
        let now = CertificatesStatus {
            reloads: self.status.borrow().reloads + taken.into_iter().filter(|taken| *taken).count() as u64,
            refused: refused.join("; "),
            ..status_of(&self.in_use.borrow().credentials, &self.etcd_in_use.borrow())
        };
        self.status.send_if_modified(|before| std::mem::replace(before, now.clone()) != now);
        metrics::record_certificates(&self.status.borrow());
    }

    /// True if they are others than before.
    fn take(&self, before: &InUse, found: InUse) -> bool {
        if found.fingerprint == before.fingerprint {
            return false;
        }
        let identity = &found.credentials.identity;
        let changed = changed_files(&before.fingerprint, &found.fingerprint);
        tracing::info!(%changed, subject = %identity.subject, not_after = %rfc3339(identity.not_after), "new certificates are in use");
        self.in_use.send_replace(Arc::new(found));
        true
    }

    /// The same for etcd. A connection that stands goes on with what it was made with, and so does etcd with it.
    fn take_for_etcd(&self, found: EtcdFiles) -> bool {
        let before = self.etcd_in_use.borrow().clone();
        if found == *before {
            return false;
        }
        let not_after = found.pair_not_after.map(rfc3339);
        tracing::info!(changed = %found.changed(&before), ?not_after, "new certificates are in use for etcd, from the next connection on");
        self.etcd_in_use.send_replace(Arc::new(found));
        true
    }
}

/// Files that are replaced just now are read once more.
fn unchanged<T>(read: impl Fn() -> Result<T, TlsError>) -> Result<T, TlsError> {
    match read() {
        Err(TlsError::Changing) => read(),
        read => read,
    }
}

/// Reads all files: what was loaded is what has this fingerprint.
fn read(files: &TlsConfig) -> Result<InUse, TlsError> {
    let fingerprint = fingerprint_of(files)?;
    let credentials = Credentials::load(files.into())?;
    if fingerprint_of(files)? != fingerprint {
        return Err(TlsError::Changing);
    }
    let server = server_config_from(&credentials)?;
    Ok(InUse { credentials, server, fingerprint })
}

fn fingerprint_of(files: &TlsConfig) -> Result<Fingerprint, TlsError> {
    files_of(files).map(|(name, path)| Ok((name, blake3::hash(&load::read(path)?)))).collect()
}

/// The names of the files that are others now, as the configuration has them.
fn changed_files(before: &[(&'static str, blake3::Hash)], found: &[(&'static str, blake3::Hash)]) -> String {
    let changed = found.iter().filter(|file| !before.contains(file));
    changed.map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

fn files_of(files: &TlsConfig) -> impl Iterator<Item = (&'static str, &Path)> {
    let TlsFiles { ca, cert, key, crl } = files.into();
    [("ca", ca), ("cert", cert), ("key", key)].into_iter().chain(crl.map(|crl| ("crl", crl)))
}

fn status_of(credentials: &Credentials, etcd: &EtcdFiles) -> CertificatesStatus {
    let identity = &credentials.identity;
    CertificatesStatus {
        subject: identity.subject.clone(),
        sans: identity.sans.clone(),
        own_expires_at: identity.not_after.unix_timestamp(),
        ca_expires_at: credentials.ca_not_after.unix_timestamp(),
        crl_expires_at: credentials.crl_next_update.map(OffsetDateTime::unix_timestamp),
        etcd_expires_at: etcd.pair_not_after.map(OffsetDateTime::unix_timestamp),
        etcd_ca_expires_at: etcd.ca_not_after.map(OffsetDateTime::unix_timestamp),
        refused: String::new(),
        reloads: 0,
    }
}

/// Watches the folder of each file: a file that is replaced is another file, and Kubernetes swaps a link beside it.
fn watch_folders(paths: &[PathBuf], changed: watch::Sender<()>) -> Result<impl Watcher + use<>, notify::Error> {
    // Our own reading opens files.
    let is_change =
        |event: &notify::Event| !matches!(event.kind, EventKind::Access(AccessKind::Open(_) | AccessKind::Read));
    let mut watcher = notify::recommended_watcher(move |event: Result<notify::Event, notify::Error>| {
        if event.as_ref().map_or(true, is_change) {
            changed.send_replace(());
        }
    })?;
    let folders: BTreeSet<&Path> = paths.iter().filter_map(|path| path.parent()).collect();
    for folder in folders {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        watcher.watch(folder, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs;
    use crate::certs::issue::{IssueRequest, Issuer};
    use tempfile::TempDir;

    /// Long for a file to be read.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// One sidecar's files and what is in use of them.
    struct Place {
        dir: TempDir,
        certificates: Certificates,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            certs::dev(dir.path(), &["us-east-1"]).unwrap();
            let file = |name: &str| dir.path().join(name);
            let files = TlsConfig {
                ca: file("ca.pem"),
                cert: file("us-east-1.pem"),
                key: file("us-east-1.key"),
                crl: None,
                admins: Vec::new(),
                viewers: Vec::new(),
            };
            let certificates = Certificates::load(&files, &EtcdConfig::default()).unwrap();
            Self { dir, certificates }
        }

        fn renew(&self) {
            let file = |name: &str| self.dir.path().join(name);
            let issuer = Issuer::load(&file("ca.pem"), &file("ca.key")).unwrap();
            let pair = issuer.issue(&IssueRequest::region("us-east-1")).unwrap();
            std::fs::write(file("us-east-1.pem"), &pair.cert_pem).unwrap();
            std::fs::write(file("us-east-1.key"), &pair.key_pem).unwrap();
        }

        /// Renews once the looks go on, and waits for the new pair to be in use.
        async fn is_taken(&self, changes: watch::Receiver<()>, every: Duration) -> bool {
            let mut status = self.certificates.status();
            let taken = async {
                self.renew();
                status.wait_for(|status| status.reloads == 1).await.is_ok()
            };
            tokio::select! {
                biased;
                () = self.certificates.follow(changes, every, CancellationToken::new()) => false,
                taken = tokio::time::timeout(PATIENCE, taken) => taken.unwrap_or(false),
            }
        }
    }

    #[tokio::test]
    async fn a_change_that_no_file_system_tells_of_is_found_at_the_next_look() {
        let (_silent, changes) = watch::channel(());
        assert!(Place::new().is_taken(changes, Duration::from_millis(5)).await);
    }

    #[tokio::test]
    async fn a_change_that_is_told_of_waits_for_no_look() {
        let place = Place::new();
        let (changed, changes) = watch::channel(());
        let _watcher = watch_folders(&place.certificates.paths(), changed).unwrap();
        assert!(place.is_taken(changes, Duration::from_secs(3_600)).await);
    }

    #[test]
    fn the_files_that_changed_are_named() {
        let files = |contents: [&str; 3]| -> Fingerprint {
            ["ca", "cert", "key"]
                .into_iter()
                .zip(contents)
                .map(|(name, text)| (name, blake3::hash(text.as_bytes())))
                .collect()
        };
        let before = files(["1", "2", "3"]);
        assert_eq!(changed_files(&before, &before), "");
        assert_eq!(changed_files(&before, &files(["1", "4", "5"])), "cert, key");
        assert_eq!(changed_files(&before, &files(["3", "2", "1"])), "ca, key", "a file's content in another's place");
        let mut with_crl = before.clone();
        with_crl.push(("crl", blake3::hash(b"6")));
        assert_eq!(changed_files(&before, &with_crl), "crl");
    }
}
