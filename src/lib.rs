//! etcd-ferry: carries an etcd cluster's revisions to a standby cluster in another region.
//!
//! The map, in the order of imports: a file may use what stands below it, never what stands above.
//!
//! ```text
//! main.rs            the command line: parse, call, print, exit code
//! demo/              mod (two regions on one machine, for `make demo`) proxy (their link) objects(p) ports
//! app.rs             bind everything, then run it; owns tasks and shutdown
//! origin/            mod watch sequence(p) lag(p) spool resume(p) ship anchor
//! replica/           mod receive admit(p) journal dedupe(the only file that knows sled) plan(p) apply
//! admin/             service http client
//! etcd.rs            the narrow typed door to etcd
//! tls/               mod (configurations) accept connect verify explain(p)
//! wire/              mod delta(p) frame(p) window(p) digest(p)
//! segment/           mod (append-only files) feed (memory first, then files), under spool and journal
//! config/            mod check(p) read(p) files: raw to checked, all faults at once
//! certs/             mod identity load issue(the only file that knows rcgen)
//! model.rs(p) retry.rs(p) metrics.rs
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
