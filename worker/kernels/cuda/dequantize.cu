// Weights in bf16, one output after another, for products by a library (`blas.rs`): each value is that of `dequantize`,
// rounded once. Variants: those of `product.cuh`.
//
// What counts is memory: a warp reads a tile as products do, in order, and writes whole sectors of 32 bytes.

#define ROW_TILES 1

#include "product.cuh"

struct Dequantized {
    Matrix weights;
    u32 codebook[4];   // bytes
    u16* values;       // [outputs from the first tile's on, 32 * in_tiles]
    u32 first_tile;    // of the outputs
    u32 padding;
};

// Two neighbours of one output, whose steps are in bf16.
__device__ __forceinline__ u32 values_of(u32 steps, float scale, float minimum) {
#if BITS == 16
    return steps;
#else
    float low = __uint_as_float(steps << 16), high = __uint_as_float(steps & 0xffff0000);
    if (MINIMUM) return pack_bf16(fmaf(scale, low, minimum), fmaf(scale, high, minimum));
    return pack_bf16(scale * low, scale * high);
#endif
}

// One warp for each tile of 32 outputs and 32 inputs. Grid: [blocks of in tiles, out tiles from the first on].
extern "C" __global__ void __launch_bounds__(32 * WARPS) dequantize(const Dequantized d) {
    begin_kernel();
    __shared__ u32 codebook[CODEBOOK ? 256 : 1];
    if (CODEBOOK) {
        make_codebook(codebook, d.codebook);
        __syncthreads();
    }
    const Matrix& w = d.weights;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 in_tile = blockIdx.x * WARPS + warp, out_tile = d.first_tile + blockIdx.y;
    if (in_tile >= w.in_tiles) return;
    Weights weights;
    load(weights, w, out_tile, in_tile, lane);
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        // Outputs g, g + 8, g + 16 and g + 24, of which a lane has eight inputs (`packing.rs`).
        int m = i / 2, upper = i % 2;
        u32 output = 8 * i + g;
        u32 pairs[4];
        #pragma unroll
        for (int step = 0; step < 2; step++) {
            float scale = 0.0f, minimum = 0.0f;
#if BITS != 16
            scale = SCALE(scale, GROUP == 32 ? 0 : step, i);
#if MINIMUM
            minimum = SCALE(minimum, GROUP == 32 ? 0 : step, i);
#endif
#endif
            u32 a[4];
            decode(a, weights, m, step, codebook);
            pairs[2 * step] = values_of(a[upper], scale, minimum);
            pairs[2 * step + 1] = values_of(a[upper + 2], scale, minimum);
        }
        if (OUTS * out_tile + output >= w.n_out) continue;
        u16* values = d.values + (u64)(OUTS * blockIdx.y + output) * (32 * w.in_tiles) + 32 * in_tile;
#if GROUP == 32
        *(uint4*)(values + 8 * t) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
#else
        *(uint2*)(values + 4 * t) = make_uint2(pairs[0], pairs[1]);
        *(uint2*)(values + 16 + 4 * t) = make_uint2(pairs[2], pairs[3]);
#endif
    }
}
