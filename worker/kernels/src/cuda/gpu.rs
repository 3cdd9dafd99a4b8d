//! The ops: what a forward pass does on a GPU, each a launch or two. All are queued; only downloads wait.
//!
//! The methods check that everything a kernel touches is there, so they are safe whatever they are given.

use std::time::Duration;

use bytemuck::{Pod, Zeroable};
use half::bf16;
use lockstep_collectives::DeviceSliceMut;

use super::{
    Arg, Buffer, CudaError, Device, Event, HostBuffer, Kernel, Program, Source,
    matrix::{GpuMatrix, GpuSumOrder, MatrixArg, RowParallelSum},
    packing::TILE,
    pool::{Piece, Pool, Target},
    product::{ProductKernel, ProductLaunch},
    step::{Blocks, Heads, Layout, Part, RowChoice, StepData, StepRows, StepShape},
};
use crate::{EncodedRows, KvEncoding, RopeTable};

/// Weights that one launch multiplies by.
pub const MAX_WEIGHTS: usize = 3;
/// Threads of a block of `merge_splits`.
const MERGE_THREADS: u32 = 256;
/// Threads of the kernels of `elementwise.cu`.
const ROW_THREADS: u32 = 512;
/// Warps of a block of `attention.cu`.
const ATTENTION_WARPS: usize = 4;
/// Longest time that a step may take. A device that is busy for longer hangs.
const MAX_STEP: Duration = Duration::from_secs(60);
/// Slots of a tile of the cache.
const KV_TILE: usize = 16;

/// A GPU and what all steps of one rank's shard need on it.
#[derive(Debug)]
pub struct Gpu {
    device: Device,
    pool: Pool,
    heads: Heads,
    head_dim: usize,
    rope: GpuRope,
    kernels: Kernels,
    words: Staging,
    activations: Staging,
}

/// The shape of the attention that one rank computes.
#[derive(Clone, Copy, Debug)]
pub struct GpuHeads {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads, which divide them.
    pub n_kv_heads: usize,
    /// Width of a head, a multiple of 16.
    pub head_dim: usize,
}

/// `[n_rows, width]` in f32.
#[derive(Debug)]
pub struct GpuTensor {
    values: Piece<f32>,
    n_rows: usize,
    width: usize,
}

/// `[n_rows, width]` as products read it: in bf16, with sums by group.
#[derive(Debug)]
pub struct GpuInput {
    values: Piece<u16>,
    sums: Piece<f32>,
    n_rows: usize,
    width: usize,
}

/// `[n_planes, n_rows, n_out]`: terms that are still to be added.
#[derive(Debug)]
pub struct GpuTerms {
    planes: Piece<f32>,
    n_rows: usize,
    width: usize,
    order: GpuSumOrder,
}

/// Keys and values of all layers (`cuda/kv_cache.cuh`).
#[derive(Debug)]
pub struct GpuKvCache {
    tiles: Buffer<u8>,
    n_layers: usize,
    n_tiles: usize,
    tiles_per_block: usize,
    encoding: KvEncoding,
    kernels: KvKernels,
}

/// The rows of a step, on the device.
#[derive(Debug)]
pub struct GpuStep {
    words: Piece<u32>,
    layout: Layout,
}

/// Host memory from which a step's words, or its first activations, are on their way to the device.
#[derive(Debug)]
struct Staging {
    host: HostBuffer<u8>,
    /// Marks the end of the copy.
    sent: Event,
}

#[derive(Debug)]
struct GpuRope {
    turns: Buffer<[f32; 2]>,
    dims: usize,
    halves: bool,
    n_positions: usize,
}

/// Kernels that every model needs; products' are made when weights of their form are loaded.
#[derive(Debug)]
struct Kernels {
    rms_norm: Kernel,
    silu_mul: Kernel,
    select_rows: Kernel,
}

#[derive(Debug)]
struct KvKernels {
    write: Kernel,
    attend_splits: Kernel,
    attend_rows: Kernel,
    merge_splits: Kernel,
}

