// Stores keys, turned to their positions, and values in the paged cache.

#include "kv_cache.cuh"

// What is stored is finite, whatever came: tiles are multiplied whole, and zero times infinity or NaN at a position that a
// row does not see would be NaN in the row.
__device__ __forceinline__ float limited(float value, float limit) { return fminf(fmaxf(value, -limit), limit); }

// The scale of 8-bit codes for a head of which `largest` is the largest magnitude here: a 127th of the largest of all.
// One warp.
__device__ __forceinline__ float scale_of(float largest) {
    #pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, distance));
    return limited(largest, 3.402823466e+38f) / 127.0f;
}

__device__ __forceinline__ Code code_of(float value, float scale) {
#if KV_BITS == 16
    return f32_to_f16(limited(value, 65504.0f));
#else
    return (Code)(__float2int_rn(scale == 0.0f ? 0.0f : limited(value / scale, 127.0f)) + 128);
#endif
}

// One warp: a token's key and value of one head. Grid: [rows, heads]; block: 32.
// `k` and `v` are [rows, heads * HEAD_DIM].
extern "C" __global__ void __launch_bounds__(32) write_kv(
    u8* layer, const float* k, const float* v, const u32* slots, const u32* positions, const Rope rope) {
    begin_kernel();
    u32 row = blockIdx.x, head = blockIdx.y, heads = gridDim.y;
    u32 slot = slots[row], position = positions[row];
    const float* key = k + ((u64)row * heads + head) * HEAD_DIM;
    const float* value = v + ((u64)row * heads + head) * HEAD_DIM;
    KvTile tile(layer, slot / KV_TILE, head, heads);
    u32 place = slot % KV_TILE;
    float key_scale = 0.0f, value_scale = 0.0f;
#if KV_BITS == 8
    for (u32 dim = threadIdx.x; dim < HEAD_DIM; dim += 32) {
        key_scale = fmaxf(key_scale, fabsf(turned(key, dim, position, rope)));
        value_scale = fmaxf(value_scale, fabsf(value[dim]));
    }
    key_scale = scale_of(key_scale);
    value_scale = scale_of(value_scale);
    if (threadIdx.x == 0) {
        tile.key_scales()[place] = key_scale;
        tile.value_scales()[place] = value_scale;
    }
#endif
    for (u32 dim = threadIdx.x; dim < HEAD_DIM; dim += 32) {
        tile.keys()[place * HEAD_DIM + dim] = code_of(turned(key, dim, position, rope), key_scale);
        tile.values()[dim * KV_TILE + place] = code_of(value[dim], value_scale);
    }
}
