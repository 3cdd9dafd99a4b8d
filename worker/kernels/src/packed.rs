//! A packed matrix: the weights of one linear layer's shard in the run-time layout that every kernel reads.
//!
//! Weights stay quantized: codes and scales are those of the file, in another order. There is one layout a family.
//!
//! **Integers** (every quantized encoding). A *panel* is 16 neighbouring outputs, the last one filled up with zeros. Per
//! panel and per 32 inputs there are lines of 64 bytes, at most one for each *quad* (4 neighbouring inputs): byte
//! `4 * o + k` is input `k` of the quad for output `o`. That is the operand of a VNNI dot product, and a column of an AMX
//! tile. Codes of fewer than eight bits share bytes (`packed/codes.rs`), those of two and three bits as if they had four.
//! Scales and minimums lie apart from the codes, 16 to a group of the panel.
//!
//! | bits, levels of scales | encodings | bytes a panel of 32 inputs |
//! |---|---|---|
//! | 4, one | Q4_0, Q4_1, IQ4_NL, NF4, FP4 | 256 + 32 (scales) + 32 (minimums of Q4_1) |
//! | 4, two | Q2_K, Q3_K, Q4_K, IQ4_XS | 256 + 16 to 64 (small scales and minimums) + 4 to 8 (block scales) |
//! | 4, two | U4_128, U4_64, U4_32 | 256 + 32 + 16, 32 or 64 |
//! | 5, one | Q5_0, Q5_1 | 320 + 32 or 64 |
//! | 5, two | Q5_K | 320 + 32 + 8 |
//! | 6, two | Q6_K | 384 + 32 + 4 |
//! | 8, one | Q8_0 | 512 + 32 |
//! | 8, two | I8_32 | 512 + 32 + 64 |
//!
//! **Floats** (F32, F16, BF16): rows as they lie in the file, any number of columns.

mod codes;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::thread;

use half::f16;
use lockstep_checkpoint::Encoding;

use crate::memory::{Array, Pieces};
use crate::quant::{self, Block, Format};
use crate::segments::SegmentPlan;
use crate::{EncodedRows, KernelError};

pub(crate) use codes::{Line, Piece, QUADS, layout};

/// Outputs in a panel, and f32 lanes in a vector.
pub(crate) const PANEL: usize = 16;
/// Inputs that share one activation scale.
pub(crate) const BLOCK: usize = 32;

/// Encoded bytes that a thread should have to pack at least, so that they outweigh its start.
const BYTES_PER_PACKING_THREAD: usize = 1 << 20;

/// The weights of one linear layer's shard, `[n_out, n_in]`, and the K-segments by which its products are summed.
#[derive(Debug)]
pub struct PackedMatrix {
    n_out: usize,
    n_in: usize,
    plan: SegmentPlan,
    weights: Weights,
}

/// Weights by family.
#[derive(Debug)]
pub(crate) enum Weights {
    /// Quantized.
    Integers(Integers),
    /// F32, row by row.
    Singles(Array<f32>),
    /// F16 bits, row by row.
    Halves(Array<u16>),
    /// BF16 bits, row by row.
    Brains(Array<u16>),
}

/// The integer family's arrays, each panel by panel. A pair of matrices shares them, their panels in turn.
#[derive(Clone, Debug)]
pub(crate) struct Integers {
    pub(crate) format: Format,
    /// `[n_panels, n_in / 32, format.bits]`.
    pub(crate) codes: Array<Line>,
    /// f16 bits: `[n_panels, n_groups]`; with two levels one for each block, `[n_panels, n_scales]`.
    pub(crate) scales: Array<[u16; PANEL]>,
    /// As `scales`; empty without minimums.
    pub(crate) minimums: Array<[u16; PANEL]>,
    /// `[n_panels, n_groups]`; empty with one level.
    pub(crate) sub_scales: Array<[i8; PANEL]>,
    /// As `sub_scales`; empty without minimums or with one level.
    pub(crate) sub_minimums: Array<[i8; PANEL]>,
    /// Groups of 16 or 32 in a row.
    pub(crate) n_groups: usize,
    /// Entries of `scales` for a row.
    pub(crate) n_scales: usize,
    /// Groups that share an entry of `scales`.
    pub(crate) groups_per_scale: usize,
    /// Matrices in the arrays.
    n_matrices: usize,
    /// Which of them this is.
    matrix_idx: usize,
}

