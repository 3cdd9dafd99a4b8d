// What products read: rows in bf16, and their sums by group, which weights with minimums need.
#pragma once

#include "device.cuh"

struct Input {
    u16* values;         // [rows, width] bf16; the width is a multiple of 32
    float* sums_of_16;   // [width / 16, padded rows]: of the rounded values
    float* sums_of_32;   // [width / 32, padded rows]
    u32 rows;
    u32 width;
    u32 padded_rows;     // a multiple of 8
    u32 padding;
};

// Stores the value of one column, rounded, and the sums of its groups. A whole warp stores 32 neighbours of one row at once,
// the first at a multiple of 32.
__device__ __forceinline__ void store_input(const Input& input, u32 row, u32 column, float value) {
    u16 rounded = f32_to_bf16(value);
    input.values[(u64)row * input.width + column] = rounded;
    float sum = bf16_to_f32(rounded);
    #pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (column % 16 == 0) input.sums_of_16[(u64)(column / 16) * input.padded_rows + row] = sum;
    sum += __shfl_xor_sync(0xffffffff, sum, 16);
    if (column % 32 == 0) input.sums_of_32[(u64)(column / 32) * input.padded_rows + row] = sum;
}

// x / (1 + e^-x).
__device__ __forceinline__ float silu(float x) {
    return x / (1.0f + exp2_fast(x * -1.4426950408889634f));
}
