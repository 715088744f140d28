//! Job: issue certificates for development and tests: a CA, a pair for each region, an admin pair.
//! Input: a folder and names. Output: PEM files, and what was made or kept.
//! Always true: an existing file is never written over; keys are made 0600; a pair that is reported is on disk.

use super::identity::PeerIdentity;
use super::load::{LoadError, rfc3339};
use super::{REGION_RULE, is_region_name};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};

/// How long a development CA lives.
const CA_LIFE: Duration = Duration::days(3650);
/// How long a development pair lives: short enough that renewal is not forgotten for ever.
const PAIR_LIFE: Duration = Duration::days(825);
/// How far before now a certificate starts, so that machines whose clocks differ a little can use it at once.
const CLOCK_SKEW: Duration = Duration::hours(1);
/// What the SANs of development certificates start with.
const SPIFFE: &str = "spiffe://etcd-ferry.dev";

#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    #[error("`{0}` cannot name a region: use {REGION_RULE}, and neither `ca` nor `admin`")]
    Region(String),
    #[error("{path} cannot be read or written: {source}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("{present} is there without {absent}: bring back {absent}, or delete {present} to issue both anew")]
    HalfPair { present: PathBuf, absent: PathBuf },
    #[error("the CA in {path} expired on {not_after}: delete all .pem and .key files beside it, and run this again")]
    CaExpired { path: PathBuf, not_after: String },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
}

/// A certificate with its key, in memory.
pub struct Pair {
    pub cert_pem: String,
    pub key_pem: String,
    serial: SerialNumber,
}

/// One pair of [`dev`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// `ca`, `admin` or the region.
    pub name: String,
    pub cert: PathBuf,
    pub key: PathBuf,
    /// False: it was there already and is kept as it is.
    pub made: bool,
}

/// What a certificate shall say. Start from [`IssueRequest::region`] or [`IssueRequest::admin`] and change what a test needs.
#[derive(Debug, Clone)]
pub struct IssueRequest {
    pub common_name: String,
    pub uris: Vec<String>,
    pub dns: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub server_auth: bool,
    pub client_auth: bool,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
}

/// A certificate authority.
pub struct Issuer {
    ca_pem: String,
    signer: rcgen::Issuer<'static, KeyPair>,
}

/// Makes what is missing of `ca`, a pair for each region and `admin` in `dir`. With a CA there already, issues from that one.
pub fn dev<R: AsRef<str>>(dir: &Path, regions: &[R]) -> Result<Vec<Issued>, CertsError> {
    let regions: Vec<&str> = regions.iter().map(AsRef::as_ref).collect();
    let reserved = |name: &str| matches!(name, "ca" | "admin");
    if let Some(bad) = regions.iter().find(|r| !is_region_name(r) || reserved(r)) {
        return Err(CertsError::Region((*bad).to_owned()));
    }
    let failed = |source| CertsError::File { path: dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;

    let ca = missing(dir, "ca")?;
    let issuer = if ca.made {
        let issuer = Issuer::new("etcd-ferry development CA")?;
        write_pair(&ca, &issuer.ca_pem, &issuer.signer.key().serialize_pem())?;
        issuer
    } else {
        Issuer::load(&ca.cert, &ca.key)?
    };
    let mut issued = vec![ca];
    let mut requests: Vec<(&str, IssueRequest)> = regions.iter().map(|r| (*r, IssueRequest::region(r))).collect();
    requests.push(("admin", IssueRequest::admin()));
    for (name, request) in requests {
        let place = missing(dir, name)?;
        if place.made {
            let pair = issuer.issue(&request)?;
            write_pair(&place, &pair.cert_pem, &pair.key_pem)?;
        }
        issued.push(place);
    }
    Ok(issued)
}

impl IssueRequest {
    /// A sidecar's certificate: its region's URI, and this machine's loopback names.
    pub fn region(region: &str) -> Self {
        let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        Self {
            dns: vec!["localhost".to_owned()],
            addresses: loopback.to_vec(),
            server_auth: true,
            ..Self::client(region, format!("{SPIFFE}/region/{region}"))
        }
    }

    /// An operator's certificate, for the admin service.
    pub fn admin() -> Self {
        Self::client("admin", format!("{SPIFFE}/admin"))
    }

    /// The same, but its time is over.
    pub fn expired(self) -> Self {
        let now = OffsetDateTime::now_utc();
        Self { not_before: now - Duration::days(2), not_after: now - Duration::days(1), ..self }
    }

    /// The same, but its time has not come.
    pub fn not_yet_valid(self) -> Self {
        let now = OffsetDateTime::now_utc();
        Self { not_before: now + Duration::days(1), not_after: now + Duration::days(2), ..self }
    }

    fn client(common_name: &str, uri: String) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            common_name: common_name.to_owned(),
            uris: vec![uri],
            dns: Vec::new(),
            addresses: Vec::new(),
            server_auth: false,
            client_auth: true,
            not_before: now - CLOCK_SKEW,
            not_after: now + PAIR_LIFE,
        }
    }
}

