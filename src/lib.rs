//! etcd-ferry: carries an etcd cluster's revisions to a standby cluster in another region.
//!
//! The map, in the order of imports: a file may use what stands below it, never what stands above.
//!
//! ```text
//! main.rs            the program
//! cli/               mod local live sidecar links quarantine about bundle generate: the command line: parse, call, print, exit code
//! demo/              mod faults compare regions process load objects(p) ports proxy meter(p) report(p) show: two regions on one machine
//! top/               mod past(p) screen(p): every link of several sidecars, live on a terminal
//! app.rs             bind everything, then run it; owns tasks and shutdown
//! app/               links reload: start, stop and change links while it runs
//! origin/            mod ship hello decide remember term standby session receipts heartbeat canary(p) status stall shipped(p) verify outcome compare tally(p) mend found(p) anchor reader elect candidacy(p) resume(p) history(p) tail watch reopen(p) head probe view sequence(p) spool lineage(p) lag(p)
//! replica/           mod receive told ranges stream shipments verify admit(p) view copy pages(p) mark apply commit position trouble quarantine poison(p) hold pause breaker(p) txn next(p) align(p) stall learned plan(p) journal foreign(p) lookout age(p) compact dedupe(the only file that knows sled)
//! admin/             service audit calls commands health refresh watching reload roles(p) messages(p) http page history(p) bundle certificates quarantine verification limits(p) client show(p) status_json(p) table(p)
//! logs/              mod recent(p): the log, its level, its last lines
//! scan.rs            a range whole, page by page, at one revision
//! etcd/              mod gate lease limits bisect(p) version(p) error watch: the narrow typed door to etcd
//! pki/               mod answer(p) ask files life(p): this sidecar's pair, from a PKI that speaks Vault's API
//! traces/            mod book(p) export span(p): spans of sampled revisions, for a collector
//! tls/               mod (configurations) reload stamps etcd_files accept connect recheck verify explain
//! wire/              mod codec window(p) frame(p) body(p) cache(p) delta(p) digest(p) parts(p) refusal(p) limits(p) varint(p) kubernetes_like (tests)
//! segment/           mod open file writer (append-only files) feed (memory first, then files), under spool and journal
//! config/            mod read(p) layers(p) check(p) limits(p) pki(p) traces(p) files effective(p) change(p): raw to checked, all faults at once
//! certs/             mod identity describe(p) load revocation issue(the only file that knows rcgen)
//! repeats.rs(p) retry.rs(p) metrics.rs failpoint.rs software.rs(p)
//! model/             mod(p) limits(p) position(p) quarantine(p) ranges(p) stall(p) status(p)
//! ```

pub mod admin;
pub mod app;
pub mod certs;
pub mod cli;
pub mod config;
pub mod demo;
pub mod etcd;
pub mod failpoint;
pub mod logs;
pub mod metrics;
pub mod model;
pub mod origin;
pub mod pki;
pub mod repeats;
pub mod replica;
pub mod retry;
pub mod scan;
pub mod segment;
pub mod software;
pub mod tls;
pub mod top;
pub mod traces;
pub mod wire;
