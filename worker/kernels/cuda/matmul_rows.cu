// Products of many rows with quantized weights: the same sums as `matmul.cu`, bit for bit. `product.cuh` says what a sum is,
// and what the variants are.
//
// What counts is that the tensor cores do not wait. A block computes 256 outputs of 64 rows. Each of its warps takes 32 of the
// outputs, whose weights only it reads and unpacks, over all inputs in order; the rows' inputs come to shared memory for all
// warps while those before them are multiplied. Counted for a tile of 32 inputs:
//  - L2: a block does 256 multiplies of m16n8k16, 1.05 Mflop, with 4 KiB of inputs and, at 4 bits, 4.5 KiB of weights and
//    scales: 120 flops a byte (8 bits: 80; bf16: 51), where `matmul.cu` does 28.
//  - Shared memory: 128 bytes a multiply, thus 83 of the 128 bytes that Hopper has in a cycle, if nothing else were in the way.
//  - Instructions, in the machine code for sm_90a (NVRTC 13), of a warp for its 32 multiplies, which take the tensor cores of
//    a quarter of a multiprocessor 206 cycles at Hopper's rate for `mma.sync` (62 % of `wgmma`'s), 256 on an A100:
//        bf16 68; Q4_0 185; Q8_0 220; NF4 226; Q4_1 274; Q6_K 294; Q4_K 314; Q2_K 495
//    So Q4_0 is bound by the tensor cores, bf16 by the L2, and Q4_K does at best 66 % of the tensor cores' rate.
//
// Sums of segments that wait for others (`merges`) are in registers, if nothing was put on top of them, else in shared
// memory: two at once, and three in all, for the eight segments of most weights.

#define ROW_TILES 8

#include "product.cuh"

// Tiles of inputs that come to shared memory at once, and of weights that a warp has asked for ahead of their use.
#define STEP 4
#define DEPTH 2
static_assert(STEP % DEPTH == 0, "a step begins with the first of the tiles under way");
// Vectors of four sums that a lane has.
#define SUM_VECTORS (4 * ROW_TILES / 2)

// What is in shared memory of the inputs of STEP tiles.
struct Step {
    uint4 values[STEP][ROWS][4];
#if MINIMUM
    float sums[STEP][GROUPS][ROWS];
#endif
};

// Where 16 bytes of a row lie among its four times 16. Lanes read pieces of 16 bytes of two rows at once if a group has 32
// inputs, and of 8 bytes of four rows if it has 16: of these, the latter two have their halves swapped so that all are in
// different banks.
__device__ __forceinline__ u32 swizzle(u32 row, u32 piece) { return GROUP == 16 ? piece ^ (row & 2) : piece; }

// The inputs of one tile, as a lane reads them.
struct TileInputs {
    const Step& step;
    u32 tile;
    u32 lane;

    __device__ __forceinline__ uint4 values(int n) const {
        u32 row = 8 * n + lane / 4, place = lane % 4;
        // Keeps the compiler from loading more rows early than there are registers for.
        if (n % 4 == 0) __syncwarp();
#if GROUP == 32
        return step.values[tile][row][place];
#else
        const uint2* halves = (const uint2*)step.values[tile][row];
        uint2 first = halves[2 * swizzle(row, place / 2) + place % 2];
        uint2 second = halves[2 * swizzle(row, 2 + place / 2) + place % 2];
        return make_uint4(first.x, first.y, second.x, second.y);
#endif
    }
#if MINIMUM
    __device__ __forceinline__ float2 sums(int group, int n) const {
        return *(const float2*)(step.sums[tile][group] + 8 * n + 2 * (lane % 4));
    }
#endif
};

// Asks for the inputs of the tiles from `first` on. Rows past the last are computed as the last, and not stored.
__device__ __forceinline__ void copy_step(Step& step, const Input& x, u32 first_row, u32 first, u32 in_tiles) {
    u32 row = threadIdx.x / 4, piece = threadIdx.x % 4;
    const u16* values = x.values + (u64)min(first_row + row, x.rows - 1) * x.width + 8 * piece;
    #pragma unroll
    for (int i = 0; i < STEP; i++)
        if (first + i < in_tiles) copy_async_16(&step.values[i][row][swizzle(row, piece)], values + 32 * (first + i));
#if MINIMUM
    u32 group = threadIdx.x / (ROWS / 4), four_rows = threadIdx.x % (ROWS / 4) * 4;
    if (group < STEP * GROUPS && GROUPS * first + group < GROUPS * in_tiles) {
        const float* sums = GROUP == 32 ? x.sums_of_32 : x.sums_of_16;
        sums += (u64)(GROUPS * first + group) * x.padded_rows + min(first_row + four_rows, x.padded_rows - 4);
        copy_async_16(&step.sums[group / GROUPS][group % GROUPS][four_rows], sums);
    }
#endif
    copy_async_commit();
}

