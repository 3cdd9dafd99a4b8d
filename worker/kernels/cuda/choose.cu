// Chooses the token of each row of logits, as the worker's sampler does, bit for bit. What the rules mean, and how sums
// and cuts are rounded, is said in worker/src/sampler/select.rs; weights are integers, so that they may be added in any
// order here.
//
// One block has a row, which lies in the L2 (513 KB for 128,256 tokens) and is read again by each pass. There are as
// many passes as the rules need:
//   - one for the highest logit, which is all that temperature 0 takes;
//   - top_k: one for each 4 bits of the k-th logit until those below differ from it, often 5 of 8;
//   - one that weighs all tokens, to draw from them, or to begin top_p with (with top_k there are few to weigh);
//   - top_p: one for each further 4 bits of the last weight that is kept, often 3 of 12, and one to draw.
// Reckoned for an H100, not measured: a pass takes 4 us or more, for what a multiprocessor reads from the L2 (64 bytes
// a cycle); the one that weighs takes some 40 us, for `exp` in f64 (about 36 operations, 64 a cycle).

#include "device.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)
#define ALL_LANES 0xffffffff
// Logits that a thread has under way.
#define LOADS 8
#define DIGIT_BITS 4
#define BUCKETS (1 << DIGIT_BITS)

static_assert(WARPS == BUCKETS, "a warp adds up each bucket");

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
    u32 n_tokens;
};

struct Scratch {
    u64* buckets;  // [BUCKETS][THREADS]: each thread has its own, so that it takes no atomic operations
    u64* sums;     // [WARPS]
};

// === Passes ===

#define IMPOSSIBLE __uint_as_float(0xff800000)

// Calls `visit(id, logit)` for the ids of [first, last): in each rank's part of them for every `stride`th, from its
// `lane`th on, ascending. And for some beyond, as IMPOSSIBLE.
template <class Visit>
__device__ __forceinline__ void for_each(const Row& row, u32 first, u32 last, u32 lane, u32 stride, Visit visit) {
    u32 begin = 0;
    for (u32 rank = 0; rank < row.n_ranks; rank++) {
        u32 end = row.ends[rank];
        const float* logits = row.logits + (u64)row.n_rows * begin + (u64)row.row * (end - begin);
        u32 stop = min(end, last);
        for (u32 id = max(begin, first) + lane; id < stop; id += LOADS * stride) {
            float loaded[LOADS];
            #pragma unroll
            for (u32 i = 0; i < LOADS; i++)
                loaded[i] = id + i * stride < stop ? logits[id + i * stride - begin] : IMPOSSIBLE;
            #pragma unroll
            for (u32 i = 0; i < LOADS; i++) visit(id + i * stride, loaded[i]);
        }
        begin = end;
    }
}

// `combine` of what the lanes of a warp have, for all of them.
template <class Combine>
__device__ __forceinline__ u64 over_warp(u64 value, Combine combine) {
    #pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
    return value;
}

__device__ __forceinline__ u64 sum_of(const u64* sums) {
    u64 total = 0;
    for (u32 i = 0; i < WARPS; i++) total += sums[i];
    return total;
}

// The first id at which the sum of `mass(id, logit)` over all ids up to there exceeds `target(total)`, which is less
// than the total. Narrows the ids down to one warp's part of them, again and again.
template <class Mass, class Target>
__device__ __forceinline__ u32 find(const Row& row, const Scratch& scratch, Mass mass, Target target) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 first = 0, last = row.n_tokens;
    u64 left = 0;
    bool is_first_pass = true;
    do {
        u32 part = (last - first + WARPS - 1) / WARPS;
        u32 from = min(first + warp * part, last);
        u64 sum = 0;
        for_each(row, from, min(from + part, last), lane, 32, [&](u32 id, float logit) { sum += mass(id, logit); });
        sum = over_warp(sum, [](u64 a, u64 b) { return a + b; });
        if (lane == 0) scratch.sums[warp] = sum;
        __syncthreads();
        if (is_first_pass) left = target(sum_of(scratch.sums));
        is_first_pass = false;
        u32 chosen = 0;
        while (chosen < WARPS - 1 && scratch.sums[chosen] <= left) left -= scratch.sums[chosen++];
        first += chosen * part;
        last = min(first + part, last);
        __syncthreads();  // before the sums are others
    } while (last > first + 1);
    return first;
}

struct Cut {
    u64 key;      // the lowest that is kept
    u64 missing;  // the mass of it that is still needed, with all that is above it; ~0: all of it is kept
};

