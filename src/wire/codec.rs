//! Job: the gRPC codec of the peer services: a protobuf message, then the crc32c of its bytes (four bytes, little-endian).
//! Input: messages; bytes of a peer. Output: bytes; messages, or DATA_LOSS where a bit has flipped after TLS had done its part.
//! Always true: no message is believed whose checksum does not match; the stream that it came on ends, and a new hello goes on from the position.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::{EncodeError, Message};
use std::marker::PhantomData;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

const CHECKSUM_BYTES: usize = 4;

/// Named in proto/build.rs for both peer services; the admin service speaks plain protobuf.
pub struct CheckedCodec<Out, In>(PhantomData<fn() -> (Out, In)>);

/// Either half of the codec.
pub struct Half<M>(PhantomData<fn() -> M>);

impl<Out, In> Default for CheckedCodec<Out, In> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<Out: Message + 'static, In: Message + Default + 'static> Codec for CheckedCodec<Out, In> {
    type Encode = Out;
    type Decode = In;
    type Encoder = Half<Out>;
    type Decoder = Half<In>;

    fn encoder(&mut self) -> Half<Out> {
        Half(PhantomData)
    }

    fn decoder(&mut self) -> Half<In> {
        Half(PhantomData)
    }
}

impl<M: Message + 'static> Encoder for Half<M> {
    type Item = M;
    type Error = Status;

    fn encode(&mut self, message: M, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        dst.put(seal(&message).map_err(|e| Status::internal(e.to_string()))?);
        Ok(())
    }
}

impl<M: Message + Default + 'static> Decoder for Half<M> {
    type Item = M;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<M>, Status> {
        unseal(src.copy_to_bytes(src.remaining())).map(Some)
    }
}

fn seal(message: &impl Message) -> Result<Bytes, EncodeError> {
    let mut sealed = BytesMut::with_capacity(message.encoded_len() + CHECKSUM_BYTES);
    message.encode(&mut sealed)?;
    let checksum = crc32c::crc32c(&sealed);
    sealed.put_u32_le(checksum);
    Ok(sealed.freeze())
}

/// The message, or DATA_LOSS. Public because the fuzz targets have no other way to hand bytes to the codec: tonic alone makes a `DecodeBuf`.
pub fn unseal<M: Message + Default>(mut sealed: Bytes) -> Result<M, Status> {
    let damaged = "a message's checksum does not match: it was damaged on the way, or the peer's software speaks another protocol version";
    let at = sealed.len().checked_sub(CHECKSUM_BYTES).ok_or_else(|| Status::data_loss(damaged))?;
    if sealed.split_off(at).get_u32_le() != crc32c::crc32c(&sealed) {
        return Err(Status::data_loss(damaged));
    }
    M::decode(sealed).map_err(|e| Status::data_loss(format!("a message cannot be decoded: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::replicate::{Ack, HelloReply, HelloRequest, Page, Progress, Receipt, Shipment, receipt, shipment};
    use proptest::prelude::*;

    fn flipped(sealed: &[u8], bit: usize) -> Bytes {
        let mut bytes = sealed.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        bytes.into()
    }

    /// How many of all single-bit flips are let through, each as what.
    fn believed<M: Message + Default>(message: &M) -> Vec<M> {
        let sealed = seal(message).unwrap();
        (0..sealed.len() * 8).filter_map(|bit| unseal(flipped(&sealed, bit)).ok()).collect()
    }

    fn shipment(what: shipment::What) -> Shipment {
        Shipment { what: Some(what) }
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let hello = HelloRequest { link: "config".to_owned(), epoch: 3, ..HelloRequest::default() };
        assert_eq!(unseal::<HelloRequest>(seal(&hello).unwrap()).unwrap(), hello);
        let empty = Receipt::default();
        assert_eq!(unseal::<Receipt>(seal(&empty).unwrap()).unwrap(), empty);
    }

    #[test]
    fn each_flipped_bit_is_noticed() {
        assert_eq!(believed(&shipment(shipment::What::Frame(Bytes::from(vec![7; 100])))), []);
        let progress = Progress { origin_revision: 700, head_revision: 1 << 40, persist: true, ..Progress::default() };
        assert_eq!(believed(&shipment(shipment::What::Progress(progress))), []);
        let page =
            Page { from: Bytes::from_static(b"/a"), to: Bytes::from_static(b"/b"), last: true, ..Page::default() };
        assert_eq!(believed(&shipment(shipment::What::Page(page))), []);
        let ack = Ack { received_seq: 9, durable_seq: 8, applied_seq: 7, ..Ack::default() };
        assert_eq!(believed(&Receipt { what: Some(receipt::What::Ack(ack)) }), []);
        assert_eq!(
            believed(&HelloReply { received_seq: 300, position: Bytes::from_static(b"{}"), ..HelloReply::default() }),
            []
        );
    }

    /// Of a later version (docs/protocol.md#compatibility): as a field of its own, and inside of a message that is known.
    #[test]
    fn a_field_and_a_kind_that_are_not_known_are_skipped() {
        // Field 1000, three bytes.
        let unknown = [0xc2, 0x3e, 3, 1, 2, 3];
        let later = |known: &[u8]| {
            let mut sealed = [known, &unknown].concat();
            let checksum = crc32c::crc32c(&sealed);
            sealed.extend(checksum.to_le_bytes());
            Bytes::from(sealed)
        };
        let hello = HelloRequest { link: "config".to_owned(), epoch: 3, ..HelloRequest::default() };
        assert_eq!(unseal::<HelloRequest>(later(&hello.encode_to_vec())).unwrap(), hello);
        let progress = Progress { origin_revision: 700, ..Progress::default() };
        let longer = [progress.encode_to_vec(), unknown.to_vec()].concat();
        let tag_and_length = [0x12, u8::try_from(longer.len()).unwrap()];
        let known = [&tag_and_length[..], &longer].concat();
        assert_eq!(unseal::<Shipment>(later(&known)).unwrap(), shipment(shipment::What::Progress(progress)));
        assert_eq!(unseal::<Shipment>(later(&[])).unwrap(), Shipment::default(), "it says nothing");
        assert_eq!(unseal::<Receipt>(later(&[])).unwrap(), Receipt::default(), "it says nothing");
    }

    proptest! {
        #[test]
        fn bytes_from_anywhere_never_panic_and_never_pass(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let bytes = Bytes::from(bytes);
            // What is left of an empty message is its checksum: only the right one passes.
            let checksum_alone = bytes.slice(..bytes.len().min(4));
            prop_assert!(checksum_alone[..] == [0; 4] || unseal::<HelloRequest>(checksum_alone).is_err());
            prop_assert!(unseal::<HelloRequest>(bytes.clone()).is_err());
            prop_assert!(unseal::<Shipment>(bytes).is_err());
        }
    }
}
