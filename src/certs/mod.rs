//! Job: certificates as files and as names: read them, say whom they name, issue them for development and tests.
//! Input: PEM files; names. Output: `PeerIdentity`, `Credentials`, key pairs on disk.
//! Always true: a private key is written 0600 and never over an existing file; no key material is ever shown.

pub mod describe;
pub mod identity;
pub mod issue;
pub mod load;
pub mod revocation;

pub use identity::PeerIdentity;
pub use issue::{Issued, Issuer, dev};
pub use load::{Credentials, LoadError, TlsFiles};

/// What a region may be called: its name is part of a certificate's SAN and of a file's name.
pub const REGION_RULE: &str = "1 to 63 of a-z, A-Z, 0-9, '-', '_' and '.', starting with a letter or digit";

/// True if `name` follows [`REGION_RULE`].
pub fn is_region_name(name: &str) -> bool {
    let shape = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let start = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    start && name.len() <= 63 && name.chars().all(shape)
}

/// What a subject alternative name in the configuration may look like.
pub const SAN_RULE: &str =
    "a SAN of a certificate: a URI such as `spiffe://example.org/region/a`, or a DNS name such as `ferry.example.org`";

/// True if `san` follows [`SAN_RULE`]. A DNS name is taken as it stands: wildcards name nobody.
pub fn is_san(san: &str) -> bool {
    is_uri(san) || is_dns_name(san)
}

/// A scheme, a colon and something printable behind it that is not just a port.
pub(crate) fn is_uri(name: &str) -> bool {
    let Some((scheme, rest)) = name.split_once(':') else { return false };
    let scheme_shape = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(scheme_shape)
        && !rest.trim_start_matches('/').is_empty()
        && rest.chars().all(|c| c.is_ascii_graphic())
        && !rest.chars().all(|c| c.is_ascii_digit())
}

/// Labels of letters, digits, '-' and '_', joined by dots.
pub(crate) fn is_dns_name(name: &str) -> bool {
    let label = |l: &str| {
        let shape = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        !l.is_empty() && l.len() <= 63 && !l.starts_with('-') && !l.ends_with('-') && l.chars().all(shape)
    };
    let address = name.rsplit('.').next().is_some_and(|last| last.chars().all(|c| c.is_ascii_digit()));
    name.len() <= 253 && name.split('.').all(label) && !address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_san_is_a_uri_or_a_dns_name_and_nothing_else() {
        for good in ["spiffe://etcd-ferry.dev/region/a", "urn:ferry:a", "ferry.example", "localhost", "a_b.example"] {
            assert!(is_san(good), "{good}");
        }
        for bad in [
            "",
            "spiffe://",
            "spiffe:",
            "*.example",
            "a b",
            "spiffe://a b",
            "-a.example",
            "a..b",
            "a/b",
            "127.0.0.1",
            "ferry.example:7443",
        ] {
            assert!(!is_san(bad), "{bad}");
        }
    }

    #[test]
    fn a_region_name_cannot_leave_its_folder() {
        assert!(is_region_name("us-east-1") && is_region_name("A.b_c"));
        for bad in ["", "..", "../a", ".a", "a/b", "-a", "a b", &"a".repeat(64)] {
            assert!(!is_region_name(bad), "{bad}");
        }
    }
}
