//! Job: what a PKI is asked and what its answer is worth, in the form of Vault's API.
//! Input: bodies of requests and answers, the names that are wanted, the CA that peers trust, the caller's clock. Output: a pair, or why not.
//! Pure: no socket, no file, no clock.
//! Always true: a pair that is called sound is one that every peer with the same CA would talk to; no key is ever shown.

use super::life::{Life, Stage};
use crate::certs::identity::{IdentityError, PeerIdentity};
use crate::certs::load::{self, LoadError, provider, rfc3339};
use crate::certs::{is_dns_name, is_uri};
use crate::config::PkiConfig;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use time::OffsetDateTime;

/// What is told of a PKI's own words.
const WORDS_MAX: usize = 300;

/// What was issued, as PEM. It has no `Debug`: it holds a private key.
pub struct Issued {
    /// The certificate, and those between it and the CA.
    pub cert: String,
    pub key: String,
    /// The CA's certificate that signed it.
    pub ca: String,
}

/// Why an answer is not used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Unsound {
    #[error("it is not in the form of Vault's API ({0})")]
    Form(String),
    #[error("its {0} is not PEM")]
    Pem(&'static str),
    #[error("its certificate cannot be used: {0}")]
    Certificate(#[from] IdentityError),
    #[error("its private key is not that of its certificate")]
    OtherKey,
    #[error("its private key cannot be used: {0}")]
    Key(String),
    #[error("its certificate does not name {0}: does the PKI's role allow that name?")]
    Name(String),
    #[error("its certificate expired on {0}")]
    Expired(String),
    #[error("its certificate is not valid before {0}: do this machine's clock and the PKI's agree?")]
    NotYetValid(String),
    #[error("its certificate ends on {0}, and two thirds of its life are over already: raise the ttl")]
    Short(String),
    #[error(
        "its certificate is not issued for use as a {0}: the PKI's role needs the extended key usages serverAuth and clientAuth"
    )]
    Purpose(&'static str),
    #[error(
        "its certificate is not of the CA in tls.ca ({0}): if the PKI has a new CA, put that beside the old one first"
    )]
    Chain(String),
}

#[derive(Deserialize)]
struct Answer {
    data: Data,
}

#[derive(Deserialize)]
struct Data {
    certificate: String,
    issuing_ca: String,
    /// The issuing CA and those above it; absent or null where there is none.
    #[serde(default)]
    ca_chain: Option<Vec<String>>,
    private_key: String,
}

#[derive(Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<String>,
}

/// Where to POST the request.
pub fn path(pki: &PkiConfig) -> String {
    format!("/v1/{}/issue/{}", pki.mount, pki.role)
}

/// The body of a request. Names are in it once, as SANs, so that a common name adds none.
pub fn request(pki: &PkiConfig) -> Value {
    let of = |kind: fn(&str) -> bool| {
        let names: Vec<&str> = pki.names.iter().map(String::as_str).filter(|name| kind(name)).collect();
        names.join(",")
    };
    let mut request = json!({ "format": "pem", "exclude_cn_from_sans": true });
    let given = [
        ("common_name", pki.common_name.clone().unwrap_or_default()),
        ("alt_names", of(|name| is_dns_name(name) && !is_uri(name))),
        ("uri_sans", of(is_uri)),
        ("ttl", pki.ttl.map(|ttl| format!("{}s", ttl.as_secs())).unwrap_or_default()),
    ];
    for (key, value) in given.into_iter().filter(|(_, value)| !value.is_empty()) {
        request[key] = value.into();
    }
    request
}

/// What a refusal says, in one short line.
pub fn words(body: &[u8]) -> String {
    let errors = serde_json::from_slice::<Errors>(body).map(|answer| answer.errors).unwrap_or_default();
    let words = errors.join("; ");
    let words = words.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let words = words.collect::<Vec<_>>().join(" ");
    match words.char_indices().nth(WORDS_MAX) {
        _ if words.is_empty() => "it does not say why".to_owned(),
        Some((end, _)) => format!("{}...", &words[..end]),
        None => words,
    }
}

/// What the body of an answer holds.
pub fn read(body: &[u8]) -> Result<Issued, Unsound> {
    // Where it is malformed, serde_json says a place, and nothing of what stands there but a value of a wrong type's kind.
    let Answer { data } = serde_json::from_slice(body)
        .map_err(|e| Unsound::Form(format!("line {}, column {}: {:?} error", e.line(), e.column(), e.classify())))?;
    let between = data.ca_chain.unwrap_or_default().into_iter().filter(|certificate| !is_self_signed(certificate));
    let chain = std::iter::once(data.certificate).chain(between);
    Ok(Issued {
        cert: chain.map(line_ended).collect(),
        key: line_ended(data.private_key),
        ca: line_ended(data.issuing_ca),
    })
}

