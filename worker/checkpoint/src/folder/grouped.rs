//! A grouped matrix: what GPTQ and AWQ make of a weight, integer codes with a scale and a zero point for each output and
//! each group of neighbouring inputs: value = scale * (code - zero).
//!
//! | tensor | GPTQ | AWQ ("gemm") |
//! |---|---|---|
//! | `qweight` | `[n_in * bits / 32, n_out]`: words of neighbouring inputs, lowest bits first | `[n_in, n_out / 8]`: words of neighbouring outputs in the order of [`AWQ_ORDER`] |
//! | `qzeros` | `[n_groups, n_out * bits / 32]`: words of neighbouring outputs, lowest bits first; `gptq` takes one off, `gptq_v2` does not | `[n_groups, n_out / 8]`, as `qweight` |
//! | `scales` | `[n_groups, n_out]` | the same |
//! | `g_idx` | `[n_in]`: the group of each input; without it, or if it is all 0, inputs are in order | |
//!
//! `gptq` takes the one off whole words: a zero point of 0 borrows from its neighbour, and adding one to whole words
//! gives that back.
//!
//! It is turned into rows of blocks, of [`Encoding::Q4_0`] or [`Encoding::Q8_0`] where every zero point is the middle of
//! the codes, as GPTQ has it unless told otherwise, and else of [`Encoding::U4_128`] or one of its kind. Nothing is
//! rounded but scales that are no half floats. A block has one scale, so 32 neighbouring inputs must be of one group:
//! those of GPTQ with `desc_act` (act-order) are not and are refused, since every layer would want its inputs in another
//! order.
//!
//! Layouts: `gptqmodel/nn_modules/qlinear/__init__.py` of GPTQModel 7.7 and `awq/modules/linear/gemm.py` of AutoAWQ 0.2.

use std::ops::Range;

use half::f16;
use memmap2::Mmap;

use super::config::Grouping;
use super::safetensors::{Dtype, RawTensor};
use super::scales::to_halves;
use super::{Parts, required};
use crate::encoding::Encoding;
use crate::error::FolderError;
use crate::tensor::Piece;

/// What goes with `qweight`.
pub(super) const PARTS: [&str; 3] = ["qzeros", "scales", "g_idx"];

/// Inputs that must be of one group.
const RUN: usize = 32;

/// Rows that are unpacked together: a cache line of words, of which AWQ's hold eight rows each.
const TILE: usize = 128;

/// Which output of eight is in each nibble of a word, from the lowest on.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// A weight as GPTQ or AWQ stores it, checked, and the blocks that it will become.
#[derive(Debug)]
pub(crate) struct Grouped {
    grouping: Grouping,
    encoding: Encoding,
    n_rows: usize,
    n_cols: usize,
    /// The group of each run of 32 columns.
    group_of_run: Vec<usize>,
    codes: Piece,
    zeros: Piece,
    scales: Piece,
    scale_type: Dtype,
}

// === impl Grouped ===

impl Grouped {
    /// Checks the tensors of a layer, of which `qweight` is one.
    pub(super) fn new(
        qweight: &RawTensor,
        parts: &Parts<'_>,
        grouping: Grouping,
        maps: &[Mmap],
    ) -> Result<Self, FolderError> {
        let (qzeros, scales) = (required(qweight, parts, "qzeros")?, required(qweight, parts, "scales")?);
        qweight.check_type(&[Dtype::I32])?;
        qzeros.check_type(&[Dtype::I32])?;
        scales.check_type(&[Dtype::F16, Dtype::BF16, Dtype::F32])?;
        let codes_per_word = grouping.codes_per_word();
        let [outer, inner] = qweight.matrix()?;
        // No overflow: neither is 0, and there is a word for each pair of them.
        let (n_rows, n_cols) = match grouping {
            Grouping::Gptq { .. } => (inner, outer * codes_per_word),
            Grouping::Awq { .. } => (inner * codes_per_word, outer),
        };
        if !n_cols.is_multiple_of(RUN) || !n_rows.is_multiple_of(codes_per_word) {
            let why = format!("{n_rows} outputs of {n_cols} inputs are not whole words, and runs of {RUN} inputs");
            return Err(qweight.error(&why));
        }
        let [n_groups, _] = scales.matrix()?;
        if n_groups > n_cols / RUN {
            return Err(scales.error(&format!("{n_groups} groups of {n_cols} inputs are not whole runs of {RUN}")));
        }
        scales.check_shape(&[n_groups, n_rows])?;
        qzeros.check_shape(&[n_groups, n_rows / codes_per_word])?;
        let g_idx = parts.get("g_idx");
        if let Some(g_idx) = g_idx {
            g_idx.check_type(&[Dtype::I32])?;
            g_idx.check_shape(&[n_cols])?;
        }
        // GPTQ's tools take a g_idx of zeros for none.
        let g_idx = g_idx.filter(|g_idx| n_groups == 1 || g_idx.piece.of(maps).iter().any(|byte| *byte != 0));
        let group_of_run = match (g_idx, grouping) {
            (Some(g_idx), Grouping::Gptq { group_size, .. }) => {
                runs_of(g_idx, group_size.unwrap_or(n_cols), n_cols, n_groups, maps)?
            }
            (None, Grouping::Gptq { is_reordered: true, .. }) => {
                let why =
                    "there is no g_idx other than 0 for it, and desc_act in config.json's quantization_config is true";
                return Err(qweight.error(why));
            }
            (None, Grouping::Gptq { group_size, .. }) | (_, Grouping::Awq { group_size }) => {
                runs_in_order(qweight, group_size.unwrap_or(n_cols), n_cols, n_groups)?
            }
        };
        let mut matrix = Grouped {
            grouping,
            encoding: Encoding::Q4_0,
            n_rows,
            n_cols,
            group_of_run,
            codes: qweight.piece.clone(),
            zeros: qzeros.piece.clone(),
            scales: scales.piece.clone(),
            scale_type: scales.dtype,
        };
        matrix.encoding = matrix.fitting_encoding(maps);
        Ok(matrix)
    }

