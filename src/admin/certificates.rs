//! Job: every certificate that a sidecar shows or trusts: gathered for an operator, and printed.
//! Input: what is in use, the files of the connection to etcd. Output: the service's answer; its table and its JSON.
//! Edge: reads the files of `etcd`, as they are now.
//! Always true: nothing of a private key is read; a file that cannot be read is told, and keeps nobody from the rest.

use super::client::{ClientError, Connection, ask};
use super::proto::{Certificate, GetCertificatesReply, GetCertificatesRequest, RevocationList, UnreadFile};
use super::table::{aligned, line};
use crate::certs::describe;
use crate::certs::identity::IdentityError;
use crate::certs::load::{self, Credentials, rfc3339};
use crate::config::{Config, EtcdConfig};
use serde::Serialize;
use std::path::Path;
use time::OffsetDateTime;

/// Of a link's peers as they are in use, of etcd as they are in the files now.
pub(super) fn gather(credentials: &Credentials, config: &Config) -> GetCertificatesReply {
    let mut reply = GetCertificatesReply::default();
    let tls = &config.tls;
    let chain = credentials.certified_key.cert.iter();
    add_chain(&mut reply, ["own", "own intermediate"], &tls.cert, chain.map(|der| &der[..]));
    for der in &credentials.authorities {
        add(&mut reply, "ca", &tls.ca, der);
    }
    let EtcdConfig { ca, cert, .. } = &config.etcd;
    if let Some(path) = cert {
        match load::load_certificates(path) {
            Ok(chain) => {
                let uses = ["etcd client", "etcd client intermediate"];
                add_chain(&mut reply, uses, path, chain.iter().map(|der| &der[..]));
            }
            Err(e) => unread(&mut reply, path, e.to_string()),
        }
    }
    if let Some(path) = ca {
        match load::load_certificates(path) {
            Ok(authorities) => authorities.iter().for_each(|der| add(&mut reply, "etcd ca", path, der)),
            Err(e) => unread(&mut reply, path, e.to_string()),
        }
    }
    if let Some(path) = &tls.crl {
        for der in &credentials.crls {
            match describe::revocation_list(der) {
                Some(list) => reply.revocation_lists.push(RevocationList {
                    file: path.display().to_string(),
                    issuer: list.issuer,
                    this_update: list.this_update.unix_timestamp(),
                    next_update: list.next_update.map(OffsetDateTime::unix_timestamp),
                    revoked: list.revoked,
                }),
                None => unread(&mut reply, path, "it holds a list that cannot be read: give another".to_owned()),
            }
        }
    }
    reply
}

/// The first one is the holder's, the others lead to its CA.
fn add_chain<'a>(
    reply: &mut GetCertificatesReply,
    uses: [&str; 2],
    file: &Path,
    chain: impl Iterator<Item = &'a [u8]>,
) {
    for (place, der) in chain.enumerate() {
        add(reply, uses[place.min(1)], file, der);
    }
}

fn add(reply: &mut GetCertificatesReply, of: &str, file: &Path, der: &[u8]) {
    match message(of, file, der) {
        Ok(certificate) => reply.certificates.push(certificate),
        Err(e) => unread(reply, file, format!("it holds a certificate that cannot be read: {e}")),
    }
}

fn message(of: &str, file: &Path, der: &[u8]) -> Result<Certificate, IdentityError> {
    let described = describe::certificate(der)?;
    Ok(Certificate {
        r#use: of.to_owned(),
        file: file.display().to_string(),
        subject: described.identity.subject,
        sans: described.identity.sans,
        issuer: described.issuer,
        serial: described.serial,
        not_before: described.identity.not_before.unix_timestamp(),
        not_after: described.identity.not_after.unix_timestamp(),
    })
}

fn unread(reply: &mut GetCertificatesReply, file: &Path, reason: String) {
    reply.unread.push(UnreadFile { file: file.display().to_string(), reason });
}

/// Every certificate of a running sidecar.
pub async fn certificates(connection: &Connection) -> Result<GetCertificatesReply, ClientError> {
    ask(connection, async |mut client| client.get_certificates(GetCertificatesRequest {}).await).await
}

#[derive(Serialize)]
struct CertificatesJson<'a> {
    certificates: Vec<CertificateJson<'a>>,
    revocation_lists: Vec<ListJson<'a>>,
    unread: Vec<UnreadJson<'a>>,
}

/// Times are RFC 3339.
#[derive(Serialize)]
struct CertificateJson<'a> {
    r#use: &'a str,
    file: &'a str,
    subject: &'a str,
    sans: &'a [String],
    issuer: &'a str,
    serial: &'a str,
    not_before: String,
    not_after: String,
}

#[derive(Serialize)]
struct ListJson<'a> {
    file: &'a str,
    issuer: &'a str,
    this_update: String,
    /// `null`: it does not say.
    next_update: Option<String>,
    revoked: u64,
}

#[derive(Serialize)]
struct UnreadJson<'a> {
    file: &'a str,
    reason: &'a str,
}