/// Vault's PEM ends without a line break.
fn line_ended(pem: String) -> String {
    if pem.ends_with('\n') { pem } else { pem + "\n" }
}

/// A root is what a peer has; it needs not be shown one.
fn is_self_signed(pem: &str) -> bool {
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).ok();
    certificate.is_some_and(|der| {
        x509_parser::parse_x509_certificate(&der).is_ok_and(|(_, c)| c.issuer().as_raw() == c.subject().as_raw())
    })
}

/// Refuses what a peer would refuse. `roots`: what they trust; `None`: what the answer says of itself, at a first issue.
pub fn judge(
    issued: &Issued,
    names: &[String],
    roots: Option<&RootCertStore>,
    now: OffsetDateTime,
) -> Result<PeerIdentity, Unsound> {
    let chain = certificates(&issued.cert, "certificate")?;
    let leaf = chain.first().ok_or(Unsound::Pem("certificate"))?;
    let identity = PeerIdentity::from_der(leaf)?;
    let secret = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).map_err(|_| Unsound::Pem("private_key"))?;
    CertifiedKey::from_der(chain.clone(), secret, &provider()).map_err(|e| {
        if matches!(e, rustls::Error::InconsistentKeys(_)) { Unsound::OtherKey } else { Unsound::Key(e.to_string()) }
    })?;
    if let Some(name) = names.iter().find(|name| !identity.bears(name)) {
        return Err(Unsound::Name(name.clone()));
    }
    if now < identity.not_before {
        return Err(Unsound::NotYetValid(rfc3339(identity.not_before)));
    }
    match Life::of(&identity).stage(now) {
        Stage::Over => return Err(Unsound::Expired(rfc3339(identity.not_after))),
        Stage::Due | Stage::Ending => return Err(Unsound::Short(rfc3339(identity.not_after))),
        Stage::Fresh => {}
    }
    for (allowed, usage) in [(identity.server_auth, "server"), (identity.client_auth, "client")] {
        if !allowed {
            return Err(Unsound::Purpose(usage));
        }
    }
    let own = certificates(&issued.ca, "issuing_ca")?;
    let roots = match roots {
        Some(roots) => roots.clone(),
        None => {
            let mut roots = RootCertStore::empty();
            own.into_iter().try_for_each(|root| roots.add(root)).map_err(|e| Unsound::Chain(e.to_string()))?;
            roots
        }
    };
    load::check_chain(Path::new("certificate"), &chain, roots, now).map_err(|error| {
        let LoadError::Chain { reason, .. } = error else { return Unsound::Chain(error.to_string()) };
        Unsound::Chain(reason)
    })?;
    Ok(identity)
}

