//! Packing: weights in the order in which the lanes of a warp multiply them (`cuda/product.cuh`).
//!
//! A *tile* is 32 outputs and 32 inputs. Lane `4 g + t` of a warp holds, for both halves `m` of the outputs and both
//! `step`s of 16 inputs, what the tensor cores want of it: outputs `16 m + g` and `16 m + g + 8` at four neighbouring
//! inputs, which begin at `8 t + 4 step` where 32 inputs share a scale, and at `16 step + 4 t` where 16 do. (Any order
//! of inputs will do if weights and inputs have the same, and so a lane reads its inputs in one load.) As operand
//! registers: `a0` is output `g` at the first two inputs, `a1` output `g + 8` there, `a2` and `a3` the same at the others.
//!
//! | bits | encodings | a lane's bytes of a tile |
//! |---|---|---|
//! | 4 | all of 2 to 4 bits | 16: a word for each half and step; nibble `i + 4 j` is value `j` of `a_i` |
//! | 6 | 5 and 6 bits | 32: a byte for each value, in the order of registers |
//! | 8 | Q8_0, I8_32 | likewise |
//! | 16 | F32, F16, BF16, rounded to BF16 | 64: the registers |
//!
//! Scales and minimums lie apart, those of outputs `g`, `g + 8`, `g + 16` and `g + 24` side by side. Outputs that fill up
//! the last tile are 0.

use bytemuck::{Pod, Zeroable};
use half::bf16;
use lockstep_checkpoint::Encoding;

use crate::{
    EncodedRows, KernelError, dequantize,
    memory::{Array, Pieces},
    packed::{packing_threads, share},
    quant::{self, Block, Format},
    segments::SegmentPlan,
};

/// Outputs, and inputs, of a tile.
pub(super) const TILE: usize = 32;
/// Inputs that are packed at once: whole blocks of every encoding.
const RUN: usize = 256;

/// What a kernel of products is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Form {
    /// As the module's table says.
    bits: usize,
    /// Inputs that share a scale: 16 or 32.
    group_len: usize,
    two_level: bool,
    has_minimum: bool,
    codebook: Option<&'static [u8; 16]>,
    offset: u8,
}

/// One K-segment as kernels read it (`cuda/product.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Segment {
    /// Of its inputs, in tiles.
    pub(super) end: u32,
    /// Pending sums to add once it is summed.
    pub(super) n_merges: u16,
    /// Whether its plane ends with it.
    pub(super) is_last: u16,
}

/// A matrix in the order of the device, still on the host.
#[derive(Debug)]
pub(super) struct Packed {
    pub(super) form: Form,
    pub(super) n_out: usize,
    pub(super) n_in: usize,
    /// `[out tiles, in tiles, lanes, words of a lane]`; vectors of four words go lane by lane.
    pub(super) codes: Array<u32>,
    /// f16 bits: `[out tiles, scales of an output, 8, 4]`.
    pub(super) scales: Array<u16>,
    /// As `scales`; empty without minimums.
    pub(super) minimums: Array<u16>,
    /// `[out tiles, groups, 8, 4]`; empty with one level.
    pub(super) sub_scales: Array<i8>,
    /// As `sub_scales`.
    pub(super) sub_minimums: Array<i8>,
    /// Scales of an output.
    pub(super) n_scales: usize,
    pub(super) segments: Vec<Segment>,
    pub(super) n_planes: usize,
}

/// One out tile's part of each array of [`Packed`].
struct TileRow<'a> {
    codes: &'a mut [u32],
    scales: &'a mut [u16],
    minimums: &'a mut [u16],
    sub_scales: &'a mut [i8],
    sub_minimums: &'a mut [i8],
}

// === impl Form ===

impl Form {
    pub(super) fn of(encoding: Encoding) -> Self {
        match Format::of(encoding) {
            None => Self { bits: 16, group_len: TILE, two_level: false, has_minimum: false, codebook: None, offset: 0 },
            Some(Format { group_len, bits, codebook, offset, has_minimum, two_level }) => {
                let bits = if bits == 5 { 6 } else { bits };
                Self { bits, group_len, two_level, has_minimum, codebook, offset }
            }
        }
    }