__device__ __forceinline__ void add(Sums& sums, const Sums& before) {
    #pragma unroll
    for (int m = 0; m < 2; m++)
        #pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) sums[m][n][i] = before[m][n][i] + sums[m][n][i];
}

// A warp's sums: of the segment that it is in, and of those before that wait for others. Of these, the last is in registers.
// The others are in shared memory, [n, WARPS, SUM_VECTORS, 32 lanes], where each lane reads but what it wrote.
struct WarpSums {
    Sums current;
    Sums last;
    u32 n_pending;
    float4* others;   // the lane's first

    __device__ __forceinline__ float4* other(u32 i) const { return others + i * (WARPS * SUM_VECTORS * 32); }

    __device__ __forceinline__ void merge(u32 merges) {
        if (merges > 0) add(current, last);
        for (u32 i = 1; i < merges; i++) {
            const float4* from = other(n_pending - 1 - i);
            #pragma unroll
            for (int v = 0; v < SUM_VECTORS; v++) {
                float4 before = from[32 * v];
                float (&to)[4] = current[v / ROW_TILES][v % ROW_TILES];
                to[0] = before.x + to[0]; to[1] = before.y + to[1]; to[2] = before.z + to[2]; to[3] = before.w + to[3];
            }
        }
        n_pending -= merges;
    }

    // Lets the current sums, with `merges` others in them, wait.
    __device__ __forceinline__ void push(u32 merges) {
        if (merges == 0 && n_pending > 0) {
            float4* to = other(n_pending - 1);
            #pragma unroll
            for (int v = 0; v < SUM_VECTORS; v++) {
                const float (&from)[4] = last[v / ROW_TILES][v % ROW_TILES];
                to[32 * v] = make_float4(from[0], from[1], from[2], from[3]);
            }
        }
        n_pending++;
        #pragma unroll
        for (int m = 0; m < 2; m++)
            #pragma unroll
            for (int n = 0; n < ROW_TILES; n++)
                #pragma unroll
                for (int i = 0; i < 4; i++) last[m][n][i] = current[m][n][i];
    }

    __device__ __forceinline__ void clear() {
        #pragma unroll
        for (int m = 0; m < 2; m++)
            #pragma unroll
            for (int n = 0; n < ROW_TILES; n++)
                #pragma unroll
                for (int i = 0; i < 4; i++) current[m][n][i] = 0.0f;
    }
};

// Where a warp's finished sums are turned so that its lanes have neighbouring outputs: [ROWS, 32], the eights of outputs in
// another order from each two rows to the next, so that lanes write to 32 different banks. They take the room of the first
// pending sums: when a plane is finished, there are none.
__device__ __forceinline__ u32 turned(u32 row, u32 output) { return OUTS * row + (output ^ row / 2 % 4 * 8); }

__device__ __forceinline__ void turn(float* finished, const Sums& sums, u32 lane) {
    u32 output = lane / 4, row = 2 * (lane % 4);
    #pragma unroll
    for (int m = 0; m < 2; m++)
        #pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++)
                finished[turned(8 * n + row + i % 2, 16 * m + output + i / 2 * 8)] = sums[m][n][i];
}

// A warp's place: its weight and the tile of it; the rows; where its pending and its finished sums are.
struct Place {
    const Matrix& w;
    u32 which;        // weight that is
    float* finished;  // its own
    u32 out_tile;
    u32 lane;
    u32 first_row;
    bool stores;
};

