// Causal attention over the paged KV cache, in the manner of FlashAttention (Dao et al., 2022) on tensor cores.
//
// The rule, for each query. A key tile is 64 neighbouring positions from a multiple of 64 on, a split four key tiles:
//
//     score[p] = q . k[p], by tensor cores in f16;  largest = the largest;  weight[p] = 2^((score[p] - largest) c)
//     total = sum of weight[p];  out[d] = sum of weight[p] v[p, d], by tensor cores, weights in f16
//     key tiles fold into their split in order, and splits in order (`Fold`); out / total is the result
//
// with c = log2(e) / sqrt(HEAD_DIM). So it makes no difference how prompts were cut, what else is in the step, or which of
// the two kernels computes. `attend_splits` takes a key tile to each warp and a split to each block, for few queries with many
// keys; `attend_rows` takes a query tile to each warp and all of its keys in turn, for prompts. `merge_splits` finishes either.
//
// A query tile is up to 16 queries of one sequence and one KV head: QUERY_HEADS heads of each of several neighbouring rows.
//
// Variants: HEAD_DIM, KV_BITS (kv_cache.cuh); GROUP_SIZE: query heads that share a KV head.

#include "input.cuh"
#include "kv_cache.cuh"

#define QUERIES 16
#define KEYS 64
#define SPLIT_TILES 4
#define SPLIT (SPLIT_TILES * KEYS)
#define WARPS 4
// Heads of a row in one query tile; where more share a KV head, they make several tiles.
#define QUERY_HEADS (GROUP_SIZE < QUERIES ? GROUP_SIZE : QUERIES)
#define HEAD_PARTS ((GROUP_SIZE + QUERIES - 1) / QUERIES)
// Dimensions that a lane loads at once, from all four lanes of a key.
#define CHUNK (HEAD_DIM % 32 == 0 ? 32 : 16)
// Floats of a part: the outputs of a query, its largest score and its total.
#define PART (HEAD_DIM + 2)
// Halves from one query to the next in shared memory: a warp's lanes then load from different banks.
#define QUERY_STRIDE (HEAD_DIM + 8)
// Bytes of a warp's part of shared memory: a part, and queries.
#define WARP_BYTES (QUERIES * PART * 4 + QUERIES * QUERY_STRIDE * 2)

struct QueryTile {
    u32 first_row;
    u32 n_rows;
    u32 table;
    u32 last_position;  // the largest of its rows
    u32 n_splits;       // parts that it is computed in: 1 in `attend_rows`
    u32 first_part;     // its [KV heads, head parts, splits, queries] begin here
};

struct Attention {
    const float* q;            // [rows, heads, HEAD_DIM]
    u8* layer;                 // this layer's part of the cache
    const u32* positions;      // of each row
    const u32* tables;         // [tables, blocks of a table]: block ids
    const QueryTile* tiles;
    float* parts;              // [parts of queries, PART]
    u32 n_tiles;
    u32 n_kv_heads;
    u32 table_stride;
    u32 kv_tiles_per_block;
    Rope rope;
};

// One warp's place in it.
struct Place {
    QueryTile tile;
    u32 kv_head;
    u32 head_part;
    u32 group;     // lane / 4
    u32 in_group;  // lane % 4
};

// Sums of a query, of two queries in each lane: g and g + 8.
struct Fold {
    float out[HEAD_DIM / 8][4];
    float largest[2];
    float total[2];
};

#define MINUS_INFINITY __int_as_float(0xff800000)

__device__ __forceinline__ void clear(Fold& fold) {
    #pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++)
        for (int j = 0; j < 4; j++) fold.out[i][j] = 0.0f;
    fold.largest[0] = fold.largest[1] = MINUS_INFINITY;
    fold.total[0] = fold.total[1] = 0.0f;
}

// 2^((score - largest) c); exactly 1 where they are equal, infinities included.
__device__ __forceinline__ float weight_of(float score, float largest) {
    const float c = 1.4426950408889634f / sqrtf((float)HEAD_DIM);
    return score == largest ? 1.0f : exp2_fast((score - largest) * c);
}

// What `next`, of later keys, adds to `fold`, for one value. `a` and `b` are the weights of their largest scores.
__device__ __forceinline__ float fold_value(float fold, float a, float next, float b) { return fmaf(fold, a, next * b); }