    /// Every form that an encoding has.
    pub(super) fn all() -> Vec<Self> {
        let mut forms: Vec<Self> = Vec::new();
        for form in Encoding::ALL.map(Self::of) {
            // What a codebook says is an argument.
            let form = Self { codebook: form.codebook.map(|_| &[0; 16]), ..form };
            if !forms.contains(&form) {
                forms.push(form);
            }
        }
        forms
    }

    /// The macros that tell a kernel (`cuda/product.cuh`).
    pub(super) fn defines(self) -> [(&'static str, i64); 6] {
        [
            ("BITS", self.bits as i64),
            ("GROUP", self.group_len as i64),
            ("TWO_LEVEL", i64::from(self.two_level)),
            ("MINIMUM", i64::from(self.has_minimum)),
            ("CODEBOOK", i64::from(self.codebook.is_some())),
            ("OFFSET", i64::from(self.offset)),
        ]
    }

    /// What codes stand for, as the kernel takes it.
    pub(super) fn codebook_words(self) -> [u32; 4] {
        self.codebook.map_or([0; 4], |bytes| bytemuck::pod_read_unaligned(bytes))
    }

    pub(super) fn group_len(self) -> usize {
        self.group_len
    }

    pub(super) fn has_minimum(self) -> bool {
        self.has_minimum
    }

    /// What lanes 0 to 3 have, both steps of each, of 32 inputs in fours.
    fn by_lane<T: Copy>(self, fours: [T; 8]) -> [T; 8] {
        let [a, b, c, d, e, f, g, h] = fours;
        if self.group_len == TILE { fours } else { [a, e, b, f, c, g, d, h] }
    }

    fn words_per_lane(self) -> usize {
        match self.bits {
            4 => 4,
            16 => 16,
            _ => 8,
        }
    }
}

/// Bits of device memory that a weight takes, its part of scales and minimums included.
pub fn bits_per_weight(encoding: Encoding) -> f64 {
    let form = Form::of(encoding);
    // A lane has as many weights of a tile as a word has bits.
    let code = form.words_per_lane() as f64;
    let scale = match (form.bits, form.two_level) {
        (16, _) => 0.0,
        (_, false) => 16.0 / form.group_len as f64,
        (_, true) => 16.0 / encoding.block_len() as f64 + 8.0 / form.group_len as f64,
    };
    code + if form.has_minimum { 2.0 * scale } else { scale }
}

// === impl Packed ===

impl Packed {
    /// Packs `source` for products that are summed by K-segments; the arguments are those of
    /// [`PackedMatrix::pack`](crate::PackedMatrix::pack), whose segments end on multiples of 32 here for every encoding.
    ///
    /// # Errors
    /// As there; or columns that are no multiple of 32.
    pub(super) fn new(source: &EncodedRows<'_>, plan: &SegmentPlan) -> Result<Self, KernelError> {
        let (encoding, n_out, n_in) = (source.encoding(), source.n_rows(), source.n_cols());
        if n_out == 0 || n_in == 0 || !n_in.is_multiple_of(TILE) {
            return Err(KernelError::Shape { encoding, n_rows: n_out, n_cols: n_in });
        }
        let form = Form::of(encoding);
        let (out_tiles, in_tiles, n_groups) = (n_out.div_ceil(TILE), n_in / TILE, n_in / form.group_len);
        let n_scales = match (form.bits, form.two_level) {
            (16, _) => 0,
            (_, false) => n_groups,
            (_, true) => n_in / encoding.block_len(),
        };
        let n_sub_scales = if form.two_level { n_groups } else { 0 };
        let with_minimum = |n: usize| if form.has_minimum { n } else { 0 };
        let mut codes = Pieces::new(out_tiles, in_tiles * TILE * form.words_per_lane());
        let mut scales = Pieces::new(out_tiles, n_scales * TILE);
        let mut minimums = Pieces::new(out_tiles, with_minimum(n_scales) * TILE);
        let mut sub_scales = Pieces::new(out_tiles, n_sub_scales * TILE);
        let mut sub_minimums = Pieces::new(out_tiles, with_minimum(n_sub_scales) * TILE);
        let levels = scales.iter_mut().zip(minimums.iter_mut());
        let sub_levels = sub_scales.iter_mut().zip(sub_minimums.iter_mut());
        let rows = codes.iter_mut().zip(levels).zip(sub_levels).enumerate();
        let is_float = Format::of(encoding).is_none();
        share(packing_threads(source), rows, |(tile, ((codes, (scales, minimums)), (sub_scales, sub_minimums)))| {
            let mut row = TileRow {
                codes: codes.fill(0),
                scales: scales.fill(0),
                minimums: minimums.fill(0),
                sub_scales: sub_scales.fill(0),
                sub_minimums: sub_minimums.fill(0),
            };
            let pack = if is_float { TileRow::pack_floats } else { TileRow::pack_blocks };
            pack(&mut row, source, form, tile * TILE);
        });
        Ok(Self {
            form,
            n_out,
            n_in,
            codes: codes.into_array(),
            scales: scales.into_array(),
            minimums: minimums.into_array(),
            sub_scales: sub_scales.into_array(),
            sub_minimums: sub_minimums.into_array(),
            n_scales,
            segments: segments(plan),
            n_planes: plan.n_partials(),
        })
    }
}

fn segments(plan: &SegmentPlan) -> Vec<Segment> {
    let of_subtree = |subtree: &[crate::segments::Segment]| {
        let last = subtree.len() - 1;
        let segment = |(i, segment): (usize, &crate::segments::Segment)| Segment {
            end: (segment.cols.end / TILE) as u32,
            n_merges: u16::from(segment.n_merges),
            is_last: u16::from(i == last),
        };
        subtree.iter().enumerate().map(segment).collect::<Vec<_>>()
    };
    plan.subtrees().flat_map(of_subtree).collect()
}

// === impl TileRow ===

impl TileRow<'_> {
    /// Packs the outputs from `first` on, as many as there are.
    fn pack_blocks(&mut self, source: &EncodedRows<'_>, form: Form, first: usize) {
        let encoding = source.encoding();
        let (block_len, block_bytes) = (encoding.block_len(), encoding.block_bytes());
        let decode = quant::decoder(encoding);
        let mut block = Block::default();
        let mut codes = [[0; RUN]; TILE];
        for run in (0..source.n_cols()).step_by(RUN) {
            let blocks = run / block_len..source.n_cols().min(run + RUN) / block_len;
            for (output, row_idx) in (first..source.n_rows()).take(TILE).enumerate() {
                let bytes = &source.row(row_idx)[blocks.start * block_bytes..blocks.end * block_bytes];
                let bytes = bytes.chunks_exact(block_bytes);
                let codes = codes[output].chunks_exact_mut(block_len);
                for ((block_idx, bytes), codes) in blocks.clone().zip(bytes).zip(codes) {
                    decode(bytes, &mut block);
                    codes.copy_from_slice(&block.codes[..block_len]);
                    self.put_scales(form, block_len, block_idx, output, &block);
                }
            }
            for (i, tile) in self.tiles(form, run).enumerate() {
                put_codes(tile, form, &codes, i * TILE);
            }
        }
    }

