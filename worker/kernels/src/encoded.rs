//! Encoded rows: a checked view of a matrix, or of a rank's slice of one, as it lies in a model file.

use std::ops::Range;

use lockstep_checkpoint::Encoding;

use crate::KernelError;

/// A matrix `[n_rows, n_cols]` in some encoding, borrowed. A row is a run of whole blocks; rows lie `stride` bytes
/// apart, so that a slice of columns is a view as well.
#[derive(Clone, Copy, Debug)]
pub struct EncodedRows<'a> {
    encoding: Encoding,
    bytes: &'a [u8],
    n_rows: usize,
    n_cols: usize,
    stride: usize,
}

// === impl EncodedRows ===

impl<'a> EncodedRows<'a> {
    /// Views `bytes` as a matrix `[n_rows, n_cols]` whose rows follow each other without a gap.
    ///
    /// # Errors
    /// If a row is no whole number of blocks, the size overflows, or `bytes` has another length than the shape needs.
    pub fn new(encoding: Encoding, bytes: &'a [u8], n_rows: usize, n_cols: usize) -> Result<Self, KernelError> {
        let shape_error = || KernelError::Shape { encoding, n_rows, n_cols };
        let stride = encoding.row_bytes(n_cols).ok_or_else(shape_error)?;
        let expected = stride.checked_mul(n_rows).ok_or_else(shape_error)?;
        if bytes.len() != expected {
            return Err(KernelError::Bytes { encoding, n_rows, n_cols, expected, actual: bytes.len() });
        }
        Ok(Self { encoding, bytes, n_rows, n_cols, stride })
    }

    /// The rows `rows` of this view.
    ///
    /// # Errors
    /// If the range lies outside of the matrix.
    pub fn rows(self, rows: Range<usize>) -> Result<Self, KernelError> {
        check_slice("rows", &rows, self.n_rows, 1)?;
        // A view of columns ends with its last row's last column, so the end is bounded by what there is.
        let start = (rows.start * self.stride).min(self.bytes.len());
        let end = (rows.end * self.stride).min(self.bytes.len());
        Ok(Self { bytes: &self.bytes[start..end], n_rows: rows.len(), ..self })
    }

    /// The columns `cols` of this view.
    ///
    /// # Errors
    /// If the range lies outside of the matrix or cuts a block of the encoding.
    pub fn cols(self, cols: Range<usize>) -> Result<Self, KernelError> {
        let block_len = self.encoding.block_len();
        check_slice("columns", &cols, self.n_cols, block_len)?;
        let start = (cols.start / block_len * self.encoding.block_bytes()).min(self.bytes.len());
        Ok(Self { bytes: &self.bytes[start..], n_cols: cols.len(), ..self })
    }

    /// How the values are stored.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Number of columns.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// The bytes of row `row_idx`: `n_cols / block_len` blocks.
    ///
    /// # Panics
    /// If `row_idx` is not below `n_rows`.
    pub fn row(&self, row_idx: usize) -> &'a [u8] {
        assert!(row_idx < self.n_rows, "row {row_idx} of {}", self.n_rows);
        let start = row_idx * self.stride;
        &self.bytes[start..start + self.n_cols / self.encoding.block_len() * self.encoding.block_bytes()]
    }
}

fn check_slice(axis: &'static str, range: &Range<usize>, len: usize, align: usize) -> Result<(), KernelError> {
    let inside = range.start <= range.end && range.end <= len;
    if inside && range.start.is_multiple_of(align) && range.end.is_multiple_of(align) {
        return Ok(());
    }
    Err(KernelError::Slice { axis, start: range.start, end: range.end, len, align })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_of_slices_are_the_bytes_of_the_file() {
        let bytes: Vec<u8> = (0..6 * 54).map(|i| (i % 251) as u8).collect();
        let whole = EncodedRows::new(Encoding::Q4_0, &bytes, 6, 96).unwrap();
        let part = whole.cols(32..96).unwrap().rows(2..5).unwrap().cols(32..64).unwrap();
        assert_eq!((part.n_rows(), part.n_cols()), (3, 32));
        for i in 0..3 {
            let start = (2 + i) * 54 + 2 * 18;
            assert_eq!(part.row(i), &bytes[start..start + 18]);
        }
        assert_eq!(whole.rows(6..6).unwrap().n_rows(), 0);
    }

    #[test]
    fn bad_views_are_refused_by_name() {
        let bytes = [0u8; 54];
        let check = |result: Result<EncodedRows<'_>, KernelError>, message: &str| {
            assert_eq!(result.unwrap_err().to_string(), message);
        };
        check(
            EncodedRows::new(Encoding::Q4_0, &bytes, 1, 90),
            "Q4_0 matrix of 1 rows and 90 columns: rows are no whole number of blocks of 32, or too large",
        );
        check(
            EncodedRows::new(Encoding::F32, &bytes, usize::MAX, 4),
            "F32 matrix of 18446744073709551615 rows and 4 columns: rows are no whole number of blocks of 1, or too large",
        );
        check(
            EncodedRows::new(Encoding::Q4_0, &bytes[1..], 1, 96),
            "Q4_0 matrix of 1 rows and 96 columns: needs 54 bytes, got 53",
        );
        let whole = EncodedRows::new(Encoding::Q4_0, &bytes, 1, 96).unwrap();
        check(whole.rows(0..2), "rows 0..2 of a matrix of 1 rows: out of range, or not on a boundary of 1");
        check(whole.cols(16..64), "columns 16..64 of a matrix of 96 columns: out of range, or not on a boundary of 32");
    }
}
