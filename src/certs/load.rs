//! Job: load a CA, a certificate with its key and a revocation list from PEM files, and check that they fit together.
//! Input: paths. Output: `Credentials`, or what is wrong with which file and what to do.
//! Always true: the key belongs to the certificate; an error names the file and never shows what is in it.

use super::identity::{IdentityError, PeerIdentity};
use super::revocation;
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::prelude::{CertificateRevocationList, FromDer};

/// Largest PEM file that is read: a CA bundle has a few KiB, a revocation list can have a few MiB.
const PEM_BYTES_MAX: u64 = 16 << 20;

/// Where one end of a TLS connection finds its files.
#[derive(Debug, Clone, Copy)]
pub struct TlsFiles<'a> {
    pub ca: &'a Path,
    pub cert: &'a Path,
    pub key: &'a Path,
    pub crl: Option<&'a Path>,
}

/// Whoever checks for a service may be in another group than it.
fn whose_group(mode: u32) -> &'static str {
    if mode & 0o37 == 0 { ", or do this as the user whom its group is for" } else { "" }
}

/// What those files hold, checked; everything that a TLS configuration is built from.
#[derive(Clone)]
pub struct Credentials {
    pub roots: Arc<RootCertStore>,
    /// The CA's certificates, as the file has them.
    pub authorities: Vec<CertificateDer<'static>>,
    pub crls: Vec<CertificateRevocationListDer<'static>>,
    pub certified_key: Arc<CertifiedKey>,
    pub identity: PeerIdentity,
    /// When the first of the CA's certificates ends.
    pub ca_not_after: OffsetDateTime,
    /// When the first revocation list is out of date; `None`: none is given, or it does not say.
    pub crl_next_update: Option<OffsetDateTime>,
}

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{} cannot be read: {source}", absolute(path))]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is open to others (mode {mode:04o}): chmod 600 {path}{}", whose_group(*mode))]
    Open { path: PathBuf, mode: u32 },
    #[error("{path} is larger than {PEM_BYTES_MAX} bytes: give a PEM file")]
    TooLarge { path: PathBuf },
    #[error("{path} holds no {what}: give a PEM file with a {what}")]
    Missing { path: PathBuf, what: &'static str },
    #[error("{path} is not sound PEM: {reason}")]
    Pem { path: PathBuf, reason: &'static str },
    #[error("{path} holds a certificate that cannot be used: {source}")]
    Certificate { path: PathBuf, source: IdentityError },
    #[error("{path} holds a CA certificate that cannot be trusted: {reason}")]
    Root { path: PathBuf, reason: String },
    #[error("{key} is not the key of {cert}: give the pair that was issued together")]
    Mismatch { cert: PathBuf, key: PathBuf },
    #[error("{path} holds a private key that cannot be used: {reason}")]
    Key { path: PathBuf, reason: String },
    #[error("{path} expired on {not_after}: issue a new one, or set this machine's clock if it is ahead")]
    Expired { path: PathBuf, not_after: String },
    #[error("{path} is not valid before {not_before}: check this machine's clock, or issue a new one")]
    NotYetValid { path: PathBuf, not_before: String },
    #[error(
        "{path} is not issued for use as a {usage}: issue one with the extended key usages serverAuth and clientAuth"
    )]
    Purpose { path: PathBuf, usage: &'static str },
    #[error("{path} was not issued by the configured CA ({reason}): every peer that trusts this CA would refuse it")]
    Chain { path: PathBuf, reason: String },
    #[error("{path} {reason}")]
    Revocation { path: PathBuf, reason: String },
}

/// Where a file was looked for: a configuration's relative paths are relative to the current directory, which not everybody has in mind.
fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

impl LoadError {
    /// The file at fault.
    pub fn path(&self) -> &Path {
        match self {
            LoadError::Read { path, .. }
            | LoadError::Open { path, .. }
            | LoadError::TooLarge { path }
            | LoadError::Missing { path, .. }
            | LoadError::Pem { path, .. }
            | LoadError::Certificate { path, .. }
            | LoadError::Root { path, .. }
            | LoadError::Key { path, .. }
            | LoadError::Expired { path, .. }
            | LoadError::NotYetValid { path, .. }
            | LoadError::Purpose { path, .. }
            | LoadError::Chain { path, .. }
            | LoadError::Revocation { path, .. } => path,
            LoadError::Mismatch { key, .. } => key,
        }
    }
}

