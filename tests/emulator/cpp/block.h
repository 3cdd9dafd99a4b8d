// A block of threads, as fibres of one OS thread.
#pragma once

#include "launch.h"
#include "machine.h"
#include "random.h"

namespace emulator {

constexpr unsigned WARPS_MAX = THREADS_MAX / LANES;

struct Block;

// A warp and how far its lanes are: each is in one of the sets, or running.
struct ScheduledWarp : Warp {
    unsigned runnable, meeting, at_barrier, exited;
    unsigned rotation;  // lanes take turns from here on
    Block* block;
    void* stack_pointers[LANES];
    // What the lanes that meet or wait have called, and from where.
    const char* operations[LANES];
    unsigned masks[LANES];
    const void* call_sites[LANES];

    unsigned take_runnable();
};

// Brings its own stacks and dynamic shared memory, and can run one block after another.
struct Block {
    Block();

    // A block whose threads wait for one another aborts the process: there is no state that a test could go on from.
    void run(const Launch& launch, Dim3 index, Random random);

    const Launch* launch;
    Dim3 index;
    unsigned n_threads, n_warps;
    Thread* current = nullptr;  // null outside `run`
    void* scheduler_stack_pointer;
    ScheduledWarp warps[WARPS_MAX];
    Thread threads[THREADS_MAX];

  private:
    void start();
    void start_thread(unsigned i, unsigned char* dynamic_shared);
    void run_warps_in_turn(Random& random);
    bool open_barrier();

    unsigned char* stacks_;
    unsigned char* shared_end_;
};

}  // namespace emulator
