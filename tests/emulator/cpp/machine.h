// What a compiled kernel and the fake driver agree on: the driver writes these, kernels read them through `self`.
#pragma once

namespace emulator {

constexpr unsigned LANES = 32;
constexpr unsigned ALL_LANES = ~0u;

struct Dim3 {
    unsigned x, y, z;
};

struct Warp;

// A copy from global to shared memory that the thread has ordered and not yet waited for.
struct PendingCopy {
    void* shared;
    const void* global;
    unsigned group;
};
constexpr unsigned PENDING_COPIES_MAX = 128;

// One CUDA thread.
struct Thread {
    Dim3 thread_idx, block_idx, block_dim, grid_dim;
    unsigned lane;
    Warp* warp;
    unsigned char* dynamic_shared;
    bool begun;  // it has called begin_kernel

    PendingCopy copies[PENDING_COPIES_MAX];
    unsigned n_copies;
    unsigned n_copy_groups;  // closed ones
};

// Where the lanes of a warp exchange what a warp-wide operation needs. The lane that arrives last reads everybody's
// input and writes everybody's output, while no other lane runs: hence no lane can overwrite what another still needs.
struct Warp {
    unsigned long long input[LANES], output[LANES];
    unsigned source_lane[LANES];

    // Operands of a matrix product. In the fragment order of the PTX ISA lane 4 r + c / 2 holds the neighbours c and c
    // + 1 of row r, so that each array is a plain 8 x 8 matrix: a[0] is the upper left quarter of A, a[1] the lower
    // left, a[2] the upper right, a[3] the lower right; b[0] and b[1] are the upper and lower half of B, transposed;
    // d[0] and d[1] the upper and lower half of D.
    alignas(32) unsigned a[4][LANES];
    alignas(32) unsigned b[2][LANES];
    alignas(32) float d[2][2 * LANES];
};

// What kernels ask of the driver.
struct Runtime {
    // Waits for all lanes in `mask` to come to the same operation. True for the last of them, which must write the
    // outputs before it does anything else.
    bool (*meet)(Thread* self, const char* operation, unsigned mask);
    // Waits for all threads of the block.
    void (*barrier)(Thread* self);
    // D += A B of the warp's operands, which are f16 or else bf16.
    void (*multiply)(Warp* warp, bool f16);
    // Names the kernel and the thread, and aborts.
    [[noreturn]] void (*fail)(Thread* self, const char* what);
};

// One entry point of a module.
struct Kernel {
    const char* name;
    void (*run)(void** parameters);  // with `self` set
    const unsigned* parameter_sizes;
    unsigned n_parameters;
    unsigned max_threads;  // of __launch_bounds__
};

// The symbol `emulator_module` of a module.
struct Module {
    const char* version;  // of the emulator that compiled it: what is above must be the same
    const char* architecture;
    const Kernel* kernels;
    unsigned n_kernels;
    unsigned char* (*shared_memory)();  // some address in the calling OS thread's copy of the __shared__ variables
    const Runtime** runtime;            // for the driver to set
};

}  // namespace emulator
