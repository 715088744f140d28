//! Job: put what a PKI issued where `tls` names it.
//! Input: a sound pair. Output: files that `tls/reload.rs` takes into use.
//! Edge: writes files.
//! Always true: each file is replaced whole; a key is never open to others; a stop between two files is made good at the next start; a CA that
//! is there already is not touched.

use super::answer::Issued;
use crate::certs::load::{self, LoadError};
use crate::config::TlsConfig;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
#[error("{path} cannot be written: {source}; may this sidecar write in its folder?")]
pub struct WriteError {
    path: PathBuf,
    source: io::Error,
}

/// Writes the pair, and the CA if there is none yet.
pub fn keep(tls: &TlsConfig, issued: &Issued) -> Result<(), WriteError> {
    let mut all = vec![(&tls.key, &issued.key, 0o600), (&tls.cert, &issued.cert, 0o644)];
    if !tls.ca.exists() {
        all.insert(0, (&tls.ca, &issued.ca, 0o644));
    }
    // All of them lie beside their places before the first is replaced.
    for (path, text, mode) in &all {
        write_beside(path, text, *mode)?;
    }
    for (path, ..) in all {
        replace(path)?;
    }
    Ok(())
}

/// A process that ended between key and certificate left a key that belongs to the certificate beside the old one.
pub fn complete(tls: &TlsConfig) -> Result<(), WriteError> {
    let torn = matches!(load::load_pair(&tls.cert, &tls.key), Err(LoadError::Mismatch { .. } | LoadError::Read { .. }));
    if torn && load::load_pair(&beside(&tls.cert), &tls.key).is_ok() {
        replace(&tls.cert)?;
    }
    Ok(())
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

fn write_beside(path: &Path, text: &str, mode: u32) -> Result<(), WriteError> {
    let path = beside(path);
    let write = || {
        // What an earlier process left may be open to others.
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path)?;
        // A sidecar's umask closes what it makes to everybody else; operators' commands read the CA and the certificate.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| WriteError { path: path.clone(), source })
}

fn replace(path: &Path) -> Result<(), WriteError> {
    let replace = || {
        std::fs::rename(beside(path), path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()
    };
    replace().map_err(|source| WriteError { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::issue::{IssueRequest, Issuer, Pair};

    fn tls(dir: &Path) -> TlsConfig {
        let [ca, cert, key] = ["ca.pem", "a.pem", "a.key"].map(|name| dir.join(name));
        TlsConfig { ca, cert, key, crl: None, admins: Vec::new(), viewers: Vec::new() }
    }

    fn issued(issuer: &Issuer) -> Issued {
        let Pair { cert_pem, key_pem, .. } = issuer.issue(&IssueRequest::region("a")).unwrap();
        Issued { cert: cert_pem, key: key_pem, ca: issuer.ca_pem().to_owned() }
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_pair_replaces_the_one_before_and_a_ca_that_is_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (tls, first, second) = (tls(dir.path()), Issuer::new("first").unwrap(), Issuer::new("second").unwrap());
        keep(&tls, &issued(&first)).unwrap();
        std::fs::write(beside(&tls.key), "left open by somebody").unwrap();
        std::fs::set_permissions(beside(&tls.key), Permissions::from_mode(0o644)).unwrap();
        let next = issued(&second);
        keep(&tls, &next).unwrap();
        assert_eq!(std::fs::read_to_string(&tls.ca).unwrap(), first.ca_pem());
        assert_eq!(std::fs::read_to_string(&tls.cert).unwrap(), next.cert);
        load::load_pair(&tls.cert, &tls.key).unwrap();
        assert_eq!([&tls.ca, &tls.cert, &tls.key].map(|path| mode(path)), [0o644, 0o644, 0o600]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "nothing else is left there");
    }

    #[test]
    fn a_stop_between_key_and_certificate_is_made_good_and_anything_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (tls, issuer) = (tls(dir.path()), Issuer::new("CA").unwrap());
        keep(&tls, &issued(&issuer)).unwrap();
        let next = issued(&issuer);
        std::fs::write(beside(&tls.cert), &next.cert).unwrap();
        complete(&tls).unwrap();
        assert_ne!(std::fs::read_to_string(&tls.cert).unwrap(), next.cert, "the old pair is whole");
        std::fs::write(&tls.key, &next.key).unwrap();
        complete(&tls).unwrap();
        assert_eq!(std::fs::read_to_string(&tls.cert).unwrap(), next.cert);
        load::load_pair(&tls.cert, &tls.key).unwrap();
    }

    #[test]
    fn a_folder_that_is_not_there_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let tls = tls(&dir.path().join("none"));
        let refused = keep(&tls, &issued(&Issuer::new("CA").unwrap())).unwrap_err().to_string();
        assert!(refused.contains("ca.pem.new cannot be written"), "{refused}");
    }
}
