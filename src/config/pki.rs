//! Job: the rules of `[tls.pki]`: whom this sidecar asks for its certificate, with which right, for which names.
//! Input: the table. Output: a `PkiConfig`, or its faults.
//! Pure: no file, no clock.
//! Always true: a token is sent through TLS, or to this machine itself; what becomes a part of a path cannot leave its place there.

use super::check::{is_url, limit, without_user};
use super::read::Section;
use crate::certs::{SAN_RULE, is_san};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Where Vault's PKI is, unless it was mounted elsewhere.
const MOUNT: &str = "pki";
/// A certificate that lives longer than ten years needs no PKI that renews it.
const TTL_SECONDS_MAX: u64 = 3_650 * 86_400;
const PATH_RULE: &str = "must be of a-z, A-Z, 0-9, '-', '_' and '.'";

/// Who issues the pair that `tls` names, and what is asked of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PkiConfig {
    /// `https://host:port`, or `http://` on this machine.
    pub address: String,
    /// The CA of the PKI's own certificate; with `https://` alone.
    pub ca: Option<PathBuf>,
    pub mount: String,
    pub role: String,
    pub namespace: Option<String>,
    /// Read anew for each request.
    pub token_file: PathBuf,
    /// The SANs, URI or DNS, that the certificate shall bear.
    pub names: Vec<String>,
    pub common_name: Option<String>,
    /// `None`: what the role gives.
    pub ttl: Option<Duration>,
}

pub(super) fn pki(s: &mut Section<'_>) -> Option<PkiConfig> {
    let address = address(s);
    let ca = s.ca_of(address.as_deref(), "address", "/etc/etcd-ferry/vault-ca.pem", "the PKI's own certificate");
    let mount = s.text_or("mount", MOUNT).and_then(|mount| path(s, "mount", &mount, true));
    let role = s.text("role", "etcd-ferry").and_then(|role| path(s, "role", &role, false));
    let namespace = s.text_if_present("namespace", "team").and_then(|name| path(s, "namespace", &name, true));
    let token_file = s.path("token_file", "/run/secrets/vault-token");
    let names = names(s);
    let common_name = s.text_if_present("common_name", "us-east-1.ferry.example");
    let ttl = limit(s, "ttl_seconds", 0, 0, TTL_SECONDS_MAX);
    Some(PkiConfig {
        address: address?,
        ca,
        mount: mount?,
        role: role?,
        namespace,
        token_file: token_file?,
        names: names?,
        common_name,
        ttl: (ttl > 0).then_some(Duration::from_secs(ttl)),
    })
}

fn address(s: &mut Section<'_>) -> Option<String> {
    let example = "https://vault.example:8200";
    let text = s.text("address", example)?;
    let address = text.strip_suffix('/').unwrap_or(&text).to_owned();
    if !is_url(&address, &["http", "https"]) {
        let rule = format!("must be https:// with a host, a port and nothing more, such as {example:?}");
        s.fault("address", format!("{rule} (found {:?})", without_user(&text)));
        return None;
    }
    if address.starts_with("http:") && !is_this_machine(&address) {
        s.fault(
            "address",
            "must be https://: a token and a private key go over it (http:// is for this machine alone)",
        );
        return None;
    }
    Some(address)
}

