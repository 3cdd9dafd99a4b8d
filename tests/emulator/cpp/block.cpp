#include "block.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>

#include "environment.h"

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 64 << 10;  // of a fibre, its guard page included
constexpr size_t PAGE_BYTES = 4096;
constexpr size_t THREADS_MAX = 1024;
constexpr size_t WARPS_MAX = THREADS_MAX / LANES;
constexpr size_t SHARED_BYTES_MAX = 256 << 10;
constexpr unsigned char POISON = 0xff;  // a NaN in every float format

// A small generator is enough: the seed must only reach many orders.
class Random {
  public:
    explicit Random(unsigned long long seed) : state_(seed) {}
    unsigned long long next() {  // SplitMix64
        unsigned long long z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    unsigned below(unsigned n) { return next() % n; }

  private:
    unsigned long long state_;
};

// === Fibres ===

// Saves what the ABI makes callees keep, and goes on where `load` was saved. A fresh stack starts at `emulator_start_fiber`,
// with the thread in r15 (`self`), the kernel in r12, its parameters in r13, and in r14 who takes over at the end.
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

void* map_or_die(size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        perror("emulator: mmap");
        abort();
    }
    return at;
}

// === Block ===

struct Block;

// A warp and how far its lanes are. Each lane of the block is in one of the sets, or running.
struct ScheduledWarp : Warp {
    unsigned runnable, meeting, at_barrier, exited;
    unsigned rotation;  // lanes take turns from here on
    Block* block;
    void* stack_pointers[LANES];
    const char* operations[LANES];  // of the lanes that are meeting
    unsigned masks[LANES];

    unsigned take_runnable() {
        unsigned turned = runnable >> rotation | runnable << (LANES - rotation) % LANES;
        unsigned lane = (__builtin_ctz(turned) + rotation) % LANES;
        runnable &= ~(1u << lane);
        return lane;
    }
};

ScheduledWarp& warp_of(Thread* thread) { return static_cast<ScheduledWarp&>(*thread->warp); }

// A block that an OS thread is running, with the stacks and the dynamic shared memory that it needs.
struct Block {
    Block();

    void run(const Launch& launch, Dim3 index, Random random);

    const Launch* launch;
    Dim3 index;
    void* scheduler_stack_pointer;
    Thread* current = nullptr;
    unsigned n_warps;
    ScheduledWarp warps[WARPS_MAX];
    Thread threads[THREADS_MAX];

  private:
    void start();
    void start_thread(unsigned i, unsigned char* dynamic_shared);
    void run_warps_in_turn(Random& random);
    bool open_barrier();
    [[noreturn]] void report_deadlock() const;

    unsigned char* stacks_;
    unsigned char* shared_end_;
};

thread_local Block* running_block = nullptr;

std::string describe(Dim3 at) {
    char text[64];
    snprintf(text, sizeof text, "(%u, %u, %u)", at.x, at.y, at.z);
    return text;
}

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
    warp_of(self).exited |= 1u << self->lane;
    suspend(self);
}

[[noreturn]] void fail(Thread* self, const char* what) {
    fprintf(stderr, "emulator: kernel %s, block %s, thread %s: %s\n", warp_of(self).block->launch->kernel->name,
            describe(self->block_idx).c_str(), describe(self->thread_idx).c_str(), what);
    abort();
}

bool meet(Thread* self, const char* operation, unsigned mask) {
    ScheduledWarp& warp = warp_of(self);
    unsigned bit = 1u << self->lane;
    if (!(mask & bit)) fail(self, (std::string(operation) + " with a mask that lacks the lane itself").c_str());
    // All who meet are the same pairwise, if each is the same as one who came before.
    if (unsigned others = warp.meeting & mask) {
        unsigned other = __builtin_ctz(others);
        bool same = warp.operations[other] == operation || strcmp(warp.operations[other], operation) == 0;
        if (!same || warp.masks[other] != mask) {
            fail(self, (std::string(operation) + " meets " + warp.operations[other] + " of another lane").c_str());
        }
    }
    warp.operations[self->lane] = operation;
    warp.masks[self->lane] = mask;
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
    warp_of(self).at_barrier |= 1u << self->lane;
    suspend(self);
}

// === impl Block ===

Block::Block() {
    stacks_ = static_cast<unsigned char*>(map_or_die(THREADS_MAX * STACK_BYTES));
    for (size_t i = 0; i < THREADS_MAX; i++) mprotect(stacks_ + i * STACK_BYTES, PAGE_BYTES, PROT_NONE);
    auto* shared = static_cast<unsigned char*>(map_or_die(SHARED_BYTES_MAX + PAGE_BYTES));
    shared_end_ = shared + SHARED_BYTES_MAX;
    mprotect(shared_end_, PAGE_BYTES, PROT_NONE);
}

