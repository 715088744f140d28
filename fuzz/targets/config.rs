//! Job: configuration files: any text.
//! Input: bytes. Output: a crash, where there is a fault.
//! Always true: a configuration is accepted, or each of its faults has a field and a rule.

#![no_main]

use etcd_ferry::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(faults) = Config::from_toml(text) {
        assert!(faults.0.iter().all(|fault| !fault.field.is_empty() && !fault.rule.is_empty()) && !faults.0.is_empty());
    }
});