impl Issuer {
    /// A new CA with a key of its own.
    pub fn new(common_name: &str) -> Result<Self, CertsError> {
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = now - CLOCK_SKEW;
        params.not_after = now + CA_LIFE;
        let key = KeyPair::generate()?;
        let ca_pem = params.self_signed(&key)?.pem();
        Ok(Self { ca_pem, signer: rcgen::Issuer::new(params, key) })
    }

    /// A CA from its files; the key must be the certificate's, and its time must not be over.
    pub fn load(cert: &Path, key: &Path) -> Result<Self, CertsError> {
        let (_, identity) = super::load::load_pair(cert, key)?;
        if identity.not_after < OffsetDateTime::now_utc() {
            return Err(CertsError::CaExpired { path: cert.to_owned(), not_after: rfc3339(identity.not_after) });
        }
        let text = |path: &Path| {
            std::fs::read_to_string(path).map_err(|source| CertsError::File { path: path.to_owned(), source })
        };
        let ca_pem = text(cert)?;
        let signer = rcgen::Issuer::from_ca_cert_pem(&ca_pem, KeyPair::from_pem(&text(key)?)?)?;
        Ok(Self { ca_pem, signer })
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    pub fn issue(&self, request: &IssueRequest) -> Result<Pair, CertsError> {
        let serial = SerialNumber::from_slice(&rand::random::<[u8; 16]>());
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(&request.common_name);
        params.serial_number = Some(serial.clone());
        params.not_before = request.not_before;
        params.not_after = request.not_after;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if request.server_auth {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if request.client_auth {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        for uri in &request.uris {
            params.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
        }
        for dns in &request.dns {
            params.subject_alt_names.push(SanType::DnsName(dns.as_str().try_into()?));
        }
        params.subject_alt_names.extend(request.addresses.iter().map(|a| SanType::IpAddress(*a)));
        let key = KeyPair::generate()?;
        let cert_pem = params.signed_by(&key, &self.signer)?.pem();
        Ok(Pair { cert_pem, key_pem: key.serialize_pem(), serial })
    }

    /// A revocation list, as PEM, that names these pairs and is to be renewed at `next_update`.
    pub fn revoke(&self, pairs: &[&Pair], next_update: OffsetDateTime) -> Result<String, CertsError> {
        let this_update = next_update - Duration::days(30);
        let revoked = |pair: &&Pair| RevokedCertParams {
            serial_number: pair.serial.clone(),
            revocation_time: this_update,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update,
            next_update,
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: pairs.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&self.signer)?.pem()?)
    }
}

impl Pair {
    /// Writes `NAME.pem` and `NAME.key` into `dir`, neither over an existing file.
    pub fn write(&self, dir: &Path, name: &str) -> Result<Issued, CertsError> {
        let place = place(dir, name, true);
        write_pair(&place, &self.cert_pem, &self.key_pem)?;
        Ok(place)
    }
}

fn subject(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

fn place(dir: &Path, name: &str, made: bool) -> Issued {
    let file = |suffix: &str| dir.join(format!("{name}.{suffix}"));
    Issued { name: name.to_owned(), cert: file("pem"), key: file("key"), made }
}

/// Where the pair belongs, and whether it is to be made; half a pair is refused.
fn missing(dir: &Path, name: &str) -> Result<Issued, CertsError> {
    let place = place(dir, name, true);
    // A link that leads nowhere counts as present: nothing may be written through it.
    let present = |path: &Path| path.symlink_metadata().is_ok();
    match (present(&place.cert), present(&place.key)) {
        (false, false) => Ok(place),
        (true, true) => Ok(Issued { made: false, ..place }),
        (true, false) => Err(CertsError::HalfPair { present: place.cert, absent: place.key }),
        (false, true) => Err(CertsError::HalfPair { present: place.key, absent: place.cert }),
    }
}

fn write_pair(place: &Issued, cert_pem: &str, key_pem: &str) -> Result<(), CertsError> {
    write_new(&place.key, 0o600, key_pem)?;
    write_new(&place.cert, 0o644, cert_pem)?;
    let Some(dir) = place.cert.parent() else { return Ok(()) };
    let synced = File::open(dir).and_then(|d| d.sync_all());
    synced.map_err(|source| CertsError::File { path: dir.to_owned(), source })
}

fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), CertsError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| CertsError::File { path: path.to_owned(), source })
}