__device__ __forceinline__ void fold_in(Fold& fold, const Fold& next) {
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        float largest = fmaxf(fold.largest[i], next.largest[i]);
        float a = weight_of(fold.largest[i], largest), b = weight_of(next.largest[i], largest);
        fold.total[i] = fold_value(fold.total[i], a, next.total[i], b);
        #pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
            for (int j = 0; j < 2; j++)
                fold.out[n][2 * i + j] = fold_value(fold.out[n][2 * i + j], a, next.out[n][2 * i + j], b);
        fold.largest[i] = largest;
    }
}

// The row of query `query` of a tile; queries that are not there take the tile's first row.
__device__ __forceinline__ u32 row_of(const QueryTile& tile, u32 query) {
    u32 i = query / QUERY_HEADS;
    return tile.first_row + (i < tile.n_rows ? i : 0);
}

// Its head among those of the KV head.
__device__ __forceinline__ u32 head_of(const Place& place, u32 query) {
    return min(place.head_part * QUERIES + query % QUERY_HEADS, GROUP_SIZE - 1);
}

// Turns the queries of a tile, as f16, to shared memory: [QUERIES, QUERY_STRIDE]. One warp.
__device__ __forceinline__ void turn_queries(u16* shared, const Attention& a, const Place& place) {
    for (u32 i = threadIdx.x % 32; i < QUERIES * HEAD_DIM; i += 32) {
        u32 query = i / HEAD_DIM, dim = i % HEAD_DIM, row = row_of(place.tile, query);
        u32 head = place.kv_head * GROUP_SIZE + head_of(place, query);
        const float* values = a.q + ((u64)row * a.n_kv_heads * GROUP_SIZE + head) * HEAD_DIM;
        shared[query * QUERY_STRIDE + dim] = f32_to_f16(turned(values, dim, a.positions[row], a.rope));
    }
    __syncwarp();
}

// 16 dimensions of the queries as an operand. A lane's dimensions of all steps of a chunk lie side by side, as those of keys.
__device__ __forceinline__ void load_queries(u32 (&operand)[4], const u16* shared, int chunk, int step, const Place& place) {
    const u16* from = shared + place.group * QUERY_STRIDE + chunk * CHUNK + place.in_group * (CHUNK / 4) + step * 4;
    uint2 first = *(const uint2*)from, second = *(const uint2*)(from + 8 * QUERY_STRIDE);
    operand[0] = first.x;
    operand[1] = second.x;
    operand[2] = first.y;
    operand[3] = second.y;
}

// Two bytes of `codes`, from byte `first` on, as f16 of the code that they stand for.
__device__ __forceinline__ u32 halves_of(u32 codes, int first) {
    // With the exponent of 1024, a code in the last bits is 1024 + code.
    u32 pair = byte_permute(codes, 0x64646464, first == 0 ? 0x4140 : 0x4342);
    return fma_f16x2(pair, 0x3c003c00, 0xe480e480);  // 1, -1152
}

// The same as bf16.
__device__ __forceinline__ u32 brains_of(u32 codes, int first) {
    float low = __uint_as_float(byte_permute(codes, 0x4b000000, first == 0 ? 0x7440 : 0x7442));
    float high = __uint_as_float(byte_permute(codes, 0x4b000000, first == 0 ? 0x7441 : 0x7443));
    return pack_bf16(low - 8388736.0f, high - 8388736.0f);  // 2^23 + 128
}

// One chunk of dimensions of eight keys, in f16. In the scores, element c of a lane's four is of key 4 t + 2 (half) + c % 2.
__device__ __forceinline__ void load_keys(u32 (&keys)[CHUNK / 8], const KvTile& kv, int half, int chunk, const Place& place) {
    u32 key = place.group / 2 * 4 + half * 2 + place.group % 2;
    const Code* from = kv.keys() + key * HEAD_DIM + chunk * CHUNK + place.in_group * (CHUNK / 4);
#if KV_BITS == 16 && CHUNK == 32
    uint4 four = *(const uint4*)from;
    keys[0] = four.x; keys[1] = four.y; keys[2] = four.z; keys[3] = four.w;
#elif KV_BITS == 16
    uint2 two = *(const uint2*)from;
    keys[0] = two.x; keys[1] = two.y;
#else
    #pragma unroll
    for (int i = 0; i < CHUNK / 16; i++) {
        u32 codes = *(const u32*)(from + 4 * i);
        keys[2 * i] = halves_of(codes, 0);
        keys[2 * i + 1] = halves_of(codes, 2);
    }
#endif
}

