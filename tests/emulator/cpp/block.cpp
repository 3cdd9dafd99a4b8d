#include "block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>

#include "fault.h"
#include "multiply.h"

namespace emulator {
namespace {

constexpr size_t PAGE_BYTES = 4096;
constexpr size_t STACK_BYTES = 64 << 10;  // of a fibre; the lowest page is a guard
constexpr size_t SHARED_BYTES_MAX = 256 << 10;
constexpr size_t SHARED_ALIGNMENT = 128;  // as the prelude promises
constexpr unsigned char POISON = 0xff;    // a NaN in every float format

// === Fibres ===

// Saves what the ABI makes callees keep, and goes on where `load` was saved. A fresh stack leads to
// `emulator_start_fiber`, with the thread in r15 (`self`), the kernel in r12, its parameters in r13, and in r14 who
// takes over at the end.
extern "C" void emulator_switch(void** save, void* load);
extern "C" void emulator_start_fiber();
asm(R"(
    .text
    .type emulator_switch, @function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size emulator_switch, . - emulator_switch

    .type emulator_start_fiber, @function
emulator_start_fiber:
    mov %r13, %rdi
    call *%r12
    mov %r15, %rdi
    call *%r14
    ud2
    .size emulator_start_fiber, . - emulator_start_fiber
)");

ScheduledWarp& warp_of(Thread* thread) { return static_cast<ScheduledWarp&>(*thread->warp); }

// Gives the OS thread to the next lane of the warp, or to the scheduler if there is none.
void suspend(Thread* self) {
    ScheduledWarp& warp = warp_of(self);
    Block& block = *warp.block;
    void** save = &warp.stack_pointers[self->lane];
    if (warp.runnable != 0) {
        unsigned lane = warp.take_runnable();
        block.current = self - self->lane + lane;
        emulator_switch(save, warp.stack_pointers[lane]);
    } else {
        emulator_switch(save, block.scheduler_stack_pointer);
    }
}

void exit_thread(Thread* self) {
    const Block& block = *warp_of(self).block;
    if (block.launch->overlaps && !self->begun) {
        abort_thread(block, *self, "ended without begin_kernel(), though it may overlap the kernel before it", nullptr);
    }
    warp_of(self).exited |= 1u << self->lane;
    suspend(self);
}

// === What kernels call ===

[[noreturn]] void fail(Thread* self, const char* what) {
    abort_thread(*warp_of(self).block, *self, what, __builtin_return_address(0));
}

bool meet(Thread* self, const char* operation, unsigned mask) {
    ScheduledWarp& warp = warp_of(self);
    unsigned lane = self->lane, bit = 1u << lane;
    warp.call_sites[lane] = __builtin_return_address(0);
    if (!(mask & bit)) {
        abort_thread(*warp.block, *self, std::string(operation) + " for lanes without this one", warp.call_sites[lane]);
    }
    // All who meet agree pairwise, if each agrees with one who came before.
    if (unsigned others = warp.meeting & mask) {
        unsigned other = __builtin_ctz(others);
        bool same = warp.operations[other] == operation || strcmp(warp.operations[other], operation) == 0;
        if (!same || warp.masks[other] != mask) {
            std::string what = std::string(operation) + " meets " + warp.operations[other] + " of another lane";
            abort_thread(*warp.block, *self, what, warp.call_sites[lane]);
        }
    }
    warp.operations[lane] = operation;
    warp.masks[lane] = mask;
    if (((warp.meeting | bit) & mask) == mask) {
        warp.meeting &= ~mask;
        warp.runnable |= mask & ~bit;
        return true;
    }
    warp.meeting |= bit;
    suspend(self);
    return false;
}

void barrier(Thread* self) {
    ScheduledWarp& warp = warp_of(self);
    warp.call_sites[self->lane] = __builtin_return_address(0);
    warp.at_barrier |= 1u << self->lane;
    suspend(self);
}

// === Memory of a block ===

unsigned char* map_or_die(size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        perror("emulator: mmap");
        abort();
    }
    return static_cast<unsigned char*>(at);
}

}  // namespace

const Runtime runtime = {meet, barrier, multiply, fail};

// === impl ScheduledWarp ===

unsigned ScheduledWarp::take_runnable() {
    unsigned turned = runnable >> rotation | runnable << (LANES - rotation) % LANES;
    unsigned lane = (__builtin_ctz(turned) + rotation) % LANES;
    runnable &= ~(1u << lane);
    return lane;
}