fn moment(seconds: i64) -> String {
    OffsetDateTime::from_unix_timestamp(seconds).map_or_else(|_| seconds.to_string(), rfc3339)
}

/// For scripts.
pub fn certificates_json(reply: &GetCertificatesReply) -> String {
    let json = CertificatesJson {
        certificates: reply.certificates.iter().map(certificate_json).collect(),
        revocation_lists: reply.revocation_lists.iter().map(list_json).collect(),
        unread: reply.unread.iter().map(|u| UnreadJson { file: &u.file, reason: &u.reason }).collect(),
    };
    // Strings, numbers and lists of them: serde_json has no way to fail on these.
    serde_json::to_string_pretty(&json).unwrap_or_default()
}

fn certificate_json(certificate: &Certificate) -> CertificateJson<'_> {
    let Certificate { r#use, file, subject, sans, issuer, serial, not_before, not_after } = certificate;
    let [not_before, not_after] = [*not_before, *not_after].map(moment);
    CertificateJson { r#use, file, subject, sans, issuer, serial, not_before, not_after }
}

fn list_json(list: &RevocationList) -> ListJson<'_> {
    let RevocationList { file, issuer, this_update, next_update, revoked } = list;
    let next_update = next_update.map(moment);
    ListJson { file, issuer, this_update: moment(*this_update), next_update, revoked: *revoked }
}

/// For people; what is wrong stands below the tables.
pub fn certificates_table(reply: &GetCertificatesReply) -> String {
    let row = |c: &Certificate| {
        let names = if c.sans.is_empty() { c.subject.clone() } else { c.sans.join(", ") };
        [c.r#use.clone(), moment(c.not_after), c.serial.clone(), c.issuer.clone(), names]
    };
    let mut text = aligned(["USE", "NOT AFTER", "SERIAL", "ISSUER", "NAMES"], reply.certificates.iter().map(row));
    if !reply.revocation_lists.is_empty() {
        let row = |l: &RevocationList| {
            let next = l.next_update.map_or_else(|| "not said".to_owned(), moment);
            [l.revoked.to_string(), moment(l.this_update), next, l.issuer.clone()]
        };
        text.push('\n');
        text.push_str(&aligned(["REVOKED", "OF", "OUT OF DATE", "ISSUER"], reply.revocation_lists.iter().map(row)));
    }
    for file in &reply.unread {
        text.push_str(&line(&format!("{}: {}", file.file, file.reason)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> GetCertificatesReply {
        let own = Certificate {
            r#use: "own".to_owned(),
            file: "us-east-1.pem".to_owned(),
            subject: "CN=us-east-1".to_owned(),
            sans: vec!["spiffe://etcd-ferry.dev/region/us-east-1".to_owned(), "localhost".to_owned()],
            issuer: "CN=dev CA".to_owned(),
            serial: "0a:ff".to_owned(),
            not_before: 1_700_000_000,
            not_after: 1_800_000_000,
        };
        let ca =
            Certificate { r#use: "ca".to_owned(), sans: Vec::new(), subject: "CN=dev\nCA".to_owned(), ..own.clone() };
        GetCertificatesReply {
            certificates: vec![own, ca],
            revocation_lists: vec![RevocationList {
                file: "crl.pem".to_owned(),
                issuer: "CN=dev CA".to_owned(),
                this_update: 1_700_000_000,
                next_update: None,
                revoked: 2,
            }],
            unread: vec![UnreadFile { file: "etcd.pem".to_owned(), reason: "it is gone".to_owned() }],
        }
    }

    #[test]
    fn people_read_who_holds_what_until_when() {
        assert_eq!(
            certificates_table(&reply()),
            "USE  NOT AFTER             SERIAL  ISSUER     NAMES\n\
             own  2027-01-15T08:00:00Z  0a:ff   CN=dev CA  spiffe://etcd-ferry.dev/region/us-east-1, localhost\n\
             ca   2027-01-15T08:00:00Z  0a:ff   CN=dev CA  CN=dev CA\n\
             \n\
             REVOKED  OF                    OUT OF DATE  ISSUER\n\
             2        2023-11-14T22:13:20Z  not said     CN=dev CA\n\
             etcd.pem: it is gone\n"
        );
    }

    #[test]
    fn the_json_has_every_field() {
        let json: serde_json::Value = serde_json::from_str(&certificates_json(&reply())).unwrap();
        let own = &json["certificates"][0];
        assert_eq!(own["not_before"], "2023-11-14T22:13:20Z");
        for field in ["use", "file", "subject", "sans", "issuer", "serial", "not_before", "not_after"] {
            assert!(!own[field].is_null(), "{field}");
        }
        assert_eq!(
            (&json["revocation_lists"][0]["revoked"], &json["unread"][0]["file"]),
            (&2.into(), &"etcd.pem".into())
        );
        assert!(json["revocation_lists"][0]["next_update"].is_null());
    }
}
