//! What kernels can say, compiled and run through cudarc, against what it should give.

use std::collections::BTreeSet;

use cudarc::driver::PushKernelArg;

use crate::gpu::{Gpu, shape};

#[test]
fn vectors_add() {
    let gpu = Gpu::open();
    let add = gpu.kernel(
        r#"extern "C" __global__ void __launch_bounds__(256) add(float* sum, const float* a, const float* b, unsigned n) {
            unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < n) sum[i] = a[i] + b[i];
        }"#,
        "add",
    );
    let n = 1000_u32;
    let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let b: Vec<f32> = (0..n).map(|i| 0.5 * i as f32).collect();
    let (a_device, b_device) = (gpu.stream.clone_htod(&a).unwrap(), gpu.stream.clone_htod(&b).unwrap());
    let mut sum = gpu.stream.alloc_zeros::<f32>(n as usize).unwrap();
    let mut launch = gpu.stream.launch_builder(&add);
    launch.arg(&mut sum).arg(&a_device).arg(&b_device).arg(&n);
    // SAFETY: the kernel takes these four, and stays below `n`.
    unsafe { launch.launch(shape(4, 256)) }.unwrap();
    let sum = gpu.stream.clone_dtoh(&sum).unwrap();
    assert!((0..n as usize).all(|i| sum[i] == a[i] + b[i]));
}

#[test]
fn blocks_reduce_with_shuffles_and_shared_memory() {
    let source = r#"
        extern "C" __global__ void block_sum(const float* in, float* out) {
            __shared__ float of_warp[8];
            float sum = in[blockIdx.x * blockDim.x + threadIdx.x];
            for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
            if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
            __syncthreads();
            if (threadIdx.x < 8) {
                sum = of_warp[threadIdx.x];
                for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xff, sum, lanes);
                if (threadIdx.x == 0) out[blockIdx.x] = sum;
            }
        }"#;
    let input: Vec<f32> = (0..5 * 256).map(|i| (i % 37) as f32).collect();
    let sums = Gpu::open().map(source, "block_sum", shape(5, 256), &input, 5);
    let expected: Vec<f32> = input.chunks(256).map(|block| block.iter().sum()).collect();
    assert_eq!(sums, expected);
}

/// A 16 x 16 by 16 x 8 product in fragments, as the PTX ISA lays them out: `a` and `b` row-major, all in one input.
fn check_mma(name: &str, pack: &str) {
    let source = format!(
        r#"extern "C" __global__ void product(const float* in, float* out) {{
            const float *a = in, *b = in + 256, *c = in + 384;
            unsigned row = threadIdx.x / 4, column = 2 * (threadIdx.x % 4);
            u32 a_parts[4], b_parts[2];
            for (int i = 0; i < 4; i++) {{
                const float* at = a + 16 * (row + 8 * (i % 2)) + column + 8 * (i / 2);
                a_parts[i] = {pack}(at[0], at[1]);
            }}
            for (int i = 0; i < 2; i++) {{
                const float* at = b + 8 * (column + 8 * i) + row;
                b_parts[i] = {pack}(at[0], at[8]);
            }}
            float d[4];
            for (int i = 0; i < 4; i++) d[i] = c[8 * (row + 8 * (i / 2)) + column + i % 2];
            {name}(d, a_parts, b_parts[0], b_parts[1]);
            for (int i = 0; i < 4; i++) out[8 * (row + 8 * (i / 2)) + column + i % 2] = d[i];
        }}"#
    );
    // Exact in either format, with sums that round, so that their order shows.
    let input: Vec<f32> =
        (0..512_i32).map(|i| ((i * 37 % 101 - 50) as f32) * if i % 7 == 0 { 64.0 } else { 0.0625 }).collect();
    let product = Gpu::open().map(&source, "product", shape(1, 32), &input, 128);
    for (i, &found) in product.iter().enumerate() {
        let (row, column) = (i / 8, i % 8);
        let expected =
            (0..16).fold(input[384 + i], |sum, k| input[16 * row + k].mul_add(input[256 + 8 * k + column], sum));
        assert_eq!(found.to_bits(), expected.to_bits(), "row {row}, column {column}");
    }
}

