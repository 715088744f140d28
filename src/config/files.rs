//! Job: what only the disk can tell about a configuration: files that are missing, too open, out of date or do not fit.
//! Input: a `Config`, the files it names, the clock. Output: this sidecar's own identity, or all faults.
//! Always true: a private key, a password or the data directory that others may read is refused.

use super::{Config, EtcdConfig, Fault, Faults, PkiConfig, TlsConfig, TracesConfig};
use crate::certs::identity::PeerIdentity;
use crate::certs::load::{self, LoadError};
use crate::certs::revocation;
use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use time::OffsetDateTime;

/// What of a configuration names files; `None` where it could not be read.
pub(super) struct NamedFiles {
    pub data_dir: Option<PathBuf>,
    pub etcd: Option<EtcdConfig>,
    /// With the PKI that issues the pair, if there is one.
    pub tls: Option<(TlsConfig, Option<PkiConfig>)>,
    pub traces: Option<TracesConfig>,
}

impl NamedFiles {
    /// Checks every file; changes nothing (so that `check`, run by another user, leaves no folder behind that the sidecar cannot write).
    /// Returns whom this sidecar's own certificate names; `None`: the PKI is to issue it.
    pub(super) fn check(&self) -> Result<Option<PeerIdentity>, Faults> {
        let now = OffsetDateTime::now_utc();
        let mut faults = Vec::new();
        if let Some(data_dir) = &self.data_dir {
            check_data_dir(&mut faults, data_dir);
        }
        if let Some(etcd) = &self.etcd {
            check_etcd(&mut faults, etcd, now);
        }
        let identity = match &self.tls {
            None => None,
            Some((tls, None)) => check_tls(&mut faults, tls, now),
            Some((tls, Some(pki))) => check_pki(&mut faults, tls, pki),
        };
        if let Some(ca) = self.traces.as_ref().and_then(|traces| traces.ca.as_ref()) {
            note(&mut faults, "traces.ca", load::load_roots(ca).map(drop));
        }
        if faults.is_empty() { Ok(identity) } else { Err(Faults(faults)) }
    }
}

impl Config {
    /// Checks every file that the configuration names; changes nothing. Returns whom this sidecar's own certificate names; `None`: the PKI is
    /// to issue it.
    pub fn check_files(&self) -> Result<Option<PeerIdentity>, Faults> {
        let (data_dir, etcd, tls) = (self.data_dir.clone(), self.etcd.clone(), (self.tls.clone(), self.pki.clone()));
        NamedFiles { data_dir: Some(data_dir), etcd: Some(etcd), tls: Some(tls), traces: self.traces.clone() }.check()
    }

    /// [`Config::check_files`], and makes the data directory (0700) if there is none: what `run` starts with.
    pub fn prepare_files(&self) -> Result<Option<PeerIdentity>, Faults> {
        let identity = self.check_files()?;
        if !self.data_dir.exists() {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.data_dir);
            made.map_err(|e| {
                let rule = format!("{} cannot be made ({e}): make it, mode 0700", self.data_dir.display());
                Faults(vec![Fault { field: "data_dir".to_owned(), rule }])
            })?;
        }
        Ok(identity)
    }
}

fn fault(faults: &mut Vec<Fault>, field: &str, rule: impl ToString) {
    faults.push(Fault { field: field.to_owned(), rule: rule.to_string() });
}

fn check_data_dir(faults: &mut Vec<Fault>, dir: &Path) {
    let shown = dir.display();
    match std::fs::metadata(dir) {
        Ok(found) if !found.is_dir() => fault(faults, "data_dir", format!("{shown} is not a directory: name one")),
        Ok(found) if found.permissions().mode() & 0o077 != 0 => {
            let mode = found.permissions().mode() & 0o777;
            let rule =
                format!("{shown} is open to others (mode {mode:04o}) and will hold key values: chmod 700 {shown}");
            fault(faults, "data_dir", rule);
        }
        Ok(_) => {
            if let Err(why) = writable(dir) {
                fault(faults, "data_dir", format!("{shown} cannot be written: {why}"));
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let above = dir.ancestors().skip(1).map(|a| if a.as_os_str().is_empty() { Path::new(".") } else { a });
            if let Some(above) = above.into_iter().find(|above| above.exists())
                && let Err(why) = writable(above)
            {
                fault(
                    faults,
                    "data_dir",
                    format!("{shown} cannot be made, since {} cannot be written: {why}", above.display()),
                );
            }
        }
        Err(e) => fault(faults, "data_dir", format!("{shown} cannot be looked at ({e}): name a directory of its own")),
    }
}

/// Whether this user may make files in a folder; what to do if not.
fn writable(dir: &Path) -> Result<(), &'static str> {
    match rustix::fs::access(dir, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK) {
        Err(rustix::io::Errno::ROFS) => {
            Err("its file system is read-only; mount it for writing, or name another folder")
        }
        Err(rustix::io::Errno::ACCESS) => Err("this user may not; chown it to the sidecar's, or name another folder"),
        // What else there may be is met, and told, by whoever writes.
        Ok(()) | Err(_) => Ok(()),
    }
}

