//! Job: what connections to etcd are made with: a CA, and a pair where etcd asks for one.
//! Input: the files that `[etcd]` names. Output: what is in them, once they are sound, and when it ends.
//! Edge: reads files.
//! Always true: what is loaded was sound as a whole; nothing of a key is told.

use super::TlsError;
use crate::certs::load;
use crate::config::EtcdConfig;
use std::path::Path;
use time::OffsetDateTime;

/// A certificate and its key, as PEM.
type PemPair = (Vec<u8>, Vec<u8>);

/// In the form that etcd's client takes; all `None` where no file is configured.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct EtcdFiles {
    pub ca: Option<Vec<u8>>,
    pub pair: Option<PemPair>,
    /// When the first certificate of the CA's file ends.
    pub ca_not_after: Option<OffsetDateTime>,
    pub pair_not_after: Option<OffsetDateTime>,
}

impl EtcdFiles {
    /// Reads all of them. Refuses what etcd would not talk to, and a key that others may read.
    pub fn load(config: &EtcdConfig) -> Result<Self, TlsError> {
        let (ca, pair) = (read_ca(config)?, read_pair(config)?);
        let ca_not_after = match &config.ca {
            Some(path) => {
                load::load_roots(path)?;
                Some(load::ca_not_after(path)?)
            }
            None => None,
        };
        let pair_not_after = match pair_of(config) {
            Some((cert, key)) => {
                let (_, identity) = load::load_pair(cert, key)?;
                load::check_dates(cert, &identity, OffsetDateTime::now_utc())?;
                load::check_secret(key)?;
                Some(identity.not_after)
            }
            None => None,
        };
        if (read_ca(config)?, read_pair(config)?) != (ca.clone(), pair.clone()) {
            return Err(TlsError::Changing);
        }
        Ok(Self { ca, pair, ca_not_after, pair_not_after })
    }

    /// Which of them are others now, as the configuration names them.
    pub fn changed(&self, before: &Self) -> String {
        let part = |files: &Self, of: fn(&PemPair) -> &Vec<u8>| files.pair.as_ref().map(of).cloned();
        let all = |files: &Self| {
            [("etcd.ca", files.ca.clone()), ("etcd.cert", part(files, |p| &p.0)), ("etcd.key", part(files, |p| &p.1))]
        };
        let changed = all(self).into_iter().zip(all(before)).filter(|(now, before)| now != before);
        changed.map(|((name, _), _)| name).collect::<Vec<_>>().join(", ")
    }

    /// Where they lie.
    pub fn paths(config: &EtcdConfig) -> impl Iterator<Item = &Path> {
        [&config.ca, &config.cert, &config.key].into_iter().flatten().map(|path| &**path)
    }
}

fn read_ca(config: &EtcdConfig) -> Result<Option<Vec<u8>>, TlsError> {
    Ok(config.ca.as_deref().map(load::read).transpose()?)
}

fn read_pair(config: &EtcdConfig) -> Result<Option<PemPair>, TlsError> {
    let read = |(cert, key): (&Path, &Path)| Ok((load::read(cert)?, load::read(key)?));
    pair_of(config).map(read).transpose()
}

fn pair_of(config: &EtcdConfig) -> Option<(&Path, &Path)> {
    config.cert.as_deref().zip(config.key.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::issue::{IssueRequest, Issuer, Pair};
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    fn files(dir: &Path) -> EtcdConfig {
        let file = |name: &str| -> Option<PathBuf> { Some(dir.join(name)) };
        EtcdConfig { ca: file("ca.pem"), cert: file("etcd.pem"), key: file("etcd.key"), ..EtcdConfig::default() }
    }

    fn write(config: &EtcdConfig, issuer: &Issuer, pair: &Pair) {
        fs::write(config.ca.as_ref().unwrap(), issuer.ca_pem()).unwrap();
        fs::write(config.cert.as_ref().unwrap(), &pair.cert_pem).unwrap();
        let key = config.key.as_ref().unwrap();
        fs::write(key, &pair.key_pem).unwrap();
        fs::set_permissions(key, fs::Permissions::from_mode(0o600)).unwrap();
    }

    #[test]
    fn only_a_set_that_fits_together_is_loaded_and_what_changed_of_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let config = files(dir.path());
        let issuer = Issuer::new("etcd's CA").unwrap();
        let request = || IssueRequest::region("etcd");
        let (first, second) = (issuer.issue(&request()).unwrap(), issuer.issue(&request()).unwrap());
        write(&config, &issuer, &first);
        let loaded = EtcdFiles::load(&config).unwrap();
        assert_eq!(loaded.changed(&EtcdFiles::default()), "etcd.ca, etcd.cert, etcd.key");
        assert_eq!(loaded.changed(&loaded), "");
        assert!(loaded.pair_not_after.unwrap() > OffsetDateTime::now_utc() && loaded.ca_not_after.is_some());

        write(&config, &issuer, &second);
        let renewed = EtcdFiles::load(&config).unwrap();
        assert_eq!(renewed.changed(&loaded), "etcd.cert, etcd.key");

        let refused = |words: &str| {
            let error = EtcdFiles::load(&config).err().unwrap().to_string();
            assert!(error.contains(words), "{error}");
        };
        fs::write(config.key.as_ref().unwrap(), &first.key_pem).unwrap();
        refused("is not the key of");
        write(&config, &issuer, &issuer.issue(&request().expired()).unwrap());
        refused("expired on");
        write(&config, &issuer, &second);
        fs::set_permissions(config.key.as_ref().unwrap(), fs::Permissions::from_mode(0o644)).unwrap();
        refused("is open to others");
        write(&config, &issuer, &second);
        fs::write(config.ca.as_ref().unwrap(), "no PEM").unwrap();
        refused("holds no certificate");
        fs::remove_file(config.ca.as_ref().unwrap()).unwrap();
        refused("cannot be read");
        assert!(EtcdFiles::load(&EtcdConfig::default()).unwrap() == EtcdFiles::default());
    }
}