#[test]
fn mma_multiplies_bf16() {
    check_mma("mma_bf16", "pack_bf16");
}

#[test]
fn mma_multiplies_f16() {
    check_mma("mma_f16", "pack_f16");
}

#[test]
fn halves_convert_and_multiply() {
    let source = r#"
        extern "C" __global__ void halves(const float* in, float* out) {
            float x = in[threadIdx.x];
            out[0] = f16_to_f32(f32_to_f16(x));
            out[1] = bf16_to_f32(f32_to_bf16(x));
            out[2] = f16_to_f32(u16(pack_f16(x, 2 * x) >> 16));
            out[3] = bf16_to_f32(u16(pack_bf16(x, 2 * x) >> 16));
            // One third squared needs more bits than a half has: added to its negated rounding, only its error is left.
            u32 third = pack_f16(1.0f / 3, 1), square = fma_f16x2(third, third, 0);
            out[4] = f16_to_f32(u16(fma_f16x2(third, third, square ^ 0x8000)));
            out[5] = f16_to_f32(u16(square >> 16));
            third = pack_bf16(1.0f / 3, 1), square = fma_bf16x2(third, third, 0);
            out[6] = bf16_to_f32(u16(fma_bf16x2(third, third, square ^ 0x8000)));
            out[7] = bf16_to_f32(u16(square >> 16));
            // Among the smallest halves: as a float, the sum lies halfway between 513 and 514, in truth it is less.
            u32 nearly = fma_f16x2(pack_f16(1025 * 0x1p-22f, 0), pack_f16(1023 * 0x1p-23f, 0), pack_f16(513 * 0x1p-24f, 0));
            out[8] = f16_to_f32(u16(nearly)) * 0x1p24f;
        }"#;
    let x = 1.000_976_6_f32 + 0.000_488_28; // halfway between two f16
    let found = Gpu::open().map(source, "halves", shape(1, 1), &[x], 9);
    let (f16_error, bf16_error) = (0.333_251_95_f32.powi(2) - 0.111_083_984, 0.333_984_38_f32.powi(2) - 0.111_328_125);
    assert_eq!(found, [1.001_953_1, 1.0, 2.003_906_2, 2.0, f16_error, 1.0, bf16_error, 1.0, 513.0]);
}

#[test]
fn integers_and_bits() {
    let source = r#"
        extern "C" __global__ void bits(const float* in, float* out) {
            u32 results[] = {
                byte_permute(0x33221100, 0x77665544, 0x5410), byte_permute(0x80, 0, 0x0008),
                __umulhi(0x80000000, 6), u32(__ffs(8)), u32(__ffs(0)), u32(__popc(0xff00ff)), u32(__clz(1)),
                u32(__float2int_rn(2.5f)), u32(__float2int_rn(-1e20f)), u32(__dp4a(0x01ff02fe, 0x01010101, 5)),
                min(3u, 4), u32(max(-3, 4)), __float_as_uint(1.0f),
            };
            for (u32 i = 0; i < sizeof results / sizeof results[0]; i++) out[i] = __uint_as_float(results[i]);
        }"#;
    let found: Vec<u32> =
        Gpu::open().map(source, "bits", shape(1, 1), &[0.0], 13).into_iter().map(f32::to_bits).collect();
    let expected = [0x5544_1100, 0x8080_80ff, 3, 4, 0, 16, 31, 2, 0x8000_0000, 5, 3, 4, 0x3f80_0000];
    assert_eq!(found, expected);
}

