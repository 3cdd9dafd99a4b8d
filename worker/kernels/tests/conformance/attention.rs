//! Attention over the paged cache: against the plain twin, against f64, and against itself in other chunks and blocks.

use lockstep_kernels::{
    AttentionBatch, AttentionRow, Cpu, KvCache, KvEncoding, NewTokens, RopeStyle, RopeTable, plain,
};
use rand_chacha::ChaCha8Rng;

use crate::{ROW_COUNTS, assert_same_bits, on_every_cpu, random};

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

const SHAPES: [Shape; 4] = [
    SMOLLM2,
    Shape { n_heads: 8, n_kv_heads: 2, head_dim: 128, block_size: 32, ..SMOLLM2 },
    Shape { n_heads: 5, n_kv_heads: 5, head_dim: 80, ..SMOLLM2 },
    Shape { n_heads: 71, n_kv_heads: 1, head_dim: 16, block_size: 48, ..SMOLLM2 },
];

/// All of them in every encoding.
fn shapes() -> impl Iterator<Item = Shape> {
    KvEncoding::ALL.into_iter().flat_map(|encoding| SHAPES.map(|shape| Shape { encoding, ..shape }))
}

fn empty(shape: Shape, n_blocks: usize) -> KvCache {
    let Shape { n_kv_heads, head_dim, block_size, encoding, .. } = shape;
    KvCache::new(2, n_blocks, block_size, n_kv_heads, head_dim, encoding).expect("a small cache")
}

/// The second of two layers, filled with sequences of `lens` positions in scattered blocks. Slots that belong to nobody
/// hold NaN: whoever reads one is found out.
fn cache_of(rng: &mut ChaCha8Rng, shape: Shape, lens: &[usize]) -> (KvCache, Vec<Vec<u32>>) {
    let n_blocks: usize = lens.iter().map(|len| len.div_ceil(shape.block_size)).sum();
    let mut cache = empty(shape, n_blocks);
    let width = shape.n_kv_heads * shape.head_dim;
    for slot in 0..n_blocks * shape.block_size {
        cache.write(1, slot, &vec![f32::NAN; width], &vec![f32::NAN; width]);
    }
    let mut next = 0;
    let mut tables = Vec::new();
    for len in lens {
        // Blocks are handed out from both ends in turn.
        let block = |i: usize| if i.is_multiple_of(2) { i / 2 } else { n_blocks - 1 - i / 2 } as u32;
        let n = len.div_ceil(shape.block_size);
        let table: Vec<u32> = (next..next + n).map(block).collect();
        next += n;
        let slots: Vec<u32> = (0..*len)
            .map(|p| table[p / shape.block_size] * shape.block_size as u32 + (p % shape.block_size) as u32)
            .collect();
        let (k, v) = (random::floats(rng, len * width), random::floats(rng, len * width));
        let positions: Vec<u32> = (0..*len as u32).collect();
        let tokens = NewTokens { layer: 1, slots: &slots, positions: &positions, rope: &rope(shape) };
        Cpu::new(1).write_kv(&mut cache, &tokens, &k, &v);
        tables.push(table);
    }
    (cache, tables)
}

/// Turns a part of each head that fills no whole number of vectors.
fn rope(shape: Shape) -> RopeTable {
    let style = if shape.head_dim == 128 { RopeStyle::Halves } else { RopeStyle::Adjacent };
    RopeTable::new(shape.head_dim, shape.head_dim / 4 * 3, 500_000.0, None, 1_000, style).expect("a small table")
}

fn rows_of(table: usize, positions: impl IntoIterator<Item = usize>) -> impl Iterator<Item = AttentionRow> {
    positions.into_iter().map(move |position| AttentionRow { position: position as u32, table })
}

