//! Attention over the paged cache: against f64, and against itself in other chunks, batches and blocks.

use half::f16;
use lockstep_kernels::{
    AttentionRow, KvEncoding, RopeStyle, RopeTable,
    cuda::{Device, Gpu, GpuHeads, GpuKvCache, RowChoice, StepRows},
};

use crate::{assert_same_bits, device, random};

const N_POSITIONS: usize = 1_000;

/// Sizes of a model's attention, and how its keys and values are stored.
#[derive(Clone, Copy, Debug)]
struct Shape {
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    encoding: KvEncoding,
}

const SMOLLM2: Shape = Shape { n_heads: 9, n_kv_heads: 3, head_dim: 64, block_size: 16, encoding: KvEncoding::F16 };

const SHAPES: [Shape; 6] = [
    SMOLLM2,
    Shape { encoding: KvEncoding::Int8, ..SMOLLM2 },
    Shape { n_heads: 8, n_kv_heads: 2, head_dim: 128, block_size: 32, ..SMOLLM2 },
    Shape { n_heads: 8, n_kv_heads: 2, head_dim: 128, block_size: 32, encoding: KvEncoding::Int8 },
    Shape { n_heads: 2, n_kv_heads: 2, head_dim: 80, ..SMOLLM2 },
    Shape { n_heads: 20, n_kv_heads: 1, head_dim: 16, block_size: 48, ..SMOLLM2 },
];

/// Sequences with keys and values, queries for every position, and the results for each.
struct Sequences {
    shape: Shape,
    gpu: Gpu,
    kv: GpuKvCache,
    tables: Vec<Vec<u32>>,
    /// `[positions, heads, head_dim]`, turned and rounded as they are stored.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    /// `[positions, heads, head_dim]`, not turned.
    queries: Vec<Vec<f32>>,
}

fn rope(shape: Shape) -> RopeTable {
    let style = if shape.head_dim == 128 { RopeStyle::Halves } else { RopeStyle::Adjacent };
    RopeTable::new(shape.head_dim, shape.head_dim / 4 * 3, 500_000.0, None, N_POSITIONS, style).expect("a small table")
}

/// A head turned to a position, in f64.
fn turned(shape: Shape, head: &[f32], position: usize) -> Vec<f64> {
    let mut turned: Vec<f64> = head.iter().map(|value| f64::from(*value)).collect();
    let dims = shape.head_dim / 4 * 3;
    for pair in 0..dims / 2 {
        let (a, b) = if shape.head_dim == 128 { (pair, pair + dims / 2) } else { (2 * pair, 2 * pair + 1) };
        let angle = position as f64 * 500_000f64.powf(-2.0 * pair as f64 / dims as f64);
        let (x, y) = (f64::from(head[a]), f64::from(head[b]));
        (turned[a], turned[b]) = (x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos());
    }
    turned
}

impl Sequences {
    /// Sequences of `lens` positions in scattered blocks of a cache.
    fn new(device: Device, shape: Shape, lens: &[usize]) -> Self {
        let Shape { n_heads, n_kv_heads, head_dim, block_size, encoding } = shape;
        let gpu = Gpu::new(device, GpuHeads { n_heads, n_kv_heads, head_dim }, &rope(shape)).expect("a GPU");
        let n_blocks: usize = lens.iter().map(|len| len.div_ceil(block_size)).sum();
        let kv = gpu.new_kv(2, n_blocks, block_size, encoding).expect("a small cache");
        let mut next = 0;
        let tables = lens.iter().map(|len| {
            let block = |i: usize| if i.is_multiple_of(2) { i / 2 } else { n_blocks - 1 - i / 2 } as u32;
            let n = len.div_ceil(block_size);
            next += n;
            (next - n..next).map(block).collect()
        });
        let tables = tables.collect();
        let rng = &mut random::seeded(40);
        let mut random = |n: usize| -> Vec<Vec<f32>> {
            lens.iter()
                .map(|len| random::floats(rng, len * n * head_dim).iter().map(|x| x.clamp(-3.0, 3.0)).collect())
                .collect()
        };
        let (keys, values, queries) = (random(n_kv_heads), random(n_kv_heads), random(n_heads));
        let mut sequences = Self { shape, gpu, kv, tables, keys, values, queries };
        for table in 0..lens.len() {
            sequences.write(table);
        }
        sequences
    }

