// Runs the blocks of a launch, each block's threads as fibres of one OS thread.
#pragma once

#include <memory>
#include <vector>

#include "machine.h"

namespace emulator {

struct Launch {
    const Module* module;
    const Kernel* kernel;
    // Where a block's __shared__ variables are: this far before `module->shared_memory()`, so many bytes.
    size_t shared_offset, shared_bytes;
    size_t dynamic_shared_bytes;
    Dim3 grid, block;
    std::vector<unsigned char> parameter_bytes;
    std::vector<void*> parameters;  // into parameter_bytes
};

// Runs all blocks, in an order that the seed decides, on LOCKSTEP_EMULATOR_THREADS OS threads. A block that cannot go on
// aborts the process: there is no state that a test could go on from.
void run_launch(const Launch& launch);

// Tells of the memory fault of a kernel before the process dies of it.
void install_fault_reports();

extern const Runtime runtime;

}  // namespace emulator
