//! Append-only files.
pub mod feed;