/// One panel's part of each array of [`Integers`].
struct Panel<'a> {
    codes: &'a mut [Line],
    scales: &'a mut [[u16; PANEL]],
    minimums: &'a mut [[u16; PANEL]],
    sub_scales: &'a mut [[i8; PANEL]],
    sub_minimums: &'a mut [[i8; PANEL]],
}

// === impl PackedMatrix ===

impl PackedMatrix {
    /// Packs `source`, a shard `[n_out, n_in]`, for products that are summed by K-segments.
    ///
    /// The segments end at the columns `segments`, ascending, the last at `n_in`; for quantized encodings every end is a
    /// multiple of 32. `subtrees` are the ranges of (local) segments that [`SumTree`](crate::SumTree) lets this rank add
    /// up, in order: a product has one partial plane for each. A layer that is not split by columns has one segment and
    /// one subtree.
    ///
    /// # Errors
    /// If the segments or subtrees do not cover the columns in order, or `source` has neither rows nor columns.
    pub fn pack(source: &EncodedRows<'_>, segments: &[usize], subtrees: &[Range<usize>]) -> Result<Self, KernelError> {
        let (encoding, n_out, n_in) = (source.encoding(), source.n_rows(), source.n_cols());
        if n_out == 0 {
            return Err(KernelError::Shape { encoding, n_rows: n_out, n_cols: n_in });
        }
        let format = Format::of(encoding);
        let plan = SegmentPlan::new(segments, subtrees, n_in, if format.is_some() { BLOCK } else { 1 })?;
        let n_threads = packing_threads(source);
        let weights = match (format, encoding) {
            (Some(format), _) => Weights::Integers(Integers::pack(&[source], format, n_threads)),
            (None, Encoding::F32) => Weights::Singles(pack_floats(source, f32::from_le_bytes, n_threads)),
            (None, Encoding::F16) => Weights::Halves(pack_floats(source, u16::from_le_bytes, n_threads)),
            (None, _) => Weights::Brains(pack_floats(source, u16::from_le_bytes, n_threads)),
        };
        Ok(Self { n_out, n_in, plan, weights })
    }

    /// Packs a matrix whose products are summed whole: one segment, one partial plane.
    ///
    /// # Errors
    /// If `source` has neither rows nor columns.
    #[allow(clippy::single_range_in_vec_init, reason = "one subtree of one segment")]
    pub fn pack_whole(source: &EncodedRows<'_>) -> Result<Self, KernelError> {
        Self::pack(source, &[source.n_cols()], &[0..1])
    }