/// What `certs dev` says about one pair.
pub fn describe(issued: &Issued) -> String {
    let Issued { name, cert, key, made } = issued;
    let identity = super::load::load_identity(cert).ok();
    let until = identity.as_ref().map(|i: &PeerIdentity| rfc3339(i.not_after)).unwrap_or_else(|| "?".to_owned());
    let names = identity.map(|i| i.sans.join(", ")).filter(|sans| !sans.is_empty());
    let names = names.map(|sans| format!(" for {sans}")).unwrap_or_default();
    if *made {
        format!("made {} and {}{names}, until {until}", cert.display(), key.display())
    } else {
        let renew = if name == "ca" { "delete all .pem and .key files beside it" } else { "delete both files" };
        format!("kept {}{names}, until {until}; to renew it, {renew} and run this again", cert.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::load::{Credentials, TlsFiles};
    use std::os::unix::fs::PermissionsExt;

    fn files(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_fresh_folder_gets_a_ca_a_pair_for_each_region_and_an_admin_pair() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("certs-dev");
        let issued = dev(&out, &["us-east-1", "cn-hangzhou"]).unwrap();
        assert!(issued.iter().all(|i| i.made));
        let expected = ["admin.key", "admin.pem", "ca.key", "ca.pem", "cn-hangzhou.key", "cn-hangzhou.pem"];
        assert_eq!(files(&out)[..6], expected);
        assert_eq!(files(&out)[6..], ["us-east-1.key", "us-east-1.pem"]);
        for place in &issued {
            let mode = std::fs::metadata(&place.key).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", place.key.display());
        }
        let (ca, admin, east) = (&issued[0], &issued[3], &issued[1]);
        let load = |p: &Issued| Credentials::load(TlsFiles { ca: &ca.cert, cert: &p.cert, key: &p.key, crl: None });
        let east = load(east).unwrap().identity;
        assert_eq!(east.sans, ["spiffe://etcd-ferry.dev/region/us-east-1", "localhost"]);
        assert!(east.server_auth && east.client_auth);
        let admin = load(admin).unwrap().identity;
        assert_eq!(admin.sans, ["spiffe://etcd-ferry.dev/admin"]);
        assert!(!admin.server_auth && admin.client_auth);
    }

    #[test]
    fn a_second_run_issues_from_the_same_ca_and_writes_over_nothing() {
        let dir = tempfile::tempdir().unwrap();
        dev(dir.path(), &["a"]).unwrap();
        let before: Vec<Vec<u8>> =
            files(dir.path()).iter().map(|f| std::fs::read(dir.path().join(f)).unwrap()).collect();
        let names = files(dir.path());
        let issued = dev(dir.path(), &["a", "b"]).unwrap();
        let made: Vec<&str> = issued.iter().filter(|i| i.made).map(|i| i.name.as_str()).collect();
        assert_eq!(made, ["b"]);
        assert!(describe(&issued[1]).starts_with("kept"));
        let after: Vec<Vec<u8>> = names.iter().map(|f| std::fs::read(dir.path().join(f)).unwrap()).collect();
        assert_eq!(before, after);

        let ca = std::fs::read(dir.path().join("ca.pem")).unwrap();
        let b = std::fs::read(dir.path().join("b.pem")).unwrap();
        let (_, ca) = x509_parser::pem::parse_x509_pem(&ca).unwrap();
        let (_, b) = x509_parser::pem::parse_x509_pem(&b).unwrap();
        let (ca, b) = (ca.parse_x509().unwrap(), b.parse_x509().unwrap());
        assert_eq!(b.issuer().as_raw(), ca.subject().as_raw());
        let usage = ca.key_usage().unwrap().unwrap().value;
        assert!(usage.key_cert_sign() && usage.crl_sign(), "a CA without CrlSign cannot revoke");
    }

    #[test]
    fn half_a_pair_is_refused_and_named() {
        let dir = tempfile::tempdir().unwrap();
        dev(dir.path(), &["a"]).unwrap();
        std::fs::remove_file(dir.path().join("ca.key")).unwrap();
        let error = dev(dir.path(), &["b"]).unwrap_err();
        assert!(matches!(&error, CertsError::HalfPair { absent, .. } if absent.ends_with("ca.key")), "{error}");
        assert!(!dir.path().join("b.pem").exists());
    }

    #[test]
    fn a_ca_with_another_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        dev(dir.path(), &["a"]).unwrap();
        std::fs::copy(dir.path().join("a.key"), dir.path().join("ca.key")).unwrap();
        assert!(matches!(dev(dir.path(), &["b"]), Err(CertsError::Load(LoadError::Mismatch { .. }))));
    }

    #[test]
    fn a_region_that_would_hide_the_ca_or_leave_the_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["ca", "admin", "../x", ""] {
            assert!(matches!(dev(dir.path(), &[bad]), Err(CertsError::Region(_))), "{bad}");
        }
        assert!(files(dir.path()).is_empty());
    }
}
