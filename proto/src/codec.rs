//! How messages of all services become bytes: tonic's own codec with small buffers. A stream holds one in each direction
//! for as long as it lives, and tonic's 8 KiB are many for one that carries a token at a time. Buffers grow as they must.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{self, BufferSettings};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Room that a buffer starts with. Unit: bytes.
const BUFFER_BYTES: usize = 512;

/// Bytes of a response that are gathered before they are handed on; tonic's own number.
const YIELD_BYTES: usize = 32 << 10;

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct Codec<T, U> {
    messages: PhantomData<(T, U)>,
}

// === impl Codec ===

impl<T, U> Codec<T, U> {
    fn buffers() -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self { messages: PhantomData }
    }
}

impl<T, U> codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(Self::buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(Self::buffers())
    }
}