    /// Packs two matrices whose panels are read in turn, as those of an MLP's gate and up are. If they are alike, a thread
    /// that does so reads memory in one stream, which the processor foresees; the two are summed whole.
    ///
    /// # Errors
    /// If either has neither rows nor columns.
    #[allow(clippy::single_range_in_vec_init, reason = "one subtree of one segment")]
    pub fn pack_pair([first, second]: [&EncodedRows<'_>; 2]) -> Result<[Self; 2], KernelError> {
        let shape = |source: &EncodedRows<'_>| (source.encoding(), source.n_rows(), source.n_cols());
        match Format::of(first.encoding()) {
            Some(format) if shape(first) == shape(second) && first.n_rows() > 0 => {
                let integers = Integers::pack(&[first, second], format, packing_threads(first));
                let matrix = |matrix_idx: usize| {
                    let plan = SegmentPlan::new(&[first.n_cols()], &[0..1], first.n_cols(), BLOCK)?;
                    let weights = Weights::Integers(Integers { matrix_idx, ..integers.clone() });
                    Ok(Self { n_out: first.n_rows(), n_in: first.n_cols(), plan, weights })
                };
                Ok([matrix(0)?, matrix(1)?])
            }
            _ => Ok([Self::pack_whole(first)?, Self::pack_whole(second)?]),
        }
    }

    /// Outputs: rows of the matrix.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Inputs: columns of the matrix.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Partial planes of a product: the number of subtrees.
    pub fn n_partials(&self) -> usize {
        self.plan.n_partials()
    }

    /// Bytes of memory that the weights take.
    pub fn size_bytes(&self) -> usize {
        match &self.weights {
            Weights::Integers(integers) => integers.size_bytes(),
            Weights::Singles(values) => size_of_val(&values[..]),
            Weights::Halves(bits) | Weights::Brains(bits) => size_of_val(&bits[..]),
        }
    }

    /// Decodes row `row_idx` to `out[..n_in]`: exactly what [`dequantize`](crate::dequantize) gives for the file's row.
    ///
    /// # Panics
    /// If `row_idx` is not below `n_out`, or `out` is not `n_in` long.
    pub fn dequantize_row(&self, row_idx: usize, out: &mut [f32]) {
        assert!(row_idx < self.n_out, "row {row_idx} of {}", self.n_out);
        assert_eq!(out.len(), self.n_in, "a row of the matrix");
        let row = row_idx * self.n_in..(row_idx + 1) * self.n_in;
        match &self.weights {
            Weights::Integers(integers) => integers.dequantize_row(row_idx, out),
            Weights::Singles(values) => out.copy_from_slice(&values[row]),
            Weights::Halves(bits) => {
                out.iter_mut().zip(&bits[row]).for_each(|(value, bits)| *value = f16::from_bits(*bits).to_f32());
            }
            Weights::Brains(bits) => {
                out.iter_mut()
                    .zip(&bits[row])
                    .for_each(|(value, bits)| *value = f32::from_bits(u32::from(*bits) << 16));
            }
        }
    }

    pub(crate) fn plan(&self) -> &SegmentPlan {
        &self.plan
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.weights
    }

    pub(crate) fn n_panels(&self) -> usize {
        self.n_out.div_ceil(PANEL)
    }

    /// Whether products quantize their input.
    pub(crate) fn is_quantized(&self) -> bool {
        matches!(self.weights, Weights::Integers(_))
    }
}

/// Threads to pack `source` with: while weights are loaded, nothing else in the process wants the processor.
pub(crate) fn packing_threads(source: &EncodedRows<'_>) -> usize {
    let n_bytes = source.n_rows() * source.row(0).len();
    thread::available_parallelism().map_or(1, usize::from).min(n_bytes / BYTES_PER_PACKING_THREAD).max(1)
}

/// Calls `run` once for each of `items`, on `n_threads` threads.
pub(crate) fn share<T: Send>(n_threads: usize, items: impl Iterator<Item = T> + Send, run: impl Fn(T) + Sync) {
    let items = Mutex::new(items);
    // A thread that panics does so between items, and the scope passes it on.
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run_all = || std::iter::from_fn(next).for_each(&run);
    thread::scope(|scope| {
        (1..n_threads).for_each(|_| _ = scope.spawn(run_all));
        run_all();
    });
}

fn pack_floats<T: Copy + Default + Send, const BYTES: usize>(
    source: &EncodedRows<'_>,
    from_bytes: fn([u8; BYTES]) -> T,
    n_threads: usize,
) -> Array<T> {
    let mut rows = Pieces::new(source.n_rows(), source.n_cols());
    share(n_threads, rows.iter_mut().enumerate(), |(row_idx, values)| {
        let words = source.row(row_idx).as_chunks::<BYTES>().0;
        values.fill(T::default()).iter_mut().zip(words).for_each(|(value, word)| *value = from_bytes(*word));
    });
    rows.into_array()
}

// === impl Integers ===

impl Integers {
    /// Packs matrices that are alike; what comes is the first of them.
    fn pack(sources: &[&EncodedRows<'_>], format: Format, n_threads: usize) -> Self {
        let (source, n_matrices) = (sources[0], sources.len());
        let n_panels = n_matrices * source.n_rows().div_ceil(PANEL);
        let n_groups = source.n_cols() / format.group_len;
        let groups_per_scale = source.encoding().block_len() / format.group_len;
        let n_scales = n_groups / groups_per_scale;
        let n_minimums = if format.has_minimum { n_scales } else { 0 };
        let n_sub_scales = if format.two_level { n_groups } else { 0 };
        let n_sub_minimums = if format.has_minimum { n_sub_scales } else { 0 };
        let mut codes = Pieces::new(n_panels, source.n_cols() / BLOCK * format.bits);
        let mut scales = Pieces::new(n_panels, n_scales);
        let mut minimums = Pieces::new(n_panels, n_minimums);
        let mut sub_scales = Pieces::new(n_panels, n_sub_scales);
        let mut sub_minimums = Pieces::new(n_panels, n_sub_minimums);
        let levels = scales.iter_mut().zip(minimums.iter_mut());
        let sub_levels = sub_scales.iter_mut().zip(sub_minimums.iter_mut());
        let panels = codes.iter_mut().zip(levels).zip(sub_levels).enumerate();
        share(n_threads, panels, |(panel_idx, ((codes, (scales, minimums)), (sub_scales, sub_minimums)))| {
            let panel = Panel {
                codes: codes.fill(Line([0; 64])),
                scales: scales.fill([0; PANEL]),
                minimums: minimums.fill([0; PANEL]),
                sub_scales: sub_scales.fill([0; PANEL]),
                sub_minimums: sub_minimums.fill([0; PANEL]),
            };
            panel.pack(sources[panel_idx % n_matrices], format, panel_idx / n_matrices * PANEL);
        });
        Self {
            format,
            codes: codes.into_array(),
            scales: scales.into_array(),
            minimums: minimums.into_array(),
            sub_scales: sub_scales.into_array(),
            sub_minimums: sub_minimums.into_array(),
            n_groups,
            n_scales,
            groups_per_scale,
            n_matrices,
            matrix_idx: 0,
        }
    }

    /// Where a panel of this matrix stands in the arrays.
    pub(crate) fn place(&self, panel_idx: usize) -> usize {
        panel_idx * self.n_matrices + self.matrix_idx
    }

    /// Runs of 32 inputs in a row.
    pub(crate) fn n_parts(&self) -> usize {
        self.n_groups * self.format.group_len / BLOCK
    }

    fn dequantize_row(&self, row_idx: usize, out: &mut [f32]) {
        let (panel_idx, lane) = (self.place(row_idx / PANEL), row_idx % PANEL);
        let (n_lines, layout) = (self.format.bits, layout(self.format.bits));
        for (group_idx, out) in out.chunks_exact_mut(self.format.group_len).enumerate() {
            let (scale, minimum) = self.group(panel_idx, group_idx, lane);
            let first_col = group_idx * self.format.group_len;
            let first_line = (panel_idx * self.n_parts() + first_col / BLOCK) * n_lines;
            let lines = &self.codes[first_line..first_line + n_lines];
            let values = out.as_chunks_mut::<4>().0.iter_mut();
            for (values, pieces) in values.zip(&layout[first_col % BLOCK / 4..]) {
                let codes = codes::get(lines, pieces, lane);
                *values = codes.map(|code| self.format.value(code, scale, minimum));
            }
        }
    }

    /// Scale and minimum of one group of one output.
    fn group(&self, panel_idx: usize, group_idx: usize, lane: usize) -> (f32, f32) {
        let outer = panel_idx * self.n_scales + group_idx / self.groups_per_scale;
        let inner = panel_idx * self.n_groups + group_idx;
        let value = |outers: &[[u16; PANEL]], inners: &[[i8; PANEL]]| {
            let inner = if inners.is_empty() { 1 } else { inners[inner][lane] };
            f16::from_bits(outers[outer][lane]).to_f32() * f32::from(inner)
        };
        let minimum = if self.format.has_minimum { value(&self.minimums, &self.sub_minimums) } else { 0.0 };
        (value(&self.scales, &self.sub_scales), minimum)
    }

    fn size_bytes(&self) -> usize {
        let n_bytes = size_of_val(&self.codes[..])
            + size_of_val(&self.scales[..])
            + size_of_val(&self.minimums[..])
            + size_of_val(&self.sub_scales[..])
            + size_of_val(&self.sub_minimums[..]);
        n_bytes / self.n_matrices
    }
}

// === impl Panel ===

impl Panel<'_> {
    /// Packs the rows from `first_row` on, as many as there are. Lanes without a row stay zero.
    ///
    /// All rows of a block's columns are decoded before anything is put in its place, so that lines are written once.
    fn pack(self, source: &EncodedRows<'_>, format: Format, first_row: usize) {
        let encoding = source.encoding();
        let (block_len, decode) = (encoding.block_len(), quant::decoder(encoding));
        let groups_per_block = block_len / format.group_len;
        let rows = (first_row..source.n_rows()).take(PANEL).map(|row_idx| source.row(row_idx));
        let mut rows: Vec<_> = rows.map(|row| row.chunks_exact(encoding.block_bytes())).collect();
        let mut blocks: [Block; PANEL] = std::array::from_fn(|_| Block::default());
        let put_codes = match format.bits {
            4 => codes::put::<4>,
            5 => codes::put::<5>,
            6 => codes::put::<6>,
            _ => codes::put::<8>,
        };
        let parts = self.codes.chunks_exact_mut(block_len / BLOCK * format.bits);
        for (block_idx, parts) in parts.enumerate() {
            for (bytes, block) in rows.iter_mut().flat_map(Iterator::next).zip(&mut blocks) {
                decode(bytes, block);
            }
            let lanes = || blocks[..rows.len()].iter().enumerate();
            lanes().for_each(|(lane, block)| self.scales[block_idx][lane] = block.scale.to_bits());
            if format.has_minimum {
                lanes().for_each(|(lane, block)| self.minimums[block_idx][lane] = block.minimum.to_bits());
            }
            if format.two_level {
                let groups = block_idx * groups_per_block..(block_idx + 1) * groups_per_block;
                let sub_scales = &mut self.sub_scales[groups.clone()];
                lanes().for_each(|(lane, block)| put_lane(sub_scales, lane, &block.sub_scales));
                if format.has_minimum {
                    let sub_minimums = &mut self.sub_minimums[groups];
                    lanes().for_each(|(lane, block)| put_lane(sub_minimums, lane, &block.sub_minimums));
                }
            }
            for (part_idx, lines) in parts.chunks_exact_mut(format.bits).enumerate() {
                put_codes(lines, &blocks, part_idx);
            }
        }
    }
}

fn put_lane(groups: &mut [[i8; PANEL]], lane: usize, values: &[i8]) {
    groups.iter_mut().zip(values).for_each(|(group, value)| group[lane] = *value);
}

#[cfg(test)]
mod tests {
    use lockstep_checkpoint::Encoding;

