// Products of few rows with quantized weights: out[plane, row, o] = sum over k of x[row, k] * w[o, k].
//
// A weight is scale * steps + minimum, where the steps are integers from -128 to 127 and thus exact in bf16. Tensor cores
// multiply them with the inputs, in bf16, over one group of the weights at a time; scale and minimum are applied to the
// group's sums in f32. So the weights lose nothing, and all rounding is that of the inputs to bf16 and of sums in f32.
//
// The order of a sum, the same for one row and for many, whatever the other rows: groups ascending within a segment (a fixed
// run of inputs), segments along the tree that `merges` describes. A warp takes whole segments of 32 outputs; the sums of
// segments meet in shared memory.
//
// Weights lie in tiles of 32 outputs and 32 inputs in the order in which the lanes of a warp need them, see `packed.rs`.
//
// Variants: BITS 4, 6 (codes below 128 in bytes), 8, 16 (bf16 weights, without scales); GROUP 16 or 32 inputs that share a
// scale; TWO_LEVEL: an 8-bit scale of each group times an f16 of several; MINIMUM; CODEBOOK: what 4-bit codes stand for;
// OFFSET: taken off codes (or off what the codebook has); ROW_TILES: rows in eights; GATED: silu(gate) * up of two weights.

#include "device.cuh"
#include "input.cuh"

#define WARPS 8
#define OUTS 32
#define ROWS (8 * ROW_TILES)
#define TILES (GATED ? 2 : 1)
#define GROUPS (32 / GROUP)
// Floats from one row of sums in shared memory to the next: a warp's lanes then store to 32 different banks.
#define STRIDE 36
#define CODE_VECTORS (BITS == 4 ? 1 : BITS == 16 ? 4 : 2)
// Registers of a `Stage`, and how many of them a warp has asked for ahead of their use: as many as leave room for its sums.
#define SCALE_REGISTERS (BITS == 16 ? 0 : TWO_LEVEL ? 2 + GROUPS : 2 * GROUPS)
#define STAGE_REGISTERS \
    (4 * CODE_VECTORS + 4 * ROW_TILES + (1 + MINIMUM) * SCALE_REGISTERS + MINIMUM * 2 * GROUPS * ROW_TILES)
#define BLOCKS_PER_SM (STAGE_REGISTERS + 4 * GATED <= 24 ? 2 : 1)
#define DEPTH_THAT_FITS ((256 / BLOCKS_PER_SM - 56 / BLOCKS_PER_SM - 24 - 8 * ROW_TILES) / STAGE_REGISTERS)
#define DEPTH (DEPTH_THAT_FITS > 8 ? 8 : DEPTH_THAT_FITS)
// bf16 of -(128 + OFFSET), twice: 128 to 144 differ in the last four bits of the mantissa alone.
#define BIAS (0xc300c300 + OFFSET * 0x00010001)

struct Segment {
    u32 end;      // of its inputs, in tiles
    u16 merges;   // pending sums to add once it is summed
    u16 is_last;  // of its plane
};

struct Matrix {
    const uint4* codes;        // [out tiles, in tiles, CODE_VECTORS, 32 lanes]
    const uint2* scales;       // [out tiles, scales, 8] of four f16: outputs g, g + 8, g + 16, g + 24
    const uint2* minimums;     // likewise
    const u32* sub_scales;     // [out tiles, groups, 8] of four i8
    const u32* sub_minimums;   // likewise
    const Segment* segments;
    u32 n_segments;
    u32 n_out;
    u32 in_tiles;
    u32 n_scales;              // of an output
    u32 groups_per_scale;
    u32 padding;
};

struct Product {
    Matrix weights[3];
    float* out[3];             // [planes, rows, n_out]
    u32 end_tile[3];           // out tiles up to the end of each weight
    u32 padding;
    Input x;
    Input gated;               // where GATED puts its results
    u32 codebook[4];           // bytes
};

// What a warp loads for one tile.
struct Stage {
    uint4 codes[CODE_VECTORS];
    uint4 x[ROW_TILES];
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
    float2 sums[GROUPS][ROW_TILES];
#endif
#endif
};

// A warp's place: its outputs, its rows and its lane's part of them.
struct Place {
    const Input& x;
    u32 out_tile;
    u32 lane;
    u32 first_row;
};

