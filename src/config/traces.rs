//! Job: the rules of `[traces]`: which collector gets spans, and of how many revisions.
//! Input: the table. Output: a `TracesConfig`, or its faults.
//! Pure: no file, no clock.
//! Always true: without the table there are no traces.

use super::check::{is_url, limit, without_user};
use super::read::Section;
use std::num::NonZeroU64;
use std::path::PathBuf;

/// One in a thousand, unless configured: at 200 revisions a second, a trace each five seconds.
const SAMPLE: u64 = 1_000;
const SAMPLE_MAX: u64 = 1_000_000_000;

/// Where spans go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TracesConfig {
    /// A collector that speaks OTLP/gRPC: `http://` or `https://`, host and port.
    pub endpoint: String,
    /// The CA of its certificate; with `https://` alone.
    pub ca: Option<PathBuf>,
    /// Revisions whose seq it divides are traced.
    pub sample: NonZeroU64,
}

pub(super) fn traces(s: &mut Section<'_>) -> Option<TracesConfig> {
    let example = "http://127.0.0.1:4317";
    let endpoint = s.text("endpoint", example).and_then(|text| {
        let endpoint = text.strip_suffix('/').unwrap_or(&text).to_owned();
        if !is_url(&endpoint, &["http", "https"]) {
            let rule = format!("must be http:// or https:// with a host, a port and nothing more, such as {example:?}");
            s.fault("endpoint", format!("{rule} (found {:?})", without_user(&text)));
            return None;
        }
        Some(endpoint)
    });
    let ca =
        s.ca_of(endpoint.as_deref(), "endpoint", "/etc/etcd-ferry/collector-ca.pem", "the collector's certificate");
    let sample = limit(s, "sample", SAMPLE, 1, SAMPLE_MAX);
    Some(TracesConfig { endpoint: endpoint?, ca, sample: NonZeroU64::new(sample)? })
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
tls = { ca = "ca.pem", cert = "a.pem", key = "a.key" }
receive = [{ link = "config", peer = "ferry.example" }]
"#;

    fn given(lines: &str) -> Result<Config, Faults> {
        Config::from_toml(&format!("{SOUND}{lines}"))
    }

    #[test]
    fn there_are_no_traces_unless_a_collector_is_named() {
        assert!(given("").unwrap().traces.is_none());
        let traces = given("[traces]\nendpoint = \"http://127.0.0.1:4317/\"").unwrap().traces.unwrap();
        assert_eq!((&traces.endpoint[..], traces.sample.get()), ("http://127.0.0.1:4317", 1_000));
        let all = given("[traces]\nendpoint = \"https://a:1\"\nca = \"ca.pem\"\nsample = 1").unwrap().traces.unwrap();
        assert_eq!(all.sample.get(), 1);
    }

    #[test]
    fn each_key_has_its_rule() {
        let sound = "endpoint = \"http://127.0.0.1:4317\"\n";
        for (lines, field) in [
            ("sample = 1".to_owned(), "traces.endpoint"),
            ("endpoint = \"127.0.0.1:4317\"".to_owned(), "traces.endpoint"),
            ("endpoint = \"http://127.0.0.1:4317/v1/traces\"".to_owned(), "traces.endpoint"),
            ("endpoint = \"https://a:1\"".to_owned(), "traces.ca"),
            (format!("{sound}ca = \"ca.pem\""), "traces.ca"),
            (format!("{sound}sample = 0"), "traces.sample"),
            (format!("{sound}sample = 0.5"), "traces.sample"),
            (format!("{sound}ratio = 1"), "traces.ratio"),
        ] {
            let Faults(faults) = given(&format!("[traces]\n{lines}")).unwrap_err();
            assert_eq!(faults.iter().map(|fault| &fault.field[..]).collect::<Vec<_>>(), [field], "{lines}");
        }
    }
}