// === impl Block ===

Block::Block() {
    stacks_ = map_or_die(THREADS_MAX * STACK_BYTES);
    for (size_t i = 0; i < THREADS_MAX; i++) mprotect(stacks_ + i * STACK_BYTES, PAGE_BYTES, PROT_NONE);
    shared_end_ = map_or_die(SHARED_BYTES_MAX + PAGE_BYTES) + SHARED_BYTES_MAX;
    mprotect(shared_end_, PAGE_BYTES, PROT_NONE);
}

void Block::run(const Launch& the_launch, Dim3 the_index, Random random) {
    launch = &the_launch;
    index = the_index;
    n_threads = launch->block.x * launch->block.y * launch->block.z;
    n_warps = (n_threads + LANES - 1) / LANES;
    start();
    do {
        run_warps_in_turn(random);
    } while (open_barrier());
    current = nullptr;
}

void Block::start() {
    memset(launch->module->shared_memory() - launch->shared_offset, POISON, launch->shared_bytes);
    unsigned char* dynamic_shared =
        shared_end_ - (launch->dynamic_shared_bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    memset(dynamic_shared, POISON, shared_end_ - dynamic_shared);
    for (unsigned i = 0; i < n_warps; i++) {
        ScheduledWarp& warp = warps[i];
        unsigned n_lanes = std::min(LANES, n_threads - i * LANES);
        warp.block = this;
        warp.runnable = n_lanes == LANES ? ALL_LANES : (1u << n_lanes) - 1;
        warp.meeting = warp.at_barrier = 0;
        warp.exited = ~warp.runnable;
    }
    for (unsigned i = 0; i < n_threads; i++) start_thread(i, dynamic_shared);
}

void Block::start_thread(unsigned i, unsigned char* dynamic_shared) {
    Thread& thread = threads[i];
    const Dim3& size = launch->block;
    thread.thread_idx = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.block_idx = index;
    thread.block_dim = size;
    thread.grid_dim = launch->grid;
    thread.lane = i % LANES;
    thread.warp = &warps[i / LANES];
    thread.dynamic_shared = dynamic_shared;
    thread.n_copies = thread.n_copy_groups = 0;
    thread.begun = false;

    // Stacks that all began at the same offset of a page would share a few sets of the cache.
    size_t colour = i % LANES * 192;
    auto** top = reinterpret_cast<void**>(stacks_ + (i + 1) * STACK_BYTES - colour);
    *--top = nullptr;  // keeps the stack 16-byte aligned at the first call
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(emulator_start_fiber);
    *--top = nullptr;                                        // rbp
    *--top = nullptr;                                        // rbx
    *--top = reinterpret_cast<void*>(launch->kernel->run);   // r12
    *--top = const_cast<void**>(launch->parameters.data());  // r13
    *--top = reinterpret_cast<void*>(exit_thread);           // r14
    *--top = &thread;                                        // r15
    warps[i / LANES].stack_pointers[thread.lane] = top;
}

// Each warp runs until all its lanes wait or have exited. The order is drawn anew for each stretch between barriers.
void Block::run_warps_in_turn(Random& random) {
    unsigned order[WARPS_MAX];
    std::iota(order, order + n_warps, 0);
    for (unsigned i = n_warps; i > 1; i--) std::swap(order[i - 1], order[random.below(i)]);
    for (unsigned i = 0; i < n_warps; i++) {
        ScheduledWarp& warp = warps[order[i]];
        if (warp.runnable == 0) continue;
        warp.rotation = random.below(LANES);
        unsigned lane = warp.take_runnable();
        current = &threads[order[i] * LANES + lane];
        emulator_switch(&scheduler_stack_pointer, warp.stack_pointers[lane]);
    }
}

// False when the block is done. All threads must come to a barrier: one that has exited will not.
bool Block::open_barrier() {
    unsigned n_waiting = 0, n_exited = 0;
    for (unsigned i = 0; i < n_warps; i++) {
        n_waiting += __builtin_popcount(warps[i].at_barrier);
        n_exited += __builtin_popcount(warps[i].exited);
    }
    if (n_exited == n_warps * LANES) return false;
    if (n_waiting != n_threads) abort_deadlock(*this);
    for (unsigned i = 0; i < n_warps; i++) {
        warps[i].runnable = warps[i].at_barrier;
        warps[i].at_barrier = 0;
    }
    return true;
}

}  // namespace emulator