__device__ __forceinline__ Place place_of_warp(const Product& p, float* finished) {
    u32 warp = threadIdx.x / 32, tile = GATED ? blockIdx.y * (WARPS / 2) + warp % (WARPS / 2) : blockIdx.y * WARPS + warp;
    // Warps past the last tile compute the last, and do not store.
    u32 out_tile = min(tile, p.end_tile[2] - 1);
    u32 which = GATED ? warp / (WARPS / 2) : find_weight(p, out_tile);
    return {p.weights[which], which, finished + warp * (ROWS * OUTS), out_tile, threadIdx.x % 32, blockIdx.x * ROWS,
            tile < p.end_tile[2]};
}

__device__ __forceinline__ void store_plane(const Product& p, const Place& place, u32 plane) {
    u32 output = OUTS * place.out_tile + place.lane;
    u32 rows = min(p.x.rows - place.first_row, (u32)ROWS);
    u32 n_out = place.w.n_out;
    float* out = p.out[place.which] + ((u64)plane * p.x.rows + place.first_row) * n_out + output;
    if (place.stores && output < n_out)
        #pragma unroll 4
        for (u32 row = 0; row < rows; row++) out[(u64)row * n_out] = place.finished[turned(row, place.lane)];
}

// Each warp stores half of the rows of a tile, of which one warp has summed gate and another up.
__device__ __forceinline__ void store_gated(const Product& p, const Place& place) {
    u32 half = threadIdx.x / 32 / (WARPS / 2);
    const float* gate = half == 0 ? place.finished : place.finished - WARPS / 2 * (ROWS * OUTS);
    const float* up = gate + WARPS / 2 * (ROWS * OUTS);
    u32 output = OUTS * place.out_tile + place.lane;
    if (!place.stores) return;
    for (u32 i = half * (ROWS / 2); i < (half + 1) * (ROWS / 2) && place.first_row + i < p.x.rows; i++)
        store_input(p.gated, place.first_row + i, output, silu(gate[turned(i, place.lane)]) * up[turned(i, place.lane)]);
}

// One block: a tile of 32 outputs for each warp (if GATED, of gate for half of them and of up for the others) of ROWS rows.
// Grid: [row blocks, blocks of out tiles of all weights]. Dynamic shared memory: two `Step`s; [pending sums but the last, at
// least 1, ROWS, 32 * WARPS] floats.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) matmul_rows(const Product p) {
    begin_kernel();
    Step* steps = (Step*)dynamic_shared();
    __shared__ u32 codebook[CODEBOOK ? 256 : 1];
    if (CODEBOOK) make_codebook(codebook, p.codebook);
    const Place place = place_of_warp(p, (float*)(steps + 2));
    const Matrix& w = place.w;
    WarpSums sums;
    sums.clear();
    sums.n_pending = 0;
    sums.others = (float4*)place.finished + place.lane;
    Weights ahead[DEPTH];
    #pragma unroll
    for (int i = 0; i < DEPTH; i++)
        if (i < w.in_tiles) load(ahead[i], w, place.out_tile, i, place.lane);
    copy_step(steps[0], p.x, place.first_row, 0, w.in_tiles);
    u32 segment = 0, end = w.segments[0].end, plane = 0;
    for (u32 first = 0; first < w.in_tiles; first += DEPTH) {
        if (first % STEP == 0) {
            copy_async_wait<0>();
            // All of the step has come, and no warp reads the one before it any more.
            __syncthreads();
            u32 next = first + STEP;
            if (next < w.in_tiles) copy_step(steps[next / STEP % 2], p.x, place.first_row, next, w.in_tiles);
        }
        #pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            u32 in_tile = first + i;
            if (in_tile >= w.in_tiles) continue;
            TileInputs inputs = {steps[in_tile / STEP % 2], in_tile % STEP, place.lane};
            accumulate(sums.current, ahead[i], inputs, codebook);
            if (in_tile + DEPTH < w.in_tiles) load(ahead[i], w, place.out_tile, in_tile + DEPTH, place.lane);
            if (in_tile + 1 < end) continue;
            Segment done = w.segments[segment++];
            sums.merge(done.merges);
            if (!done.is_last) {
                sums.push(done.merges);
            } else {
                // All lanes have read what was pending.
                __syncwarp();
                turn(place.finished, sums.current, place.lane);
                __syncwarp();
                if (!GATED) store_plane(p, place, plane++);
                __syncwarp();
            }
            sums.clear();
            if (in_tile + 1 < w.in_tiles) end = w.segments[segment].end;
        }
    }
    if (GATED) {
        __syncthreads();
        store_gated(p, place);
    }
}
