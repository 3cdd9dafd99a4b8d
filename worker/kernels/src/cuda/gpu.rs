//! The ops: what a forward pass does on a GPU, each a launch or two. All are queued; only downloads wait.
//!
//! The methods check that everything a kernel touches is there, so they are safe whatever they are given.
//!
//! - `tensors`: activations, on their way to the device and back; `steps`: the rows of a step; `table`: their embeddings;
//!   `attention`: the cache, too; `ranks`: what crosses between the ranks of a group; `exchange`: what that costs;
//!   `choice`: from logits to token ids; `answers`: results that nobody waits for yet.
//! - Here: weights and their products, and what is done row by row; `dense`: the products that may be a library's.

mod answers;
mod attention;
mod choice;
mod dense;
mod exchange;
mod ranks;
mod steps;
mod table;
mod tensors;

use std::sync::{Arc, Mutex};

use bytemuck::{Pod, Zeroable};

use super::{
    Arg, Buffer, CudaError, Device, Event, Kernel, Program, Source,
    matrix::{GpuMatrix, MatrixArg, RowParallelSum},
    pool::Pool,
    product::ProductLaunch,
    step::{Heads, RowChoice},
};
use crate::{EncodedRows, RopeTable};

pub use answers::Answer;
pub use attention::GpuKvCache;
pub(super) use choice::MAX_VOCAB;
pub use choice::{ChoiceRule, GpuVocab, MAX_CHOICES};
pub use exchange::{Exchange, ExchangeError, ExchangeShape, Exchanges};
pub use steps::GpuStep;
pub use table::{GpuTable, table_bits_per_weight};
pub use tensors::{GpuInput, GpuTensor, GpuTerms};

pub(super) use table::table_programs;

use answers::Pages;
use attention::GpuRope;
use dense::Dense;
use steps::Staging;
use tensors::{InputArg, TermsArg};

/// Weights that one launch multiplies by.
pub const MAX_WEIGHTS: usize = 3;
/// Threads of the kernels of `elementwise.cu`.
const ROW_THREADS: u32 = 512;
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
    /// There if products of many rows may be computed in any order.
    dense: Option<Mutex<Dense>>,
    staging: Staging,
    /// Rows of the table, once there is one: token ids are below.
    table_rows: Option<usize>,
    /// What the last step that chose has chosen, one for each of its rows of logits: `[MAX_CHOICES]`.
    choices: Buffer<u32>,
    /// Marks the beginning of the last step.
    begun: Arc<Event>,
    answers: Pages<u32>,
    rows: Pages<f32>,
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

/// Kernels that every model needs; products' are made when weights of their form are loaded.
#[derive(Debug)]
struct Kernels {
    rms_norm: Kernel,
    silu_mul: Kernel,
    select_rows: Kernel,
    choose: Kernel,
    join_columns: Kernel,
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
        let begun = device.event()?;
        begun.record()?;
        Ok(Self {
            kernels: Kernels {
                rms_norm: device.kernel(&elementwise, "rms_norm")?,
                silu_mul: device.kernel(&elementwise, "silu_mul")?,
                select_rows: device.kernel(&elementwise, "select_rows")?,
                join_columns: device.kernel(&elementwise, "join_columns")?,
                choose: device.kernel(&Program::new(Source::Choose, &[]), "choose")?,
            },
            rope: GpuRope {
                turns: device.upload_new(rope.turns())?,
                dims: rope.rope_dim(),
                halves: rope.style() == crate::RopeStyle::Halves,
                n_positions: rope.max_position(),
            },
            dense: None,
            heads: Heads { n_kv_heads, group_size: n_heads / n_kv_heads },
            head_dim,
            pool: Pool::new(device.clone()),
            staging: Staging::new(&device)?,
            table_rows: None,
            choices: device.zeros(MAX_CHOICES)?,
            begun: Arc::new(begun),
            answers: Pages::new(&device, MAX_CHOICES)?,
            rows: Pages::new(&device, 0)?,
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
        let mut matrix = GpuMatrix::new(&self.device, source, sum)?;
        matrix.load_kernels(&self.device, false, self.dense.is_some())?;
        Ok(matrix)
    }

    /// As [`Gpu::load_matrix`], for the two weights of [`Gpu::gated`].
    ///
    /// # Errors
    /// As there.
    pub fn load_gated(&self, [gate, up]: [&EncodedRows<'_>; 2]) -> Result<[GpuMatrix; 2], CudaError> {
        let (mut gate, mut up) = (GpuMatrix::new(&self.device, gate, None)?, GpuMatrix::new(&self.device, up, None)?);
        let gated = gate.is_like(&up);
        for weights in [&mut gate, &mut up] {
            weights.load_kernels(&self.device, gated, self.dense.is_some())?;
        }
        Ok([gate, up])
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
        let mut rest = Vec::with_capacity(N);
        for (weight, out) in weights.into_iter().zip(&out) {
            if !self.multiply_dense(weight, x, out.values.pointer())? {
                rest.push((weight, out.values.pointer()));
            }
        }
        for alike in rest.chunk_by(|(a, _), (b, _)| a.is_like(b)) {
            for alike in alike.chunks(MAX_WEIGHTS) {
                let (weights, pointers): (Vec<_>, Vec<_>) = alike.iter().copied().unzip();
                self.multiply(&weights, x, &pointers)?;
            }
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
        let own_planes = planes.pointer() + (first_plane * plane * size_of::<f32>()) as u64;
        if !self.multiply_dense(weight, x, own_planes)? {
            self.multiply(&[weight], x, &[own_planes])?;
        }
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
        if gate.is_like(up) && gate.kernels(true).is_some() && !self.may_be_dense(x.n_rows) {
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

    /// The rows of `x` that give a result, in the step's order.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If `x` has other rows than the step.
    pub fn select_rows(&self, x: &GpuTensor, step: &GpuStep) -> Result<GpuTensor, CudaError> {
        assert_eq!(x.n_rows, step.layout.n_rows, "all rows of the step");
        let n_rows = step.layout.queries(RowChoice::Results).n_rows;
        let out = self.tensor(n_rows, x.width)?;
        let args = [
            Arg::Ptr(x.values.pointer()),
            Arg::Ptr(step.at(step.layout.result_rows)),
            Arg::Ptr(out.values.pointer()),
            Arg::U32(x.width as u32),
        ];
        // SAFETY: the kernel's parameters; the rows were checked when the step began.
        unsafe { self.kernels.select_rows.launch([n_rows as u32, 1, 1], ROW_THREADS, 0, &args)? };
        Ok(out)
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
        let kernel = weights.kernels(gated).expect("weights that were loaded for products").get(launch.kernel);
        // SAFETY: the kernel's parameter; weights, inputs and outputs have the shapes that it names.
        unsafe { kernel.launch(launch.grid, launch.threads, launch.shared_bytes, &[Arg::of(product)]) }
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
