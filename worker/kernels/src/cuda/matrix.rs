//! A matrix on the device: one linear layer's shard, packed, with the order of its sums.

use std::{ops::Range, sync::Arc};

use bytemuck::{Pod, Zeroable};

use super::{
    Buffer, CudaError, Device, Kernel, Program, Source,
    packing::{Form, Packed, Segment, TILE},
    product::{ProductKernels, ProductShape},
};
use crate::{EncodedRows, KernelError, SumOrder, SumTree, segments::SegmentPlan};

/// K-segments that a weight that is summed whole is cut into: as many warps share the work on its outputs.
const MAX_SEGMENTS_OF_A_WHOLE: usize = 8;
/// Tiles of inputs below which a segment is not worth a warp.
const MIN_TILES_OF_A_SEGMENT: usize = 2;
/// The entry point of what makes bf16 of weights, the only one of its program.
pub(super) const DEQUANTIZE_ENTRIES: &[&str] = &["dequantize"];

/// The weights of one linear layer's shard, `[n_out, n_in]`, on the device.
#[derive(Debug)]
pub struct GpuMatrix {
    n_out: usize,
    n_in: usize,
    form: Form,
    n_planes: usize,
    n_segments: usize,
    max_pending: usize,
    n_scales: usize,
    codes: Buffer<u32>,
    scales: Buffer<u16>,
    minimums: Buffer<u16>,
    sub_scales: Buffer<i8>,
    sub_minimums: Buffer<i8>,
    segments: Buffer<Segment>,
    order: Option<GpuSumOrder>,
    /// What multiplies by it, if it was loaded for that.
    products: Option<ProductKernels>,
    /// What multiplies by it and one that is like it, gate and up.
    gated: Option<ProductKernels>,
    /// What makes bf16 of it, if it was loaded for dense products.
    dequantize: Option<Kernel>,
}

/// The order in which the planes of all ranks are added, on the device.
#[derive(Clone, Debug)]
pub(super) struct GpuSumOrder {
    pub(super) order: SumOrder,
    pub(super) merges: Arc<Buffer<u8>>,
}

/// A matrix as kernels take it (`cuda/product.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct MatrixArg {
    codes: u64,
    scales: u64,
    minimums: u64,
    sub_scales: u64,
    sub_minimums: u64,
    segments: u64,
    n_segments: u32,
    n_out: u32,
    in_tiles: u32,
    n_scales: u32,
    scale_shift: u32,
    padding: u32,
}

/// How a row-parallel weight's products are summed.
#[derive(Clone, Copy, Debug)]
pub struct RowParallelSum<'a> {
    /// Ends of this rank's K-segments, in its own columns; multiples of 32.
    pub segment_ends: &'a [usize],
    /// Its subtrees, as ranges of its own segments: a plane each.
    pub subtrees: &'a [Range<usize>],
    /// How the planes of all ranks are added.
    pub order: &'a SumOrder,
}

// === impl GpuMatrix ===

impl GpuMatrix {
    /// Packs `source` and brings it to the device. Without a `sum` its products are summed whole.
    ///
    /// # Errors
    /// No rows, columns that are no multiple of 32, segments that do not cover them; or not enough device memory.
    pub(super) fn new(
        device: &Device,
        source: &EncodedRows<'_>,
        sum: Option<RowParallelSum<'_>>,
    ) -> Result<Self, CudaError> {
        let plan = match sum {
            Some(sum) => SegmentPlan::new(sum.segment_ends, sum.subtrees, source.n_cols(), TILE)?,
            None => whole(source.n_cols())?,
        };
        let packed = Packed::new(source, &plan)?;
        let order = sum.map(|sum| GpuSumOrder::new(device, sum.order)).transpose()?;
        Ok(Self {
            n_out: packed.n_out,
            n_in: packed.n_in,
            form: packed.form,
            n_planes: packed.n_planes,
            n_segments: packed.segments.len(),
            max_pending: max_pending(&packed.segments),
            n_scales: packed.n_scales,
            codes: device.upload_new(&packed.codes)?,
            scales: device.upload_new(&packed.scales)?,
            minimums: device.upload_new(&packed.minimums)?,
            sub_scales: device.upload_new(&packed.sub_scales)?,
            sub_minimums: device.upload_new(&packed.sub_minimums)?,
            segments: device.upload_new(&packed.segments)?,
            order,
            products: None,
            gated: None,
            dequantize: None,
        })
    }