// Adds the values of 16 keys, times their weights. Values at places from `n_valid` on were never written, or belong to
// somebody else, and may be no numbers: they do not count.
__device__ __forceinline__ void add_values(
    Fold& fold, const float (&first)[4], const float (&second)[4], const KvTile& kv, u32 n_valid, const Place& place) {
    u32 key = 4 * place.in_group;
    u32 keep_low = (key < n_valid ? 0x0000ffff : 0) | (key + 1 < n_valid ? 0xffff0000 : 0);
    u32 keep_high = (key + 2 < n_valid ? 0x0000ffff : 0) | (key + 3 < n_valid ? 0xffff0000 : 0);
#if KV_BITS == 16
    u32 weights[4] = {
        pack_f16(first[0], first[1]), pack_f16(first[2], first[3]), pack_f16(second[0], second[1]), pack_f16(second[2], second[3])};
#else
    // bf16, since scales may be small.
    float4 s = *(const float4*)(kv.value_scales() + key);
    u32 weights[4] = {
        pack_bf16(first[0] * s.x, first[1] * s.y) & keep_low, pack_bf16(first[2] * s.x, first[3] * s.y) & keep_low,
        pack_bf16(second[0] * s.z, second[1] * s.w) & keep_high, pack_bf16(second[2] * s.z, second[3] * s.w) & keep_high};
#endif
    #pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        const Code* from = kv.values() + (8 * n + place.group) * KV_TILE + key;
#if KV_BITS == 16
        uint2 values = *(const uint2*)from;
        mma_f16(fold.out[n], weights, values.x & keep_low, values.y & keep_high);
#else
        u32 codes = *(const u32*)from;
        mma_bf16(fold.out[n], weights, brains_of(codes, 0), brains_of(codes, 2));
#endif
    }
}

// The 16 slots from position `start` on. Slots that are not there stand for the first, which are; nothing of them counts.
__device__ __forceinline__ KvTile kv_tile_at(const Attention& a, const Place& place, u32 start) {
    u32 at = start <= place.tile.last_position ? start / KV_TILE : 0;
    u32 block = a.tables[(u64)place.tile.table * a.table_stride + at / a.kv_tiles_per_block];
    return KvTile(a.layer, block * a.kv_tiles_per_block + at % a.kv_tiles_per_block, place.kv_head, a.n_kv_heads);
}

// q . k for the keys of a key tile from position `first` on.
__device__ __forceinline__ void score(float (&scores)[KEYS / 8][4], const u16* q, const Attention& a, const Place& place, u32 first) {
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        #pragma unroll
        for (int c = 0; c < 4; c++) scores[n][c] = 0.0f;
    // Not unrolled: the keys of one chunk are as much as registers can hold.
    #pragma unroll 1
    for (int chunk = 0; chunk < HEAD_DIM / CHUNK; chunk++) {
        u32 queries[CHUNK / 16][4];
        #pragma unroll
        for (int step = 0; step < CHUNK / 16; step++) load_queries(queries[step], q, chunk, step, place);
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            u32 keys[CHUNK / 8];
            load_keys(keys, kv_tile_at(a, place, first + n / 2 * KV_TILE), n % 2, chunk, place);
            #pragma unroll
            for (int step = 0; step < CHUNK / 16; step++) mma_f16(scores[n], queries[step], keys[2 * step], keys[2 * step + 1]);
        }
    }
#if KV_BITS == 8
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        KvTile kv = kv_tile_at(a, place, first + n / 2 * KV_TILE);
        float2 scales = *(const float2*)(kv.key_scales() + 4 * place.in_group + n % 2 * 2);
        scores[n][0] *= scales.x;
        scores[n][1] *= scales.y;
        scores[n][2] *= scales.x;
        scores[n][3] *= scales.y;
    }
#endif
}