    /// Puts the scales and minimums of an output's block in their places.
    fn put_scales(&mut self, form: Form, block_len: usize, block_idx: usize, output: usize, block: &Block) {
        let place = output % 8 * 4 + output / 8;
        let groups_per_block = block_len / form.group_len;
        let scales_per_block = if form.two_level { 1 } else { groups_per_block };
        for i in block_idx * scales_per_block..(block_idx + 1) * scales_per_block {
            self.scales[i * TILE + place] = block.scale.to_bits();
            if form.has_minimum {
                self.minimums[i * TILE + place] = block.minimum.to_bits();
            }
        }
        if form.two_level {
            for i in 0..groups_per_block {
                let at = (block_idx * groups_per_block + i) * TILE + place;
                self.sub_scales[at] = block.sub_scales[i];
                if form.has_minimum {
                    self.sub_minimums[at] = block.sub_minimums[i];
                }
            }
        }
    }

    /// As [`Self::pack_blocks`], for floats, rounded to bf16.
    fn pack_floats(&mut self, source: &EncodedRows<'_>, form: Form, first: usize) {
        let value_bytes = source.encoding().block_bytes();
        let mut bits = [[0; RUN]; TILE];
        for run in (0..source.n_cols()).step_by(RUN) {
            let end = source.n_cols().min(run + RUN);
            for (bits, row_idx) in bits.iter_mut().zip(first..source.n_rows()) {
                let bytes = &source.row(row_idx)[run * value_bytes..end * value_bytes];
                round_to_bf16(source.encoding(), bytes, &mut bits[..end - run]);
            }
            for (i, tile) in self.tiles(form, run).enumerate() {
                put_bf16(tile, form, &bits, i * TILE);
            }
        }
    }

