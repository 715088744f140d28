//! The replica's half of a link.
pub mod admit;
pub mod apply;
pub mod dedupe;
pub mod journal;
pub mod plan;
pub mod receive;
