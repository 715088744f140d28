//! The tests that need real processes: one binary, real etcds, real sidecars, a link that can fail.
#![allow(clippy::unwrap_used, reason = "clippy knows #[test] functions, not the functions that they call")]

mod admin;
mod bank;
mod bed;
mod both_ways;
mod config;
mod copy;
mod demo;
mod docs;
mod etcd_access;
mod flips;
mod following;
mod guards;
mod lag;
mod large;
mod links;
mod memory;
mod peers;
mod power_cut;
mod replica_trouble;
mod seeing;
mod sidecar_kills;
mod tidy;
mod trust;