#[test]
fn a_mixed_batch_has_the_bits_of_the_plain_twin() {
    for shape in shapes() {
        let rng = &mut random::seeded(40);
        let (cache, tables) = cache_of(rng, shape, &[1, 16, 75, 40, 560]);
        // Decodes, a chunk of a prompt that crosses tiles, a whole prompt, and rows of one sequence apart.
        let mut rows: Vec<AttentionRow> = rows_of(0, [0]).chain(rows_of(1, [15])).chain(rows_of(2, 30..75)).collect();
        rows.extend(rows_of(3, 0..40).chain(rows_of(2, [3])).chain(rows_of(3, [39])));
        // In the first split, across its end, and in the second and third: apart, and as neighbours.
        rows.extend(rows_of(4, 250..262).chain(rows_of(0, [0])).chain(rows_of(4, [255, 256, 511, 512, 559])));
        let (rope, n_heads) = (rope(shape), shape.n_heads);
        let batch = AttentionBatch { cache: &cache, layer: 1, rows: &rows, tables: &tables, n_heads, rope: &rope };
        let q = random::floats(rng, rows.len() * shape.n_heads * shape.head_dim);
        let mut expected = vec![f32::NAN; q.len()];
        plain::attention(&q, &batch, &mut expected);
        assert!(expected.iter().all(|out| out.is_finite()));
        on_every_cpu(|cpu| {
            let mut out = vec![f32::NAN; q.len()];
            cpu.attention(&mut q.clone(), &batch, &mut out);
            assert_same_bits(&out, &expected, &format_args!("{shape:?} on {cpu:?}"));
        });
    }
}

/// Threads share the splits of such rows.
#[test]
fn a_few_rows_of_long_sequences_have_the_bits_of_the_plain_twin() {
    for shape in shapes() {
        let rng = &mut random::seeded(46);
        let (cache, tables) = cache_of(rng, shape, &[9, 800, 520]);
        let (rope, n_heads) = (rope(shape), shape.n_heads);
        let one = rows_of(1, [799]).collect::<Vec<_>>();
        let chunk = rows_of(1, 253..259).collect();
        let several = rows_of(0, [8]).chain(rows_of(1, [511])).chain(rows_of(2, [0, 519])).collect();
        for rows in [one, chunk, several] {
            let batch = AttentionBatch { cache: &cache, layer: 1, rows: &rows, tables: &tables, n_heads, rope: &rope };
            let q = random::floats(rng, rows.len() * shape.n_heads * shape.head_dim);
            let mut expected = vec![f32::NAN; q.len()];
            plain::attention(&q, &batch, &mut expected);
            on_every_cpu(|cpu| {
                let mut out = vec![f32::NAN; q.len()];
                cpu.attention(&mut q.clone(), &batch, &mut out);
                assert_same_bits(&out, &expected, &format_args!("{shape:?}, {rows:?} on {cpu:?}"));
            });
        }
    }
}

#[test]
fn written_keys_and_values_have_the_bits_of_the_plain_twin() {
    for shape in shapes() {
        let rng = &mut random::seeded(45);
        let width = shape.n_kv_heads * shape.head_dim;
        for n_tokens in ROW_COUNTS {
            // Neighbours share tiles, and the last wrap around; values reach past the largest f16.
            let slots: Vec<u32> = (0..n_tokens).map(|i| ((i * 5 + 70) % (6 * shape.block_size)) as u32).collect();
            let k: Vec<f32> = random::floats(rng, n_tokens * width).iter().map(|k| k * 1_000.0).collect();
            let v = random::floats(rng, n_tokens * width);
            let mut expected = empty(shape, 6);
            let positions: Vec<u32> = (0..n_tokens as u32).map(|i| i * 97 % 300).collect();
            let tokens = NewTokens { layer: 1, slots: &slots, positions: &positions, rope: &rope(shape) };
            plain::write_kv(&mut expected, &tokens, &k, &v);
            on_every_cpu(|cpu| {
                let mut cache = empty(shape, 6);
                cpu.write_kv(&mut cache, &tokens, &k, &v);
                for slot in 0..6 * shape.block_size {
                    let what = format!("{shape:?} slot {slot} on {cpu:?}");
                    assert_same_bits(&contents(&cache, shape, slot), &contents(&expected, shape, slot), &what);
                }
            });
        }
    }
}

