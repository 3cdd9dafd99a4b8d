// A kernel on a grid of blocks.
#pragma once

#include <cstddef>
#include <vector>

#include "machine.h"

namespace emulator {

constexpr unsigned THREADS_MAX = 1024;  // of a block

struct Launch {
    const Module* module;
    const Kernel* kernel;
    int image;  // file descriptor of the module, for reports of faults
    // Where a block's __shared__ variables are: this far before `module->shared_memory()`, so many bytes.
    size_t shared_offset, shared_bytes;
    size_t dynamic_shared_bytes;
    Dim3 grid, block;
    bool overlaps;  // it may start before the kernel ahead of it has ended: each thread must call begin_kernel
    std::vector<unsigned char> parameter_bytes;
    std::vector<void*> parameters;  // into parameter_bytes
};

// Runs all blocks, in an order that the seed decides, on LOCKSTEP_EMULATOR_THREADS OS threads.
void run_launch(const Launch& launch);

// What kernels call.
extern const Runtime runtime;

}  // namespace emulator
