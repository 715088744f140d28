//! The admin service, its client, and the http listener.
pub mod client;
pub mod http;
pub mod service;
