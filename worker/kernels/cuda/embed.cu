// Embeddings: the rows of a table that a step's tokens name, in f32, with the bits that `dequantize` gives them.
//
// Variants: FLOATS 1 (F32), 2 (F16), 3 (BF16): rows as a file has them; 0: packed rows, in the variants of `matrix.cuh`
// but BITS 16.

#include "device.cuh"
#include "matrix.cuh"

#define THREADS 256
// Marks what the step before has chosen (`step.rs`).
#define CHOSEN 0x80000000u

struct Table {
    Matrix packed;
    const void* floats;  // [rows, width]
    u32 codebook[4];     // bytes
    u32 rows;
    u32 width;
};

#if FLOATS == 1
__device__ __forceinline__ float value_of(const Table& table, u64 row, u32 column) {
    return ((const float*)table.floats)[row * table.width + column];
}
#elif FLOATS != 0
__device__ __forceinline__ float value_of(const Table& table, u64 row, u32 column) {
    u16 half = ((const u16*)table.floats)[row * table.width + column];
    return FLOATS == 2 ? f16_to_f32(half) : bf16_to_f32(half);
}
#else
// Where `packing.rs` has put the code of one output and input: a word of lane 4 g + t, in which the operand register it goes
// to, and which half of that, say where.
__device__ __forceinline__ u32 code_of(const Matrix& w, u32 row, u32 column) {
    u32 out = row % 32, in = column % 32;
    u32 t = GROUP == 32 ? in / 8 : in % 16 / 4, step = GROUP == 32 ? in / 4 % 2 : in / 16;
    u32 lane = out % 8 * 4 + t, m = out / 16, a = out / 8 % 2 + in % 4 / 2 * 2, half = in % 2;
    u32 word = BITS == 4 ? 2 * m + step : 4 * m + 2 * step + a / 2;
    u32 shift = BITS == 4 ? 4 * a + 16 * half : 16 * (a % 2) + 8 * half;
    const u32* tile = (const u32*)(w.codes + ((u64)(row / 32) * w.in_tiles + column / 32) * (CODE_VECTORS * 32));
    return tile[(word / 4 * 32 + lane) * 4 + word % 4] >> shift & (BITS == 4 ? 15 : 255);
}

// A scale, or a minimum, of one output and group.
__device__ __forceinline__ float scale_of(const Matrix& w, const uint2* scales, const u32* sub_scales, u32 row, u32 group) {
    u64 out_tile = row / 32;
    u32 place = row % 8 * 4 + row % 32 / 8;
    float scale = f16_to_f32(((const u16*)scales)[(out_tile * w.n_scales + (group >> w.scale_shift)) * 32 + place]);
#if TWO_LEVEL
    scale *= (float)((const i8*)sub_scales)[(out_tile * (w.in_tiles * GROUPS) + group) * 32 + place];
#endif
    return scale;
}

__device__ __forceinline__ float value_of(const Table& table, u32 row, u32 column) {
    const Matrix& w = table.packed;
    u32 code = code_of(w, row, column), group = column / GROUP;
#if CODEBOOK
    u32 low = byte_permute(table.codebook[0], table.codebook[1], code % 8);
    u32 high = byte_permute(table.codebook[2], table.codebook[3], code % 8);
    code = (code < 8 ? low : high) & 255;
#endif
    float steps = (float)((int)code - OFFSET), scale = scale_of(w, w.scales, w.sub_scales, row, group);
#if MINIMUM
    return fmaf(scale, steps, scale_of(w, w.minimums, w.sub_minimums, row, group));
#else
    return scale * steps;
#endif
}
#endif

// One block for 256 columns of a row. What the step before has chosen is below the vocabulary, but a table may have fewer
// rows: then the last is taken. Tokens from the host were checked there.
extern "C" __global__ void __launch_bounds__(THREADS) embed(
    const Table table, const u32* tokens, const u32* choices, float* out) {
    begin_kernel();
    u32 column = blockIdx.y * THREADS + threadIdx.x;
    if (column >= table.width) return;
    u32 token = tokens[blockIdx.x];
    if (token & CHOSEN) token = choices[token ^ CHOSEN];
    u32 row = token < table.rows ? token : table.rows - 1;
    out[(u64)blockIdx.x * table.width + column] = value_of(table, row, column);
}
