//! The origin's half of a link.
pub mod anchor;
pub mod lag;
pub mod resume;
pub mod sequence;
pub mod ship;
pub mod spool;
pub mod watch;