// The tokens of highest keys whose masses together reach a target; all, if they do not. A radix select, from the
// highest digit of the keys on: it ends once all tokens of the digits so far are needed.
template <class Ranking>
__device__ __forceinline__ Cut select(const Row& row, const Scratch& scratch, Ranking ranking) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64* own = scratch.buckets + threadIdx.x;
    u64 prefix = 0, above = 0, target = 0;
    int shift = Ranking::KEY_BITS;
    while (true) {
        shift -= DIGIT_BITS;
        for (u32 bucket = 0; bucket < BUCKETS; bucket++) own[bucket * THREADS] = 0;
        for_each(row, 0, row.n_tokens, threadIdx.x, THREADS, [&](u32, float logit) {
            u64 key, mass = ranking.mass(logit, key);
            if (mass != 0 && key >> DIGIT_BITS >> shift == prefix) own[(key >> shift) % BUCKETS * THREADS] += mass;
        });
        __syncthreads();
        u64 sum = 0;
        for (u32 i = lane; i < THREADS; i += 32) sum += scratch.buckets[warp * THREADS + i];
        sum = over_warp(sum, [](u64 a, u64 b) { return a + b; });
        if (lane == 0) scratch.sums[warp] = sum;
        __syncthreads();
        if (shift == Ranking::KEY_BITS - DIGIT_BITS) target = ranking.target(sum_of(scratch.sums));
        u32 digit = BUCKETS - 1;
        while (digit > 0 && above + scratch.sums[digit] < target) above += scratch.sums[digit--];
        u64 inside = scratch.sums[digit];
        __syncthreads();  // before the sums are others
        prefix = prefix << DIGIT_BITS | digit;
        u64 key = prefix << shift;
        if (above + inside < target + ranking.least_mass(key)) return {key, ~0ull};
        if (shift == 0) return {key, target - above};
        ranking.narrow(key);
    }
}

// === What tokens are ranked by ===

// Of the lowest and the highest number that a logit can be.
#define LEAST_ORDER 0x00800000
#define HIGHEST_ORDER 0xff7fffff