    pub(super) fn shape(&self) -> Vec<usize> {
        vec![self.n_rows, self.n_cols]
    }

    pub(super) fn encoding(&self) -> Encoding {
        self.encoding
    }

    pub(crate) fn pieces(&self) -> [&Piece; 3] {
        [&self.codes, &self.zeros, &self.scales]
    }

    /// The blocks that state the same numbers.
    fn fitting_encoding(&self, maps: &[Mmap]) -> Encoding {
        let bits = self.grouping.bits();
        let is_symmetric = self.zero_words(maps).all(|word| word == ones(bits) << (bits - 1));
        // Blocks of so many runs have one group each.
        let is_one_group = |n_runs: usize| {
            let mut blocks = self.group_of_run.chunks(n_runs);
            blocks.all(|block| block.len() == n_runs && block.iter().all(|group| *group == block[0]))
        };
        match (bits, is_symmetric) {
            (4, true) => Encoding::Q4_0,
            (4, false) if is_one_group(4) => Encoding::U4_128,
            (4, false) if is_one_group(2) => Encoding::U4_64,
            (4, false) => Encoding::U4_32,
            (_, true) => Encoding::Q8_0,
            (_, false) => Encoding::I8_32,
        }
    }

    /// The words of zero points, none of them less one.
    fn zero_words<'a>(&self, maps: &'a [Mmap]) -> impl Iterator<Item = u32> + use<'a> {
        let one = match self.grouping {
            // As GPTQModel does it: on whole words.
            Grouping::Gptq { bits, zeros_less_one: true, .. } => ones(bits),
            _ => 0,
        };
        words(self.zeros.of(maps)).iter().map(move |word| u32::from_le_bytes(*word).wrapping_add(one))
    }

    /// `[n_groups, n_rows]`.
    fn zeros(&self, maps: &[Mmap]) -> Vec<u8> {
        let words = self.zero_words(maps);
        match self.grouping {
            Grouping::Gptq { bits, .. } => {
                words.flat_map(|word| (0..32 / bits).map(move |i| code(word, bits, i))).collect()
            }
            Grouping::Awq { .. } => {
                let in_order = |word| {
                    let mut zeros = [0; 8];
                    AWQ_ORDER.iter().zip(0..).for_each(|(output, i)| zeros[*output] = code(word, 4, i));
                    zeros
                };
                words.flat_map(in_order).collect()
            }
        }
    }

    /// The matrix in its encoding, row after row.
    pub(crate) fn reblock(&self, maps: &[Mmap]) -> Result<Vec<u8>, String> {
        let scales = to_halves(self.scale_type, self.scales.of(maps))?; // [n_groups, n_rows]
        let zeros = self.zeros(maps); // [n_groups, n_rows]
        let block_bytes = self.encoding.block_bytes();
        let row_bytes = self.n_cols / self.encoding.block_len() * block_bytes;
        let runs_per_block = self.encoding.block_len() / RUN;
        let run_bytes = RUN * self.grouping.bits() as usize / 8;
        let header_bytes = block_bytes - runs_per_block * run_bytes;
        let mut bytes = vec![0; self.n_rows * row_bytes];
        let mut codes = [[0; RUN]; TILE];
        for (tile_idx, tile) in bytes.chunks_mut(TILE * row_bytes).enumerate() {
            let rows = tile_idx * TILE..(tile_idx * TILE + TILE).min(self.n_rows);
            for (run_idx, group) in self.group_of_run.iter().enumerate() {
                self.unpack(self.codes.of(maps), run_idx, rows.clone(), &mut codes);
                let in_group = group * self.n_rows + rows.start..group * self.n_rows + rows.end;
                let levels = scales[in_group.clone()].iter().zip(&zeros[in_group]);
                for ((row, codes), (scale, zero)) in tile.chunks_exact_mut(row_bytes).zip(&codes).zip(levels) {
                    let block = &mut row[run_idx / runs_per_block * block_bytes..][..block_bytes];
                    let (header, runs) = block.split_at_mut(header_bytes);
                    put_header(header, *scale, *zero, self.grouping.bits());
                    put_codes(&mut runs[run_idx % runs_per_block * run_bytes..][..run_bytes], codes);
                }
            }
        }
        Ok(bytes)
    }

    /// The codes of 32 columns of some rows.
    fn unpack(&self, packed: &[u8], run_idx: usize, rows: Range<usize>, codes: &mut [[u8; RUN]; TILE]) {
        let words = words(packed);
        match self.grouping {
            Grouping::Gptq { bits, .. } => {
                for word_idx in 0..bits as usize {
                    let words = &words[(run_idx * bits as usize + word_idx) * self.n_rows..][rows.clone()];
                    for (word, codes) in words.iter().zip(codes.iter_mut()) {
                        let (word, n_codes) = (u32::from_le_bytes(*word), 32 / bits as usize);
                        let codes = codes[word_idx * n_codes..][..n_codes].iter_mut().enumerate();
                        codes.for_each(|(i, it)| *it = code(word, bits, i as u32));
                    }
                }
            }
            Grouping::Awq { .. } => {
                for col in 0..RUN {
                    let words = &words[(run_idx * RUN + col) * (self.n_rows / 8)..][rows.start / 8..rows.end / 8];
                    for (word, codes) in words.iter().zip(codes.as_chunks_mut::<8>().0) {
                        let word = u32::from_le_bytes(*word);
                        let outputs = AWQ_ORDER.iter().enumerate();
                        outputs.for_each(|(i, output)| codes[*output][col] = code(word, 4, i as u32));
                    }
                }
            }
        }
    }
}