// One key tile, from position `first` on, for a query tile.
__device__ __forceinline__ void attend_tile(
    Fold& fold, const u16* q, const Attention& a, const Place& place, u32 first, const u32 (&positions)[2]) {
    float scores[KEYS / 8][4];
    float largest[2] = {MINUS_INFINITY, MINUS_INFINITY};
    score(scores, q, a, place, first);
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        #pragma unroll
        for (int c = 0; c < 4; c++) {
            u32 position = first + n / 2 * KV_TILE + 4 * place.in_group + n % 2 * 2 + c % 2;
            if (position > positions[c / 2]) scores[n][c] = MINUS_INFINITY;
            largest[c / 2] = fmaxf(largest[c / 2], scores[n][c]);
        }
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffff, largest[i], 1));
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffff, largest[i], 2));
        fold.largest[i] = largest[i];
    }
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        #pragma unroll
        for (int c = 0; c < 4; c++) {
            // A query all of whose keys lie before this tile has no largest score.
            bool counts = scores[n][c] != MINUS_INFINITY;
            scores[n][c] = counts ? weight_of(scores[n][c], largest[c / 2]) : 0.0f;
            fold.total[c / 2] += scores[n][c];
        }
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        fold.total[i] += __shfl_xor_sync(0xffffffff, fold.total[i], 1);
        fold.total[i] += __shfl_xor_sync(0xffffffff, fold.total[i], 2);
    }
    #pragma unroll
    for (int i = 0; i < KEYS / KV_TILE; i++) {
        u32 start = first + KV_TILE * i;
        u32 n_valid = start <= place.tile.last_position ? place.tile.last_position - start + 1 : 0;
        add_values(fold, scores[2 * i], scores[2 * i + 1], kv_tile_at(a, place, start), n_valid, place);
    }
}

__device__ __forceinline__ Place place_of(const Attention& a, u32 tile, u32 kv_head_part) {
    u32 lane = threadIdx.x % 32;
    return {a.tiles[tile], kv_head_part / HEAD_PARTS, kv_head_part % HEAD_PARTS, lane / 4, lane % 4};
}

// The positions of a lane's two queries.
__device__ __forceinline__ void positions_of(u32 (&positions)[2], const Attention& a, const Place& place) {
    #pragma unroll
    for (int i = 0; i < 2; i++) positions[i] = a.positions[row_of(place.tile, place.group + 8 * i)];
}

__device__ __forceinline__ u32 n_queries(const QueryTile& tile) { return tile.n_rows * QUERY_HEADS; }

// The parts of a tile's queries, of one split.
__device__ __forceinline__ float* parts_of(const Attention& a, const Place& place, u32 split) {
    u32 part = (place.kv_head * HEAD_PARTS + place.head_part) * place.tile.n_splits + split;
    return a.parts + (u64)(place.tile.first_part + part * n_queries(place.tile)) * PART;
}

// Stores the sums of a lane's two queries, [QUERIES, PART].
__device__ __forceinline__ void store(float* part, const Fold& fold, const Place& place) {
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        float* query = part + (place.group + 8 * i) * PART;
        #pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
            *(float2*)(query + 8 * n + 2 * place.in_group) = make_float2(fold.out[n][2 * i], fold.out[n][2 * i + 1]);
        if (place.in_group == 0) *(float2*)(query + HEAD_DIM) = make_float2(fold.largest[i], fold.total[i]);
    }
}

// Folds one value of a query of several parts, `stride` floats apart.
__device__ __forceinline__ void fold_parts(float& out, float& largest, float& total, const float* query, u32 dim, u32 n_parts, u64 stride) {
    out = total = 0.0f;
    largest = MINUS_INFINITY;
    for (u32 i = 0; i < n_parts; i++, query += stride) {
        float2 next = *(const float2*)(query + HEAD_DIM);
        float most = fmaxf(largest, next.x);
        float a = weight_of(largest, most), b = weight_of(next.x, most);
        out = fold_value(out, a, query[dim], b);
        total = fold_value(total, a, next.y, b);
        largest = most;
    }
}

