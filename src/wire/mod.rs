//! The wire: what two sidecars say to each other.
mod body;
mod cache;
pub mod delta;
pub mod digest;
pub mod frame;
#[cfg(test)]
mod kubernetes_like;
mod varint;
pub mod window;

/// Generated from proto/replicate.proto.
#[allow(clippy::all, clippy::pedantic)]
pub mod replicate {
    tonic::include_proto!("etcd_ferry.replicate.v1");
}
