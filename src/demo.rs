//! Two regions on one machine, for `make demo`.