fn certificates(pem: &str, what: &'static str) -> Result<Vec<CertificateDer<'static>>, Unsound> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    all.ok().filter(|all| !all.is_empty()).ok_or(Unsound::Pem(what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::issue::{IssueRequest, Issuer, Pair};
    use std::path::PathBuf;
    use std::time::Duration;

    const NAME: &str = "spiffe://etcd-ferry.dev/region/a";

    fn pki() -> PkiConfig {
        PkiConfig {
            address: "https://vault.example:8200".to_owned(),
            ca: None,
            mount: "team/pki".to_owned(),
            role: "ferry".to_owned(),
            namespace: None,
            token_file: PathBuf::from("token"),
            names: vec![NAME.to_owned(), "a.example".to_owned(), "urn:ferry:a".to_owned()],
            common_name: None,
            ttl: None,
        }
    }

    fn body(issuer: &Issuer, pair: &Pair) -> Value {
        let (ca, cert) = (issuer.ca_pem().trim_end(), pair.cert_pem.trim_end());
        json!({ "data": { "certificate": cert, "issuing_ca": ca, "ca_chain": [ca], "private_key": pair.key_pem } })
    }

    fn read_value(body: &Value) -> Result<Issued, Unsound> {
        read(body.to_string().as_bytes())
    }

    fn judged(issuer: &Issuer, pair: &Pair, roots: Option<&RootCertStore>) -> Result<PeerIdentity, Unsound> {
        judge(&read_value(&body(issuer, pair))?, &[NAME.to_owned()], roots, OffsetDateTime::now_utc())
    }

    fn roots(issuer: &Issuer) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(issuer.ca_pem().as_bytes()).unwrap()).unwrap();
        roots
    }

    #[test]
    fn a_request_is_in_vaults_form_and_says_only_what_is_configured() {
        assert_eq!(path(&pki()), "/v1/team/pki/issue/ferry");
        let bare = json!({
            "format": "pem",
            "exclude_cn_from_sans": true,
            "alt_names": "a.example",
            "uri_sans": format!("{NAME},urn:ferry:a"),
        });
        assert_eq!(request(&pki()), bare);
        let (common_name, ttl) = (Some("a.example".to_owned()), Some(Duration::from_secs(3_600)));
        let full = request(&PkiConfig { common_name, ttl, ..pki() });
        assert_eq!((&full["common_name"], &full["ttl"]), (&json!("a.example"), &json!("3600s")));
    }

    #[test]
    fn a_refusal_is_told_in_the_pkis_own_words_on_one_short_line() {
        assert_eq!(words(br#"{"errors":["permission denied","role\nunknown"]}"#), "permission denied; role unknown");
        for silent in [&b"{}"[..], b"", b"<html>", br#"{"errors":[]}"#, br#"{"errors":[" "]}"#] {
            assert_eq!(words(silent), "it does not say why");
        }
        let long = words(json!({ "errors": ["\u{e4}".repeat(5_000)] }).to_string().as_bytes());
        assert_eq!(long.chars().count(), WORDS_MAX + 3);
    }

    #[test]
    fn what_peers_would_talk_to_is_sound_and_its_chain_holds_no_root() {
        let issuer = Issuer::new("test CA").unwrap();
        let pair = issuer.issue(&IssueRequest::region("a")).unwrap();
        assert!(judged(&issuer, &pair, Some(&roots(&issuer))).unwrap().bears(NAME));
        judged(&issuer, &pair, None).unwrap();
        let issued = read_value(&body(&issuer, &pair)).unwrap();
        assert_eq!(issued.cert, pair.cert_pem, "the root is left out, and the line is ended");
        assert!(issued.key.ends_with('\n') && issued.ca.ends_with('\n'));
        let mut between = body(&issuer, &pair);
        between["data"]["ca_chain"] = json!([pair.cert_pem, issuer.ca_pem()]);
        assert_eq!(read_value(&between).unwrap().cert.matches("BEGIN CERTIFICATE").count(), 2);
        between["data"]["ca_chain"] = Value::Null;
        assert_eq!(read_value(&between).unwrap().cert.matches("BEGIN CERTIFICATE").count(), 1);
    }

    #[test]
    fn what_a_peer_would_refuse_is_unsound() {
        let (issuer, other) = (Issuer::new("test CA").unwrap(), Issuer::new("another CA").unwrap());
        let good = IssueRequest::region("a");
        let issue = |request: &IssueRequest| issuer.issue(request).unwrap();
        let ours = roots(&issuer);
        let refusal = |pair: &Pair| judged(&issuer, pair, Some(&ours)).unwrap_err().to_string();
        let now = OffsetDateTime::now_utc();
        let short = IssueRequest {
            not_before: now - Duration::from_secs(3_600),
            not_after: now + Duration::from_secs(60),
            ..good.clone()
        };
        for (request, words) in [
            (IssueRequest::region("b"), "does not name spiffe://etcd-ferry.dev/region/a"),
            (good.clone().expired(), "expired on"),
            (good.clone().not_yet_valid(), "is not valid before"),
            (short, "two thirds of its life are over"),
            (IssueRequest { server_auth: false, ..good.clone() }, "for use as a server"),
            (IssueRequest { client_auth: false, ..good.clone() }, "for use as a client"),
        ] {
            let said = refusal(&issue(&request));
            assert!(said.contains(words), "{said}");
        }
        let (mut halves, second) = (issue(&good), issue(&good));
        halves.key_pem = second.key_pem;
        assert_eq!(refusal(&halves), Unsound::OtherKey.to_string());
        let strange = other.issue(&good).unwrap();
        assert!(refusal(&strange).contains("is not of the CA in tls.ca"));
        assert!(
            matches!(judged(&issuer, &strange, None), Err(Unsound::Chain(_))),
            "nor of the CA that it names itself"
        );
    }

    #[test]
    fn what_is_not_in_the_form_is_refused_without_being_shown() {
        for bad in ["", "{}", "[]", r#"{"data":null}"#, r#"{"data":{"certificate":"SECRET"}}"#, r#"{"data":"SECRET"}"#]
        {
            let refusal = read(bad.as_bytes()).err().unwrap();
            assert!(matches!(refusal, Unsound::Form(_)) && !refusal.to_string().contains("SECRET"), "{refusal}");
        }
        let issuer = Issuer::new("test CA").unwrap();
        let pair = issuer.issue(&IssueRequest::region("a")).unwrap();
        for (key, unsound) in [
            ("certificate", Unsound::Pem("certificate")),
            ("private_key", Unsound::Pem("private_key")),
            ("issuing_ca", Unsound::Pem("issuing_ca")),
        ] {
            let mut body = body(&issuer, &pair);
            body["data"][key] = json!("SECRET");
            let issued = read_value(&body).unwrap();
            assert_eq!(judge(&issued, &[], None, OffsetDateTime::now_utc()).unwrap_err(), unsound);
        }
    }
}