/// `Input` of `input.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct InputArg {
    values: u64,
    sums_of_16: u64,
    sums_of_32: u64,
    rows: u32,
    width: u32,
    padded_rows: u32,
    padding: u32,
}

/// `Product` of `product.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct ProductArg {
    weights: [MatrixArg; MAX_WEIGHTS],
    out: [u64; MAX_WEIGHTS],
    end_tile: [u32; MAX_WEIGHTS],
    padding: u32,
    x: InputArg,
    gated: InputArg,
    codebook: [u32; 4],
}

/// `Terms` of `elementwise.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct TermsArg {
    planes: u64,
    merges: u64,
    n_planes: u32,
    padding: u32,
}

/// `Rope` of `kv_cache.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct RopeArg {
    turns: u64,
    dims: u32,
    halves: u32,
}

/// `Attention` of `attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct AttentionArg {
    q: u64,
    layer: u64,
    positions: u64,
    tables: u64,
    tiles: u64,
    parts: u64,
    n_tiles: u32,
    n_kv_heads: u32,
    table_stride: u32,
    kv_tiles_per_block: u32,
    rope: RopeArg,
}

// === impl Gpu ===

impl Gpu {
    /// Makes `device` ready for shards whose attention is of this shape.
    ///
    /// # Errors
    /// A shape that kernels cannot have, no compiler where one is needed, or not enough device memory.
    pub fn new(device: Device, heads: GpuHeads, rope: &RopeTable) -> Result<Self, CudaError> {
        let GpuHeads { n_heads, n_kv_heads, head_dim } = heads;
        let is_sound = n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads) && head_dim == rope.head_dim();
        if !is_sound || n_heads == 0 || !head_dim.is_multiple_of(KV_TILE) || head_dim == 0 {
            return Err(CudaError::Heads { n_heads, n_kv_heads, head_dim });
        }
        let elementwise = Program::new(Source::Elementwise, &[]);
        Ok(Self {
            kernels: Kernels {
                rms_norm: device.kernel(&elementwise, "rms_norm")?,
                silu_mul: device.kernel(&elementwise, "silu_mul")?,
                select_rows: device.kernel(&elementwise, "select_rows")?,
            },
            rope: GpuRope {
                turns: device.upload_new(rope.turns())?,
                dims: rope.rope_dim(),
                halves: rope.style() == crate::RopeStyle::Halves,
                n_positions: rope.max_position(),
            },
            heads: Heads { n_kv_heads, group_size: n_heads / n_kv_heads },
            head_dim,
            pool: Pool::new(device.clone()),
            words: Staging::new(&device)?,
            activations: Staging::new(&device)?,
            device,
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Packs a weight and brings it to the device, and compiles what multiplies by it. With a `sum` it is row-parallel.
    ///
    /// # Errors
    /// As [`GpuMatrix`] says, or a kernel that cannot be compiled.
    pub fn load_matrix(
        &self,
        source: &EncodedRows<'_>,
        sum: Option<RowParallelSum<'_>>,
    ) -> Result<GpuMatrix, CudaError> {
        let matrix = GpuMatrix::new(&self.device, source, sum)?;
        self.compile_products(&matrix, false)?;
        Ok(matrix)
    }

    /// As [`Gpu::load_matrix`], for the two weights of [`Gpu::gated`].
    ///
    /// # Errors
    /// As there.
    pub fn load_gated(&self, [gate, up]: [&EncodedRows<'_>; 2]) -> Result<[GpuMatrix; 2], CudaError> {
        let (gate, up) = (GpuMatrix::new(&self.device, gate, None)?, GpuMatrix::new(&self.device, up, None)?);
        let gated = gate.is_like(&up);
        for weights in [&gate, &up] {
            self.compile_products(weights, gated)?;
        }
        Ok([gate, up])
    }

    /// Makes room for keys and values.
    ///
    /// # Errors
    /// A block that is no multiple of 16, a size of 0, or not enough device memory.
    pub fn new_kv(
        &self,
        n_layers: usize,
        n_blocks: usize,
        block_size: usize,
        encoding: KvEncoding,
    ) -> Result<GpuKvCache, CudaError> {
        if n_layers == 0 || n_blocks == 0 || block_size == 0 || !block_size.is_multiple_of(KV_TILE) {
            return Err(CudaError::KvCache { n_layers, n_blocks, block_size });
        }
        let tiles_per_block = block_size / KV_TILE;
        let n_tiles = n_blocks.saturating_mul(tiles_per_block);
        let tile_bytes = KV_TILE * encoding.head_bytes(self.head_dim);
        let sizes = [n_layers, n_tiles, self.heads.n_kv_heads, tile_bytes];
        let n_bytes = sizes.into_iter().fold(1usize, usize::saturating_mul);
        let bits = match encoding {
            KvEncoding::F16 => 16,
            KvEncoding::Int8 => 8,
        };
        let defines = [("HEAD_DIM", self.head_dim as i64), ("KV_BITS", bits)];
        let attention =
            Program::new(Source::Attention, &[&defines[..], &[("GROUP_SIZE", self.heads.group_size as i64)]].concat());
        Ok(GpuKvCache {
            kernels: KvKernels {
                write: self.device.kernel(&Program::new(Source::KvCache, &defines), "write_kv")?,
                attend_splits: self.device.kernel(&attention, "attend_splits")?,
                attend_rows: self.device.kernel(&attention, "attend_rows")?,
                merge_splits: self.device.kernel(&attention, "merge_splits")?,
            },
            // One block more, for rows that fill a step up.
            tiles: self.device.zeros(n_bytes + n_bytes / n_blocks)?,
            n_layers,
            n_tiles,
            tiles_per_block,
            encoding,
        })
    }

    /// Brings the rows of a step to the device, filled up if it has a shape.
    ///
    /// # Errors
    /// A slot, a block or a position that is not there; or the driver's.
    pub fn begin(
        &mut self,
        step: &StepRows<'_>,
        kv: &GpuKvCache,
        shape: Option<StepShape>,
    ) -> Result<GpuStep, CudaError> {
        let StepData { words, layout } = self.lay_out(step, kv, shape)?;
        let piece = self.pool.take(words.len())?;
        self.words.send(&self.device, &words, piece.target())?;
        Ok(GpuStep { words: piece, layout })
    }

    /// Sends the words of another step of the same shape.
    pub(super) fn send_again(
        &mut self,
        to: &mut GpuStep,
        step: &StepRows<'_>,
        kv: &GpuKvCache,
        shape: StepShape,
    ) -> Result<(), CudaError> {
        let StepData { words, .. } = self.lay_out(step, kv, Some(shape))?;
        assert_eq!(words.len(), to.words.len(), "words of a shape");
        self.words.send(&self.device, &words, to.words.target())
    }

    /// Sends activations to where others of the same shape were.
    pub(super) fn send_activations(&mut self, to: Target, values: &[f32]) -> Result<(), CudaError> {
        self.activations.send(&self.device, values, to)
    }

    fn lay_out(&self, step: &StepRows<'_>, kv: &GpuKvCache, shape: Option<StepShape>) -> Result<StepData, CudaError> {
        let blocks = kv.blocks();
        let Blocks { n_blocks, block_size } = blocks;
        let n_slots = n_blocks * block_size;
        let reaches = |row: &crate::AttentionRow| {
            let position = row.position as usize;
            position < self.rope.n_positions
                && step.tables.get(row.table).is_some_and(|table| position / block_size < table.len())
        };
        let is_sound = step.slots.len() == step.rows.len()
            && step.logits_rows.len() == step.logits_attention.len()
            && step.slots.iter().all(|slot| (*slot as usize) < n_slots)
            && step.logits_rows.iter().all(|row| (*row as usize) < step.slots.len())
            && step.rows.iter().chain(step.logits_attention).all(reaches)
            && step.tables.iter().flatten().all(|block| (*block as usize) < n_blocks);
        if !is_sound {
            return Err(CudaError::Step);
        }
        Ok(StepData::new(step, self.heads, blocks, shape))
    }

    /// Brings values `[n_rows, width]` to the device.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the values are no whole rows.
    pub fn upload(&mut self, values: &[f32], width: usize) -> Result<GpuTensor, CudaError> {
        assert!(width > 0 && values.len().is_multiple_of(width), "whole rows of {width}");
        let n_rows = values.len() / width;
        self.upload_padded(values, width, n_rows)
    }

    /// As [`Gpu::upload`], with rows after them of which nothing is said.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there, or if `n_rows` are less.
    pub fn upload_padded(&mut self, values: &[f32], width: usize, n_rows: usize) -> Result<GpuTensor, CudaError> {
        assert!(values.len() <= n_rows * width, "at most {n_rows} rows");
        let tensor = self.tensor(n_rows, width)?;
        self.activations.send(&self.device, values, tensor.target())?;
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

    /// `x += terms`, if there are any; then `x * weight / sqrt(mean(x^2) + eps)`, row by row.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the shapes do not agree.
    pub fn rms_norm(
        &self,
        x: &mut GpuTensor,
        terms: Option<&GpuTerms>,
        weight: &GpuTensor,
        eps: f32,
    ) -> Result<GpuInput, CudaError> {
        assert_eq!(weight.values.len(), x.width, "a weight for each column");
        let terms = match terms {
            None => TermsArg::default(),
            Some(terms) => {
                assert_eq!((terms.n_rows, terms.width), (x.n_rows, x.width), "terms of the same shape");
                terms.arg()
            }
        };
        let out = self.input(x.n_rows, x.width)?;
        let out_arg = out.arg();
        let args = [
            Arg::Ptr(x.values.pointer()),
            Arg::of(&terms),
            Arg::Ptr(weight.values.pointer()),
            Arg::F32(eps),
            Arg::of(&out_arg),
        ];
        // SAFETY: the kernel's parameters; x and out have the shape that `out_arg` names, terms and weight fit it.
        unsafe { self.kernels.rms_norm.launch([x.n_rows as u32, 1, 1], ROW_THREADS, 0, &args)? };
        Ok(out)
    }

    /// `x · wᵀ` for several weights: `[n_rows, n_out]` each.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If a weight has another width than `x`, or is row-parallel.
    pub fn matmul<const N: usize>(&self, weights: [&GpuMatrix; N], x: &GpuInput) -> Result<[GpuTensor; N], CudaError> {
        assert!(weights.iter().all(|weight| weight.n_planes() == 1), "weights that are summed whole");
        let out = weights.iter().map(|weight| self.tensor(x.n_rows, weight.n_out())).collect::<Result<Vec<_>, _>>()?;
        let mut first = 0;
        for alike in weights.chunk_by(|a, b| a.is_like(b)) {
            for (weights, out) in alike.chunks(MAX_WEIGHTS).zip(out[first..first + alike.len()].chunks(MAX_WEIGHTS)) {
                let pointers: Vec<u64> = out.iter().map(|out| out.values.pointer()).collect();
                self.multiply(weights, x, &pointers)?;
            }
            first += alike.len();
        }
        let mut out = out.into_iter();
        Ok(std::array::from_fn(|_| out.next().expect("one for each weight")))
    }

    /// `x · wᵀ` for a row-parallel weight: room for the planes of all ranks, of which this rank's, from `first_plane` on,
    /// are computed.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the weight has another width than `x`, or is not row-parallel.
    pub fn matmul_partial(&self, weight: &GpuMatrix, x: &GpuInput, first_plane: usize) -> Result<GpuTerms, CudaError> {
        let order = weight.order().expect("a row-parallel weight").clone();
        let n_planes = order.order.n_planes();
        assert!(first_plane + weight.n_planes() <= n_planes, "planes of this rank among those of all");
        let plane = x.n_rows * weight.n_out();
        let planes = self.pool.take(n_planes * plane)?;
        self.multiply(&[weight], x, &[planes.pointer() + (first_plane * plane * size_of::<f32>()) as u64])?;
        Ok(GpuTerms { planes, n_rows: x.n_rows, width: weight.n_out(), order })
    }

    /// `silu(x · gateᵀ) * (x · upᵀ)`, element by element: `[n_rows, n_out]`.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the shapes do not agree.
    pub fn gated(&self, gate: &GpuMatrix, up: &GpuMatrix, x: &GpuInput) -> Result<GpuInput, CudaError> {
        assert_eq!(gate.n_out(), up.n_out(), "gate and up of one shape");
        let out = self.input(x.n_rows, gate.n_out())?;
        let out_arg = out.arg();
        if gate.is_like(up) {
            let mut product = ProductArg { gated: out_arg, ..product(&[gate, up], x, &[]) };
            product.end_tile = [gate.out_tiles() as u32; MAX_WEIGHTS];
            self.launch_product(&product, gate, x, gate.out_tiles(), true)?;
            return Ok(out);
        }
        let [gate, up] = self.matmul([gate, up], x)?;
        let args = [Arg::Ptr(gate.values.pointer()), Arg::Ptr(up.values.pointer()), Arg::of(&out_arg)];
        // SAFETY: the kernel's parameters; all three have the shape that `out_arg` names.
        unsafe { self.kernels.silu_mul.launch([x.n_rows as u32, 1, 1], ROW_THREADS, 0, &args)? };
        Ok(out)
    }

    /// Turns the keys of all rows of a step and stores them with their values, both `[n_rows, n_kv_heads * head_dim]`.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the shapes do not agree or there is no such layer.
    pub fn write_kv(
        &self,
        kv: &mut GpuKvCache,
        layer: usize,
        step: &GpuStep,
        k: &GpuTensor,
        v: &GpuTensor,
    ) -> Result<(), CudaError> {
        let shape = (step.layout.n_rows, self.heads.n_kv_heads * self.head_dim);
        assert!((k.n_rows, k.width) == shape && (v.n_rows, v.width) == shape, "keys and values of all rows");
        let rope = self.rope.arg();
        let args = [
            Arg::Ptr(kv.layer(layer)),
            Arg::Ptr(k.values.pointer()),
            Arg::Ptr(v.values.pointer()),
            Arg::Ptr(step.at(step.layout.slots)),
            Arg::Ptr(step.at(step.layout.queries(RowChoice::All).positions)),
            Arg::of(&rope),
        ];
        let grid = [step.layout.n_rows as u32, self.heads.n_kv_heads as u32, 1];
        // SAFETY: the kernel's parameters; slots and positions were checked when the step began.
        unsafe { kv.kernels.write.launch(grid, 32, 0, &args) }
    }

    /// Turns queries to their positions; then causal attention over each row's own sequence. `q` and the result are
    /// `[n_rows, n_heads * head_dim]`, of the rows of `choice`.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the shapes do not agree or there is no such layer.
    pub fn attention(
        &self,
        q: &GpuTensor,
        kv: &GpuKvCache,
        layer: usize,
        step: &GpuStep,
        choice: RowChoice,
    ) -> Result<GpuInput, CudaError> {
        let layout = &step.layout;
        let queries = layout.queries(choice);
        let n_heads = self.heads.n_kv_heads * self.heads.group_size;
        assert_eq!((q.n_rows, q.width), (queries.n_rows, n_heads * self.head_dim), "queries of all rows");
        let parts = self.pool.take::<f32>(queries.n_parts * (self.head_dim + 2))?;
        let attention = AttentionArg {
            q: q.values.pointer(),
            layer: kv.layer(layer),
            positions: step.at(queries.positions),
            tables: step.at(layout.tables),
            tiles: step.at(queries.tiles),
            parts: parts.pointer(),
            n_tiles: queries.n_split as u32,
            n_kv_heads: self.heads.n_kv_heads as u32,
            table_stride: layout.table_stride as u32,
            kv_tiles_per_block: kv.tiles_per_block as u32,
            rope: self.rope.arg(),
        };
        let warp_bytes = 16 * (self.head_dim + 2) * size_of::<f32>() + 16 * (self.head_dim + 8) * size_of::<u16>();
        let (threads, shared) = ((32 * ATTENTION_WARPS) as u32, (ATTENTION_WARPS * warp_bytes) as u32);
        let head_parts = (self.heads.n_kv_heads * self.heads.n_parts()) as u32;
        if queries.n_split > 0 {
            let grid = [queries.max_splits as u32, head_parts, queries.n_split as u32];
            // SAFETY: the kernel's parameters; tables, positions and tiles were checked when the step began, and parts
            // has room for all of them.
            unsafe { kv.kernels.attend_splits.launch(grid, threads, shared, &[Arg::of(&attention)])? };
        }
        let n_others = queries.n_tiles - queries.n_split;
        if n_others > 0 {
            let tile_bytes = size_of::<super::step::QueryTile>();
            let tiles = attention.tiles + (queries.n_split * tile_bytes) as u64;
            let attention = AttentionArg { tiles, n_tiles: n_others as u32, ..attention };
            let grid = [n_others.div_ceil(ATTENTION_WARPS) as u32, head_parts, 1];
            // SAFETY: as above.
            unsafe { kv.kernels.attend_rows.launch(grid, threads, shared, &[Arg::of(&attention)])? };
        }
        let out = self.input(q.n_rows, q.width)?;
        let out_arg = out.arg();
        let args = [Arg::of(&attention), Arg::Ptr(step.at(queries.tile_of_row)), Arg::of(&out_arg)];
        // SAFETY: as above; out has the shape of q.
        unsafe { kv.kernels.merge_splits.launch([q.n_rows as u32, 1, 1], MERGE_THREADS, 0, &args)? };
        Ok(out)
    }

    /// The rows of `x` that need logits.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If `x` has other rows than the step.
    pub fn select_rows(&self, x: &GpuTensor, step: &GpuStep) -> Result<GpuTensor, CudaError> {
        assert_eq!(x.n_rows, step.layout.n_rows, "all rows of the step");
        let n_rows = step.layout.queries(RowChoice::Logits).n_rows;
        let out = self.tensor(n_rows, x.width)?;
        let args = [
            Arg::Ptr(x.values.pointer()),
            Arg::Ptr(step.at(step.layout.logits_rows)),
            Arg::Ptr(out.values.pointer()),
            Arg::U32(x.width as u32),
        ];
        // SAFETY: the kernel's parameters; the rows were checked when the step began.
        unsafe { self.kernels.select_rows.launch([n_rows as u32, 1, 1], ROW_THREADS, 0, &args)? };
        Ok(out)
    }

    fn tensor(&self, n_rows: usize, width: usize) -> Result<GpuTensor, CudaError> {
        Ok(GpuTensor { values: self.pool.take(n_rows * width)?, n_rows, width })
    }

    fn input(&self, n_rows: usize, width: usize) -> Result<GpuInput, CudaError> {
        assert!(width.is_multiple_of(TILE), "inputs of {width}, no multiple of {TILE}");
        let padded_rows = n_rows.next_multiple_of(8);
        let sums = self.pool.take((width / 16 + width / 32) * padded_rows)?;
        Ok(GpuInput { values: self.pool.take(n_rows * width)?, sums, n_rows, width })
    }

    /// Products with up to [`MAX_WEIGHTS`] weights that are alike.
    fn multiply(&self, weights: &[&GpuMatrix], x: &GpuInput, out: &[u64]) -> Result<(), CudaError> {
        let out_tiles = weights.iter().map(|weight| weight.out_tiles()).sum();
        self.launch_product(&product(weights, x, out), weights[0], x, out_tiles, false)
    }

    /// `weights` stands for all weights of the product, which are alike.
    fn launch_product(
        &self,
        product: &ProductArg,
        weights: &GpuMatrix,
        x: &GpuInput,
        out_tiles: usize,
        gated: bool,
    ) -> Result<(), CudaError> {
        assert_eq!(x.width, weights.n_in(), "inputs of a product");
        if x.n_rows == 0 {
            return Ok(());
        }
        let launch = ProductLaunch::new(&weights.shape(out_tiles, gated), x.n_rows, self.device.info().limits);
        let kernel = self.product_kernel(launch.kernel, weights, gated)?;
        // SAFETY: the kernel's parameter; weights, inputs and outputs have the shapes that it names.
        unsafe { kernel.launch(launch.grid, launch.threads, launch.shared_bytes, &[Arg::of(product)]) }
    }

    /// Compiles what products with such weights may need, while there is no work yet.
    fn compile_products(&self, weights: &GpuMatrix, gated: bool) -> Result<(), CudaError> {
        ProductKernel::ALL.into_iter().try_for_each(|kernel| self.product_kernel(kernel, weights, gated).map(|_| ()))
    }

    fn product_kernel(&self, kernel: ProductKernel, weights: &GpuMatrix, gated: bool) -> Result<Kernel, CudaError> {
        self.device.kernel(&kernel.program(weights.form(), gated), kernel.entries()[0])
    }
}

fn product(weights: &[&GpuMatrix], x: &GpuInput, out: &[u64]) -> ProductArg {
    let mut product = ProductArg {
        x: x.arg(),
        codebook: weights.first().map_or([0; 4], |weight| weight.form().codebook_words()),
        ..ProductArg::default()
    };
    let mut end_tile = 0;
    for (i, weight) in weights.iter().enumerate() {
        end_tile += weight.out_tiles() as u32;
        product.weights[i] = weight.arg();
        product.end_tile[i] = end_tile;
    }
    product.end_tile[weights.len()..].fill(end_tile);
    product.out[..out.len()].copy_from_slice(out);
    product
}

// === impl GpuStep ===

impl GpuStep {
    /// Where a part begins on the device.
    fn at(&self, part: Part) -> u64 {
        self.words.pointer() + part.offset()
    }
}

// === impl Staging ===

impl Staging {
    fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self { host: device.host_buffer(0)?, sent: device.event()? })
    }

    /// Queues that `values` go to the beginning of `to`. Waits until what it sent before has gone.
    fn send<T: Pod>(&mut self, device: &Device, values: &[T], to: Target) -> Result<(), CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.sent.wait(MAX_STEP)?;
        if self.host.as_slice().len() < bytes.len() {
            self.host = device.host_buffer(bytes.len().next_power_of_two())?;
        }
        self.host.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: nobody touches the buffer before `sent` is reached.
        unsafe { to.queue_upload(device, &self.host, bytes.len())? };
        self.sent.record()
    }
}

// === impl GpuTensor ===

impl GpuTensor {
    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    pub(super) fn target(&self) -> Target {
        self.values.target()
    }
}

// === impl GpuInput ===

impl GpuInput {
    fn arg(&self) -> InputArg {
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

    /// All planes, for a collective between devices.
    pub fn collective_slice_mut(&mut self) -> DeviceSliceMut<'_, f32> {
        // SAFETY: the piece lies there, its pool gives nothing back, and all who use it do so on the device's stream.
        unsafe { DeviceSliceMut::new(self.planes.pointer(), self.planes.len()) }
    }

    /// Values of one plane.
    pub fn plane_len(&self) -> usize {
        self.n_rows * self.width
    }

    fn arg(&self) -> TermsArg {
        TermsArg {
            planes: self.planes.pointer(),
            merges: self.order.merges.pointer(),
            n_planes: self.order.order.n_planes() as u32,
            padding: 0,
        }
    }
}

// === impl GpuKvCache ===

impl GpuKvCache {
    /// How keys and values are stored.
    pub fn encoding(&self) -> KvEncoding {
        self.encoding
    }

    fn blocks(&self) -> Blocks {
        Blocks { n_blocks: self.n_tiles / self.tiles_per_block, block_size: self.tiles_per_block * KV_TILE }
    }

    /// Where a layer's part begins.
    fn layer(&self, layer: usize) -> u64 {
        assert!(layer < self.n_layers, "layer {layer} of {}", self.n_layers);
        self.tiles.pointer() + (self.tiles.len() / self.n_layers * layer) as u64
    }
}

// === impl GpuRope ===

impl GpuRope {
    fn arg(&self) -> RopeArg {
        RopeArg { turns: self.turns.pointer(), dims: self.dims as u32, halves: u32::from(self.halves) }
    }
}