    fn slot(&self, table: usize, position: usize) -> u32 {
        let block_size = self.shape.block_size;
        self.tables[table][position / block_size] * block_size as u32 + (position % block_size) as u32
    }

    /// Writes a sequence's keys and values into the second of two layers.
    fn write(&mut self, table: usize) {
        let width = self.shape.n_kv_heads * self.shape.head_dim;
        let n = self.keys[table].len() / width;
        let slots: Vec<u32> = (0..n).map(|position| self.slot(table, position)).collect();
        let rows: Vec<_> = (0..n).map(|position| AttentionRow { position: position as u32, table }).collect();
        let step = StepRows {
            tokens: &vec![0; n],
            slots: &slots,
            rows: &rows,
            result_rows: &[],
            result_attention: &[],
            choices: &[],
            tables: &self.tables,
        };
        let step = self.gpu.begin(&step, &self.kv, None).expect("a step");
        let k = self.gpu.upload(&self.keys[table], width).unwrap();
        let v = self.gpu.upload(&self.values[table], width).unwrap();
        self.gpu.write_kv(&mut self.kv, 1, &step, &k, &v).unwrap();
    }

    fn attend(&mut self, rows: &[AttentionRow]) -> Vec<f32> {
        let width = self.shape.n_heads * self.shape.head_dim;
        let slots: Vec<u32> = rows.iter().map(|row| self.slot(row.table, row.position as usize)).collect();
        let step = StepRows {
            tokens: &vec![0; rows.len()],
            slots: &slots,
            rows,
            result_rows: &[],
            result_attention: &[],
            choices: &[],
            tables: &self.tables,
        };
        let step = self.gpu.begin(&step, &self.kv, None).expect("a step");
        let q: Vec<f32> = rows
            .iter()
            .flat_map(|row| &self.queries[row.table][row.position as usize * width..][..width])
            .copied()
            .collect();
        let q = self.gpu.upload(&q, width).unwrap();
        let out = self.gpu.attention(&q, &self.kv, 1, &step, RowChoice::All).unwrap();
        let [values, _, _] = self.gpu.download_input(&out).unwrap();
        values
    }

