//! Speed of the kernels at the shapes of real models: `cargo bench -p lockstep-kernels -- [threads] [filter] [isa]`.
//!
//! One line a matrix and number of rows, the best of many calls in turn on copies of the matrix that together exceed the
//! caches: GB/s of packed weights read, and Gop/s counting a multiplication and an addition for each weight and row.

use std::hint::black_box;
use std::time::{Duration, Instant};

use lockstep_checkpoint::Encoding;
use lockstep_kernels::{
    Activations, AttentionBatch, AttentionRow, Cpu, EncodedRows, Forms, Isa, KvCache, KvEncoding, PackedMatrix,
    RopeStyle, RopeTable, read_bandwidth,
};

/// Weights that a pass goes over: beyond the last-level caches of the machines this runs on.
const PASS_BYTES: usize = 96 << 20;

/// Memory that is read to measure how fast it is.
const MEMORY_BYTES: usize = 512 << 20;

const ROW_COUNTS: [usize; 5] = [1, 4, 8, 16, 128];

/// Name, encoding, outputs, inputs.
const MATRICES: [(&str, Encoding, usize, usize); 11] = [
    ("SmolLM2 q, o", Encoding::Q4_1, 576, 576),
    ("SmolLM2 k, v", Encoding::Q4_1, 192, 576),
    ("SmolLM2 gate, up", Encoding::Q4_1, 1536, 576),
    ("SmolLM2 down", Encoding::Q4_1, 576, 1536),
    ("SmolLM2 logits", Encoding::Q8_0, 49152, 576),
    ("Llama-3-8B q, o", Encoding::Q4_0, 4096, 4096),
    ("Llama-3-8B gate, up", Encoding::Q4_0, 14336, 4096),
    ("Llama-3-8B down", Encoding::Q4K, 4096, 14336),
    ("Llama-3-8B down", Encoding::Q6K, 4096, 14336),
    ("Llama-3-8B down", Encoding::IQ4_XS, 4096, 14336),
    ("Llama-3-8B q, o", Encoding::BF16, 4096, 4096),
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let all_cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let n_threads = args.first().and_then(|arg| arg.parse().ok()).unwrap_or(all_cores);
    let filter = args.get(1).cloned().unwrap_or_default();
    let named = |name: &String| Isa::ALL.into_iter().find(|isa| format!("{isa:?}").eq_ignore_ascii_case(name));
    let isa = args.get(2).and_then(named).unwrap_or(Isa::best());
    let mut cpu = Cpu::with_isa(n_threads, isa).expect("a supported instruction set");
    let memory = read_bandwidth::<1>(n_threads, MEMORY_BYTES) / 1e9;
    println!("{:?}, {n_threads} threads; memory, the limit of GB/s, is read at {memory:.1}", cpu.isa());
    println!("{:<22} {:>6} {:>5} {:>10} {:>8} {:>8}", "matrix", "", "rows", "us", "GB/s", "Gop/s");
    for (name, encoding, n_out, n_in) in MATRICES {
        if format!("{name} {encoding}").contains(&filter) {
            bench_products(&mut cpu, name, encoding, n_out, n_in);
        }
    }
    for (name, encoding, n_out, n_in) in MATRICES.into_iter().filter(|matrix| matrix.0.ends_with("gate, up")) {
        if format!("{name} {encoding} gated").contains(&filter) {
            bench_gated(&mut cpu, name, encoding, n_out, n_in);
        }
    }
    if "attention".contains(&filter) {
        for encoding in KvEncoding::ALL {
            bench_attention(&mut cpu, "SmolLM2 attention", encoding, 9, 3, 64);
            bench_attention(&mut cpu, "Llama-3-8B attention", encoding, 32, 8, 128);
        }
    }
}

fn bench_products(cpu: &mut Cpu, name: &str, encoding: Encoding, n_out: usize, n_in: usize) {
    let bytes = random_bytes(encoding, n_out * n_in);
    let source = EncodedRows::new(encoding, &bytes, n_out, n_in).expect("whole blocks");
    let pack = || PackedMatrix::pack_whole(&source).expect("a whole matrix");
    let first = pack();
    let n_copies = PASS_BYTES.div_ceil(first.size_bytes());
    let copies: Vec<PackedMatrix> = std::iter::once(first).chain((1..n_copies).map(|_| pack())).collect();
    for n_rows in ROW_COUNTS {
        let x: Vec<f32> = (0..n_rows * n_in).map(|i| (i % 61) as f32 / 30.0 - 1.0).collect();
        let mut out = vec![0.0; n_rows * n_out];
        let mut next = copies.iter().cycle();
        let mut inputs = Activations::new(Forms::of(&copies[0]));
        let mut call = || {
            cpu.quantize(black_box(&x), n_in, &mut inputs);
            cpu.matmul(next.next().expect("a cycle"), &inputs, &mut out);
        };
        let seconds = best_of(&mut call).as_secs_f64();
        let (read, ops) = (copies[0].size_bytes() as f64, (2 * n_rows * n_out * n_in) as f64);
        let (gbs, gops) = (read / seconds / 1e9, ops / seconds / 1e9);
        println!("{name:<22} {encoding:>6} {n_rows:>5} {:>10.1} {gbs:>8.1} {gops:>8.0}", seconds * 1e6);
    }
}

