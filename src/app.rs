//! Bind everything, then run it; owns tasks and shutdown.
