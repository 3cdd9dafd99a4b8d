// The KV cache on the device: for each layer and each tile of 16 slots and each KV head, keys [16, HEAD_DIM], then values
// [HEAD_DIM, 16], in f16, or in 8 bits (128 added) with the scales of the 16 keys and of the 16 values, in f32, after them.
//
// Variants: HEAD_DIM, a multiple of 16; KV_BITS 16 or 8.
#pragma once

#include "device.cuh"

#define KV_TILE 16
#define KV_CODES (KV_TILE * HEAD_DIM)
#if KV_BITS == 16
typedef u16 Code;
#define KV_TILE_BYTES (2 * KV_CODES * 2)
#else
typedef u8 Code;
#define KV_TILE_BYTES (2 * KV_CODES + 2 * KV_TILE * 4)
#endif

struct KvTile {
    Code* codes;

    // `layer` is the part of the cache that belongs to one layer.
    __device__ KvTile(u8* layer, u32 tile, u32 head, u32 heads)
        : codes((Code*)(layer + ((u64)tile * heads + head) * KV_TILE_BYTES)) {}
    __device__ Code* keys() const { return codes; }
    __device__ Code* values() const { return codes + KV_CODES; }
    // In 8 bits alone.
    __device__ float* key_scales() const { return (float*)(codes + 2 * KV_CODES); }
    __device__ float* value_scales() const { return key_scales() + KV_TILE; }
};

// How queries and keys are turned to their positions (`RopeTable`).
struct Rope {
    const float2* turns;  // [positions, dims / 2]: cosine, sine
    u32 dims;             // of a head, from the first, that are turned
    u32 halves;           // pairs are i and i + dims / 2; else 2 i and 2 i + 1
};

// Dimension `dim` of a head, turned: (a cos - b sin, a sin + b cos), the second product rounded by itself.
__device__ __forceinline__ float turned(const float* head, u32 dim, u32 position, const Rope& rope) {
    if (dim >= rope.dims) return head[dim];
    u32 pairs = rope.dims / 2;
    u32 pair = rope.halves ? dim % pairs : dim / 2;
    bool is_second = rope.halves ? dim >= pairs : dim % 2;
    float a = head[rope.halves ? pair : 2 * pair], b = head[rope.halves ? pair + pairs : 2 * pair + 1];
    float2 turn = rope.turns[(u64)position * pairs + pair];
    return is_second ? fmaf(a, turn.y, b * turn.x) : fmaf(a, turn.x, -(b * turn.y));
}