void Block::run(const Launch& the_launch, Dim3 the_index, Random random) {
    launch = &the_launch;
    index = the_index;
    start();
    do {
        run_warps_in_turn(random);
    } while (open_barrier());
    current = nullptr;
}

void Block::start() {
    unsigned n_threads = launch->block.x * launch->block.y * launch->block.z;
    n_warps = (n_threads + LANES - 1) / LANES;
    memset(launch->module->shared_memory() - launch->shared_offset, POISON, launch->shared_bytes);
    unsigned char* dynamic_shared = shared_end_ - (launch->dynamic_shared_bytes + 127) / 128 * 128;
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

    // Stacks that all began at the same offset of a page would share a few sets of the cache.
    size_t colour = i % 32 * 192;
    auto** top = reinterpret_cast<void**>(stacks_ + (i + 1) * STACK_BYTES - colour);
    *--top = nullptr;  // keeps the stack 16-byte aligned at the first call
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(emulator_start_fiber);
    *--top = nullptr;  // rbp
    *--top = nullptr;  // rbx
    *--top = reinterpret_cast<void*>(launch->kernel->run);                    // r12
    *--top = const_cast<void**>(launch->parameters.data());                   // r13
    *--top = reinterpret_cast<void*>(exit_thread);                            // r14
    *--top = &thread;                                                         // r15
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

// False when the block is done. As on a GPU, all threads must come to a barrier: one that has exited will not.
bool Block::open_barrier() {
    unsigned existing = 0, waiting = 0, exited = 0;
    unsigned n_threads = launch->block.x * launch->block.y * launch->block.z;
    for (unsigned i = 0; i < n_warps; i++) {
        existing += LANES;
        waiting += __builtin_popcount(warps[i].at_barrier);
        exited += __builtin_popcount(warps[i].exited);
    }
    if (exited == existing) return false;
    if (waiting != n_threads) report_deadlock();
    for (unsigned i = 0; i < n_warps; i++) {
        warps[i].runnable = warps[i].at_barrier;
        warps[i].at_barrier = 0;
    }
    return true;
}

void Block::report_deadlock() const {
    fprintf(stderr, "emulator: kernel %s, block %s: threads wait for one another (seed %llu)\n", launch->kernel->name,
            describe(index).c_str(), environment().seed);
    unsigned n_threads = launch->block.x * launch->block.y * launch->block.z;
    auto state = [&](unsigned i) -> std::string {
        const ScheduledWarp& warp = warps[i / LANES];
        unsigned lane = i % LANES;
        if (warp.exited >> lane & 1) return "have exited";
        if (warp.at_barrier >> lane & 1) return "wait at __syncthreads";
        char mask[16];
        snprintf(mask, sizeof mask, "%08x", warp.masks[lane]);
        return std::string("wait at ") + warp.operations[lane] + " for the lanes " + mask;
    };
    for (unsigned first = 0, next; first < n_threads; first = next) {
        for (next = first + 1; next < n_threads && state(next) == state(first);) next++;
        fprintf(stderr, "emulator:   threads %u to %u %s\n", first, next - 1, state(first).c_str());
    }
    abort();
}

// === Workers ===

// The blocks of one launch, which OS threads take one by one.
struct Job {
    const Launch* launch;
    unsigned long long seed;
    unsigned n_blocks;
    unsigned stride;  // prime to n_blocks: i * stride goes through all blocks
    std::atomic<unsigned> next{0};
    unsigned n_helpers = 0;  // under the mutex of the pool
};

// Blocks at rest. A thousand stacks with their guard pages are too dear to make for every launch, and there may be more
// OS threads in the process than run blocks at a time.
class BlockPool {
  public:
    Block* take() {
        std::lock_guard lock(mutex_);
        if (blocks_.empty()) return new Block;
        Block* block = blocks_.back();
        blocks_.pop_back();
        return block;
    }
    void give_back(Block* block) {
        std::lock_guard lock(mutex_);
        blocks_.push_back(block);
    }

  private:
    std::mutex mutex_;
    std::vector<Block*> blocks_;
};

void run_blocks(Job& job) {
    static BlockPool* pool = new BlockPool;  // never destroyed: OS threads may run until the process ends
    Block* block = pool->take();
    running_block = block;
    const Dim3& grid = job.launch->grid;
    for (unsigned i; (i = job.next.fetch_add(1)) < job.n_blocks;) {
        unsigned b = static_cast<unsigned long long>(i) * job.stride % job.n_blocks;
        block->run(*job.launch, {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)}, Random(job.seed + b));
    }
    running_block = nullptr;
    pool->give_back(block);
}