/// Keys and values of a slot in both layers.
fn contents(cache: &KvCache, shape: Shape, slot: usize) -> Vec<f32> {
    let (mut k, mut v) = (vec![0.0; shape.head_dim], vec![0.0; shape.head_dim]);
    let mut contents = Vec::new();
    for (layer, head) in (0..2).flat_map(|layer| (0..shape.n_kv_heads).map(move |head| (layer, head))) {
        cache.read(layer, slot, head, &mut k, &mut v);
        contents.extend(k.iter().chain(&v));
    }
    contents
}

/// In f16 the number itself is kept, in int8 its head's scale.
#[test]
fn a_number_that_is_not_finite_poisons_who_attends_to_it_alone() {
    for (shape, poison) in shapes().flat_map(|shape| [f32::NAN, f32::INFINITY].map(|poison| (shape, poison))) {
        let (rope, n_heads) = (rope(shape), shape.n_heads);
        let width = shape.n_kv_heads * shape.head_dim;
        let (mut cache, tables) = cache_of(&mut random::seeded(47), shape, &[40, 40]);
        let rows: Vec<AttentionRow> = rows_of(0, 0..40).chain(rows_of(1, 0..40)).collect();
        let q = random::floats(&mut random::seeded(48), rows.len() * n_heads * shape.head_dim);
        let attend = |cpu: &mut Cpu, cache: &KvCache| {
            let mut out = vec![0.0; q.len()];
            let batch = AttentionBatch { cache, layer: 1, rows: &rows, tables: &tables, n_heads, rope: &rope };
            cpu.attention(&mut q.clone(), &batch, &mut out);
            out
        };
        let sound = attend(&mut Cpu::new(1), &cache);
        // The last head's key and value at position 20 of the first sequence.
        let at = tables[0][20 / shape.block_size] * shape.block_size as u32 + (20 % shape.block_size) as u32;
        let tokens = NewTokens { layer: 1, slots: &[at], positions: &[20], rope: &rope };
        let mut v = random::floats(&mut random::seeded(49), width);
        v[width - 1] = poison;
        Cpu::new(1).write_kv(&mut cache, &tokens, &vec![1.0; width], &v);
        on_every_cpu(|cpu| {
            let out = attend(cpu, &cache);
            let heads = out.chunks(shape.head_dim).zip(sound.chunks(shape.head_dim)).enumerate();
            for (query_idx, (out, sound)) in heads {
                let (row_idx, head) = (query_idx / n_heads, query_idx % n_heads);
                let attends = (20..40).contains(&row_idx);
                if !attends {
                    assert_same_bits(out, sound, &format_args!("{shape:?} row {row_idx} head {head}"));
                } else if head / (n_heads / shape.n_kv_heads) == shape.n_kv_heads - 1 {
                    assert!(!out[shape.head_dim - 1].is_finite(), "{shape:?} row {row_idx} head {head}: {out:?}");
                } else {
                    assert!(out.iter().all(|out| out.is_finite()), "{shape:?} row {row_idx} head {head}: {out:?}");
                }
            }
        });
    }
}

#[test]
fn any_chunking_gives_the_same_bits() {
    let rng = &mut random::seeded(41);
    for shape in shapes() {
        let (cache, tables) = cache_of(rng, shape, &[300]);
        let rows: Vec<AttentionRow> = rows_of(0, 0..300).collect();
        let width = shape.n_heads * shape.head_dim;
        let q = random::floats(rng, 300 * width);
        let (rope, n_heads) = (rope(shape), shape.n_heads);
        let attend = |rows: &[AttentionRow], q: &[f32]| {
            let mut out = vec![f32::NAN; q.len()];
            let batch = AttentionBatch { cache: &cache, layer: 1, rows, tables: &tables, n_heads, rope: &rope };
            Cpu::new(2).attention(&mut q.to_vec(), &batch, &mut out);
            out
        };
        let whole = attend(&rows, &q);
        for chunk_len in [1, 7, 16, 33] {
            let chunks = rows.chunks(chunk_len).zip(q.chunks(chunk_len * width));
            let chunked: Vec<f32> = chunks.flat_map(|(rows, q)| attend(rows, q)).collect();
            assert_same_bits(&chunked, &whole, &format_args!("{shape:?} in chunks of {chunk_len}"));
        }
    }
}

