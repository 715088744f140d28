//! etcd-ferry: carries an etcd cluster's revisions to a standby cluster in another region.
//!
//! The map, in the order of imports: a file may use what stands below it, never what stands above.
//!
//! ```text
//! main.rs            the command line: parse, call, print, exit code
//! demo.rs            two regions on one machine, for `make demo`
//! app.rs             bind everything, then run it; owns tasks and shutdown
//! origin/            mod watch sequence(p) lag(p) spool resume(p) ship anchor
//! replica/           mod receive admit(p) journal dedupe(the only file that knows sled) plan(p) apply
//! admin/             service http client
//! etcd.rs            the narrow typed door to etcd
//! tls.rs             load and check certificates; peer identity
//! wire/              mod window(p) frame(p) body(p) cache(p) delta(p) digest(p) varint(p) kubernetes_like (tests)
//! segment/           mod (append-only files) file open feed (memory first, then files) writer, under spool and journal
//! config.rs          raw to checked, all faults at once
//! model.rs(p) retry.rs(p) certs.rs(rcgen) metrics.rs
//! ```

pub mod admin;
pub mod app;
pub mod certs;
pub mod config;
pub mod demo;
pub mod etcd;
pub mod metrics;
pub mod model;
pub mod origin;
pub mod replica;
pub mod retry;
pub mod segment;
pub mod tls;
pub mod wire;
