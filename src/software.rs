//! Job: what this program is: its version, the commit it was built from, and how it was built.
//! Input: what proto/build.rs found out. Output: texts for `--version`.
//! Pure: no clock, no I/O.
//! Always true: a commit is only named if the sources were those of that commit, or the text says that they were changed.

/// For `-V`: one line.
pub const SHORT: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("ETCD_FERRY_COMMIT"), ")");

/// For `--version`.
pub const LONG: &str =
    concat!(env!("CARGO_PKG_VERSION"), "\ncommit: ", env!("ETCD_FERRY_COMMIT"), "\nbuild: ", env!("ETCD_FERRY_BUILD"),);
