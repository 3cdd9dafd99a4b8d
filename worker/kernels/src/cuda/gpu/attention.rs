//! The KV cache on the device, and attention over it.

use bytemuck::{Pod, Zeroable};

use super::{
    super::{
        Arg, Buffer, CudaError, Kernel, Program, Source,
        step::{Blocks, QueryTile, RowChoice},
    },
    Gpu, GpuInput, GpuStep, GpuTensor, KV_TILE,
};
use crate::KvEncoding;

/// Threads of a block of `merge_splits`.
const MERGE_THREADS: u32 = 256;

/// Warps of a block of `attention.cu`.
const ATTENTION_WARPS: usize = 4;

/// Keys and values of all layers (`cuda/kv_cache.cuh`).
#[derive(Debug)]
pub struct GpuKvCache {
    pub(super) tiles: Buffer<u8>,
    pub(super) n_layers: usize,
    pub(super) n_tiles: usize,
    pub(super) tiles_per_block: usize,
    pub(super) kernels: KvKernels,
}

#[derive(Debug)]
pub(super) struct KvKernels {
    pub(super) write: Kernel,
    pub(super) attend_splits: Kernel,
    pub(super) attend_rows: Kernel,
    pub(super) merge_splits: Kernel,
}

#[derive(Debug)]
pub(super) struct GpuRope {
    pub(super) turns: Buffer<[f32; 2]>,
    pub(super) dims: usize,
    pub(super) halves: bool,
    pub(super) n_positions: usize,
}

/// `Rope` of `kv_cache.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct RopeArg {
    pub(super) turns: u64,
    pub(super) dims: u32,
    pub(super) halves: u32,
}

/// `Attention` of `attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct AttentionArg {
    pub(super) q: u64,
    pub(super) layer: u64,
    pub(super) positions: u64,
    pub(super) tables: u64,
    pub(super) tiles: u64,
    pub(super) parts: u64,
    pub(super) n_tiles: u32,
    pub(super) n_kv_heads: u32,
    pub(super) table_stride: u32,
    pub(super) kv_tiles_per_block: u32,
    pub(super) rope: RopeArg,
}

// === impl Gpu ===

impl Gpu {
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
            tiles: self.device.zeros(n_bytes.saturating_add(n_bytes / n_blocks))?,
            n_layers,
            n_tiles,
            tiles_per_block,
        })
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
            let tile_bytes = size_of::<QueryTile>();
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
}

// === impl GpuKvCache ===

impl GpuKvCache {
    pub(super) fn blocks(&self) -> Blocks {
        Blocks { n_blocks: self.n_tiles / self.tiles_per_block, block_size: self.tiles_per_block * KV_TILE }
    }

    /// Where a layer's part begins.
    pub(super) fn layer(&self, layer: usize) -> u64 {
        assert!(layer < self.n_layers, "layer {layer} of {}", self.n_layers);
        self.tiles.pointer() + (self.tiles.len() / self.n_layers * layer) as u64
    }
}

// === impl GpuRope ===

impl GpuRope {
    pub(super) fn arg(&self) -> RopeArg {
        RopeArg { turns: self.turns.pointer(), dims: self.dims as u32, halves: u32::from(self.halves) }
    }
}