// Grid: [splits of the tile that has most, KV heads * head parts, tiles]. A warp takes a key tile, the block folds the four.
// Dynamic shared memory: WARPS * WARP_BYTES.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) attend_splits(const Attention a) {
    begin_kernel();
    const Place place = place_of(a, blockIdx.z, blockIdx.y);
    u32 split = blockIdx.x, warp = threadIdx.x / 32;
    if (split >= place.tile.n_splits) return;
    float* parts = (float*)dynamic_shared();
    u32 first = split * SPLIT + warp * KEYS;
    u32 n_tiles = min((u32)SPLIT_TILES, (place.tile.last_position - split * SPLIT) / KEYS + 1);
    if (warp < n_tiles) {
        u32 positions[2];
        positions_of(positions, a, place);
        u16* q = (u16*)(parts + WARPS * QUERIES * PART) + warp * (QUERIES * QUERY_STRIDE);
        turn_queries(q, a, place);
        Fold fold;
        clear(fold);
        attend_tile(fold, q, a, place, first, positions);
        store(parts + warp * (QUERIES * PART), fold, place);
    }
    __syncthreads();
    float* out = parts_of(a, place, split);
    for (u32 i = threadIdx.x; i < n_queries(place.tile) * HEAD_DIM; i += 32 * WARPS) {
        u32 query = i / HEAD_DIM, dim = i % HEAD_DIM;
        float value, largest, total;
        fold_parts(value, largest, total, parts + query * PART, dim, n_tiles, QUERIES * PART);
        out[query * PART + dim] = value;
        if (dim == 0) *(float2*)(out + query * PART + HEAD_DIM) = make_float2(largest, total);
    }
}

// Grid: [tiles / WARPS, KV heads * head parts]. A warp takes a query tile and visits all of its keys.
// Dynamic shared memory: WARPS * WARP_BYTES; a part is what was folded of earlier splits.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) attend_rows(const Attention a) {
    begin_kernel();
    u32 warp = threadIdx.x / 32, tile = blockIdx.x * WARPS + warp;
    if (tile >= a.n_tiles) return;
    const Place place = place_of(a, tile, blockIdx.y);
    float* earlier = (float*)dynamic_shared() + warp * (QUERIES * PART);
    u16* q = (u16*)((float*)dynamic_shared() + WARPS * QUERIES * PART) + warp * (QUERIES * QUERY_STRIDE);
    u32 positions[2];
    positions_of(positions, a, place);
    turn_queries(q, a, place);
    Fold all;
    clear(all);
    store(earlier, all, place);
    for (u32 split = 0; split <= place.tile.last_position; split += SPLIT) {
        Fold of_split;
        clear(of_split);
        for (u32 first = split; first < split + SPLIT && first <= place.tile.last_position; first += KEYS) {
            Fold fold;
            clear(fold);
            attend_tile(fold, q, a, place, first, positions);
            fold_in(of_split, fold);
        }
        // A lane reads and writes its own values alone, but for the largest score and the total.
        __syncwarp();
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            float* query = earlier + (place.group + 8 * i) * PART;
            float2 before = *(const float2*)(query + HEAD_DIM);
            __syncwarp();
            float largest = fmaxf(before.x, of_split.largest[i]);
            float a_weight = weight_of(before.x, largest), b_weight = weight_of(of_split.largest[i], largest);
            #pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) {
                float2* two = (float2*)(query + 8 * n + 2 * place.in_group);
                *two = make_float2(
                    fold_value(two->x, a_weight, of_split.out[n][2 * i], b_weight),
                    fold_value(two->y, a_weight, of_split.out[n][2 * i + 1], b_weight));
            }
            if (place.in_group == 0) {
                float total = fold_value(before.y, a_weight, of_split.total[i], b_weight);
                *(float2*)(query + HEAD_DIM) = make_float2(largest, total);
            }
        }
        __syncwarp();
    }
    float* out = parts_of(a, place, 0);
    for (u32 i = threadIdx.x % 32; i < n_queries(place.tile) * PART; i += 32) out[i] = earlier[i];
}

// Folds the splits of every row. Grid: [rows]; a thread to each of the heads' dimensions in turn.
// `tile_of_row` are query tiles.
extern "C" __global__ void __launch_bounds__(256) merge_splits(const Attention a, const u32* tile_of_row, const Input out) {
    begin_kernel();
    u32 row = blockIdx.x;
    for (u32 column = threadIdx.x; column < out.width; column += 256) {
        u32 head = column / HEAD_DIM, in_group = head % GROUP_SIZE;
        Place place = {a.tiles[tile_of_row[row]], head / GROUP_SIZE, in_group / QUERIES, 0, 0};
        u32 query = (row - place.tile.first_row) * QUERY_HEADS + in_group % QUERIES;
        float value, largest, total;
        const float* part = parts_of(a, place, 0) + query * PART;
        u32 stride = n_queries(place.tile) * PART;
        fold_parts(value, largest, total, part, column % HEAD_DIM, place.tile.n_splits, stride);
        store_input(out, row, column, value / total);
    }
}
