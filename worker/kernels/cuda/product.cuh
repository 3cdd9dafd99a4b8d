// What the products of few rows (`matmul.cu`) and of many (`matmul_rows.cu`) share: weights, and how sums are made of them.
// `dequantize.cu` reads weights, too.
//
// A weight is scale * steps + minimum, where the steps are integers from -128 to 127 and thus exact in bf16. Tensor cores
// multiply them with the inputs, in bf16, over one group of the weights at a time; scale and minimum are applied to the
// group's sums in f32. So the weights lose nothing, and all rounding is that of the inputs to bf16 and of sums in f32.
//
// The order of a sum, the same for one row and for many, whatever the other rows: groups ascending within a segment (a fixed
// run of inputs), segments along the tree that `merges` describes. `accumulate` is the only code that adds up a segment.
//
// Variants: those of `matrix.cuh`, and of BITS 16, too (bf16 weights, without scales); GATED: silu(gate) * up of two weights.
// ROW_TILES: rows of a warp, in eights.
#pragma once

#include "device.cuh"
#include "input.cuh"
#include "matrix.cuh"

#define WARPS 8
#define OUTS 32
#define ROWS (8 * ROW_TILES)
// Registers of `Weights`.
#define SCALE_REGISTERS (BITS == 16 ? 0 : TWO_LEVEL ? 2 + GROUPS : 2 * GROUPS)
#define WEIGHT_REGISTERS (4 * CODE_VECTORS + (1 + MINIMUM) * SCALE_REGISTERS)
// bf16 of -(128 + OFFSET), twice: 128 to 144 differ in the last four bits of the mantissa alone.
#define BIAS (0xc300c300 + OFFSET * 0x00010001)

struct Product {
    Matrix weights[3];
    float* out[3];             // [planes, rows, n_out]
    u32 end_tile[3];           // out tiles up to the end of each weight
    u32 padding;
    Input x;
    Input gated;               // where GATED puts its results
    u32 codebook[4];           // bytes
};

// What a warp loads of the weights for one tile.
struct Weights {
    uint4 codes[CODE_VECTORS];
#if BITS != 16
    uint2 scales[TWO_LEVEL ? 1 : GROUPS];
#if TWO_LEVEL
    u32 sub_scales[GROUPS];
#endif
#if MINIMUM
    uint2 minimums[TWO_LEVEL ? 1 : GROUPS];
#if TWO_LEVEL
    u32 sub_minimums[GROUPS];
#endif
#endif
#endif
};

__device__ __forceinline__ void load(Weights& weights, const Matrix& w, u32 out_tile, u32 in_tile, u32 lane) {
    u32 tile = out_tile * w.in_tiles + in_tile;
    const uint4* codes = w.codes + (u64)tile * (CODE_VECTORS * 32) + lane;
    #pragma unroll
    for (int i = 0; i < CODE_VECTORS; i++) weights.codes[i] = load_once(codes + 32 * i);
#if BITS != 16
    u32 group_lane = lane / 4;
    u64 groups = (u64)tile * GROUPS;
#if TWO_LEVEL
    u64 scale = (u64)out_tile * w.n_scales + (GROUPS * in_tile >> w.scale_shift);
    weights.scales[0] = w.scales[scale * 8 + group_lane];
#if MINIMUM
    weights.minimums[0] = w.minimums[scale * 8 + group_lane];
#endif
#endif
    #pragma unroll
    for (int i = 0; i < GROUPS; i++) {
#if TWO_LEVEL
        weights.sub_scales[i] = w.sub_scales[(groups + i) * 8 + group_lane];
#else
        weights.scales[i] = load_once(w.scales + (groups + i) * 8 + group_lane);
#endif
#if MINIMUM
#if TWO_LEVEL
        weights.sub_minimums[i] = w.sub_minimums[(groups + i) * 8 + group_lane];
#else
        weights.minimums[i] = load_once(w.minimums + (groups + i) * 8 + group_lane);
#endif
#endif
    }
#endif
}

// The steps of the 16 outputs `m` and the 16 inputs `step` of a tile, as an operand of the tensor cores.
__device__ __forceinline__ void decode(u32 (&a)[4], const Weights& weights, int m, int step, const u32* codebook) {
#if BITS == 16
    uint4 codes = weights.codes[2 * m + step];
    a[0] = codes.x; a[1] = codes.y; a[2] = codes.z; a[3] = codes.w;
#elif BITS == 4
    uint4 all = weights.codes[0];
    u32 codes = m == 0 ? (step == 0 ? all.x : all.y) : (step == 0 ? all.z : all.w);
    #pragma unroll
    for (int i = 0; i < 4; i++) {
#if CODEBOOK
        u32 pair = codes >> (4 * i) & 0x000f000f;
        a[i] = codebook[(pair | pair >> 12) & 0xff];
#else
        // With the exponent of 128, a code in the last bits is 128 + code.
        a[i] = fma_bf16x2(mask_or(codes >> (4 * i), 0x000f000f, 0x43004300), 0x3f803f80, BIAS);
#endif
    }
#else
    uint4 vector = weights.codes[m];
    u32 low = step == 0 ? vector.x : vector.z, high = step == 0 ? vector.y : vector.w;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 bytes = i < 2 ? low : high;
#if BITS == 6
        u32 pair = byte_permute(bytes, 0x43434343, i % 2 == 0 ? 0x4140 : 0x4342);
        a[i] = fma_bf16x2(pair, 0x3f803f80, BIAS);
#else
        // 2^23 + code, in f32.
        float first = __uint_as_float(byte_permute(bytes, 0x4b000000, i % 2 == 0 ? 0x7440 : 0x7442));
        float second = __uint_as_float(byte_permute(bytes, 0x4b000000, i % 2 == 0 ? 0x7441 : 0x7443));
        a[i] = pack_bf16(first - (8388608.0f + OFFSET), second - (8388608.0f + OFFSET));
#endif
    }
