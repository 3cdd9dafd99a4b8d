#include "launch.h"

#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>
#include <numeric>
#include <thread>

#include "block.h"
#include "environment.h"
#include "fault.h"
#include "random.h"

namespace emulator {
namespace {

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
    watch_faults(block);
    const Dim3& grid = job.launch->grid;
    for (unsigned i; (i = job.next.fetch_add(1)) < job.n_blocks;) {
        unsigned b = static_cast<unsigned long long>(i) * job.stride % job.n_blocks;
        block->run(*job.launch, {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)}, Random(job.seed + b));
    }
    watch_faults(nullptr);
    pool->give_back(block);
}

// OS threads that help whoever runs a launch. They are never joined: the process may exit at any time.
class Helpers {
  public:
    explicit Helpers(unsigned n) {
        for (unsigned i = 0; i < n; i++) std::thread([this] { help(); }).detach();
    }

    void run(Job& job) {
        if (job.n_blocks == 1) return run_blocks(job);
        {
            std::lock_guard lock(mutex_);
            jobs_.push_back(&job);
        }
        work_.notify_all();
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
                if (candidate->next < candidate->n_blocks) job = candidate;
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

}  // namespace

void run_launch(const Launch& launch) {
    static Helpers* helpers = new Helpers(environment().n_threads - 1);
    static std::atomic<unsigned long long> n_launches{0};
    Random random(environment().seed + n_launches++);
    Job job;
    job.launch = &launch;
    job.seed = random.next();
    job.n_blocks = launch.grid.x * launch.grid.y * launch.grid.z;
    do {
        job.stride = random.below(job.n_blocks) + 1;
    } while (std::gcd(job.stride, job.n_blocks) != 1);
    helpers->run(job);
}

}  // namespace emulator
