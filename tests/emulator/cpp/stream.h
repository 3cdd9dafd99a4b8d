// Contexts, streams, events and graphs: when operations run.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "api.h"

namespace emulator {

class Stream;

// A unit of work in a stream. A result that is no success spoils the context.
using Operation = std::function<CUresult()>;

// What a stream has yet to run. Shared with the stream's OS thread, and with whoever waits for all streams of a
// context: both may be about it for a moment after the stream has been destroyed.
struct Queue {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Operation> operations;  // the first one is running
    bool closed = false;

    void wait_until_empty();
};

// The primary context of a device.
struct Context {
    explicit Context(int the_device) : device(the_device) {}

    const int device;
    // Sticky, as on a GPU: what fails in a stream fails every later call.
    std::atomic<CUresult> error{CUDA_SUCCESS};

    Stream& default_stream();
    CUresult synchronize();

  private:
    friend class Stream;
    std::mutex mutex_;
    std::set<std::shared_ptr<Queue>> queues_;  // of all streams
    std::once_flag once_;
    Stream* default_stream_;
};

// What a graph keeps for somebody else, who is told when nobody needs it any more.
struct UserObject {
    void* data;
    void (*destroy)(void*);

    UserObject(void* the_data, void (*the_destroy)(void*)) : data(the_data), destroy(the_destroy) {}
    ~UserObject() { destroy(data); }
};

// Copies, and launches that have not ended, keep what the graph does.
struct Graph {
    std::vector<Operation> operations;
    std::vector<std::shared_ptr<UserObject>> retained;
};

// An OS thread that runs operations in order, while whoever submits them goes on.
class Stream {
  public:
    explicit Stream(Context& context);
    ~Stream();  // after what was submitted

    // Queues the operation, or records it while capturing.
    void submit(Operation operation);
    // Queues operations as one: nothing else comes between.
    void submit_all(const std::vector<Operation>& operations);
    // Waits until the queue is empty.
    CUresult synchronize();
    bool idle();

    void begin_capture();
    std::unique_ptr<Graph> end_capture();  // null if there is no capture
    bool capturing();
    Graph* captured();  // so far; null if there is no capture

    Context& context;

  private:
    static void run(std::shared_ptr<Queue> queue, Context& context);

    std::shared_ptr<Queue> queue_ = std::make_shared<Queue>();
    std::mutex capture_mutex_;
    std::unique_ptr<Graph> capture_;
};

// Completed once the stream has run all that came before its last record.
class Event {
  public:
    void record(Stream& stream);
    bool completed();
    void wait();
    // Operation that makes another stream wait for what is recorded by now.
    Operation waiting();
    std::chrono::steady_clock::time_point at();

  private:
    struct State {
        std::mutex mutex;
        std::condition_variable changed;
        unsigned long long n_recorded = 0, n_completed = 0;
        std::chrono::steady_clock::time_point at;
    };
    static void wait_for(State& state, unsigned long long n);

    std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace emulator
