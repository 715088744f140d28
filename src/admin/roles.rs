//! Job: who may call what at the admin port.
//! Input: a call's path, whom a certificate names, the names of the configuration. Output: the caller and its role, or why the call is refused.
//! Pure: no clock, no I/O, no async.
//! Always true: a call that is not in the table asks for the full role; a name in both lists has the full one.

use super::proto::admin_server::SERVICE_NAME;
use crate::certs::PeerIdentity;
use std::fmt;

/// What somebody may do at the admin port. A greater one may do all that a lesser one may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdminRole {
    /// Of `tls.viewers`: look, and change nothing, nor cost the links any work.
    ReadOnly,
    /// Of `tls.admins`: everything.
    Full,
}

impl AdminRole {
    pub fn as_str(self) -> &'static str {
        match self {
            AdminRole::ReadOnly => "read-only",
            AdminRole::Full => "full",
        }
    }
}

/// Every call of the admin service, with the role that it asks for. A comparison changes nothing and costs both sides work, so it is no look.
pub const CALLS: [(&str, AdminRole); 17] = [
    ("Status", AdminRole::ReadOnly),
    ("Resync", AdminRole::Full),
    ("Verify", AdminRole::Full),
    ("Repair", AdminRole::Full),
    ("ShowQuarantined", AdminRole::ReadOnly),
    ("RetryQuarantined", AdminRole::Full),
    ("DiscardQuarantined", AdminRole::Full),
    ("Allow", AdminRole::Full),
    ("ReloadConfiguration", AdminRole::Full),
    ("Pause", AdminRole::Full),
    ("Resume", AdminRole::Full),
    ("WatchStatus", AdminRole::ReadOnly),
    ("GetConfiguration", AdminRole::ReadOnly),
    ("GetCertificates", AdminRole::ReadOnly),
    ("Bundle", AdminRole::ReadOnly),
    ("GetLogLevel", AdminRole::ReadOnly),
    ("SetLogLevel", AdminRole::Full),
];

/// The other services of the port; they only tell.
const TELLING: [&str; 3] =
    ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"];

/// The names that the configuration lets in.
#[derive(Debug, Clone, Default)]
pub struct Admins {
    /// `tls.admins`.
    pub admins: Vec<String>,
    /// `tls.viewers`.
    pub viewers: Vec<String>,
}

/// Why a call is not let in; for whoever called.
#[derive(Debug, PartialEq, Eq)]
pub enum Denied {
    /// The certificate bears no name that is let in.
    Stranger,
    /// It bears this one, whose role is less than the call asks for.
    AsksFor { name: String, asked: AdminRole },
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Denied::Stranger => f.write_str("none of tls.admins or tls.viewers"),
            Denied::AsksFor { asked, .. } => write!(f, "the call asks for the {} role", asked.as_str()),
        }
    }
}

impl Admins {
    /// The name by which the certificate is let in to this call.
    pub fn judge(&self, identity: &PeerIdentity, path: &str) -> Result<String, Denied> {
        let borne = |names: &[String]| names.iter().find(|name| identity.bears(name)).cloned();
        let full = borne(&self.admins).map(|name| (name, AdminRole::Full));
        let known = full.or_else(|| borne(&self.viewers).map(|name| (name, AdminRole::ReadOnly)));
        let (name, role) = known.ok_or(Denied::Stranger)?;
        let asked = asked(path);
        if role < asked { Err(Denied::AsksFor { name, asked }) } else { Ok(name) }
    }
}

/// The role that a call asks for, by its path: `/etcd_ferry.admin.v1.Admin/Status`.
pub(super) fn asked(path: &str) -> AdminRole {
    let Some((service, call)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
        return AdminRole::Full;
    };
    if TELLING.contains(&service) {
        return AdminRole::ReadOnly;
    }
    let known = CALLS.iter().find(|(name, _)| service == SERVICE_NAME && *name == call);
    known.map_or(AdminRole::Full, |(_, role)| *role)
}