    /// One row in f64, `[heads, head_dim]`, with keys and values as the cache rounds them.
    fn exact(&self, row: &AttentionRow) -> Vec<f64> {
        let Shape { n_heads, n_kv_heads, head_dim, encoding, .. } = self.shape;
        let position = row.position as usize;
        let stored = |head: Vec<f64>| -> Vec<f64> {
            match encoding {
                KvEncoding::F16 => head.iter().map(|x| f16::from_f64(*x).to_f64()).collect(),
                KvEncoding::Int8 => {
                    let scale = head.iter().fold(0.0, |most: f64, x| most.max(x.abs())) / 127.0;
                    head.iter().map(|x| (x / scale).round_ties_even() * scale).collect()
                }
            }
        };
        let head_of = |values: &[f32], position: usize, head: usize, n: usize| {
            values[(position * n + head) * head_dim..][..head_dim].to_vec()
        };
        let mut out = Vec::new();
        for head in 0..n_heads {
            let kv_head = head / (n_heads / n_kv_heads);
            let q = turned(self.shape, &head_of(&self.queries[row.table], position, head, n_heads), position);
            let scores: Vec<f64> = (0..=position)
                .map(|p| {
                    let k = stored(turned(self.shape, &head_of(&self.keys[row.table], p, kv_head, n_kv_heads), p));
                    q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>() / (head_dim as f64).sqrt()
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sums = vec![0.0; head_dim];
            for (p, weight) in weights.iter().enumerate() {
                let v = head_of(&self.values[row.table], p, kv_head, n_kv_heads);
                let v = stored(v.iter().map(|x| f64::from(*x)).collect());
                sums.iter_mut().zip(&v).for_each(|(sum, v)| *sum += weight / total * v);
            }
            out.extend(sums);
        }
        out
    }
}

fn rows_of(table: usize, positions: impl IntoIterator<Item = usize>) -> impl Iterator<Item = AttentionRow> {
    positions.into_iter().map(move |position| AttentionRow { position: position as u32, table })
}

#[test]
fn attention_is_within_the_rounding_of_halves() {
    for shape in SHAPES {
        let mut sequences = Sequences::new(device(), shape, &[1, 40, 330]);
        let rows: Vec<_> = rows_of(0, [0]).chain(rows_of(1, [15, 39])).chain(rows_of(2, [255, 256, 329])).collect();
        let found = sequences.attend(&rows);
        let width = shape.n_heads * shape.head_dim;
        for (row, found) in rows.iter().zip(found.chunks_exact(width)) {
            for (i, (found, expected)) in found.iter().zip(sequences.exact(row)).enumerate() {
                // Queries and softmax weights are rounded to f16 (or bf16), results to bf16; values are up to 3.
                let bound = 0.02 + 0.01 * expected.abs();
                let error = (f64::from(*found) - expected).abs();
                assert!(error <= bound, "{shape:?}, {row:?}, element {i}: {found} for {expected}");
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_chunk_and_any_company() {
    for shape in SHAPES {
        let mut sequences = Sequences::new(device(), shape, &[7, 330]);
        let width = shape.n_heads * shape.head_dim;
        // A whole prompt goes through its keys row by row of tiles; a few rows split by split.
        let prompt: Vec<_> = rows_of(1, 200..330).collect();
        let together = sequences.attend(&prompt);
        let mut checked = 0;
        for chunk in [
            rows_of(1, 200..203).collect::<Vec<_>>(),
            rows_of(0, 0..7).chain(rows_of(1, 250..262)).collect(),
            rows_of(1, [329]).collect(),
        ] {
            let apart = sequences.attend(&chunk);
            for (row, apart) in chunk.iter().zip(apart.chunks_exact(width)).filter(|(row, _)| row.table == 1) {
                let expected = &together[(row.position as usize - 200) * width..][..width];
                assert_same_bits(apart, expected, &format_args!("{shape:?}, {row:?}"));
                checked += 1;
            }
        }
        assert_eq!(checked, 3 + 12 + 1);
    }
}

#[test]
fn what_no_cache_can_store_is_seen_by_later_rows_alone() {
    for shape in SHAPES {
        let mut sequences = Sequences::new(device(), shape, &[100]);
        // As one prompt, and as a few rows; tiles of queries have rows on either side.
        let rows: [Vec<_>; 2] = [rows_of(0, 0..95).collect(), rows_of(0, 85..95).collect()];
        let expected = rows.clone().map(|rows| sequences.attend(&rows));
        let width = shape.n_kv_heads * shape.head_dim;
        for (i, bad) in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e38, -70_000.0].into_iter().enumerate() {
            sequences.keys[0][(90 + i) * width..][..width].fill(bad);
            sequences.values[0][(90 + i) * width..][..width].fill(bad);
        }
        sequences.write(0);
        for (rows, expected) in rows.iter().zip(&expected) {
            let n_before = (rows.len() - 5) * shape.n_heads * shape.head_dim;
            let found = sequences.attend(rows);
            let name = format_args!("{shape:?}, {} rows", rows.len());
            assert_same_bits(&found[..n_before], &expected[..n_before], &name);
        }
    }
}