__device__ __forceinline__ void load(Stage& stage, const Matrix& w, const Place& place, u32 in_tile) {
    u32 group_lane = place.lane / 4, input_lane = place.lane % 4;
    const uint4* codes = w.codes + ((u64)place.out_tile * w.in_tiles + in_tile) * (CODE_VECTORS * 32) + place.lane;
    #pragma unroll
    for (int i = 0; i < CODE_VECTORS; i++) stage.codes[i] = load_once(codes + 32 * i);
    #pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        // Rows past the last are computed as the last, and not stored.
        u32 row = min(place.first_row + 8 * n + group_lane, place.x.rows - 1);
        const u16* x = place.x.values + (u64)row * place.x.width + 32 * in_tile;
#if GROUP == 32
        stage.x[n] = *(const uint4*)(x + 8 * input_lane);
#else
        uint2 first = *(const uint2*)(x + 4 * input_lane), second = *(const uint2*)(x + 16 + 4 * input_lane);
        stage.x[n] = make_uint4(first.x, first.y, second.x, second.y);
#endif
    }
#if BITS != 16
    u32 group = GROUPS * in_tile;
    u64 groups = (u64)place.out_tile * (GROUPS * w.in_tiles) + group;
#if TWO_LEVEL
    u64 scale = (u64)place.out_tile * w.n_scales + group / w.groups_per_scale;
    stage.scales[0] = w.scales[scale * 8 + group_lane];
#if MINIMUM
    stage.minimums[0] = w.minimums[scale * 8 + group_lane];
#endif
#endif
    #pragma unroll
    for (int i = 0; i < GROUPS; i++) {
#if TWO_LEVEL
        stage.sub_scales[i] = w.sub_scales[(groups + i) * 8 + group_lane];
#else
        stage.scales[i] = load_once(w.scales + (groups + i) * 8 + group_lane);
#endif
#if MINIMUM
#if TWO_LEVEL
        stage.sub_minimums[i] = w.sub_minimums[(groups + i) * 8 + group_lane];
#else
        stage.minimums[i] = load_once(w.minimums + (groups + i) * 8 + group_lane);
#endif
        const float* sums = GROUP == 32 ? place.x.sums_of_32 : place.x.sums_of_16;
        #pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            u32 row = min(place.first_row + 8 * n, place.x.padded_rows - 8) + 2 * input_lane;
            stage.sums[i][n] = *(const float2*)(sums + (u64)(group + i) * place.x.padded_rows + row);
        }
#endif
    }
#endif
}

// The steps of the 16 outputs `m` and the 16 inputs `step` of a tile, as an operand of the tensor cores.
__device__ __forceinline__ void decode(u32 (&a)[4], const Stage& stage, int m, int step, const u32* codebook) {
#if BITS == 16
    uint4 codes = stage.codes[2 * m + step];
    a[0] = codes.x; a[1] = codes.y; a[2] = codes.z; a[3] = codes.w;
#elif BITS == 4
    uint4 all = stage.codes[0];
    u32 codes = m == 0 ? (step == 0 ? all.x : all.y) : (step == 0 ? all.z : all.w);
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 pair = codes >> (4 * i) & 0x000f000f;
#if CODEBOOK
        a[i] = codebook[(pair | pair >> 12) & 0xff];
#else
        // With the exponent of 128, a code in the last bits is 128 + code.
        a[i] = fma_bf16x2(pair | 0x43004300, 0x3f803f80, BIAS);
#endif
    }
#else
    uint4 vector = stage.codes[m];
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
#define SCALE(name, group, i) (half_of(stage.name##s[0], i) * (float)(i8)(stage.sub_##name##s[group] >> (8 * (i))))
#else
#define SCALE(name, group, i) half_of(stage.name##s[group], i)
#endif

typedef float Sums[2][ROW_TILES][4];

__device__ __forceinline__ void accumulate(Sums& sums, const Stage& stage, const u32* codebook) {
    u32 a[2][2][4];
    #pragma unroll
    for (int m = 0; m < 2; m++)
        #pragma unroll
        for (int step = 0; step < 2; step++) decode(a[m][step], stage, m, step, codebook);
#if BITS == 16
    #pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
        #pragma unroll
        for (int m = 0; m < 2; m++) {
            mma_bf16(sums[m][n], a[m][0], stage.x[n].x, stage.x[n].y);
            mma_bf16(sums[m][n], a[m][1], stage.x[n].z, stage.x[n].w);
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
        for (int n = 0; n < ROW_TILES; n++)
            #pragma unroll
            for (int m = 0; m < 2; m++) {
                float dots[4];
                if (GROUP == 32) {
                    mma_bf16_fresh(dots, a[m][0], stage.x[n].x, stage.x[n].y);
                    mma_bf16(dots, a[m][1], stage.x[n].z, stage.x[n].w);
                } else if (group == 0) {
                    mma_bf16_fresh(dots, a[m][0], stage.x[n].x, stage.x[n].y);
                } else {
                    mma_bf16_fresh(dots, a[m][1], stage.x[n].z, stage.x[n].w);
                }
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    float sum = fmaf(scales[2 * m + i / 2], dots[i], sums[m][n][i]);
#if MINIMUM
                    sum = fmaf(minimums[2 * m + i / 2], i % 2 == 0 ? stage.sums[group][n].x : stage.sums[group][n].y, sum);
#endif
                    sums[m][n][i] = sum;
                }
            }
    }
