// The twin of worker/kernels/cuda/device.cuh, and of what NVRTC has built in: CUDA C++ for a CPU.
//
// A CUDA thread is a fibre; `self` says which one. Everything a warp or a block does together is a meeting of fibres.
// Faults that a GPU may forgive are made to show: copies arrive as late as they may, lanes that nobody named read
// garbage.
#pragma once

#include "machine.h"

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
// A block runs on one OS thread, so that thread's copy is the block's.
#define __shared__ static thread_local

// The driver starts each fibre with its thread in this register, which switches along with the fibre.
register emulator::Thread* self asm("r15");

namespace emulator {
inline const Runtime* runtime;
}

#define threadIdx (self->thread_idx)
#define blockIdx (self->block_idx)
#define blockDim (self->block_dim)
#define gridDim (self->grid_dim)
constexpr int warpSize = emulator::LANES;

// Kernels run one after the other here. That none forgets this call, the driver checks.
inline void begin_kernel() { self->begun = true; }

// ---- Vector types ----

struct __align__(8) uint2 {
    unsigned x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct __align__(16) uint4 {
    unsigned x, y, z, w;
};
struct __align__(8) int2 {
    int x, y;
};
struct __align__(16) int4 {
    int x, y, z, w;
};
struct __align__(8) float2 {
    float x, y;
};
struct __align__(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- Arithmetic ----

extern "C" {
float fmaf(float, float, float) noexcept;
float sqrtf(float) noexcept;
float fabsf(float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float rintf(float) noexcept;
float roundf(float) noexcept;
float truncf(float) noexcept;
float expf(float) noexcept;
float exp2f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float powf(float, float) noexcept;
float sinf(float) noexcept;
float cosf(float) noexcept;
float tanhf(float) noexcept;
double ceil(double) noexcept;
int abs(int) noexcept;
int printf(const char*, ...);
}

template <class To, class From>
__forceinline__ To bit_cast_to(From from) {
    static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
    return __builtin_bit_cast(To, from);
}
inline unsigned __float_as_uint(float x) { return bit_cast_to<unsigned>(x); }
inline int __float_as_int(float x) { return bit_cast_to<int>(x); }
inline float __uint_as_float(unsigned x) { return bit_cast_to<float>(x); }
inline float __int_as_float(int x) { return bit_cast_to<float>(x); }
inline long long __double_as_longlong(double x) { return bit_cast_to<long long>(x); }
inline double __longlong_as_double(long long x) { return bit_cast_to<double>(x); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
// Out of range saturates, NaN gives zero.
inline int __float2int_rn(float x) {
    if (x >= 2147483648.0f) return 0x7fffffff;
    if (x < -2147483648.0f) return -0x7fffffff - 1;
    return x == x ? int(rintf(x)) : 0;
}
inline unsigned __float2uint_rn(float x) {
    if (x >= 4294967296.0f) return ~0u;
    return x > 0 ? unsigned((long long)rintf(x)) : 0;
}

inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __ull2double_rn(u64 x) { return double(x); }
inline u64 __double2ull_ru(double x) {
    if (x >= 18446744073709551616.0) return ~0ull;
    return x > 0 ? u64(ceil(x)) : 0;
}

inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((u64(x) * y) >> 32); }
inline u64 __umul64hi(u64 x, u64 y) { return u64(((unsigned __int128)x * y) >> 64); }
inline int __mulhi(int x, int y) { return int(((long long)x * y) >> 32); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(u64 x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += int((signed char)(a >> i)) * int((signed char)(b >> i));
    return sum;
}

// Of two types of integers they take the one that a sum has.
template <class T, class U>
inline decltype(T() + U()) min(T x, U y) {
    using Common = decltype(T() + U());
    return Common(y) < Common(x) ? y : x;
}
template <class T, class U>
inline decltype(T() + U()) max(T x, U y) {
    using Common = decltype(T() + U());
    return Common(x) < Common(y) ? y : x;
}
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }

// ---- Atomic operations: blocks run on several OS threads ----

namespace emulator {
template <class T, class Choose>
inline T atomic_choose(T* at, T x, Choose choose) {
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(at, &old, choose(old, x), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
}  // namespace emulator

inline int atomicAdd(int* at, int x) { return __atomic_fetch_add(at, x, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* at, unsigned x) { return __atomic_fetch_add(at, x, __ATOMIC_RELAXED); }
inline u64 atomicAdd(u64* at, u64 x) { return __atomic_fetch_add(at, x, __ATOMIC_RELAXED); }
inline unsigned atomicOr(unsigned* at, unsigned x) { return __atomic_fetch_or(at, x, __ATOMIC_RELAXED); }
inline unsigned atomicAnd(unsigned* at, unsigned x) { return __atomic_fetch_and(at, x, __ATOMIC_RELAXED); }
inline int atomicExch(int* at, int x) { return __atomic_exchange_n(at, x, __ATOMIC_RELAXED); }
inline unsigned atomicExch(unsigned* at, unsigned x) { return __atomic_exchange_n(at, x, __ATOMIC_RELAXED); }
template <class T>
inline T atomicMax(T* at, T x) {
    return emulator::atomic_choose(at, x, [](T old, T x) { return max(old, x); });
}
template <class T>
inline T atomicMin(T* at, T x) {
    return emulator::atomic_choose(at, x, [](T old, T x) { return min(old, x); });
}
template <class T>
inline T atomicCAS(T* at, T expected, T desired) {
    __atomic_compare_exchange_n(at, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}

// ---- Warps and blocks ----

inline void __syncthreads() { emulator::runtime->barrier(self); }
inline void __syncwarp(unsigned mask = emulator::ALL_LANES) { emulator::runtime->meet(self, "__syncwarp", mask); }
[[noreturn]] inline void __trap() { emulator::runtime->fail(self, "__trap()"); }

namespace emulator {

// Each lane gets the value that lane `source` brought. A source that is not part of the meeting gives garbage, as on a
// GPU.
template <class T>
inline T shuffle(const char* operation, unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    Warp* warp = self->warp;
    __builtin_memcpy(&warp->input[self->lane], &value, sizeof value);
    warp->source_lane[self->lane] = source;
    if (runtime->meet(self, operation, mask)) {
        for (unsigned lane = 0; lane < LANES; lane++) {
            unsigned from = warp->source_lane[lane] % LANES;
            if (mask >> lane & 1) warp->output[lane] = mask >> from & 1 ? warp->input[from] : ~0ull;
        }
    }
    __builtin_memcpy(&value, &warp->output[self->lane], sizeof value);
    return value;
}

// The source lane if it lies in the same part of `width` lanes, and else the lane itself.
inline unsigned within_part(int source, int width) {
    int first = int(self->lane) & ~(width - 1);
    return source >= first && source < first + width ? source : int(self->lane);
}

// Each lane gets `combine` of all lanes' values, in the order of lanes.
template <class T, class Combine>
inline T reduce(const char* operation, unsigned mask, T value, Combine combine) {
    Warp* warp = self->warp;
    warp->input[self->lane] = u64(value);
    if (runtime->meet(self, operation, mask)) {
        T sum = T(warp->input[__builtin_ctz(mask)]);
        for (unsigned rest = mask & (mask - 1); rest; rest &= rest - 1) {
            sum = combine(sum, T(warp->input[__builtin_ctz(rest)]));
        }
        for (unsigned lane = 0; lane < LANES; lane++) {
            if (mask >> lane & 1) warp->output[lane] = u64(sum);
        }
    }
    return T(warp->output[self->lane]);
}

}  // namespace emulator

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    unsigned first = self->lane & ~unsigned(width - 1);
    return emulator::shuffle("__shfl_sync", mask, value, first + (unsigned(source) & unsigned(width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
    return emulator::shuffle("__shfl_xor_sync", mask, value, emulator::within_part(int(self->lane) ^ lanes, width));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = warpSize) {
    return emulator::shuffle("__shfl_down_sync", mask, value, emulator::within_part(int(self->lane + lanes), width));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = warpSize) {
    return emulator::shuffle("__shfl_up_sync", mask, value, emulator::within_part(int(self->lane - lanes), width));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned bit = predicate ? 1u << self->lane : 0;
    return emulator::reduce("__ballot_sync", mask, bit, [](unsigned x, unsigned y) { return x | y; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    return emulator::reduce("__reduce_add_sync", mask, value, [](unsigned x, unsigned y) { return x + y; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    return emulator::reduce("__reduce_max_sync", mask, value, [](unsigned x, unsigned y) { return x < y ? y : x; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    return emulator::reduce("__reduce_min_sync", mask, value, [](unsigned x, unsigned y) { return x < y ? x : y; });
}

// ---- What worker/kernels/cuda/device.cuh declares; see there ----

inline float f16_to_f32(u16 half) { return float(bit_cast_to<_Float16>(half)); }
inline float bf16_to_f32(u16 half) { return __uint_as_float(u32(half) << 16); }
// One NaN for all, as the instructions have it.
inline u16 f32_to_f16(float wide) { return wide != wide ? 0x7fff : bit_cast_to<u16>(_Float16(wide)); }
inline u16 f32_to_bf16(float wide) {
    u32 bits = __float_as_uint(wide);
    if (wide != wide) return 0x7fff;
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u32 pack_bf16(float lo, float hi) { return f32_to_bf16(lo) | u32(f32_to_bf16(hi)) << 16; }
inline u32 pack_f16(float lo, float hi) { return f32_to_f16(lo) | u32(f32_to_f16(hi)) << 16; }

namespace emulator {

// The double next to a b + c, whose last bit is odd unless it is the very value. Rounding it again, to a half, falls as
// rounding once would have.
inline double fma_to_odd(double a, double b, double c) {
    double product = a * b, sum = product + c;  // the product of halves is exact
    double shadow = sum - product;
    double error = (product - (sum - shadow)) + (c - shadow);
    u64 bits = bit_cast_to<u64>(sum);
    if (error == 0 || error != error || bits & 1 || sum - sum != 0) return sum;
    return bit_cast_to<double>(bits + ((error > 0) == (sum > 0) ? 1 : -1));
}
inline float to_float_odd(double wide) {
    float narrow = float(wide);
    u32 bits = __float_as_uint(narrow);
    if (double(narrow) == wide || wide != wide || bits & 1 || narrow - narrow != 0) return narrow;
    return __uint_as_float(bits + ((double(narrow) < wide) == (wide > 0) ? 1 : -1));
}

// a b + c as a float that rounds to a half as the exact value does. The float next to it will do, except where it lies
// halfway between two halves: `beyond` are the bits that a half of its exponent lacks, or some more.
inline float fma_before_half(float a, float b, float c, u32 beyond) {
    float sum = fmaf(a, b, c);
    if (__builtin_expect((__float_as_uint(sum) & beyond) != (beyond + 1) / 2, true)) return sum;
    return to_float_odd(fma_to_odd(a, b, c));
}

inline u16 fma_bf16(u16 a, u16 b, u16 c) {
    return f32_to_bf16(fma_before_half(bf16_to_f32(a), bf16_to_f32(b), bf16_to_f32(c), 0xffff));
}
inline u16 fma_f16(u16 a, u16 b, u16 c) {
    float x = f16_to_f32(a), y = f16_to_f32(b), z = f16_to_f32(c);
    float sum = fma_before_half(x, y, z, 0x1fff);
    // Below the normal halves, where a half's last bit is, varies.
    if (__builtin_expect(fabsf(sum) < 6.1035156e-5f, false)) sum = to_float_odd(fma_to_odd(x, y, z));
    return f32_to_f16(sum);
}

}  // namespace emulator

inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u16 low = emulator::fma_bf16(u16(a), u16(b), u16(c));
    return low | u32(emulator::fma_bf16(u16(a >> 16), u16(b >> 16), u16(c >> 16))) << 16;
}
inline u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u16 low = emulator::fma_f16(u16(a), u16(b), u16(c));
    return low | u32(emulator::fma_f16(u16(a >> 16), u16(b >> 16), u16(c >> 16))) << 16;
}

// Written out, since selectors are constants: then little is left of it.
__forceinline__ u32 byte_permute(u32 a, u32 b, u32 selector) {
    u64 bytes = u64(b) << 32 | a;
    auto pick = [&](u32 select) {
        u32 byte = u32(bytes >> (8 * (select & 7))) & 0xff;
        return select & 8 ? (byte & 0x80 ? 0xff : 0) : byte;
    };
    return pick(selector) | pick(selector >> 4) << 8 | pick(selector >> 8) << 16 | pick(selector >> 12) << 24;
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) { return byte_permute(a, b, selector & 0x7777); }

inline u32 mask_or(u32 value, u32 mask, u32 ones) { return (value & mask) | ones; }

inline float exp2_fast(float x) { return exp2f(x); }

namespace emulator {
inline void mma(const char* operation, bool f16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Warp* warp = self->warp;
    unsigned lane = self->lane;
    for (int i = 0; i < 4; i++) warp->a[i][lane] = a[i];
    warp->b[0][lane] = b0;
    warp->b[1][lane] = b1;
    for (int i = 0; i < 4; i++) warp->d[i / 2][2 * lane + i % 2] = d[i];
    if (runtime->meet(self, operation, ALL_LANES)) runtime->multiply(warp, f16);
    for (int i = 0; i < 4; i++) d[i] = warp->d[i / 2][2 * lane + i % 2];
}
}  // namespace emulator

inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::mma("mma_bf16", false, d, a, b0, b1);
}
inline void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator::mma("mma_f16", true, d, a, b0, b1); }
inline void mma_bf16_fresh(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    for (float& element : d) element = 0;
    mma_bf16(d, a, b0, b1);
}

inline u8* dynamic_shared() { return self->dynamic_shared; }

inline uint4 load_once(const uint4* global) { return *global; }
inline uint2 load_once(const uint2* global) { return *global; }

// There is no cache to fill, but the address must be good.
inline void prefetch(const void* global) { (void)*(const volatile u8*)global; }

// Copies are made when the thread waits for them: whoever forgets to wait reads what was there before.
inline void copy_async_16(void* shared, const void* global) {
    const auto& fail = emulator::runtime->fail;
    if ((u64(shared) | u64(global)) % 16 != 0) fail(self, "copy_async_16 of an address that is not 16-byte aligned");
    if (self->n_copies == emulator::PENDING_COPIES_MAX) fail(self, "more copies under way than the emulator keeps");
    self->copies[self->n_copies++] = {shared, global, self->n_copy_groups};
}
inline void copy_async_commit() { self->n_copy_groups++; }
template <int N>
inline void copy_async_wait() {
    unsigned n_left = 0;
    for (unsigned i = 0; i < self->n_copies; i++) {
        const emulator::PendingCopy& copy = self->copies[i];
        if (copy.group + N < self->n_copy_groups) {
            __builtin_memcpy(copy.shared, copy.global, 16);
        } else {
            self->copies[n_left++] = copy;
        }
    }
    self->n_copies = n_left;
}

// ---- How the driver enters ----

namespace emulator {

template <class T>
struct Signature;
template <class... Parameters>
struct Signature<void(Parameters...)> {
    static constexpr unsigned n_parameters = sizeof...(Parameters);
    static constexpr unsigned sizes[n_parameters + 1] = {sizeof(Parameters)...};

    template <int... I>
    struct Positions {};
    template <int... I>
    static void call(void (*kernel)(Parameters...), void** parameters, Positions<I...>) {
        kernel(*(Parameters*)parameters[I]...);
    }
    static void call(void (*kernel)(Parameters...), void** parameters) {
        call(kernel, parameters, Positions<__integer_pack(sizeof...(Parameters))...>());
    }
};

template <class T, T* kernel>
constexpr Kernel describe(const char* name, unsigned max_threads) {
    using S = Signature<T>;
    return {name, [](void** parameters) { S::call(kernel, parameters); }, S::sizes, S::n_parameters, max_threads};
}

inline u8* shared_memory() {
    static thread_local u8 marker;
    return &marker;
}

}  // namespace emulator