// OS threads that help whoever runs a launch. They are never joined: the process may exit at any time.
class Pool {
  public:
    explicit Pool(unsigned n_helpers) {
        for (unsigned i = 0; i < n_helpers; i++) std::thread([this] { help(); }).detach();
    }

    void run(Job& job) {
        {
            std::lock_guard lock(mutex_);
            jobs_.push_back(&job);
        }
        if (job.n_blocks > 1) work_.notify_all();
        run_blocks(job);
        std::unique_lock lock(mutex_);
        jobs_.remove(&job);
        done_.wait(lock, [&] { return job.n_helpers == 0; });
    }

  private:
    void help() {
        std::unique_lock lock(mutex_);
        for (;;) {
            Job* job = nullptr;
            for (Job* candidate : jobs_) {
                if (candidate->next.load() < candidate->n_blocks) job = candidate;
            }
            if (!job) {
                work_.wait(lock);
                continue;
            }
            job->n_helpers++;
            lock.unlock();
            run_blocks(*job);
            lock.lock();
            job->n_helpers--;
            done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable work_, done_;
    std::list<Job*> jobs_;
};

// === Matrix products ===

typedef float Row __attribute__((vector_size(32)));  // of 8 elements

void widen(const unsigned* pairs, bool f16, float (&wide)[64]) {
    const auto* halves = reinterpret_cast<const unsigned short*>(pairs);
    if (f16) {
        for (int i = 0; i < 64; i++) {
            _Float16 half;
            memcpy(&half, &halves[i], 2);
            wide[i] = half;
        }
    } else {
        for (int i = 0; i < 64; i++) {
            unsigned bits = static_cast<unsigned>(halves[i]) << 16;
            memcpy(&wide[i], &bits, 4);
        }
    }
}

// Each element sums in the order of k, starting from what it holds, and rounds after each product: `fma` of halves.
void multiply(Warp* warp, bool f16) {
    float transposed[64], a[64];
    Row b[16];
    for (int half = 0; half < 2; half++) {
        widen(warp->b[half], f16, transposed);
        for (int k = 0; k < 8; k++) {
            for (int column = 0; column < 8; column++) b[8 * half + k][column] = transposed[8 * column + k];
        }
    }
    for (int half = 0; half < 2; half++) {
        Row d[8];
        memcpy(d, warp->d[half], sizeof d);
        for (int k_half = 0; k_half < 2; k_half++) {
            widen(warp->a[2 * k_half + half], f16, a);
            for (int k = 0; k < 8; k++) {
                for (int row = 0; row < 8; row++) {
                    Row broadcast = a[8 * row + k] - Row{};
                    d[row] = __builtin_ia32_vfmaddps256(broadcast, b[8 * k_half + k], d[row]);
                }
            }
        }
        memcpy(warp->d[half], d, sizeof d);
    }
}

// === Faults ===

struct sigaction previous_actions[NSIG];

void report_fault(int signal, siginfo_t* info, void* context) {
    if (Block* block = running_block; block && block->current) {
        char text[512];
        int n = snprintf(text, sizeof text, "emulator: kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s at address %p\n",
                         block->launch->kernel->name, block->index.x, block->index.y, block->index.z,
                         block->current->thread_idx.x, block->current->thread_idx.y, block->current->thread_idx.z,
                         signal == SIGILL ? "misaligned or out of an array's bounds" : "no such memory", info->si_addr);
        (void)!write(STDERR_FILENO, text, n);
        signal = SIGABRT;
        abort();
    }
    const struct sigaction& previous = previous_actions[signal];
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else {
        sigaction(signal, &previous, nullptr);  // the instruction faults again
    }
}

}  // namespace

const Runtime runtime = {meet, barrier, multiply, fail};

void run_launch(const Launch& launch) {
    static Pool* pool = new Pool(environment().n_threads - 1);
    static std::atomic<unsigned long long> n_launches{0};
    Job job;
    job.launch = &launch;
    job.n_blocks = launch.grid.x * launch.grid.y * launch.grid.z;
    job.seed = Random(environment().seed + n_launches++).next();
    do {
        job.stride = Random(job.seed++).below(job.n_blocks) + 1;
    } while (std::gcd(job.stride, job.n_blocks) != 1);
    pool->run(job);
}

void install_fault_reports() {
    struct sigaction action = {};
    action.sa_sigaction = report_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int signal : {SIGSEGV, SIGBUS, SIGILL}) sigaction(signal, &action, &previous_actions[signal]);
}

}  // namespace emulator