fn is_this_machine(address: &str) -> bool {
    let Ok(uri) = address.parse::<http::Uri>() else { return false };
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A part of the request's path, or several with slashes between; slashes at its ends are dropped.
fn path(s: &mut Section<'_>, key: &str, text: &str, several: bool) -> Option<String> {
    let path = if several { text.trim_matches('/') } else { text };
    let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let part = |part: &str| !part.is_empty() && part.chars().all(letter) && part.chars().any(|c| c != '.');
    if !(if several { path.split('/').all(part) } else { part(path) }) {
        let parts = if several { ", with '/' between parts" } else { "" };
        s.fault(key, format!("{PATH_RULE}{parts} (found {text:?})"));
        return None;
    }
    Some(path.to_owned())
}

fn names(s: &mut Section<'_>) -> Option<Vec<String>> {
    let Some(texts) = s.texts("names") else {
        s.missing_list("names", "spiffe://example.org/etcd-ferry/us-east-1");
        return None;
    };
    if texts.is_empty() {
        s.fault("names", "is empty: give at least the name that the other sides write as `peer`");
    }
    let mut names: Vec<String> = Vec::new();
    for (field, name) in texts {
        // Vault takes names as one text, with commas between.
        if !is_san(&name) || name.contains(',') {
            s.fault_at(field, format!("must be {SAN_RULE}, without a comma (found {name:?})"));
        } else if names.contains(&name) {
            s.fault_at(field, "is given twice: remove one");
        }
        names.push(name);
    }
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Faults};

    const SOUND: &str = r#"
region = "us-east-1"
node = "us-east-1-a"
data_dir = "data"
etcd.endpoints = ["http://127.0.0.1:2379"]
listen = { peer = "0.0.0.0:7443", admin = "127.0.0.1:7444", http = "127.0.0.1:7445" }
receive = [{ link = "config", peer = "ferry.example" }]
[tls]
ca = "ca.pem"
cert = "a.pem"
key = "a.key"
[tls.pki]
address = "https://vault.example:8200/"
ca = "vault-ca.pem"
role = "ferry"
token_file = "token"
names = ["spiffe://example.org/a"]
"#;

    fn fields(from: &str, to: &str) -> Vec<String> {
        assert_eq!(SOUND.matches(from).count(), 1, "{from:?} is in the sound configuration once");
        match Config::from_toml(&SOUND.replace(from, to)) {
            Ok(_) => Vec::new(),
            Err(Faults(faults)) => faults.into_iter().map(|fault| fault.field).collect(),
        }
    }

    #[test]
    fn a_pki_is_asked_only_where_one_is_configured() {
        let pki = Config::from_toml(SOUND).unwrap().pki.unwrap();
        assert_eq!((&pki.address[..], &pki.mount[..], &pki.role[..]), ("https://vault.example:8200", "pki", "ferry"));
        assert_eq!((pki.namespace, pki.common_name, pki.ttl), (None, None, None));
        let (without, _) = SOUND.split_once("[tls.pki]").unwrap();
        assert!(Config::from_toml(without).unwrap().pki.is_none());
    }

    #[test]
    fn each_key_has_its_rule() {
        let (role, names) = ("role = \"ferry\"", "[\"spiffe://example.org/a\"]");
        for (from, to, field) in [
            ("https://vault.example:8200/", "http://vault.example:8200", "tls.pki.address"),
            ("https://vault.example:8200/", "https://vault.example:8200/v1", "tls.pki.address"),
            ("https://vault.example:8200/", "http://127.0.0.1:8200", "tls.pki.ca"),
            ("ca = \"vault-ca.pem\"\n", "", "tls.pki.ca"),
            (role, "", "tls.pki.role"),
            (role, "role = \"a/b\"", "tls.pki.role"),
            (role, "role = \"..\"", "tls.pki.role"),
            (role, "role = \"a\"\nmount = \"../sys\"", "tls.pki.mount"),
            (role, "role = \"a\"\nmount = \"a//b\"", "tls.pki.mount"),
            (role, "role = \"a\"\nmount = \"\"", "tls.pki.mount"),
            (role, "role = \"a\"\nnamespace = \"a b\"", "tls.pki.namespace"),
            (role, "role = \"a\"\nttl_seconds = -1", "tls.pki.ttl_seconds"),
            (role, "role = \"a\"\nrole_id = 1", "tls.pki.role_id"),
            ("token_file = \"token\"", "", "tls.pki.token_file"),
            (names, "[]", "tls.pki.names"),
            (names, "[\"127.0.0.1\"]", "tls.pki.names[0]"),
            (names, "[\"urn:a,b\"]", "tls.pki.names[0]"),
            (names, "[\"a.example\", \"a.example\"]", "tls.pki.names[1]"),
            ("key = \"a.key\"", "key = \"a.pem\"", "tls.key"),
            ("[tls.pki]", "[tls.pky]", "tls.pky"),
        ] {
            assert_eq!(fields(from, to), [field], "{to}");
        }
    }

    #[test]
    fn this_machine_may_be_asked_without_tls_and_mounts_may_lie_deep() {
        for address in ["http://127.0.0.1:8200", "http://[::1]:8200", "http://localhost:8200"] {
            let text = SOUND.replace("https://vault.example:8200/", address).replace("ca = \"vault-ca.pem\"\n", "");
            assert!(Config::from_toml(&text).is_ok(), "{address}");
        }
        let given = "role = \"ferry\"\nmount = \"/team/pki/\"\nnamespace = \"a/b/\"\nttl_seconds = 60";
        let pki = Config::from_toml(&SOUND.replace("role = \"ferry\"", given)).unwrap().pki.unwrap();
        assert_eq!((&pki.mount[..], pki.namespace.as_deref()), ("team/pki", Some("a/b")));
        assert_eq!(pki.ttl.map(|ttl| ttl.as_secs()), Some(60));
    }
}