    use super::{Format, Integers, pack_floats};
    use crate::EncodedRows;

    /// The arrays of a packed matrix, to be compared.
    fn arrays(packed: Integers) -> impl PartialEq + std::fmt::Debug {
        let codes: Vec<[u8; 64]> = packed.codes.iter().map(|line| line.0).collect();
        (
            codes,
            packed.scales.to_vec(),
            packed.minimums.to_vec(),
            packed.sub_scales.to_vec(),
            packed.sub_minimums.to_vec(),
        )
    }

    #[test]
    fn any_number_of_threads_packs_the_same() {
        for encoding in Encoding::ALL {
            let n_bytes = 70 * encoding.row_bytes(512).unwrap();
            let bytes: Vec<u8> = (0..n_bytes as u32).map(|i| (i.wrapping_mul(0x9E37_79B1) >> 24) as u8).collect();
            let source = EncodedRows::new(encoding, &bytes, 70, 512).unwrap();
            match Format::of(encoding) {
                Some(format) => {
                    let pack = |n_threads| arrays(Integers::pack(&[&source], format, n_threads));
                    assert_eq!(pack(1), pack(3), "{encoding}");
                }
                None if encoding == Encoding::F32 => {
                    let pack = |n_threads| pack_floats(&source, u32::from_le_bytes, n_threads);
                    assert_eq!(pack(1)[..], pack(3)[..], "{encoding}");
                }
                None => {
                    let pack = |n_threads| pack_floats(&source, u16::from_le_bytes, n_threads);
                    assert_eq!(pack(1)[..], pack(3)[..], "{encoding}");
                }
            }
        }
    }
}