/// Both products of an MLP's first half, and what joins them.
fn bench_gated(cpu: &mut Cpu, name: &str, encoding: Encoding, n_out: usize, n_in: usize) {
    let bytes = random_bytes(encoding, n_out * n_in);
    let source = EncodedRows::new(encoding, &bytes, n_out, n_in).expect("whole blocks");
    let pack = || PackedMatrix::pack_pair([&source; 2]).expect("a whole matrix");
    let pair_bytes: usize = pack().iter().map(PackedMatrix::size_bytes).sum();
    let copies: Vec<_> = (0..PASS_BYTES.div_ceil(pair_bytes)).map(|_| pack()).collect();
    for n_rows in ROW_COUNTS {
        let x: Vec<f32> = (0..n_rows * n_in).map(|i| (i % 61) as f32 / 30.0 - 1.0).collect();
        let mut next = copies.iter().cycle();
        let (mut inputs, mut out) = (Activations::new(Forms::Quantized), Activations::new(Forms::Quantized));
        let seconds = best_of(|| {
            cpu.quantize(black_box(&x), n_in, &mut inputs);
            let [gate, up] = next.next().expect("a cycle");
            cpu.gated(gate, up, &inputs, &mut out);
        })
        .as_secs_f64();
        let (gbs, gops) = (pair_bytes as f64 / seconds / 1e9, (4 * n_rows * n_out * n_in) as f64 / seconds / 1e9);
        let name = format!("{name} gated");
        println!("{name:<22} {encoding:>6} {n_rows:>5} {:>10.1} {gbs:>8.1} {gops:>8.0}", seconds * 1e6);
    }
}

/// Decode of 1 and 16 sequences with 1,024 positions each, and prefill of 512 positions.
fn bench_attention(
    cpu: &mut Cpu,
    name: &str,
    encoding: KvEncoding,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
) {
    let n_blocks = 16 * 64;
    let mut cache = KvCache::new(1, n_blocks, 16, n_kv_heads, head_dim, encoding).expect("a cache");
    let token: Vec<f32> = (0..n_kv_heads * head_dim).map(|i| (i % 17) as f32 / 17.0).collect();
    (0..n_blocks * 16).for_each(|slot| cache.write(0, slot, &token, &token));
    let tables: Vec<Vec<u32>> = (0..16).map(|i| (i * 64..(i + 1) * 64).collect()).collect();
    let decode = |n: usize| (0..n).map(|table| AttentionRow { position: 1_023, table }).collect::<Vec<_>>();
    let prefill = (0..512).map(|position| AttentionRow { position, table: 0 }).collect();
    let rope = RopeTable::new(head_dim, head_dim, 1e4, None, 1_024, RopeStyle::Adjacent).expect("a small table");
    for rows in [decode(1), decode(16), prefill] {
        let mut q = vec![0.1; rows.len() * n_heads * head_dim];
        let mut out = vec![0.0; q.len()];
        let batch = AttentionBatch { cache: &cache, layer: 0, rows: &rows, tables: &tables, n_heads, rope: &rope };
        let seconds = best_of(|| cpu.attention(black_box(&mut q), &batch, &mut out)).as_secs_f64();
        let n_positions: usize = rows.iter().map(|row| row.position as usize + 1).sum();
        let n_read = if rows.len() == 512 { 512 } else { n_positions };
        let gbs = (n_read * n_kv_heads * encoding.head_bytes(head_dim)) as f64 / seconds / 1e9;
        let gops = (4 * n_positions * n_heads * head_dim) as f64 / seconds / 1e9;
        let (encoding, us) = (format!("{encoding:?}"), seconds * 1e6);
        println!("{name:<22} {encoding:>6} {:>5} {us:>10.1} {gbs:>8.1} {gops:>8.0}", rows.len());
    }
}

/// The shortest of the runs that fit half a second, at least three.
fn best_of(mut run: impl FnMut()) -> Duration {
    let begin = Instant::now();
    let mut best = Duration::MAX;
    let mut n_runs = 0;
    while n_runs < 3 || begin.elapsed() < Duration::from_millis(500) {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed());
        n_runs += 1;
    }
    best
}

/// Bytes of a matrix of `n` values whose f16 scales are small numbers.
fn random_bytes(encoding: Encoding, n: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // No exponent above 2^-3 where two bytes in a row are a float.
        (state >> 56) as u8 & 0x2f
    };
    (0..n / encoding.block_len() * encoding.block_bytes()).map(|_| byte()).collect()
}
