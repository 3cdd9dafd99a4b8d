//! A reader: a cursor over the header of a GGUF file that never reads, allocates or advances beyond what is there.
//!
//! The reader knows its place (which key or tensor it is at), so that every error names it together with the offset.

use crate::error::{Fault, FormatError};

/// Bytes that the header (metadata and tensor descriptions) may take; the largest vocabularies in use need under 20
/// MiB. With the rule that a count is believed only if the bytes for it are there, it bounds what a file can make us
/// allocate.
pub(super) const HEADER_BYTES_MAX: usize = 64 << 20;

/// A cursor over the start of a file.
pub(super) struct Reader<'a> {
    file: &'a [u8],
    offset: usize,
    place: String,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a [u8]) -> Self {
        Reader { file, offset: 0, place: "header".to_owned() }
    }

    /// Names the part of the file that is read from here on.
    pub(super) fn enter(&mut self, place: String) {
        self.place = place;
    }

    /// Offset of the next byte.
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    /// Bytes from here to the end of the file.
    pub(super) fn remaining(&self) -> usize {
        self.file.len() - self.offset
    }

    /// A defect of the item at `offset`.
    pub(super) fn error(&self, offset: usize, fault: Fault) -> FormatError {
        FormatError { place: self.place.clone(), offset: offset as u64, fault }
    }

    /// The next `n_bytes` bytes.
    pub(super) fn bytes(&mut self, n_bytes: u64) -> Result<&'a [u8], FormatError> {
        let available = self.remaining();
        let Some(length) = usize::try_from(n_bytes).ok().filter(|&length| length <= available) else {
            return Err(self.error(self.offset, Fault::Truncated { needed: n_bytes, available: available as u64 }));
        };
        let end = self.offset + length;
        if end > HEADER_BYTES_MAX {
            let limit = HEADER_BYTES_MAX as u64;
            return Err(self.error(self.offset, Fault::OverLimit { what: "header size", found: end as u64, limit }));
        }
        let bytes = &self.file[self.offset..end];
        self.offset = end;
        Ok(bytes)
    }

    /// One number; `decode` is its `from_le_bytes`.
    pub(super) fn number<const N: usize, T>(&mut self, decode: fn([u8; N]) -> T) -> Result<T, FormatError> {
        let mut number = [0; N];
        number.copy_from_slice(self.bytes(N as u64)?);
        Ok(decode(number))
    }

    /// `count` numbers; `decode` is their `from_le_bytes`.
    pub(super) fn numbers<const N: usize, T>(
        &mut self,
        count: u64,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, FormatError> {
        let bytes = self.bytes(count.saturating_mul(N as u64))?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|&number| decode(number)).collect())
    }

    /// A boolean, stored as one byte.
    pub(super) fn bool(&mut self) -> Result<bool, FormatError> {
        let offset = self.offset;
        match self.number(u8::from_le_bytes)? {
            0 => Ok(false),
            1 => Ok(true),
            found => Err(self.error(offset, Fault::Bool { found })),
        }
    }

    /// A count of items that take at least `bytes_min` bytes each: one that the rest of the file cannot hold is
    /// refused here, before anything is allocated for it.
    pub(super) fn count(&mut self, what: &'static str, limit: u64, bytes_min: u64) -> Result<u64, FormatError> {
        let offset = self.offset;
        let count = self.number(u64::from_le_bytes)?;
        if count > limit {
            return Err(self.error(offset, Fault::OverLimit { what, found: count, limit }));
        }
        let needed = count.saturating_mul(bytes_min);
        let available = self.remaining() as u64;
        if needed > available {
            return Err(self.error(offset, Fault::Truncated { needed, available }));
        }
        Ok(count)
    }

    /// A text of at most `limit` bytes.
    pub(super) fn string(&mut self, what: &'static str, limit: u64) -> Result<&'a str, FormatError> {
        let length = self.count(what, limit, 1)?;
        let offset = self.offset;
        std::str::from_utf8(self.bytes(length)?).map_err(|_| self.error(offset, Fault::Utf8))
    }

    /// A text that names something: not empty.
    pub(super) fn name(&mut self, what: &'static str, limit: u64) -> Result<&'a str, FormatError> {
        let offset = self.offset;
        match self.string(what, limit)? {
            "" => Err(self.error(offset, Fault::EmptyName)),
            name => Ok(name),
        }
    }
}
