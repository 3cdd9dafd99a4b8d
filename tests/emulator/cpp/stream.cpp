#include "stream.h"

#include <thread>

namespace emulator {

// === impl Context ===

Stream& Context::default_stream() {
    std::call_once(once_, [this] { default_stream_ = new Stream(*this); });
    return *default_stream_;
}

CUresult Context::synchronize() {
    std::set<std::shared_ptr<Queue>> queues;
    {
        std::lock_guard lock(mutex_);
        queues = queues_;
    }
    for (const auto& queue : queues) queue->wait_until_empty();
    return error;
}

// === impl Queue ===

void Queue::wait_until_empty() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return operations.empty(); });
}

// === impl Stream ===

Stream::Stream(Context& the_context) : context(the_context) {
    std::lock_guard lock(context.mutex_);
    context.queues_.insert(queue_);
    std::thread(run, queue_, std::ref(context)).detach();
}

Stream::~Stream() {
    queue_->wait_until_empty();
    {
        std::lock_guard lock(context.mutex_);
        context.queues_.erase(queue_);
    }
    std::lock_guard lock(queue_->mutex);
    queue_->closed = true;
    queue_->changed.notify_all();
}

void Stream::run(std::shared_ptr<Queue> queue, Context& context) {
    std::unique_lock lock(queue->mutex);
    for (;;) {
        queue->changed.wait(lock, [&] { return queue->closed || !queue->operations.empty(); });
        if (queue->operations.empty()) return;
        Operation& operation = queue->operations.front();  // a deque's elements stay where they are
        lock.unlock();
        if (CUresult result = operation(); result != CUDA_SUCCESS) {
            CUresult none = CUDA_SUCCESS;
            context.error.compare_exchange_strong(none, result);
        }
        lock.lock();
        queue->operations.pop_front();
        if (queue->operations.empty()) queue->changed.notify_all();
    }
}

void Stream::submit(Operation operation) {
    {
        std::lock_guard lock(capture_mutex_);
        if (capture_) return capture_->operations.push_back(std::move(operation));
    }
    submit_all({std::move(operation)});
}

void Stream::submit_all(const std::vector<Operation>& operations) {
    std::lock_guard lock(queue_->mutex);
    queue_->operations.insert(queue_->operations.end(), operations.begin(), operations.end());
    queue_->changed.notify_all();
}

CUresult Stream::synchronize() {
    queue_->wait_until_empty();
    return context.error;
}

bool Stream::idle() {
    std::lock_guard lock(queue_->mutex);
    return queue_->operations.empty();
}

void Stream::begin_capture() {
    std::lock_guard lock(capture_mutex_);
    capture_ = std::make_unique<Graph>();
}

std::unique_ptr<Graph> Stream::end_capture() {
    std::lock_guard lock(capture_mutex_);
    return std::move(capture_);
}

bool Stream::capturing() { return captured() != nullptr; }

Graph* Stream::captured() {
    std::lock_guard lock(capture_mutex_);
    return capture_.get();
}

// === impl Event ===

void Event::record(Stream& stream) {
    unsigned long long n;
    {
        std::lock_guard lock(state_->mutex);
        n = ++state_->n_recorded;
    }
    stream.submit([state = state_, n] {
        std::lock_guard lock(state->mutex);
        state->n_completed = n;
        state->at = std::chrono::steady_clock::now();
        state->changed.notify_all();
        return CUDA_SUCCESS;
    });
}

bool Event::completed() {
    std::lock_guard lock(state_->mutex);
    return state_->n_completed == state_->n_recorded;
}

void Event::wait_for(State& state, unsigned long long n) {
    std::unique_lock lock(state.mutex);
    state.changed.wait(lock, [&] { return state.n_completed >= n; });
}

void Event::wait() { waiting()(); }

Operation Event::waiting() {
    std::lock_guard lock(state_->mutex);
    return [state = state_, n = state_->n_recorded] {
        wait_for(*state, n);
        return CUDA_SUCCESS;
    };
}

std::chrono::steady_clock::time_point Event::at() {
    std::lock_guard lock(state_->mutex);
    return state_->at;
}

}  // namespace emulator