fn check_etcd(faults: &mut Vec<Fault>, etcd: &EtcdConfig, now: OffsetDateTime) {
    if let Some(ca) = &etcd.ca
        && let Err(e) = load::load_roots(ca)
    {
        fault(faults, "etcd.ca", e);
    }
    if let (Some(cert), Some(key)) = (&etcd.cert, &etcd.key) {
        match load::load_pair(cert, key) {
            Ok((_, identity)) => note(faults, "etcd.cert", load::check_dates(cert, &identity, now)),
            Err(e) => pair_fault(faults, "etcd", key, e),
        }
        note(faults, "etcd.key", load::check_secret(key));
    }
    if let Some(path) = &etcd.password_file {
        check_word(faults, "etcd.password_file", path, "password");
    }
}

/// A password or a token, in a file of its own.
fn check_word(faults: &mut Vec<Fault>, field: &str, path: &Path, what: &str) {
    if std::fs::read_to_string(path).is_ok_and(|text| text.trim().is_empty()) {
        fault(faults, field, format!("{} is empty: write the {what} into it", path.display()));
    }
    note(faults, field, load::check_secret(path));
}

/// A pair that is absent, out of its time or otherwise not sound is no fault here: it is asked for at the start.
fn check_pki(faults: &mut Vec<Fault>, tls: &TlsConfig, pki: &PkiConfig) -> Option<PeerIdentity> {
    if let Some(ca) = &pki.ca {
        note(faults, "tls.pki.ca", load::load_roots(ca).map(drop));
    }
    check_word(faults, "tls.pki.token_file", &pki.token_file, "token");
    if tls.ca.exists() {
        note(faults, "tls.ca", load::load_roots(&tls.ca).map(drop));
    }
    if let Some(crl) = &tls.crl {
        note(faults, "tls.crl", load::load_crls(crl).map(drop));
    }
    if tls.key.exists() {
        note(faults, "tls.key", load::check_secret(&tls.key));
    }
    for (field, path) in [("tls.ca", &tls.ca), ("tls.cert", &tls.cert), ("tls.key", &tls.key)] {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !folder.is_dir() {
            let rule = format!("{} is no folder: make it, for what the PKI issues", folder.display());
            fault(faults, field, rule);
        }
    }
    load::load_pair(&tls.cert, &tls.key).ok().map(|(_, identity)| identity)
}

fn check_tls(faults: &mut Vec<Fault>, tls: &TlsConfig, now: OffsetDateTime) -> Option<PeerIdentity> {
    let roots = load::load_roots(&tls.ca).map_err(|e| fault(faults, "tls.ca", e)).ok();
    let lists = tls.crl.as_ref().and_then(|crl| load::load_crls(crl).map_err(|e| fault(faults, "tls.crl", e)).ok());
    note(faults, "tls.key", load::check_secret(&tls.key));
    match load::load_pair(&tls.cert, &tls.key) {
        Ok((pair, identity)) => {
            let dates = load::check_dates(&tls.cert, &identity, now);
            let purpose = load::check_purpose(&tls.cert, &identity);
            // A certificate out of its time, or for another use, fails the chain for that very reason, which would be said twice.
            if dates.is_ok()
                && purpose.is_ok()
                && let Some(roots) = roots
            {
                let chain = load::check_chain(&tls.cert, &pair.cert, roots.clone(), now);
                if let (Ok(()), Some(crl), Some(lists)) = (&chain, &tls.crl, &lists) {
                    note(faults, "tls.crl", revocation::check(crl, lists, &pair.cert, Arc::new(roots), now));
                }
                note(faults, "tls.cert", chain);
            }
            note(faults, "tls.cert", dates);
            note(faults, "tls.cert", purpose);
            if identity.sans.is_empty() {
                let shown = tls.cert.display();
                fault(faults, "tls.cert", format!("{shown} bears no URI or DNS name, so that no peer can name it"));
            }
            Some(identity)
        }
        Err(e) => {
            pair_fault(faults, "tls", &tls.key, e);
            None
        }
    }
}

fn note(faults: &mut Vec<Fault>, field: &str, result: Result<(), LoadError>) {
    if let Err(e) = result {
        fault(faults, field, e);
    }
}

/// Puts what is wrong with a pair at the field whose file it is. A key that cannot be read has its fault already.
fn pair_fault(faults: &mut Vec<Fault>, table: &str, key: &Path, error: LoadError) {
    // Where one path is given for both, that no certificate is in it is the certificate's fault.
    let of_certificate =
        matches!(error, LoadError::Missing { what: "certificate", .. } | LoadError::Certificate { .. });
    let of_key = error.path() == key && !of_certificate;
    if !(of_key && matches!(error, LoadError::Read { .. })) {
        fault(faults, &format!("{table}.{}", if of_key { "key" } else { "cert" }), error);
    }
}
