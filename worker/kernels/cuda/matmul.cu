// Products of few rows with quantized weights: out[plane, row, o] = sum over k of x[row, k] * w[o, k].
//
// What counts is that weights are read once, as fast as memory gives them: a warp takes whole segments of 32 outputs and has
// the next tiles of them under way; the sums of segments meet in shared memory. `product.cuh` says what a sum is, and what
// the variants are.

#include "product.cuh"

#define TILES (GATED ? 2 : 1)
// Floats from one row of sums in shared memory to the next: a warp's lanes then store to 32 different banks.
#define STRIDE 36
// Registers of a `Stage`, and how many of them a warp has asked for ahead of their use: as many as leave room for its sums.
#define STAGE_REGISTERS (WEIGHT_REGISTERS + 4 * ROW_TILES + MINIMUM * 2 * GROUPS * ROW_TILES)
#define BLOCKS_PER_SM (STAGE_REGISTERS + 4 * GATED <= 24 ? 2 : 1)
#define DEPTH_THAT_FITS ((256 / BLOCKS_PER_SM - 56 / BLOCKS_PER_SM - 24 - 8 * ROW_TILES) / STAGE_REGISTERS)
#define DEPTH (DEPTH_THAT_FITS > 8 ? 8 : DEPTH_THAT_FITS)

// What a warp loads for one tile.
struct Stage {
    Weights weights;
    uint4 x[ROW_TILES];
#if MINIMUM
    float2 x_sums[GROUPS][ROW_TILES];
#endif

    __device__ __forceinline__ uint4 values(int n) const { return x[n]; }
#if MINIMUM
    __device__ __forceinline__ float2 sums(int group, int n) const { return x_sums[group][n]; }
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
    load(stage.weights, w, place.out_tile, in_tile, place.lane);
    u32 row_lane = place.lane / 4, input_lane = place.lane % 4;
    #pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        // Rows past the last are computed as the last, and not stored.
        u32 row = min(place.first_row + 8 * n + row_lane, place.x.rows - 1);
        const u16* x = place.x.values + (u64)row * place.x.width + 32 * in_tile;
#if GROUP == 32
        stage.x[n] = *(const uint4*)(x + 8 * input_lane);
#else
        uint2 first = *(const uint2*)(x + 4 * input_lane), second = *(const uint2*)(x + 16 + 4 * input_lane);
        stage.x[n] = make_uint4(first.x, first.y, second.x, second.y);
#endif
    }
#if MINIMUM
    const float* sums = GROUP == 32 ? place.x.sums_of_32 : place.x.sums_of_16;
    #pragma unroll
    for (int group = 0; group < GROUPS; group++)
        #pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            u32 row = min(place.first_row + 8 * n, place.x.padded_rows - 8) + 2 * input_lane;
            stage.x_sums[group][n] = *(const float2*)(sums + (u64)(GROUPS * in_tile + group) * place.x.padded_rows + row);
        }
#endif
}

// Asks for the beginning of a warp's share of an out tile's codes. That is about where its first segment is, and some warp
// of the block needs it in any case. No kernel writes weights, so memory need not idle until the kernel ahead has ended.
// (Variants with a codebook have no register to spare for it.)
__device__ __forceinline__ void prefetch_codes(const Matrix& w, u32 out_tile, u32 warp, u32 lane) {
    u32 share = w.in_tiles * (CODE_VECTORS * 32 * sizeof(uint4) / WARPS);
    const u8* codes = (const u8*)w.codes + (u64)(out_tile * WARPS + warp) * share;
    #pragma unroll
    for (u32 i = 32 * lane; i < 4096; i += 32 * 32)
        if (i < share) prefetch(codes + i);
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
            if (in_tile + i < end) accumulate(sums, stages[i].weights, stages[i], codebook);
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

// One block: 32 outputs (of gate and up each, if GATED) of ROWS rows. Grid: [row blocks, out tiles of all weights].
// Dynamic shared memory: [TILES, segments, ROWS, STRIDE] floats.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM) matmul(const Product p) {
    float* parts = (float*)dynamic_shared();
    __shared__ u32 codebook[CODEBOOK ? 256 : 1];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 out_tile = blockIdx.y;
    u32 which = GATED ? 0 : find_weight(p, out_tile);
    const Matrix w = weights_of(p, which);
    if (!CODEBOOK) prefetch_codes(w, out_tile, warp, lane);
    begin_kernel();
    if (CODEBOOK) {
        make_codebook(codebook, p.codebook);
        __syncthreads();
    }
    const Place place = {p.x, out_tile, lane, blockIdx.x * ROWS};
    for (u32 job = warp; job < TILES * w.n_segments; job += WARPS) {
        u32 segment = GATED && job >= w.n_segments ? job - w.n_segments : job;
#if GATED
        const Matrix of = weights_of(p, job >= w.n_segments);
#else
        const Matrix& of = w;
#endif
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
        float* out = out_of(p, which);
        u32 segment = 0;
        for (u32 plane = 0; segment < w.n_segments; plane++) {
            float sum = sum_plane(part, w, segment);
            if (output < w.n_out) out[((u64)plane * p.x.rows + row) * w.n_out + output] = sum;
        }
#endif
    }
}
