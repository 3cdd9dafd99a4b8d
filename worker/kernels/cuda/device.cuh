// What kernels need of the machine beyond CUDA C++ itself: conversions, paired arithmetic, matrix multiply and
// memory instructions, each one PTX instruction. No toolkit header is used, so that NVRTC compiles kernels on machines
// that have none. Needs sm_80. Names of PTX ISA 8.x, where each instruction is specified.
//
// `tests/emulator/cpp/device.cuh` is the twin that runs on a CPU; what one of them declares, the other must, too.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- Kernels that overlap ----

// What every kernel calls first, in every thread: lets the kernel after it start, and waits for those before it.
//
// From sm_90 on a kernel may start before the one ahead of it in the stream has ended (programmatic dependent launch,
// which `Kernel::launch` asks for): as soon as each block of that one has called this or exited, and there is room. Then
// nothing but the wait stands between the two. It lasts until the one ahead has completed and what it wrote can be seen;
// as that one has waited in turn, all kernels before it have completed, too. A kernel with a thread that does not wait
// breaks this chain for those after it. Copies, and kernels of others (NCCL), wait for the end of what is before them.
//
// Hence what any kernel writes is read, and written, after this call alone. Arguments and weights may be read before:
// weights are copied to the device, and no kernel writes them. A parameter must not be `__restrict__`: of one that is
// `const`, that says that nobody writes it while this kernel runs, and the compiler may read it before the wait.
//
// CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol`.
__device__ __forceinline__ void begin_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Conversions: round to nearest, ties to even; overflow gives infinity ----

// Two floats as bf16; `lo` lands in the low half.
__device__ __forceinline__ u32 pack_bf16(float lo, float hi) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
}

// Two floats as f16; `lo` lands in the low half.
__device__ __forceinline__ u32 pack_f16(float lo, float hi) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
}

__device__ __forceinline__ float f16_to_f32(u16 half) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(half));
    return wide;
}

// A bf16 is the upper half of its float.
__device__ __forceinline__ float bf16_to_f32(u16 half) { return __uint_as_float(u32(half) << 16); }

__device__ __forceinline__ u16 f32_to_f16(float wide) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(wide));
    return half;
}

__device__ __forceinline__ u16 f32_to_bf16(float wide) {
    u16 half;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(wide));
    return half;
}

// ---- Arithmetic on registers that hold two halves, or four bytes ----

// a * b + c in both halves, each rounded once.
__device__ __forceinline__ u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Byte i of the result is byte `selector >> 4 i & 7` of the eight bytes b:a (a holds bytes 0 to 3); bit 3 of a selector
// spreads the byte's sign instead.
__device__ __forceinline__ u32 byte_permute(u32 a, u32 b, u32 selector) {
    u32 picked;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(a), "r"(b), "r"(selector));
    return picked;
}

// value & mask | ones, in one instruction.
__device__ __forceinline__ u32 mask_or(u32 value, u32 mask, u32 ones) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "r"(mask), "r"(ones));
    return result;
}

// 2^x, to within 2 units in the last place; subnormals are zero.
__device__ __forceinline__ float exp2_fast(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// ---- Matrix multiply: a warp's d[16][8] += a[16][16] b[16][8], all 32 lanes together ----
//
// With g = lane / 4 and t = lane % 4, registers hold pairs of neighbours, the lower index in the low half:
//     a[0]: row g, columns 2t..        b0: column g, rows 2t..          d[0], d[1]: row g,     columns 2t, 2t + 1
//     a[1]: row g + 8, columns 2t..    b1: column g, rows 2t + 8..      d[2], d[3]: row g + 8, columns 2t, 2t + 1
//     a[2]: row g, columns 2t + 8..
//     a[3]: row g + 8, columns 2t + 8..
// The order of the sums inside is the hardware's, the same for every element and every call.

__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = a b.
__device__ __forceinline__ void mma_bf16_fresh(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// ---- Memory ----

// The shared memory whose size the launch names, 128-byte aligned.
__device__ __forceinline__ u8* dynamic_shared() {
    extern __shared__ __align__(128) u8 dynamic_shared_bytes[];
    return dynamic_shared_bytes;
}

// Loads of what no kernel writes and nobody reads twice (weights): they pass L1 by, and may come before `begin_kernel`.
__device__ __forceinline__ uint4 load_once(const uint4* global) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(global));
    return v;
}

__device__ __forceinline__ uint2 load_once(const uint2* global) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(global));
    return v;
}

// Asks for the 32 bytes at an address, which come to L2 behind the thread's back. Of use before `begin_kernel`, thus
// nothing where kernels do not overlap.
__device__ __forceinline__ void prefetch(const void* global) {
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}

// Copies 16 bytes from global to shared memory behind the thread's back; both 16-byte aligned. They have arrived for the
// thread itself after `copy_async_wait`, for others after a barrier that follows it.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
    u32 address = u32(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// Closes the group of the thread's copies since the last commit.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of the thread's newest groups are under way.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