#[cfg(test)]
mod tests {
    use super::super::service::DESCRIPTORS;
    use super::*;
    use prost::Message;
    use prost_types::FileDescriptorSet;
    use std::collections::BTreeSet;
    use time::OffsetDateTime;

    fn bearer(sans: &[&str]) -> PeerIdentity {
        PeerIdentity {
            sans: sans.iter().map(|san| (*san).to_owned()).collect(),
            subject: "CN=somebody".to_owned(),
            not_before: OffsetDateTime::UNIX_EPOCH,
            not_after: OffsetDateTime::UNIX_EPOCH,
            server_auth: true,
            client_auth: true,
        }
    }

    fn admins() -> Admins {
        Admins { admins: vec!["urn:admin".to_owned()], viewers: vec!["urn:viewer".to_owned()] }
    }

    fn path(call: &str) -> String {
        format!("/{SERVICE_NAME}/{call}")
    }

    #[test]
    fn the_table_has_every_call_of_the_service_and_no_other() {
        let files = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
        let services = files.file.iter().flat_map(|file| file.service.iter().map(|s| (file.package(), s)));
        let (_, service) =
            services.into_iter().find(|(package, s)| format!("{package}.{}", s.name()) == SERVICE_NAME).unwrap();
        let calls: BTreeSet<&str> = service.method.iter().map(|method| method.name()).collect();
        let table: BTreeSet<&str> = CALLS.iter().map(|(call, _)| *call).collect();
        assert_eq!(table, calls, "give each call of proto/admin.proto (right) a role in the table (left)");
        assert_eq!(table.len(), CALLS.len(), "a call is there twice");
    }

    #[test]
    fn a_viewer_may_look_and_nothing_else() {
        let viewer = bearer(&["localhost", "urn:viewer"]);
        for (call, role) in CALLS {
            let wanted = match role {
                AdminRole::ReadOnly => Ok("urn:viewer".to_owned()),
                AdminRole::Full => Err(Denied::AsksFor { name: "urn:viewer".to_owned(), asked: AdminRole::Full }),
            };
            assert_eq!(admins().judge(&viewer, &path(call)), wanted, "{call}");
        }
        let may: Vec<&str> = CALLS.iter().filter(|(_, role)| *role == AdminRole::ReadOnly).map(|(c, _)| *c).collect();
        assert_eq!(
            may,
            [
                "Status",
                "ShowQuarantined",
                "WatchStatus",
                "GetConfiguration",
                "GetCertificates",
                "Bundle",
                "GetLogLevel"
            ]
        );
        for service in TELLING {
            assert!(admins().judge(&viewer, &format!("/{service}/Anything")).is_ok(), "{service}");
        }
    }

    #[test]
    fn what_is_not_in_the_table_is_for_admins() {
        let others = ["", "/", "Status", "/Status", "/other.Service/Status", "/etcd_ferry.admin.v1.Admin/Unheard"];
        for other in others {
            let denied = admins().judge(&bearer(&["urn:viewer"]), other);
            assert!(matches!(denied, Err(Denied::AsksFor { asked: AdminRole::Full, .. })), "{other}");
            assert_eq!(admins().judge(&bearer(&["urn:admin"]), other), Ok("urn:admin".to_owned()), "{other}");
        }
    }

    #[test]
    fn who_is_in_no_list_may_nothing_and_who_is_in_both_may_everything() {
        assert_eq!(admins().judge(&bearer(&["urn:other"]), &path("Status")), Err(Denied::Stranger));
        assert_eq!(Admins::default().judge(&bearer(&["urn:admin"]), &path("Status")), Err(Denied::Stranger));
        let both = bearer(&["urn:viewer", "urn:admin"]);
        assert_eq!(admins().judge(&both, &path("Resync")), Ok("urn:admin".to_owned()));
    }
}
