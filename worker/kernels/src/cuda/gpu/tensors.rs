//! Activations on the device, on their way to it and back.

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::{
    super::{CudaError, matrix::GpuSumOrder, packing::TILE, pool::Piece, recording::RecordedResult},
    Gpu,
};

/// `[n_rows, width]` in f32.
#[derive(Debug)]
pub struct GpuTensor {
    pub(super) values: Piece<f32>,
    pub(super) n_rows: usize,
    pub(super) width: usize,
}

/// `[n_rows, width]` as products read it: in bf16, with sums by group.
#[derive(Debug)]
pub struct GpuInput {
    pub(super) values: Piece<u16>,
    pub(super) sums: Piece<f32>,
    pub(super) n_rows: usize,
    pub(super) width: usize,
}

/// `[n_planes, n_rows, n_out]`: terms that are still to be added.
#[derive(Debug)]
pub struct GpuTerms {
    pub(super) planes: Piece<f32>,
    pub(super) n_rows: usize,
    pub(super) width: usize,
    pub(super) order: GpuSumOrder,
}

/// `Input` of `input.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct InputArg {
    pub(super) values: u64,
    pub(super) sums_of_16: u64,
    pub(super) sums_of_32: u64,
    pub(super) rows: u32,
    pub(super) width: u32,
    pub(super) padded_rows: u32,
    pub(super) padding: u32,
}

/// `Terms` of `elementwise.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct TermsArg {
    pub(super) planes: u64,
    pub(super) merges: u64,
    pub(super) n_planes: u32,
    pub(super) padding: u32,
}

// === impl Gpu ===

impl Gpu {
    /// Brings values `[n_rows, width]` to the device and waits for it.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the values are no whole rows.
    pub fn upload(&self, values: &[f32], width: usize) -> Result<GpuTensor, CudaError> {
        assert!(width > 0 && values.len().is_multiple_of(width), "whole rows of {width}");
        let mut tensor = self.tensor(values.len() / width, width)?;
        tensor.values.upload(values)?;
        Ok(tensor)
    }

    /// Brings values `[n_rows, width]` to the device as products read them. The ops make their inputs themselves; this is
    /// for those who try products alone.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the values are no whole rows, or rows no multiple of 32.
    pub fn upload_input(&self, values: &[f32], width: usize) -> Result<GpuInput, CudaError> {
        assert!(width > 0 && values.len().is_multiple_of(width), "whole rows of {width}");
        let mut input = self.input(values.len() / width, width)?;
        let rounded: Vec<u16> = values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect();
        let padded_rows = input.n_rows.next_multiple_of(8);
        let mut sums = Vec::with_capacity(input.sums.len());
        for group_len in [16, 32] {
            for first in (0..width).step_by(group_len) {
                let of_row = |row: usize| match rounded.get(row * width + first..row * width + first + group_len) {
                    Some(group) if row < input.n_rows => group.iter().map(|bits| bf16::from_bits(*bits).to_f32()).sum(),
                    _ => 0.0,
                };
                sums.extend((0..padded_rows).map(of_row));
            }
        }
        input.values.upload(&rounded)?;
        input.sums.upload(&sums)?;
        Ok(input)
    }

    /// Brings back what products read: the rounded values, and the sums of 16 and of 32 neighbours, row by row.
    ///
    /// # Errors
    /// The driver's, or a kernel that failed.
    pub fn download_input(&self, input: &GpuInput) -> Result<[Vec<f32>; 3], CudaError> {
        let mut values = vec![0; input.values.len()];
        input.values.download(&mut values)?;
        let mut sums = vec![0.0; input.sums.len()];
        input.sums.download(&mut sums)?;
        let padded_rows = input.n_rows.next_multiple_of(8);
        let (of_16, of_32) = sums.split_at(input.width / 16 * padded_rows);
        let by_row = |sums: &[f32]| {
            let n_groups = sums.len() / padded_rows.max(1);
            (0..input.n_rows * n_groups).map(|i| sums[i % n_groups * padded_rows + i / n_groups]).collect()
        };
        Ok([values.iter().map(|bits| bf16::from_bits(*bits).to_f32()).collect(), by_row(of_16), by_row(of_32)])
    }