#[test]
fn wide_numbers() {
    let source = r#"
        extern "C" __global__ void wide(const float* in, float* out) {
            double third = __ddiv_rn(1.0, 3.0);
            u64 results[] = {
                __umul64hi(1ull << 63, 6), __double2ull_ru(2.25), __double2ull_ru(2.0), __double2ull_ru(-1.0),
                __double2ull_ru(1e30) >> 40, u64(__ull2double_rn((1ull << 53) + 1)) - (1ull << 53),
                u64(__double_as_longlong(third)) >> 40,
                // The error of the product is lost, as without a fused sum.
                u64(__dsub_rn(__dmul_rn(third, 3.0), 1.0)), u64(__dadd_rn(__longlong_as_double(0x3ff0000000000000), 4.0)),
            };
            for (u32 i = 0; i < sizeof results / sizeof results[0]; i++) out[i] = float(results[i]);
        }"#;
    let found = Gpu::open().map(source, "wide", shape(1, 1), &[0.0], 9);
    assert_eq!(found, [3.0, 3.0, 2.0, 0.0, 16_777_215.0, 0.0, 4_183_381.0, 0.0, 5.0]);
}

#[test]
fn lanes_exchange() {
    let source = r#"
        extern "C" __global__ void exchange(const float* in, float* out) {
            unsigned lane = threadIdx.x;
            float x = in[lane], *mine = out + 6 * lane;
            mine[0] = __shfl_sync(0xffffffff, x, 5);
            mine[1] = __shfl_sync(0xffffffff, x, lane + 1, 8);
            mine[2] = __shfl_up_sync(0xffffffff, x, 1);
            mine[3] = __ballot_sync(0xffffffff, lane % 3 == 0) == 0x49249249;
            mine[4] = __reduce_add_sync(0xffffffff, lane);
            if (lane < 16) mine[5] = __shfl_xor_sync(0xffff, x, 1);
            else mine[5] = __all_sync(0xffff0000, lane >= 16);
        }"#;
    let input: Vec<f32> = (0..32).map(|i| i as f32).collect();
    let found = Gpu::open().map(source, "exchange", shape(1, 32), &input, 6 * 32);
    for (lane, found) in found.chunks(6).enumerate() {
        let neighbour = (lane & !7) + (lane + 1) % 8;
        let last = if lane < 16 { lane ^ 1 } else { 1 };
        let expected = [5, neighbour, lane.saturating_sub(1), 1, 31 * 16, last].map(|x| x as f32);
        assert_eq!(found, expected, "lane {lane}");
    }
}

/// The first sum waits for its copies; the second reads before they have come, and finds the poison of fresh memory.
#[test]
fn copies_arrive_when_waited_for_and_no_earlier() {
    let source = r#"
        extern "C" __global__ void copies(const float* in, float* out) {
            float* tile = (float*)dynamic_shared();
            unsigned i = threadIdx.x;
            copy_async_16(tile + 4 * i, in + 4 * i);
            copy_async_commit();
            copy_async_16(tile + 128 + 4 * i, in + 4 * i);
            copy_async_commit();
            copy_async_wait<1>();
            __syncthreads();
            out[i] = tile[(4 * i + 17) % 128];
            out[32 + i] = tile[128 + (4 * i + 17) % 128];
        }"#;
    let input: Vec<f32> = (0..128).map(|i| i as f32).collect();
    let mut launch = shape(1, 32);
    launch.shared_mem_bytes = 1024;
    let found = Gpu::open().map(source, "copies", launch, &input, 64);
    for i in 0..32 {
        assert_eq!(found[i], input[(4 * i + 17) % 128]);
        assert!(found[32 + i].is_nan());
    }
}