impl Credentials {
    /// Reads all files. The certificate's dates are not checked here, see [`check_dates`].
    pub fn load(files: TlsFiles<'_>) -> Result<Self, LoadError> {
        let roots = Arc::new(load_roots(files.ca)?);
        let authorities = load_certificates(files.ca)?;
        let ca_not_after = ca_not_after(files.ca)?;
        let (certified_key, identity) = load_pair(files.cert, files.key)?;
        let crls = match files.crl {
            Some(path) => load_crls(path)?,
            None => Vec::new(),
        };
        let crl_next_update = crls.iter().filter_map(next_update).min();
        let certified_key = Arc::new(certified_key);
        Ok(Self { roots, authorities, crls, certified_key, identity, ca_not_after, crl_next_update })
    }

    /// Refuses what no peer with the same CA would talk to at `now`, and a key that others may read.
    pub fn check(&self, files: TlsFiles<'_>, now: OffsetDateTime) -> Result<(), LoadError> {
        check_secret(files.key)?;
        check_dates(files.cert, &self.identity, now)?;
        check_purpose(files.cert, &self.identity)?;
        check_chain(files.cert, &self.certified_key.cert, self.roots.as_ref().clone(), now)
    }

    /// Refuses revocation lists by which everybody with a certificate of this one's CA would be refused at `now`. `path`: their file.
    pub fn check_lists(&self, path: &Path, now: OffsetDateTime) -> Result<(), LoadError> {
        revocation::check(path, &self.crls, &self.certified_key.cert, self.roots.clone(), now)
    }
}

/// The one provider of cryptography in this process; the process default is never consulted.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// All certificates of a CA file as trust anchors; each must be usable.
pub fn load_roots(path: &Path) -> Result<RootCertStore, LoadError> {
    let mut roots = RootCertStore::empty();
    for certificate in load_certificates(path)? {
        let root = |e: rustls::Error| LoadError::Root { path: path.to_owned(), reason: e.to_string() };
        roots.add(certificate).map_err(root)?;
    }
    Ok(roots)
}

/// A certificate chain (leaf first) with its key, and whom the leaf names.
pub fn load_pair(cert: &Path, key: &Path) -> Result<(CertifiedKey, PeerIdentity), LoadError> {
    let chain = load_certificates(cert)?;
    let identity = leaf_identity(cert, &chain)?;
    let secret = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|e| pem_error(key, "private key", &e))?;
    let certified_key = CertifiedKey::from_der(chain, secret, &provider()).map_err(|e| {
        if matches!(e, rustls::Error::InconsistentKeys(_)) {
            LoadError::Mismatch { cert: cert.to_owned(), key: key.to_owned() }
        } else {
            LoadError::Key { path: key.to_owned(), reason: e.to_string() }
        }
    })?;
    Ok((certified_key, identity))
}

/// Whom the certificate in this file names (the leaf, when it holds a chain).
pub fn load_identity(path: &Path) -> Result<PeerIdentity, LoadError> {
    leaf_identity(path, &load_certificates(path)?)
}

/// All revocation lists of a file.
pub fn load_crls(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, LoadError> {
    let what = "X509 CRL";
    let pem = read(path)?;
    let all: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&pem).collect();
    let all = all.map_err(|e| pem_error(path, what, &e))?;
    if all.is_empty() { Err(LoadError::Missing { path: path.to_owned(), what }) } else { Ok(all) }
}

/// A secret must be there and readable, by us alone.
pub fn check_secret(path: &Path) -> Result<(), LoadError> {
    let unreadable = |source| LoadError::Read { path: path.to_owned(), source };
    let found = File::open(path).and_then(|file| file.metadata()).map_err(unreadable)?;
    let mode = found.permissions().mode() & 0o777;
    let lent = found.uid() == 0 && !rustix::process::geteuid().is_root();
    if is_open(mode, lent) { Err(LoadError::Open { path: path.to_owned(), mode }) } else { Ok(()) }
}

/// `lent`: it is root's, and we are somebody else, who can only be let in by a group: so Kubernetes mounts secrets, and so Debian keeps keys.
fn is_open(mode: u32, lent: bool) -> bool {
    mode & if lent { 0o137 } else { 0o177 } != 0
}

/// Refuses a certificate outside its time of validity; `now` is the caller's clock.
pub fn check_dates(path: &Path, identity: &PeerIdentity, now: OffsetDateTime) -> Result<(), LoadError> {
    if now > identity.not_after {
        return Err(LoadError::Expired { path: path.to_owned(), not_after: rfc3339(identity.not_after) });
    }
    if now < identity.not_before {
        return Err(LoadError::NotYetValid { path: path.to_owned(), not_before: rfc3339(identity.not_before) });
    }
    Ok(())
}