    /// Brings the first rows of a tensor back and waits for them.
    ///
    /// # Errors
    /// The driver's, or a kernel that failed.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn download_rows(&self, tensor: &GpuTensor, n_rows: usize, out: &mut Vec<f32>) -> Result<(), CudaError> {
        assert!(n_rows <= tensor.n_rows, "{n_rows} rows of {}", tensor.n_rows);
        out.resize(n_rows * tensor.width, 0.0);
        tensor.values.download(out)
    }

    /// Brings a tensor back, row by row, and waits for it.
    ///
    /// # Errors
    /// The driver's, or a kernel that failed.
    pub fn download(&self, tensor: &GpuTensor, out: &mut Vec<f32>) -> Result<(), CudaError> {
        self.download_rows(tensor, tensor.n_rows, out)
    }

    pub(super) fn tensor(&self, n_rows: usize, width: usize) -> Result<GpuTensor, CudaError> {
        Ok(GpuTensor { values: self.pool.take(n_rows * width)?, n_rows, width })
    }

    pub(super) fn input(&self, n_rows: usize, width: usize) -> Result<GpuInput, CudaError> {
        assert!(width.is_multiple_of(TILE), "inputs of {width}, no multiple of {TILE}");
        let padded_rows = n_rows.next_multiple_of(8);
        let sums = self.pool.take((width / 16 + width / 32) * padded_rows)?;
        Ok(GpuInput { values: self.pool.take(n_rows * width)?, sums, n_rows, width })
    }
}

// === impl GpuTensor ===

impl GpuTensor {
    /// Its rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Keeps the first rows alone.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn truncate(&mut self, n_rows: usize) {
        assert!(n_rows <= self.n_rows, "{n_rows} rows of {}", self.n_rows);
        self.n_rows = n_rows;
    }

    pub(in crate::cuda) fn recorded(&self) -> RecordedResult {
        RecordedResult { target: self.values.target(), n_rows: self.n_rows, width: self.width }
    }
}

// === impl GpuInput ===

impl GpuInput {
    pub(super) fn arg(&self) -> InputArg {
        let padded_rows = self.n_rows.next_multiple_of(8);
        InputArg {
            values: self.values.pointer(),
            sums_of_16: self.sums.pointer(),
            sums_of_32: self.sums.pointer() + (self.width / 16 * padded_rows * size_of::<f32>()) as u64,
            rows: self.n_rows as u32,
            width: self.width as u32,
            padded_rows: padded_rows as u32,
            padding: 0,
        }
    }
}

// === impl GpuTerms ===

impl GpuTerms {
    /// All planes, those of other ranks included, to be brought to other ranks: `[n_planes, n_rows, width]`.
    ///
    /// # Errors
    /// The driver's, or a kernel that failed.
    pub fn download(&self, out: &mut Vec<f32>) -> Result<(), CudaError> {
        out.resize(self.planes.len(), 0.0);
        self.planes.download(out)
    }

    /// Replaces all planes.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If there are not as many values.
    pub fn upload(&mut self, values: &[f32]) -> Result<(), CudaError> {
        assert_eq!(values.len(), self.planes.len(), "all planes");
        self.planes.upload(values)
    }

    /// Values of one plane.
    pub fn plane_len(&self) -> usize {
        self.n_rows * self.width
    }

    pub(super) fn arg(&self) -> TermsArg {
        TermsArg {
            planes: self.planes.pointer(),
            merges: self.order.merges.pointer(),
            n_planes: self.order.order.n_planes() as u32,
            padding: 0,
        }
    }
}
