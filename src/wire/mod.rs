//! Job: the wire: what two sidecars say to each other, and the bounds of it.
//! Input: revisions, and what came from a peer. Output: frames, digests, protobuf messages.
//! Pure: the rooms below do no I/O; the services and streams are the origin's and the replica's.
//! Always true: nothing from a peer is believed before its size, checksum and digest are checked.

mod body;
mod cache;
pub mod codec;
pub mod delta;
pub mod digest;
pub mod frame;
#[cfg(test)]
mod kubernetes_like;
mod limits;
pub mod parts;
pub mod refusal;
mod varint;
pub mod window;

/// Generated from proto/replicate.proto.
#[allow(clippy::all, clippy::pedantic)]
pub mod replicate {
    tonic::include_proto!("etcd_ferry.replicate.v1");
}

/// What Hello compares: raised when an older peer could misread a newer one.
pub const PROTOCOL_VERSION: u32 = 1;
/// Metadata of a Ship stream: the link's name.
pub const LINK_METADATA: &str = "etcd-ferry-link";
/// Metadata of a Ship stream: the session that its hello was given, in hexadecimal.
pub const SESSION_METADATA: &str = "etcd-ferry-session";
/// A hello is read before the peer's name is checked, so it is small.
pub const HELLO_BYTES_MAX: usize = 64 << 10;

/// What a sidecar reads of its peer in one message of a hello's answer or of receipts. An answer to a question about keys is far below it,
/// unless keys have some ten thousand bytes each; what is larger ends the stream.
pub const RECEIPT_BYTES_MAX: usize = 64 << 20;

/// What one side says in words of its own state.
pub const TEXT_BYTES_MAX: usize = 1 << 10;

/// The beginning of a text, as much of it as may be said or is taken: [`TEXT_BYTES_MAX`].
pub fn cut_text(mut text: String) -> String {
    let end = (0..=TEXT_BYTES_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
    text
}

/// The lesser of our own limit and a peer's; a peer that names none leaves ours.
pub fn lesser(ours: usize, theirs: u64) -> usize {
    match usize::try_from(theirs) {
        Ok(0) | Err(_) => ours,
        Ok(theirs) => ours.min(theirs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_two_of_its_characters() {
        assert_eq!(cut_text("short".to_owned()), "short");
        let long = format!("x{}", "é".repeat(TEXT_BYTES_MAX));
        let cut = cut_text(long.clone());
        assert_eq!(cut.len(), TEXT_BYTES_MAX - 1);
        assert!(long.starts_with(&cut));
    }

    #[test]
    fn the_lesser_limit_of_both_sides_holds_and_a_peer_that_names_none_leaves_ours() {
        assert_eq!((lesser(5, 3), lesser(3, 5)), (3, 3));
        assert_eq!((lesser(5, 0), lesser(5, u64::MAX)), (5, 5));
    }
}
