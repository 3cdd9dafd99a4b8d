// What is done row by row: normalization, the gated MLP where its weights are of two kinds, picking rows, and joining
// those that several ranks have parts of.

#include "device.cuh"
#include "input.cuh"

#define THREADS 512
#define MAX_PENDING 8
#define MAX_RANKS 64

// Planes of a sum, [planes, rows, width], and for each plane how many pending sums are added to it (`SumOrder`).
struct Terms {
    const float* planes;  // none if null
    const u8* merges;
    u32 n_planes;
    u32 padding;
};

// One value of the sum, at `i` of a plane of `size`. `pending` is this thread's column of shared memory.
__device__ __forceinline__ float sum_terms(const Terms& terms, u64 i, u64 size, float* pending) {
    float sum = terms.planes[i];
    u32 n_pending = 0;
    for (u32 plane = 1; plane < terms.n_planes; plane++) {
        pending[n_pending++ * THREADS] = sum;
        sum = terms.planes[plane * size + i];
        for (u32 n = terms.merges[plane]; n > 0; n--) sum += pending[--n_pending * THREADS];
    }
    return sum;
}

// x += terms; out = x * weight / sqrt(mean(x^2) + eps). One block for each row.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    float* x, const Terms terms, const float* weight, float eps, const Input out) {
    begin_kernel();
    __shared__ float pending[MAX_PENDING * THREADS];
    __shared__ float squares[THREADS / 32];
    u32 row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 first = (u64)row * out.width, size = (u64)out.rows * out.width;
    float sum = 0.0f;
    for (u32 column = threadIdx.x; column < out.width; column += THREADS) {
        float value = x[first + column];
        if (terms.planes) {
            value += sum_terms(terms, first + column, size, pending + threadIdx.x);
            x[first + column] = value;
        }
        sum = fmaf(value, value, sum);
    }
    #pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (lane == 0) squares[warp] = sum;
    __syncthreads();
    sum = squares[lane % (THREADS / 32)];
    #pragma unroll
    for (int distance = THREADS / 64; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
    float factor = 1.0f / sqrtf(sum / (float)out.width + eps);
    for (u32 column = threadIdx.x; column < out.width; column += THREADS)
        store_input(out, row, column, x[first + column] * factor * weight[column]);
}

// silu(gate) * up. One block for each row.
extern "C" __global__ void __launch_bounds__(THREADS) silu_mul(const float* gate, const float* up, const Input out) {
    begin_kernel();
    u32 row = blockIdx.x;
    u64 first = (u64)row * out.width;
    for (u32 column = threadIdx.x; column < out.width; column += THREADS)
        store_input(out, row, column, silu(gate[first + column]) * up[first + column]);
}

// out[i] = x[rows[i]]. One block for each row of `out`.
extern "C" __global__ void __launch_bounds__(THREADS) select_rows(const float* x, const u32* rows, float* out, u32 width) {
    begin_kernel();
    const float* from = x + (u64)rows[blockIdx.x] * width;
    float* to = out + (u64)blockIdx.x * width;
    for (u32 column = threadIdx.x; column < width; column += THREADS) to[column] = from[column];
}

// Where each rank's columns end in a row of all of them.
struct ColumnEnds {
    u32 end[MAX_RANKS];
};

// From every rank's columns, [ranks][rows, columns of the rank], to whole rows, [rows, columns of all]. One block for each
// row and rank.
extern "C" __global__ void __launch_bounds__(THREADS) join_columns(
    const float* gathered, float* joined, const ColumnEnds ranks, u32 width) {
    begin_kernel();
    u32 rows = gridDim.x, row = blockIdx.x, rank = blockIdx.y;
    u32 first = rank == 0 ? 0 : ranks.end[rank - 1], n = ranks.end[rank] - first;
    const float* from = gathered + (u64)rows * first + (u64)row * n;
    float* to = joined + (u64)row * width + first;
    for (u32 column = threadIdx.x; column < n; column += THREADS) to[column] = from[column];
}