// An integer that is higher if the logit is, and equal if it is. NaN is as good as impossible.
__device__ __forceinline__ u32 order_of(float logit) {
    u32 bits = __float_as_uint(logit != logit ? IMPOSSIBLE : logit + 0.0f);  // -0 + 0 is 0
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

__device__ __forceinline__ float logit_of(u32 order) {
    return __uint_as_float(order >> 31 ? order & 0x7fffffff : ~order);
}

// `exp` of worker/src/sampler/softmax.rs, operation by operation, for -708 <= x <= 0.
__device__ __forceinline__ double exp_of(double x) {
    const double ROUNDER = 6755399441055744.0, LOG2_E = 1.4426950408889634;
    const double LN_2_HI = 6.931471803691238e-1, LN_2_LO = 1.9082149292705877e-10;
    const double FACTORIALS[10] = {
        479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0};
    double rounded = __dadd_rn(__dmul_rn(x, LOG2_E), ROUNDER);
    double n = __dsub_rn(rounded, ROUNDER);
    double r = __dsub_rn(__dsub_rn(x, __dmul_rn(n, LN_2_HI)), __dmul_rn(n, LN_2_LO));
    double series = 1.0 / 6227020800.0;
    #pragma unroll
    for (int i = 0; i < 10; i++) series = __dadd_rn(__dmul_rn(series, r), 1.0 / FACTORIALS[i]);
    series = __dmul_rn(__dmul_rn(__dadd_rn(__dmul_rn(series, r), 0.5), r), r);
    series = __dadd_rn(__dadd_rn(series, r), 1.0);
    return __dmul_rn(series, __longlong_as_double((__double_as_longlong(rounded) + 1023) << 52));
}

#define FULL_WEIGHT 17592186044416.0  // 2^44
#define TO_INTEGER 4503599627370496.0  // 2^52
#define LN_2 0.6931471805599453

struct Weights {
    double highest;  // logit
    double scale;    // one over the temperature
    u32 least_order;
    double least;  // below it, a scaled logit weighs nothing, or nothing that counts

    __device__ __forceinline__ u64 of(float logit) const {
        u32 order = order_of(logit);
        if (order < least_order) return 0;
        double x = __dmul_rn(__dsub_rn((double)logit_of(min(order, HIGHEST_ORDER)), highest), scale);
        if (x < least) return 0;
        double rounded = __dadd_rn(__dmul_rn(exp_of(x), FULL_WEIGHT), TO_INTEGER);
        return __double_as_longlong(rounded) - __double_as_longlong(TO_INTEGER);
    }

    // Weights below `lowest` do not count from now on, so that most `exp` are spared. One that counts was rounded from
    // half of the power of two in `lowest` or more; the bound has some room.
    __device__ __forceinline__ void narrow(u64 lowest) {
        int exponent = (int)(__double_as_longlong(__ull2double_rn(lowest)) >> 52) - 1023;
        least = (exponent - 45) * LN_2 - 0.01;
    }
};

// By logit, each of mass 1.
struct TopK {
    u32 k;
    static constexpr int KEY_BITS = 32;

    __device__ __forceinline__ u64 mass(float logit, u64& key) const {
        key = min(order_of(logit), HIGHEST_ORDER);
        return key >= LEAST_ORDER;
    }
    __device__ __forceinline__ u64 target(u64) const { return k; }
    __device__ __forceinline__ u64 least_mass(u64) const { return 1; }
    __device__ __forceinline__ void narrow(u64) const {}
};

// By weight, which is the mass. The key is the weight as a floating-point number, so that its digits part weights
// evenly: the double's bits above those of 1/2, without the last ones, which are 0. The first digit spans 16 to 1.
struct TopP {
    Weights weights;
    double share;
    static constexpr int KEY_BITS = 52;
    static constexpr int ZERO_BITS = 6;
    static constexpr u64 HALF_BITS = 1022ull << 52;

    __device__ __forceinline__ u64 mass(float logit, u64& key) const {
        u64 weight = weights.of(logit);
        key = ((u64)__double_as_longlong(__ull2double_rn(weight)) - HALF_BITS) >> ZERO_BITS;
        return weight;
    }
    __device__ __forceinline__ u64 target(u64 total) const {
        return max(__double2ull_ru(__dmul_rn(share, __ull2double_rn(total))), 1ull);
    }
    __device__ __forceinline__ u64 least_mass(u64 key) const {
        return __double2ull_ru(__longlong_as_double((key << ZERO_BITS) + HALF_BITS));
    }
    __device__ __forceinline__ void narrow(u64 key) { weights.narrow(least_mass(key)); }
};

// === Choosing ===

// The order of the highest logit, above the complement of its id, the lowest if there are several.
__device__ __forceinline__ u64 likeliest(const Row& row, const Scratch& scratch) {
    auto higher = [](u64 a, u64 b) { return max(a, b); };
    u64 best = 0;
    for_each(row, 0, row.n_tokens, threadIdx.x, THREADS, [&](u32 id, float logit) {
        best = max(best, (u64)order_of(logit) << 32 | ~id);
    });
    best = over_warp(best, higher);
    if (threadIdx.x % 32 == 0) scratch.sums[threadIdx.x / 32] = best;
    __syncthreads();
    best = over_warp(scratch.sums[threadIdx.x % WARPS], higher);
    __syncthreads();  // before the sums are others
    return best;
}

__device__ __forceinline__ u32 draw(const Row& row, const Scratch& scratch, const Rule& rule, float highest) {
    Weights weights = {highest, __ddiv_rn(1.0, rule.temperature), LEAST_ORDER, -32.0};
    if (rule.top_k != 0 && rule.top_k < row.n_tokens)
        weights.least_order = max((u32)select(row, scratch, TopK{rule.top_k}).key, LEAST_ORDER);
    // Those that weigh more than `lowest`, and those that weigh as much up to the id `last`.
    u64 lowest = 1;
    u32 last = ~0u;
    if (rule.top_p < 1.0f) {
        TopP ranking = {weights, rule.top_p};
        Cut cut = select(row, scratch, ranking);
        lowest = ranking.least_mass(cut.key);
        weights.narrow(lowest);
        if (cut.missing != ~0ull) {
            u64 n_kept = (cut.missing + lowest - 1) / lowest;
            auto is_last = [&](u32, float logit) { return (u64)(weights.of(logit) == lowest); };
            last = find(row, scratch, is_last, [&](u64) { return n_kept - 1; });
        }
    }
    if (rule.min_p > 0.0f) {
        u64 floor = __double2ull_ru(__dmul_rn(fminf(rule.min_p, 1.0f), FULL_WEIGHT));
        if (floor > lowest) {
            lowest = floor;
            last = ~0u;
            weights.narrow(lowest);
        }
    }
    auto mass = [&](u32 id, float logit) {
        u64 weight = weights.of(logit);
        return weight > lowest || (weight == lowest && id <= last) ? weight : 0;
    };
    u64 uniform = (u64)rule.uniform[1] << 32 | rule.uniform[0];
    auto target = [&](u64 total) { return __umul64hi(uniform, total) << 11 | uniform * total >> 53; };
    return find(row, scratch, mass, target);
}

// Grid: [rows]; shared memory: a Scratch's buckets.
extern "C" __global__ void __launch_bounds__(THREADS) choose(
    const float* logits, const u32* ends, u32 n_ranks, const Rule* rules, u32* choices) {
    begin_kernel();
    __shared__ u64 sums[WARPS];
    Row row = {logits, ends, n_ranks, gridDim.x, blockIdx.x, ends[n_ranks - 1]};
    Scratch scratch = {(u64*)dynamic_shared(), sums};
    Rule rule = rules[blockIdx.x];
    u64 best = likeliest(row, scratch);
    u32 id = ~(u32)best, order = (u32)(best >> 32);
    if (rule.temperature > 0.0f && order >= LEAST_ORDER)
        id = draw(row, scratch, rule, logit_of(min(order, HIGHEST_ORDER)));
    if (threadIdx.x == 0) choices[blockIdx.x] = id;
}
