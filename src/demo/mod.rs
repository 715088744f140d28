//! Job: two regions on one machine, for `make demo`; and the parts of it that tests and benchmarks use too.
//! Input: the demo's options. Output: a live line, a table, and whether both sides are equal.
//! Always true: it listens on loopback only.

pub mod objects;
pub mod ports;
pub mod proxy;