    /// The tiles of the run of inputs that begins at `run`.
    fn tiles(&mut self, form: Form, run: usize) -> impl Iterator<Item = &mut [u32]> {
        let tile_words = TILE * form.words_per_lane();
        self.codes.chunks_exact_mut(tile_words).skip(run / TILE).take(RUN / TILE)
    }
}

/// Puts the codes of the tile from input `first` of a run on in their places.
fn put_codes(tile: &mut [u32], form: Form, codes: &[[u8; RUN]; TILE], first: usize) {
    let codes = |output: usize| -> [u32; 8] {
        let codes: &[u8; TILE] = codes[output][first..].first_chunk().expect("a run is whole tiles");
        form.by_lane(bytemuck::cast(*codes))
    };
    // Vectors of four words go lane by lane.
    let (vectors, _) = tile.as_chunks_mut::<4>();
    for pair in 0..TILE / 2 {
        let (m, g) = (pair / 8, pair % 8);
        // Registers 0 and 2, and 1 and 3: the first two inputs are in the lower ones.
        let (even, odd) = (codes(16 * m + g), codes(16 * m + g + 8));
        let steps = even.as_chunks::<2>().0.iter().zip(odd.as_chunks::<2>().0);
        if form.bits == 4 {
            for (vector, (even, odd)) in vectors[4 * g..4 * g + 4].iter_mut().zip(steps) {
                for step in 0..2 {
                    let all = even[step] | odd[step] << 4;
                    vector[2 * m + step] = all & 0xff00_00ff | all << 8 & 0xff_0000 | all >> 8 & 0xff00;
                }
            }
        } else {
            let first = TILE * m + 4 * g;
            for (vector, (even, odd)) in vectors[first..first + 4].iter_mut().zip(steps) {
                let low = |step: usize| even[step] & 0xffff | odd[step] << 16;
                let high = |step: usize| even[step] >> 16 | odd[step] & 0xffff_0000;
                *vector = [low(0), high(0), low(1), high(1)];
            }
        }
    }
}

fn round_to_bf16(encoding: Encoding, bytes: &[u8], bits: &mut [u16]) {
    if encoding == Encoding::BF16 {
        bits.iter_mut().zip(bytes.as_chunks().0).for_each(|(bits, bytes)| *bits = u16::from_le_bytes(*bytes));
        return;
    }
    let values = &mut [0.0; RUN][..bits.len()];
    dequantize(encoding, bytes, values);
    bits.iter_mut().zip(values).for_each(|(bits, value)| *bits = bf16::from_f32(*value).to_bits());
}

