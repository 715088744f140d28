//! The tests that need real processes: one binary, real etcds, real sidecars, a link that can fail.
#![allow(clippy::unwrap_used, reason = "clippy knows #[test] functions, not the functions that they call")]

mod admin;
mod bank;
mod bed;
mod both_ways;
mod config;
mod copy;
mod damage;
mod demo;
mod docs;
mod elections;
mod etcd_access;
mod fencing;
mod flips;
mod following;
mod guards;
mod lag;
mod large;
mod links;
mod lost_history;
mod memory;
mod mutants_apply;
mod peers;
mod power_cut;
mod repair;
mod replica_trouble;
mod resume;
mod same_origin;
mod seeing;
mod sidecar_kills;
mod simulation;
mod spool_full;
mod takeover;
mod tidy;
mod trust;
mod verify;