#[test]
fn the_place_of_blocks_and_their_size_do_not_matter() {
    for encoding in KvEncoding::ALL {
        check_places(Shape { encoding, ..SMOLLM2 });
    }
}

fn check_places(shape: Shape) {
    let attend = |block_size: usize, others: &[usize]| {
        let rng = &mut random::seeded(42);
        let shape = Shape { block_size, ..shape };
        let (cache, tables) = cache_of(rng, shape, &[&[60], others].concat());
        let mut q = random::floats(&mut random::seeded(43), shape.n_heads * shape.head_dim);
        let mut out = vec![f32::NAN; q.len()];
        let rows = [AttentionRow { position: 59, table: 0 }];
        let (rope, n_heads) = (rope(shape), shape.n_heads);
        let batch = AttentionBatch { cache: &cache, layer: 1, rows: &rows, tables: &tables, n_heads, rope: &rope };
        Cpu::new(1).attention(&mut q, &batch, &mut out);
        out
    };
    let expected = attend(16, &[]);
    assert_same_bits(&attend(16, &[100, 3]), &expected, &"among others");
    assert_same_bits(&attend(32, &[]), &expected, &"blocks of 32");
    assert_same_bits(&attend(64, &[200]), &expected, &"blocks of 64");
}

#[test]
fn attention_is_near_f64() {
    for encoding in KvEncoding::ALL {
        check_against_f64(Shape { encoding, ..SHAPES[1] });
    }
}

fn check_against_f64(shape: Shape) {
    let rng = &mut random::seeded(44);
    let (cache, tables) = cache_of(rng, shape, &[600]);
    let mut q: Vec<f32> = random::floats(rng, shape.n_heads * shape.head_dim).iter().map(|q| q / 50.0).collect();
    let rows = [AttentionRow { position: 599, table: 0 }];
    let mut out = vec![0.0; q.len()];
    let (rope, n_heads) = (rope(shape), shape.n_heads);
    let batch = AttentionBatch { cache: &cache, layer: 1, rows: &rows, tables: &tables, n_heads, rope: &rope };
    // Leaves the turned queries behind.
    Cpu::new(1).attention(&mut q, &batch, &mut out);
    for (head, (q, out)) in q.chunks(shape.head_dim).zip(out.chunks(shape.head_dim)).enumerate() {
        let (mut k, mut v) = (vec![0.0; shape.head_dim], vec![0.0; shape.head_dim]);
        let (mut total, mut sums) = (0.0, vec![0.0; shape.head_dim]);
        for position in 0..600 {
            let slot = tables[0][position / shape.block_size] as usize * shape.block_size + position % shape.block_size;
            cache.read(1, slot, head / (shape.n_heads / shape.n_kv_heads), &mut k, &mut v);
            let score: f64 = q.iter().zip(&k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            let weight = (score / (shape.head_dim as f64).sqrt()).exp();
            total += weight;
            sums.iter_mut().zip(&v).for_each(|(sum, v)| *sum += weight * f64::from(*v));
        }
        for (out, sum) in out.iter().zip(&sums) {
            // Scores of some tens carry an absolute error of some 1e-6, the weights' relative one; values reach 100.
            assert!((f64::from(*out) - sum / total).abs() < 1e-3, "head {head}: {out} for {}", sum / total);
        }
    }
}