/// Vector types, `__constant__` tables, variants by macros, atomic operations over blocks.
#[test]
fn blocks_count_together() {
    let source = r#"
        __constant__ u8 weights[4] = {1, 2, 3, 4};
        __device__ __forceinline__ unsigned weigh(uint4 v) {
            return weights[0] * v.x + weights[1] * v.y + weights[2] * v.z + weights[3] * v.w;
        }
        static_assert(sizeof(uint2) == 8 && alignof(uint4) == 16, "vector types");
        extern "C" __global__ void __launch_bounds__((1 ? 2 : (3)) * (16 + 16), 1) count(const float* in, float* out) {
            const uint4 v = load_once((const uint4*)in);
            atomicAdd((unsigned*)out, weigh(v));
            atomicMax((int*)out + 1, int(blockIdx.y * gridDim.x + blockIdx.x));
        }"#;
    let gpu = Gpu::open();
    let count = gpu.kernel(source, "count");
    let mut out = gpu.stream.alloc_zeros::<u32>(2).unwrap();
    let v = gpu.stream.clone_htod(&[1_u32, 10, 100, 1000]).unwrap();
    let mut launch = shape(7, 64);
    launch.grid_dim.1 = 3;
    // SAFETY: the kernel takes two pointers, to four words and to two.
    unsafe { gpu.stream.launch_builder(&count).arg(&v).arg(&mut out).launch(launch) }.unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&out).unwrap(), [21 * 64 * 4321, 20]);
}

/// Kernels are written against one prelude and tested with the other.
#[test]
fn prelude_and_its_twin_declare_the_same() {
    let functions = |text: &'static str| {
        let names = text.lines().filter(|line| !line.starts_with(' ') && line.contains(") {"));
        names.map(|line| line.split('(').next().unwrap().rsplit([' ', '*']).next().unwrap()).collect::<BTreeSet<_>>()
    };
    let prelude = functions(include_str!("../../../../worker/kernels/cuda/device.cuh"));
    let twin = functions(include_str!("../../cpp/device.cuh"));
    assert!(prelude.len() > 15, "{prelude:?}");
    let missing: Vec<_> = prelude.difference(&twin).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// `n / 2^48` as the nearest number of `digits` significant bits, and a last bit of at least `2^smallest`.
fn round(n: i128, digits: u32, smallest: i32) -> f64 {
    let magnitude = n.unsigned_abs();
    let n_bits = i128::BITS - magnitude.leading_zeros();
    let drop = n_bits.saturating_sub(digits).max((smallest + 48) as u32);
    let (kept, rest, half) = (magnitude >> drop, magnitude & ((1 << drop) - 1), 1 << (drop - 1));
    let rounded = kept + u128::from(rest > half || (rest == half && kept % 2 == 1));
    rounded as f64 * f64::from(drop as i32 - 48).exp2() * (n.signum() as f64)
}

/// Paired sums of products round once: against exact integers, for halves that are multiples of 2^-24 below 2^16.
#[test]
fn paired_products_round_once() {
    let source = r#"
        extern "C" __global__ void pairs(const float* in, float* out) {
            unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
            const float* of = in + 3 * i;
            u32 f16 = fma_f16x2(pack_f16(of[0], 1), pack_f16(of[1], 1), pack_f16(of[2], 1));
            u32 bf16 = fma_bf16x2(pack_bf16(1, of[0]), pack_bf16(1, of[1]), pack_bf16(1, of[2]));
            out[2 * i] = f16_to_f32(u16(f16));
            out[2 * i + 1] = bf16_to_f32(u16(bf16 >> 16));
        }"#;
    let n = 64 * 256;
    let mut state = 1_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    // Eight significant bits are exact in both formats.
    let mut half = || {
        let sign = if random(2) == 0 { 1.0 } else { -1.0 };
        sign * random(256) as f32 * (random(25) as f32 - 24.0).exp2()
    };
    let input: Vec<f32> = (0..3 * n).map(|_| half()).collect();
    let found = Gpu::open().map(source, "pairs", shape(64, 256), &input, 2 * n);
    for (of, found) in input.chunks(3).zip(found.chunks(2)) {
        let units = |x: f32, scale: f64| (f64::from(x) * scale) as i128;
        let exact = units(of[0], 24_f64.exp2()) * units(of[1], 24_f64.exp2()) + units(of[2], 48_f64.exp2());
        let f16 = round(exact, 11, -24);
        let expected = [if f16.abs() < 65520.0 { f16 } else { f64::INFINITY.copysign(f16) }, round(exact, 8, -47)];
        assert_eq!([f64::from(found[0]), f64::from(found[1])], expected, "{of:?}");
    }
}