fn words(bytes: &[u8]) -> &[[u8; 4]] {
    bytes.as_chunks().0
}

/// A word of codes that are 1.
fn ones(bits: u32) -> u32 {
    u32::MAX / ((1 << bits) - 1)
}

/// The `i`-th code of a word.
fn code(word: u32, bits: u32, i: u32) -> u8 {
    (word >> (bits * i) & ((1 << bits) - 1)) as u8
}

/// A block's scale and, where the encoding has it, zero point: less 128 if codes are.
fn put_header(header: &mut [u8], scale: f16, zero: u8, bits: u32) {
    let (scale_bytes, zero_byte) = header.split_at_mut(2);
    scale_bytes.copy_from_slice(&scale.to_le_bytes());
    zero_byte.fill(if bits == 8 { zero ^ 0x80 } else { zero });
}

/// 32 codes: in nibbles, the first half in the low ones, or less 128 in bytes.
fn put_codes(bytes: &mut [u8], codes: &[u8; RUN]) {
    if bytes.len() == RUN {
        bytes.iter_mut().zip(codes).for_each(|(byte, code)| *byte = code ^ 0x80);
    } else {
        let (low, high) = codes.split_at(RUN / 2);
        bytes.iter_mut().zip(low.iter().zip(high)).for_each(|(byte, (low, high))| *byte = low | high << 4);
    }
}

/// The group of each run of columns where groups are in order.
fn runs_in_order(
    qweight: &RawTensor,
    group_size: usize,
    n_cols: usize,
    n_groups: usize,
) -> Result<Vec<usize>, FolderError> {
    if group_size == 0 || !group_size.is_multiple_of(RUN) || n_cols.div_ceil(group_size) != n_groups {
        let why =
            format!("{n_cols} inputs in groups of {group_size} do not make {n_groups} groups of whole runs of {RUN}");
        return Err(qweight.error(&why));
    }
    Ok((0..n_cols / RUN).map(|run| run * RUN / group_size).collect())
}

/// The group of each run of columns, as `g_idx` has it.
fn runs_of(
    g_idx: &RawTensor,
    group_size: usize,
    n_cols: usize,
    n_groups: usize,
    maps: &[Mmap],
) -> Result<Vec<usize>, FolderError> {
    let groups: Vec<u32> = words(g_idx.piece.of(maps)).iter().map(|word| u32::from_le_bytes(*word)).collect();
    let mut sizes = vec![0; n_groups];
    for group in &groups {
        let size = sizes.get_mut(*group as usize);
        *size.ok_or_else(|| g_idx.error(&format!("group {} of {n_groups}", group.cast_signed())))? += 1;
    }
    let runs = groups.as_chunks::<RUN>().0;
    if runs.iter().any(|run| run.iter().any(|group| *group != run[0])) {
        let why = "32 neighbouring inputs are of several groups: activation order (desc_act) is not supported";
        return Err(g_idx.error(why));
    }
    // All groups are full but the last, which has what is left.
    let wanted = |group: usize| n_cols.saturating_sub(group.saturating_mul(group_size)).min(group_size);
    if let Some((group, size)) = sizes.iter().enumerate().find(|(group, size)| **size != wanted(*group)) {
        let why = format!("group {group} of {n_groups} has {size} inputs, config.json asks for {}", wanted(group));
        return Err(g_idx.error(&why));
    }
    Ok(runs.iter().map(|run| run[0] as usize).collect())
}
