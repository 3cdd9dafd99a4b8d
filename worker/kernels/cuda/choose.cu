// Chooses the token of each row of logits.

#include "device.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)
#define ALL_LANES 0xffffffff

// `ChoiceRule` of the host.
struct Rule {
    float temperature;
    u32 top_k;
    float top_p;
    float min_p;
    u32 uniform[2];
};

// The logits of one row: for each rank, those of its range of the vocabulary, [n_rows, range].
struct Row {
    const float* logits;
    const u32* ends;
    u32 n_ranks;
    u32 n_rows;
    u32 row;
};

// Calls `visit(id, logit)` for the ids of [first, last) that are `lane` away from the first modulo `stride`, ascending.
template <class Visit>
__device__ __forceinline__ void for_each(const Row& row, u32 first, u32 last, u32 lane, u32 stride, Visit visit) {
    u32 begin = 0;
    for (u32 rank = 0; rank < row.n_ranks; rank++) {
        u32 end = row.ends[rank];
        const float* logits = row.logits + (u64)row.n_rows * begin + (u64)row.row * (end - begin);
        u32 stop = min(end, last);
        for (u32 id = max(begin, first) + lane; id < stop; id += stride) visit(id, logits[id - begin]);
        begin = end;
    }
}

// An integer that is higher if the logit is, and equal if it is. NaN is as good as impossible.
__device__ __forceinline__ u32 order_of(float logit) {
    u32 bits = __float_as_uint(logit != logit ? __uint_as_float(0xff800000) : logit + 0.0f);  // -0 + 0 is 0
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

// The id of the highest logit, the lowest id if there are several. For all threads.
__device__ __forceinline__ u32 likeliest(const Row& row, u32 n_tokens, u64* best_of_warp) {
    u64 best = 0;
    for_each(row, 0, n_tokens, threadIdx.x, THREADS, [&](u32 id, float logit) {
        best = max(best, (u64)order_of(logit) << 32 | (~id));
    });
    #pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, distance));
    if (threadIdx.x % 32 == 0) best_of_warp[threadIdx.x / 32] = best;
    __syncthreads();
    best = best_of_warp[threadIdx.x % WARPS];
    #pragma unroll
    for (int distance = WARPS / 2; distance > 0; distance /= 2)
        best = max(best, __shfl_xor_sync(ALL_LANES, best, distance));
    return ~(u32)best;
}

// One block for each row.
extern "C" __global__ void __launch_bounds__(THREADS) choose(
    const float* logits, const u32* ends, u32 n_ranks, const Rule* rules, u32* choices) {
    __shared__ u64 best_of_warp[WARPS];
    Row row = {logits, ends, n_ranks, gridDim.x, blockIdx.x};
    u32 id = likeliest(row, ends[n_ranks - 1], best_of_warp);
    if (threadIdx.x == 0) choices[blockIdx.x] = id;
}