#endif
}

// The sums of one segment, to shared memory: [row, output].
__device__ __forceinline__ void sum_segment(
    float* out, const Matrix& w, const Place& place, u32 first, u32 end, const u32* codebook) {
    Sums sums = {};
    Stage stages[DEPTH];
    #pragma unroll
    for (int i = 0; i < DEPTH; i++)
        if (first + i < end) load(stages[i], w, place, first + i);
    for (u32 in_tile = first; in_tile < end; in_tile += DEPTH) {
        #pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            if (in_tile + i < end) accumulate(sums, stages[i], codebook);
            if (in_tile + i + DEPTH < end) load(stages[i], w, place, in_tile + i + DEPTH);
        }
    }
    u32 output = place.lane / 4, row = 2 * (place.lane % 4);
    #pragma unroll
    for (int m = 0; m < 2; m++)
        #pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++)
                out[(8 * n + row + i % 2) * STRIDE + 16 * m + output + i / 2 * 8] = sums[m][n][i];
}

// Adds the segments of one plane along the tree, from `segment` on; returns its sum and moves on to the next plane.
__device__ __forceinline__ float sum_plane(float* parts, const Matrix& w, u32& segment) {
    u32 pending = 0;
    for (;; segment++) {
        Segment s = w.segments[segment];
        float sum = parts[segment * (ROWS * STRIDE)];
        for (u32 i = 0; i < s.merges; i++) sum = parts[--pending * (ROWS * STRIDE)] + sum;
        if (s.is_last) {
            segment++;
            return sum;
        }
        parts[pending++ * (ROWS * STRIDE)] = sum;
    }
}

__device__ __forceinline__ Matrix weights_of(const Product& p, u32 i) {
    return i == 0 ? p.weights[0] : i == 1 ? p.weights[1] : p.weights[2];
}

// One block: 32 outputs (of gate and up each, if GATED) of ROWS rows. Grid: [row blocks, out tiles of all weights].
// Dynamic shared memory: [TILES, segments, ROWS, STRIDE] floats.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM) matmul(const Product p) {
    float* parts = (float*)dynamic_shared();
    __shared__ u32 codebook[CODEBOOK ? 256 : 1];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 which = GATED ? 0 : (blockIdx.y >= p.end_tile[0]) + (blockIdx.y >= p.end_tile[1]);
    u32 out_tile = blockIdx.y - (which == 0 ? 0 : which == 1 ? p.end_tile[0] : p.end_tile[1]);
    const Matrix w = weights_of(p, which);
    if (CODEBOOK) {
        // bf16 of the steps of both codes of a pair: 128 has been added to what the codebook has.
        u32 low = threadIdx.x & 15, high = threadIdx.x >> 4 & 15;
        float first = (float)(p.codebook[low / 4] >> (low % 4 * 8) & 0xff) - OFFSET;
        float second = (float)(p.codebook[high / 4] >> (high % 4 * 8) & 0xff) - OFFSET;
        codebook[threadIdx.x] = pack_bf16(first, second);
        __syncthreads();
    }
    const Place place = {p.x, out_tile, lane, blockIdx.x * ROWS};
    for (u32 job = warp; job < TILES * w.n_segments; job += WARPS) {
        u32 segment = GATED && job >= w.n_segments ? job - w.n_segments : job;
        const Matrix& of = GATED && job >= w.n_segments ? p.weights[1] : w;
        u32 first = segment == 0 ? 0 : of.segments[segment - 1].end;
        sum_segment(parts + job * (ROWS * STRIDE), of, place, first, of.segments[segment].end, codebook);
    }
    __syncthreads();
    for (u32 i = warp; i < ROWS; i += WARPS) {
        u32 row = blockIdx.x * ROWS + i, output = OUTS * out_tile + lane;
        if (row >= p.x.rows) continue;
        float* part = parts + i * STRIDE + lane;
#if GATED
        u32 segment = 0, up_segment = 0;
        float gate = sum_plane(part, w, segment);
        float up = sum_plane(part + w.n_segments * (ROWS * STRIDE), w, up_segment);
        store_input(p.gated, row, output, silu(gate) * up);
#else
        float* out = which == 0 ? p.out[0] : which == 1 ? p.out[1] : p.out[2];
        u32 segment = 0;
        for (u32 plane = 0; segment < w.n_segments; plane++) {
            float sum = sum_plane(part, w, segment);
            if (output < w.n_out) out[((u64)plane * p.x.rows + row) * w.n_out + output] = sum;
        }
#endif
    }
}