#endif
}

// Value `i` of four f16.
__device__ __forceinline__ float half_of(uint2 four, int i) {
    u32 two = i < 2 ? four.x : four.y;
    return f16_to_f32((u16)(i % 2 == 0 ? two : two >> 16));
}

#if TWO_LEVEL
#define SCALE(name, group, i) (half_of(weights.name##s[0], i) * (float)(i8)(weights.sub_##name##s[group] >> (8 * (i))))
#else
#define SCALE(name, group, i) half_of(weights.name##s[group], i)
#endif

typedef float Sums[2][ROW_TILES][4];

// Adds a tile's products to the sums of 32 outputs and ROWS rows, of which a lane has d[0] to d[3] of each matrix multiply
// (`device.cuh`). `inputs.values(n)` are the lane's of row tile `n`, in the order of the weights; `inputs.sums(group, n)`
// those of a group of its two rows.
template <typename Inputs>
__device__ __forceinline__ void accumulate(Sums& sums, const Weights& weights, const Inputs& inputs, const u32* codebook) {
    u32 a[2][2][4];
    #pragma unroll
    for (int m = 0; m < 2; m++)
        #pragma unroll
        for (int step = 0; step < 2; step++) decode(a[m][step], weights, m, step, codebook);
#if BITS == 16
    #pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        uint4 x = inputs.values(n);
        #pragma unroll
        for (int m = 0; m < 2; m++) {
            mma_bf16(sums[m][n], a[m][0], x.x, x.y);
            mma_bf16(sums[m][n], a[m][1], x.z, x.w);
        }
    }
#else
    #pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        float scales[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) scales[i] = SCALE(scale, group, i);
#if MINIMUM
        float minimums[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) minimums[i] = SCALE(minimum, group, i);
#endif
        #pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            uint4 x = inputs.values(n);
#if MINIMUM
            float2 x_sums = inputs.sums(group, n);
#endif
            #pragma unroll
            for (int m = 0; m < 2; m++) {
                float dots[4];
                if (GROUP == 32) {
                    mma_bf16_fresh(dots, a[m][0], x.x, x.y);
                    mma_bf16(dots, a[m][1], x.z, x.w);
                } else if (group == 0) {
                    mma_bf16_fresh(dots, a[m][0], x.x, x.y);
                } else {
                    mma_bf16_fresh(dots, a[m][1], x.z, x.w);
                }
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    float sum = fmaf(scales[2 * m + i / 2], dots[i], sums[m][n][i]);
#if MINIMUM
                    sum = fmaf(minimums[2 * m + i / 2], i % 2 == 0 ? x_sums.x : x_sums.y, sum);
#endif
                    sums[m][n][i] = sum;
                }
            }
        }
    }
#endif
}

__device__ __forceinline__ Matrix weights_of(const Product& p, u32 i) {
    return i == 0 ? p.weights[0] : i == 1 ? p.weights[1] : p.weights[2];
}

// Which weight an out tile of all weights together belongs to; it becomes one of that weight's.
__device__ __forceinline__ u32 find_weight(const Product& p, u32& out_tile) {
    u32 which = (out_tile >= p.end_tile[0]) + (out_tile >= p.end_tile[1]);
    out_tile -= which == 0 ? 0 : which == 1 ? p.end_tile[0] : p.end_tile[1];
    return which;
}

__device__ __forceinline__ float* out_of(const Product& p, u32 i) {
    return i == 0 ? p.out[0] : i == 1 ? p.out[1] : p.out[2];
}

// bf16 of the steps of both codes of a pair, an entry for each thread of a block. A barrier must follow.
__device__ __forceinline__ void make_codebook(u32* codebook, const u32 (&bytes)[4]) {
    // Chosen, not indexed: the compiler would copy an indexed argument to local memory.
    auto word = [&](u32 i) { return i & 2 ? (i & 1 ? bytes[3] : bytes[2]) : (i & 1 ? bytes[1] : bytes[0]); };
    // 128 has been added to what the argument has.
    u32 low = threadIdx.x & 15, high = threadIdx.x >> 4 & 15;
    float first = (float)(word(low / 4) >> (low % 4 * 8) & 0xff) - OFFSET;
    float second = (float)(word(high / 4) >> (high % 4 * 8) & 0xff) - OFFSET;
    codebook[threadIdx.x] = pack_bf16(first, second);
}

