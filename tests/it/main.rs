//! The tests that need real processes: one binary, real etcds, real sidecars, a link that can fail.
#![allow(clippy::unwrap_used, reason = "clippy knows #[test] functions, not the functions that they call")]

mod admin;
mod bank;
mod bed;
mod both_ways;
mod config;
mod copy;
mod docs;
mod following;
mod guards;
mod links;
mod power_cut;
mod tidy;
mod trust;
