//! Job: the certificates in use, and their change while connections stand.
//! Input: the configured files, read when their folders change and every few seconds. Output: the last sound set, to whoever shakes hands
//! or holds a connection; what is known of it, for status and metrics.
//! Edge: reads files, watches folders.
//! Always true: what is in use was loaded whole and fits together; a set that is not sound leaves the last one in use, and is told.

use super::recheck::{As, Peer};
use super::{PeerIdentity, TlsError, client_verifier, server_config_from, server_verifier};
use crate::certs::load::{self, Credentials, TlsFiles, rfc3339};
use crate::config::TlsConfig;
use crate::metrics;
use crate::model::CertificatesStatus;
use notify::event::AccessKind;
use notify::{EventKind, RecursiveMode, Watcher};
use rustls::ServerConfig;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{ServerName, UnixTime};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
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

/// The files of one sidecar, and the set of them in use.
pub struct Certificates {
    files: TlsConfig,
    in_use: watch::Sender<Arc<InUse>>,
    status: watch::Sender<CertificatesStatus>,
}

/// What the last looks found.
#[derive(Default)]
struct Looks {
    /// Why the files are not sound; told once a second look says so too, since files are replaced one after the other.
    refused: Option<String>,
    told: Option<String>,
}

impl Certificates {
    /// Loads the files for the first time. That they are what peers would talk to is checked with the configuration.
    pub fn load(files: &TlsConfig) -> Result<Self, TlsError> {
        let in_use = match read(files) {
            Err(TlsError::Changing) => read(files)?,
            in_use => in_use?,
        };
        let status = watch::channel(status_of(&in_use.credentials)).0;
        Ok(Self { files: files.clone(), in_use: watch::channel(Arc::new(in_use)).0, status })
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
        let (changed, mut changes) = watch::channel(());
        let watcher = watch_folders(&self.files, changed);
        if let Err(error) = &watcher {
            tracing::warn!(%error, "the folders of the certificates cannot be watched; their files are read every {} s", LOOK_EVERY.as_secs());
        }
        let mut looks = Looks::default();
        metrics::record_certificates(&self.status.borrow());
        loop {
            let next = async {
                tokio::select! {
                    Ok(()) = changes.changed() => tokio::time::sleep(SETTLE).await,
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                }
                changes.mark_unchanged();
                self.look(&mut looks).await;
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = next => {}
            }
        }
    }

    /// Refuses what peers would not talk to. They know this sidecar by its names: a certificate without them would be refused everywhere.
    fn successor(&self, before: &Credentials, found: &Credentials) -> Result<(), TlsError> {
        found.check((&self.files).into(), OffsetDateTime::now_utc())?;
        let lost = before.identity.telling_sans().into_iter().find(|san| !found.identity.bears(san));
        lost.map_or(Ok(()), |san| Err(TlsError::NameLost { san }))
    }

    async fn look(&self, looks: &mut Looks) {
        let files = self.files.clone();
        let Ok(found) = tokio::task::spawn_blocking(move || read(&files)).await else { return };
        let before = self.in_use.borrow().clone();
        match found.and_then(|found| self.successor(&before.credentials, &found.credentials).map(|()| found)) {
            Ok(found) => {
                *looks = Looks::default();
                if found.fingerprint != before.fingerprint {
                    let identity = &found.credentials.identity;
                    let changed = changed_files(&before.fingerprint, &found.fingerprint);
                    tracing::info!(%changed, subject = %identity.subject, not_after = %rfc3339(identity.not_after), "new certificates are in use");
                    let (fresh, reloads) = (status_of(&found.credentials), self.status.borrow().reloads + 1);
                    self.status.send_replace(CertificatesStatus { reloads, ..fresh });
                    self.in_use.send_replace(Arc::new(found));
                } else {
                    self.status.send_if_modified(|status| !std::mem::take(&mut status.refused).is_empty());
                }
            }
            Err(error) => {
                let reason = error.to_string();
                let again = looks.refused.as_ref() == Some(&reason);
                looks.refused = Some(reason.clone());
                if again && looks.told.replace(reason.clone()).as_ref() != Some(&reason) {
                    tracing::warn!(%reason, "new certificates are refused; the last ones stay in use");
                    self.status.send_modify(|status| status.refused = reason);
                }
            }
        }
        metrics::record_certificates(&self.status.borrow());
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

fn status_of(credentials: &Credentials) -> CertificatesStatus {
    let identity = &credentials.identity;
    CertificatesStatus {
        subject: identity.subject.clone(),
        sans: identity.sans.clone(),
        own_expires_at: identity.not_after.unix_timestamp(),
        ca_expires_at: credentials.ca_not_after.unix_timestamp(),
        crl_expires_at: credentials.crl_next_update.map(OffsetDateTime::unix_timestamp),
        refused: String::new(),
        reloads: 0,
    }
}

/// Watches the folder of each file: a file that is replaced is another file, and Kubernetes swaps a link beside it.
fn watch_folders(files: &TlsConfig, changed: watch::Sender<()>) -> Result<impl Watcher + use<>, notify::Error> {
    // Our own reading opens files.
    let is_change =
        |event: &notify::Event| !matches!(event.kind, EventKind::Access(AccessKind::Open(_) | AccessKind::Read));
    let mut watcher = notify::recommended_watcher(move |event: Result<notify::Event, notify::Error>| {
        if event.as_ref().map_or(true, is_change) {
            changed.send_replace(());
        }
    })?;
    let folders: BTreeSet<PathBuf> =
        files_of(files).filter_map(|(_, path)| path.parent()).map(Path::to_owned).collect();
    for folder in folders {
        let folder = if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder };
        watcher.watch(&folder, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}

#[cfg(test)]
mod tests {
    use super::*;

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
