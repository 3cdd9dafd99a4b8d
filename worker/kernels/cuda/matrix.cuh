// Weights on the device, in tiles of 32 outputs and 32 inputs, in the order in which the lanes of a warp need them: see
// `packing.rs`.
//
// Variants: BITS 4, 6 (codes below 128 in bytes), 8, 16 (bf16, without scales); GROUP 16 or 32 inputs that share a scale;
// TWO_LEVEL: an 8-bit scale of each group times an f16 of several; MINIMUM; CODEBOOK: what 4-bit codes stand for; OFFSET:
// taken off codes (or off what the codebook has).
#pragma once

#include "device.cuh"

#define GROUPS (32 / GROUP)
#define CODE_VECTORS (BITS == 4 ? 1 : BITS == 16 ? 4 : 2)

struct Segment {
    u32 end;      // of its inputs, in tiles
    u16 merges;   // pending sums to add once it is summed
    u16 is_last;  // of its plane
};

struct Matrix {
    const uint4* codes;        // [out tiles, in tiles, CODE_VECTORS, 32 lanes]
    const uint2* scales;       // [out tiles, scales, 8] of four f16: outputs g, g + 8, g + 16, g + 24
    const uint2* minimums;     // likewise
    const u32* sub_scales;     // [out tiles, groups, 8] of four i8
    const u32* sub_minimums;   // likewise
    const Segment* segments;
    u32 n_segments;
    u32 n_out;
    u32 in_tiles;
    u32 n_scales;              // of an output
    u32 scale_shift;           // log2 of the groups that share one, if TWO_LEVEL
    u32 padding;
};