/// As [`put_codes`], for weights in bf16.
fn put_bf16(tile: &mut [u32], form: Form, bits: &[[u16; RUN]; TILE], first: usize) {
    let bits = |output: usize| -> [[u32; 2]; 8] {
        let bits: &[u16; TILE] = bits[output][first..].first_chunk().expect("a run is whole tiles");
        form.by_lane(bytemuck::cast(*bits))
    };
    let (vectors, _) = tile.as_chunks_mut::<4>();
    for pair in 0..TILE / 2 {
        let (m, g) = (pair / 8, pair % 8);
        let (even, odd) = (bits(16 * m + g), bits(16 * m + g + 8));
        for (i, ([a0, a2], [a1, a3])) in even.into_iter().zip(odd).enumerate() {
            let (lane, step) = (4 * g + i / 2, i % 2);
            vectors[TILE * (2 * m + step) + lane] = [a0, a1, a2, a3];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel makes of a packed matrix, element by element: steps, scale and minimum as kernels find them.
    fn unpack(packed: &Packed, output: usize, input: usize, groups_per_scale: usize) -> f32 {
        let form = packed.form;
        let (out_tile, in_tile, in_tiles) = (output / TILE, input / TILE, packed.n_in / TILE);
        let (o, k, words) = (output % TILE, input % TILE, form.words_per_lane());
        let (m, g, upper) = (o / 16, o % 8, o % 16 / 8);
        let (t, step, i) = if form.group_len == TILE { (k / 8, k % 8 / 4, k % 4) } else { (k % 16 / 4, k / 16, k % 4) };
        let (register, j, lane) = (upper + i / 2 * 2, i % 2, 4 * g + t);
        let word = |word: usize| {
            packed.codes[((out_tile * in_tiles + in_tile) * TILE * words) + (word / 4 * 32 + lane) * 4 + word % 4]
        };
        let code = match form.bits {
            4 => word(2 * m + step) >> (4 * register + 16 * j) & 15,
            16 => word(8 * m + 4 * step + register) >> (16 * j) & 0xffff,
            _ => word(4 * m + 2 * step + register / 2) >> (16 * (register % 2) + 8 * j) & 0xff,
        };
        if form.bits == 16 {
            return bf16::from_bits(code as u16).to_f32();
        }
        let code = form.codebook.map_or(code as i32, |codebook| i32::from(codebook[code as usize]));
        let steps = (code - i32::from(form.offset)) as f32;
        let group = input / form.group_len;
        let place = g * 4 + o / 8;
        let value = |values: &[u16], subs: &[i8]| {
            let at = (out_tile * packed.n_scales + if form.two_level { group / groups_per_scale } else { group })
                * TILE
                + place;
            let value = half::f16::from_bits(values[at]).to_f32();
            let n_groups = packed.n_in / form.group_len;
            if form.two_level { value * f32::from(subs[(out_tile * n_groups + group) * TILE + place]) } else { value }
        };
        let scale = value(&packed.scales, &packed.sub_scales);
        if form.has_minimum {
            scale.mul_add(steps, value(&packed.minimums, &packed.sub_minimums))
        } else {
            scale * steps
        }
    }

    #[test]
    fn a_packed_matrix_holds_what_the_file_does() {
        for encoding in Encoding::ALL {
            // Two runs of inputs, and a part of one.
            let (n_out, n_in) = (70, if encoding.block_len() > TILE { 512 } else { 544 });
            let n_bytes = n_out * encoding.row_bytes(n_in).unwrap();
            // Bytes below 0x40 keep every float and scale finite.
            let bytes: Vec<u8> =
                (0..n_bytes as u32).map(|i| (i.wrapping_mul(0x9E37_79B1) >> 24) as u8 & 0x3f).collect();
            let source = EncodedRows::new(encoding, &bytes, n_out, n_in).unwrap();
            let plan = SegmentPlan::new(&[n_in], std::slice::from_ref(&(0..1)), n_in, TILE).unwrap();
            let packed = Packed::new(&source, &plan).unwrap();
            let groups_per_scale = encoding.block_len() / packed.form.group_len.min(encoding.block_len());
            for output in 0..n_out {
                let mut expected = vec![0.0; n_in];
                dequantize(encoding, source.row(output), &mut expected);
                for (input, expected) in expected.iter().enumerate() {
                    let expected = if packed.form.bits == 16 { bf16::from_f32(*expected).to_f32() } else { *expected };
                    let found = unpack(&packed, output, input, groups_per_scale);
                    assert_eq!(found, expected, "{encoding}, output {output}, input {input}");
                }
            }
        }
    }

    #[test]
    fn a_weight_takes_the_bits_it_says() {
        for encoding in Encoding::ALL {
            let (n_out, n_in) = (64, 512);
            let bytes = vec![0; n_out * encoding.row_bytes(n_in).unwrap()];
            let source = EncodedRows::new(encoding, &bytes, n_out, n_in).unwrap();
            let plan = SegmentPlan::new(&[n_in], std::slice::from_ref(&(0..1)), n_in, TILE).unwrap();
            let Packed { codes, scales, minimums, sub_scales, sub_minimums, .. } = Packed::new(&source, &plan).unwrap();
            let n_bits =
                32 * codes.len() + 16 * (scales.len() + minimums.len()) + 8 * (sub_scales.len() + sub_minimums.len());
            assert_eq!(bits_per_weight(encoding) * (n_out * n_in) as f64, n_bits as f64, "{encoding}");
        }
    }

    #[test]
    fn segments_keep_the_order_of_their_trees() {
        let plan = SegmentPlan::new(&[32, 96, 160, 192], &[0..3, 3..4], 192, TILE).unwrap();
        let found = segments(&plan);
        let expected = [(1, 0, 0), (3, 1, 0), (5, 1, 1), (6, 0, 1)];
        assert_eq!(found.iter().map(|s| (s.end, s.n_merges, s.is_last)).collect::<Vec<_>>(), expected);
    }
}
