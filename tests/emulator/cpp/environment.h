// The settings of the emulator: environment variables, read once.
#pragma once

#include <cstddef>

namespace emulator {

struct Environment {
    int n_devices;                   // LOCKSTEP_EMULATOR_DEVICES, 8
    int architecture;                // LOCKSTEP_EMULATOR_ARCH, 90: compute capability 9.0
    int driver;                      // LOCKSTEP_EMULATOR_DRIVER, 13000: as cuDriverGetVersion gives it
    size_t memory_bytes;             // LOCKSTEP_EMULATOR_MEMORY, 8 GiB: of each device; an allocation beyond it fails
    unsigned n_threads;              // LOCKSTEP_EMULATOR_THREADS, 2: OS threads that run blocks
    unsigned long long seed;         // LOCKSTEP_EMULATOR_SEED, 1: of the order of blocks, warps and lanes
    unsigned long long fail_launch;  // LOCKSTEP_EMULATOR_FAIL_LAUNCH, 0: the launch, from 1 on, that fails; 0: none
    bool fail_graphs;                // LOCKSTEP_EMULATOR_FAIL_GRAPHS, 0: 1 refuses to make graphs of what was captured
};

const Environment& environment();

}  // namespace emulator