    /// Compiles what products may need, while there is no work yet.
    pub(super) fn load_kernels(&mut self, device: &Device, gated: bool, dense: bool) -> Result<(), CudaError> {
        self.products = Some(ProductKernels::load(device, self.form, false)?);
        self.gated = gated.then(|| ProductKernels::load(device, self.form, true)).transpose()?;
        let program = dequantize_program(self.form);
        self.dequantize = dense.then(|| device.kernel(&program, DEQUANTIZE_ENTRIES[0])).transpose()?;
        Ok(())
    }

    /// What multiplies by it, alone or as one of gate and up; `None` if it was not loaded for that.
    pub(super) fn kernels(&self, gated: bool) -> Option<&ProductKernels> {
        if gated { self.gated.as_ref() } else { self.products.as_ref() }
    }

    /// What makes bf16 of it; `None` if it was not loaded for that.
    pub(super) fn dequantize(&self) -> Option<&Kernel> {
        self.dequantize.as_ref()
    }

    /// Outputs.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Inputs.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Planes of a product: one for each subtree of this rank.
    pub fn n_planes(&self) -> usize {
        self.n_planes
    }

    /// Bytes of device memory that it takes.
    pub fn size_bytes(&self) -> usize {
        4 * self.codes.len()
            + 2 * (self.scales.len() + self.minimums.len())
            + self.sub_scales.len()
            + self.sub_minimums.len()
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    pub(super) fn out_tiles(&self) -> usize {
        self.n_out.div_ceil(TILE)
    }

    pub(super) fn order(&self) -> Option<&GpuSumOrder> {
        self.order.as_ref()
    }

    /// Whether one launch can multiply by this and `other`.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (self.form, self.n_in, self.n_segments) == (other.form, other.n_in, other.n_segments)
    }

    /// The shape of a product with this and others that are like it, which have so many out tiles together.
    pub(super) fn shape(&self, out_tiles: usize, gated: bool) -> ProductShape {
        let Self { form, n_segments, max_pending, .. } = *self;
        ProductShape { form, n_segments, max_pending, out_tiles, gated }
    }

    pub(super) fn arg(&self) -> MatrixArg {
        MatrixArg {
            codes: self.codes.pointer(),
            scales: self.scales.pointer(),
            minimums: self.minimums.pointer(),
            sub_scales: self.sub_scales.pointer(),
            sub_minimums: self.sub_minimums.pointer(),
            segments: self.segments.pointer(),
            n_segments: self.n_segments as u32,
            n_out: self.n_out as u32,
            in_tiles: (self.n_in / TILE) as u32,
            n_scales: self.n_scales as u32,
            // Blocks, and the groups that they are cut into, are powers of two.
            scale_shift: (self.n_in / self.form.group_len()).checked_div(self.n_scales).map_or(0, usize::ilog2),
            padding: 0,
        }
    }
}

/// The program that makes bf16 of weights of one form.
pub(super) fn dequantize_program(form: Form) -> Program {
    Program::new(Source::Dequantize, &[&form.defines()[..], &[("GATED", 0)]].concat())
}

/// The segments of a weight that is summed whole. They depend on its columns alone, which are the same on every rank.
fn whole(n_in: usize) -> Result<SegmentPlan, KernelError> {
    let n_tiles = n_in / TILE;
    let n_segments = (n_tiles / MIN_TILES_OF_A_SEGMENT).clamp(1, MAX_SEGMENTS_OF_A_WHOLE);
    let ends: Vec<usize> = (1..=n_segments).map(|i| n_tiles * i / n_segments * TILE).collect();
    SegmentPlan::new(&ends, &SumTree::new(n_segments).subtrees(0..n_segments), n_in, TILE)
}

/// Sums of segments that wait for others at once, at most.
fn max_pending(segments: &[Segment]) -> usize {
    let (mut n_pending, mut max) = (0, 0);
    for segment in segments {
        n_pending -= usize::from(segment.n_merges);
        n_pending += usize::from(segment.is_last == 0);
        max = max.max(n_pending);
    }
    max
}

// === impl GpuSumOrder ===

impl GpuSumOrder {
    pub(super) fn new(device: &Device, order: &SumOrder) -> Result<Self, CudaError> {
        Ok(Self { merges: Arc::new(device.upload_new(order.merges())?), order: order.clone() })
    }
}