/// Refuses a certificate that cannot stand at both ends: a sidecar is server and client with one pair.
pub fn check_purpose(path: &Path, identity: &PeerIdentity) -> Result<(), LoadError> {
    let wanted = [(identity.server_auth, "server"), (identity.client_auth, "client")];
    match wanted.into_iter().find(|(allowed, _)| !allowed) {
        Some((_, usage)) => Err(LoadError::Purpose { path: path.to_owned(), usage }),
        None => Ok(()),
    }
}

/// Refuses a certificate that does not lead to one of `roots`, as a peer with the same CA would.
pub fn check_chain(
    path: &Path,
    chain: &[CertificateDer<'static>],
    roots: RootCertStore,
    now: OffsetDateTime,
) -> Result<(), LoadError> {
    let refused = |reason: String| LoadError::Chain { path: path.to_owned(), reason };
    let missing = LoadError::Missing { path: path.to_owned(), what: "certificate" };
    let (leaf, intermediates) = chain.split_first().ok_or(missing)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build();
    let verifier = verifier.map_err(|e| refused(e.to_string()))?;
    verifier.verify_client_cert(leaf, intermediates, unix_time(now)).map(drop).map_err(|e| refused(e.to_string()))
}

/// A time as rustls takes it.
pub(super) fn unix_time(time: OffsetDateTime) -> UnixTime {
    let seconds = u64::try_from(time.unix_timestamp()).unwrap_or(0);
    UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds))
}

/// A time as logs and errors show it.
pub fn rfc3339(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_else(|_| time.to_string())
}

fn leaf_identity(path: &Path, chain: &[CertificateDer<'static>]) -> Result<PeerIdentity, LoadError> {
    let leaf = chain.first().ok_or(LoadError::Missing { path: path.to_owned(), what: "certificate" })?;
    PeerIdentity::from_der(leaf).map_err(|source| LoadError::Certificate { path: path.to_owned(), source })
}

/// When the first certificate of a CA's file ends.
pub fn ca_not_after(path: &Path) -> Result<OffsetDateTime, LoadError> {
    let ends = |certificate: &CertificateDer<'_>| {
        let identity = PeerIdentity::from_der(certificate);
        identity.map(|i| i.not_after).map_err(|source| LoadError::Certificate { path: path.to_owned(), source })
    };
    let all = load_certificates(path)?.iter().map(ends).collect::<Result<Vec<_>, _>>()?;
    all.into_iter().min().ok_or(LoadError::Missing { path: path.to_owned(), what: "certificate" })
}

fn next_update(crl: &CertificateRevocationListDer<'_>) -> Option<OffsetDateTime> {
    let (_, list) = CertificateRevocationList::from_der(crl).ok()?;
    list.next_update().map(|time| time.to_datetime())
}

/// All certificates of a file, in its order.
pub fn load_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let what = "certificate";
    let pem = read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let all = all.map_err(|e| pem_error(path, what, &e))?;
    if all.is_empty() { Err(LoadError::Missing { path: path.to_owned(), what }) } else { Ok(all) }
}

/// A PEM file of bounded size.
pub fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    let unreadable = |source| LoadError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(unreadable)?.len() > PEM_BYTES_MAX {
        return Err(LoadError::TooLarge { path: path.to_owned() });
    }
    std::fs::read(path).map_err(unreadable)
}

fn pem_error(path: &Path, what: &'static str, error: &pem::Error) -> LoadError {
    if matches!(error, pem::Error::NoItemsFound) {
        return LoadError::Missing { path: path.to_owned(), what };
    }
    // The text of a base64 error names a byte of the file, which may be a key's.
    let base64 = matches!(error, pem::Error::Base64Decode(_));
    let reason = if base64 { "its base64 is broken" } else { "a section is cut off or malformed" };
    LoadError::Pem { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_root_may_be_lent_to_our_group_and_one_of_our_own_to_nobody() {
        for mode in [0o400, 0o600] {
            assert!(!is_open(mode, false) && !is_open(mode, true), "{mode:o}");
        }
        for mode in [0o440, 0o640] {
            assert!(is_open(mode, false) && !is_open(mode, true), "{mode:o}");
        }
        for mode in [0o444, 0o460, 0o644, 0o660, 0o700, 0o650, 0o604] {
            assert!(is_open(mode, false) && is_open(mode, true), "{mode:o}");
        }
    }
}
