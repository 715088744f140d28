//! Job: keep this sidecar's pair fresh: ask a PKI for it at the start and at two thirds of its life, and put it where `tls` names it.
//! Input: the configuration of `tls` and `[tls.pki]`, the set in use. Output: files; log lines and metrics when it does not succeed.
//! Edge: asks over HTTP, writes files; what is taken into use is `tls/reload.rs`'s business.
//! Always true: an answer that peers would refuse changes no file; a failure is tried again, less and less often, until it is mended.

pub mod answer;
mod ask;
mod files;
mod life;

use crate::certs::load::{self, Credentials, LoadError};
use crate::config::{PkiConfig, TlsConfig};
use crate::metrics;
use crate::retry::Backoff;
use crate::tls::reload::InUse;
use answer::Unsound;
use files::WriteError;
use life::{Life, Stage, Telling};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Between two tries that failed: a PKI that restarts is met soon, and one that is gone is asked twelve times an hour.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(300);
/// The clock is looked at so often, since a machine may sleep and a clock may be set.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// New files are noticed within two seconds.
const TAKEN_WITHIN: Duration = Duration::from_secs(15);

/// Why there is no new pair, in one line.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("the token in {path} cannot be used: {reason}")]
    Token { path: PathBuf, reason: String },
    #[error(transparent)]
    File(#[from] LoadError),
    #[error("{address} cannot be asked: {reason}")]
    Unreachable { address: String, reason: String },
    #[error("{address} did not answer within {} s", timeout.as_secs())]
    Silent { address: String, timeout: Duration },
    #[error("{address} answered {status} to {path}: {reason}")]
    Refused { address: String, path: String, status: u16, reason: String },
    #[error("the answer of {address} is refused: {source}")]
    Unsound { address: String, source: Unsound },
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("the pair that was issued is in its files and was not taken into use: the log says why")]
    NotTaken,
    #[error("a thread of ours failed ({0}); please report it")]
    Thread(#[from] tokio::task::JoinError),
}

/// The PKI of one sidecar.
#[derive(Debug, Clone)]
pub struct Pki {
    tls: TlsConfig,
    pki: PkiConfig,
}

impl Pki {
    pub fn new(tls: TlsConfig, pki: PkiConfig) -> Self {
        Self { tls, pki }
    }

    /// Returns as soon as the files hold a pair that peers would talk to: at once, or when the PKI has issued one.
    pub async fn prepare(&self) {
        let (mut backoff, mut telling) = (Backoff::new(RETRY_FIRST, RETRY_MAX), Telling::default());
        while let Err(lacking) = self.look().await {
            let found = match self.renew(&[]).await {
                Ok(()) => self.look().await,
                Err(error) => Err(error.to_string()),
            };
            let Err(reason) = found else {
                tracing::info!(pki = %self.pki.address, %lacking, "the PKI issued this sidecar's certificate");
                return;
            };
            metrics::count_pki_failure();
            if let Some(failures) = telling.failed(&reason, Stage::Over) {
                tracing::warn!(%lacking, %reason, failures, "there is no certificate to start with; the PKI is asked again");
            }
            tokio::time::sleep(backoff.after_failure(rand::random())).await;
        }
    }

    /// Keeps the pair in use fresh until `stop`.
    pub async fn run(&self, mut in_use: watch::Receiver<Arc<InUse>>, stop: CancellationToken) {
        let (mut backoff, mut telling) = (Backoff::new(RETRY_FIRST, RETRY_MAX), Telling::default());
        loop {
            let before = in_use.borrow_and_update().credentials.identity.clone();
            let life = Life::of(&before);
            metrics::record_renewal(life.renew_at().unix_timestamp());
            let stage = life.stage(OffsetDateTime::now_utc());
            let step = async {
                if stage == Stage::Fresh {
                    return life.renew_in(OffsetDateTime::now_utc()).min(LOOK_EVERY);
                }
                let renewed = match self.renew(&before.telling_sans()).await {
                    Ok(()) => taken(&mut in_use).await,
                    Err(error) => Err(error),
                };
                let Err(error) = renewed else {
                    backoff.succeeded();
                    let failures = telling.succeeded();
                    tracing::info!(pki = %self.pki.address, failures, "the PKI renewed this sidecar's certificate");
                    return Duration::ZERO;
                };
                metrics::count_pki_failure();
                self.tell(&mut telling, &error, stage, life);
                life.retry_in(OffsetDateTime::now_utc(), backoff.after_failure(rand::random()))
            };
            let wait = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                wait = step => wait,
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                // Somebody else may have put a pair there.
                changed = in_use.changed(), if !wait.is_zero() => if changed.is_err() { return },
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Asks once, and writes what is sound. `known_by`: names that the certificate must bear beside those that are configured.
    pub async fn renew(&self, known_by: &[String]) -> Result<(), PkiError> {
        let issued = ask::ask(&self.pki).await?;
        let (this, known_by) = (self.clone(), known_by.to_vec());
        let kept = tokio::task::spawn_blocking(move || {
            let roots = if this.tls.ca.exists() { Some(load::load_roots(&this.tls.ca)?) } else { None };
            let names = [&this.pki.names[..], &known_by].concat();
            answer::judge(&issued, &names, roots.as_ref(), OffsetDateTime::now_utc())
                .map_err(|source| PkiError::Unsound { address: this.pki.address.clone(), source })?;
            Ok::<(), PkiError>(files::keep(&this.tls, &issued)?)
        });
        let kept = kept.await?;
        if kept.is_ok() {
            metrics::count_pki_certificate();
        }
        kept
    }

    /// Whether the files hold a pair that will do, after what an earlier process left half done; else what is lacking.
    async fn look(&self) -> Result<(), String> {
        let this = self.clone();
        let look = tokio::task::spawn_blocking(move || {
            files::complete(&this.tls).map_err(|e| e.to_string())?;
            let files = (&this.tls).into();
            let found = Credentials::load(files).map_err(|e| e.to_string())?;
            found.check(files, OffsetDateTime::now_utc()).map_err(|e| e.to_string())?;
            let absent = this.pki.names.iter().find(|name| !found.identity.bears(name));
            absent.map_or(Ok(()), |name| Err(format!("the certificate does not name {name}, as tls.pki.names wants")))
        });
        look.await.unwrap_or_else(|e| Err(e.to_string()))
    }

    fn tell(&self, telling: &mut Telling, error: &PkiError, stage: Stage, life: Life) {
        let reason = error.to_string();
        let Some(failures) = telling.failed(&reason, stage) else { return };
        let not_after = load::rfc3339(life.until());
        if stage == Stage::Due {
            tracing::warn!(%reason, failures, %not_after, "the PKI did not renew this sidecar's certificate; it is asked again");
        } else {
            tracing::error!(%reason, failures, %not_after, "this sidecar's certificate ends, and the PKI does not renew it: peers will refuse this sidecar from then on");
        }
    }
}

/// Waits until what is in the files is in use.
async fn taken(in_use: &mut watch::Receiver<Arc<InUse>>) -> Result<(), PkiError> {
    match tokio::time::timeout(TAKEN_WITHIN, in_use.changed()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(PkiError::NotTaken),
    }
}
