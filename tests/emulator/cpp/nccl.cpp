// A libnccl.so.2 for machines without GPUs: the functions that Lockstep uses, between the threads and processes of one
// host. Device memory is what the fake driver makes of it, host memory; a call runs on its stream by cuLaunchHostFunc,
// the only thing asked of the driver beside the current device.
//
// It is as awkward as the real one (NCCL 2.29, src/init.cc and src/group.cc) where that matters to whoever calls it:
// a communicator is brought up, and a call put on its stream, by a thread of its own; until then its state is "in
// progress" and to use it is an error; nobody notices that a peer makes another call or has died, so that its call spins
// until it is aborted; two ranks on one device are refused; and a communicator does not come to its end, not even by an
// abort, before the graphs that have captured its calls are destroyed (commDestroySync, localPersistentRefs).
//
// Ranks exchange bytes through rings in shared memory, one for each ordered pair. The segment is named by the unique id
// and loses its name once all ranks have come.
//
// The environment makes it misbehave. Operations are counted by communicator, from 1; a group is one.
//   LOCKSTEP_EMULATOR_NCCL_VERSION=23000   what ncclGetVersion says; 22907 otherwise
//   LOCKSTEP_EMULATOR_NCCL_INIT_DELAY_MS=n  a communicator is brought up that much later
//   LOCKSTEP_EMULATOR_NCCL_HANG_AT=n       the n-th operation never ends on the device
//   LOCKSTEP_EMULATOR_NCCL_STALL_AT=n      the n-th operation never comes to the stream
//   LOCKSTEP_EMULATOR_NCCL_FAIL_AT=n       the n-th operation ends in an asynchronous ncclRemoteError
//   LOCKSTEP_EMULATOR_NCCL_STUCK=1         to abort or to destroy a communicator never returns
//   NCCL_HOSTID, NCCL_MULTI_RANK_GPU_ENABLE  as NCCL: who may share a device

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "libcuda.h"

namespace {

enum Result {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

struct UniqueId {
  char internal[128];
};

struct Config {
  size_t size;
  unsigned magic;
  unsigned version;
  int blocking;
};

// === the environment ===

constexpr const char* kPrefix = "LOCKSTEP_EMULATOR_NCCL_";

long env_number(const char* name, long otherwise) {
  const char* value = getenv((std::string(kPrefix) + name).c_str());
  return value ? atol(value) : otherwise;
}

int library_version() { return static_cast<int>(env_number("VERSION", 22907)); }

std::mutex last_error_lock;
char last_error[256];

Result fail(Result code, const char* text) {
  std::lock_guard<std::mutex> hold(last_error_lock);
  snprintf(last_error, sizeof last_error, "%s", text);
  return code;
}

// === the driver ===

// What tells devices of one host apart.
uint64_t current_device() {
  int device = 0;
  auto get = driver<int (*)(int*)>("cuCtxGetDevice");
  if (get) get(&device);
  char uuid[16];
  auto get_uuid = driver<int (*)(char*, int)>("cuDeviceGetUuid");
  if (!get_uuid || get_uuid(uuid, device) != 0) return static_cast<uint64_t>(device);
  uint64_t halves[2];
  memcpy(halves, uuid, sizeof halves);
  return halves[0] ^ (halves[1] * 0x9e3779b97f4a7c15u);
}

uint64_t host() {
  const char* id = getenv("NCCL_HOSTID");
  return std::hash<std::string>()(id ? id : "this host");
}

// === shared memory ===

constexpr int kMaxRanks = 64;
constexpr size_t kRingBytes = 1 << 14;

// What one rank has written for another, of which the other has read a part.
struct Ring {
  std::atomic<uint64_t> written;
  std::atomic<uint64_t> read;
  char bytes[kRingBytes];
};

struct Seat {
  std::atomic<uint32_t> taken;
  uint64_t device;
  uint64_t host;
};

struct Segment {
  std::atomic<uint32_t> arrived;
  Seat seats[kMaxRanks];
  Ring rings[1];  // [n_ranks * n_ranks], from * n_ranks + to
};

size_t segment_bytes(int n_ranks) { return sizeof(Segment) + sizeof(Ring) * n_ranks * n_ranks; }

void pause_after(int turn) {
  if (turn < 200) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

// === communicators ===

struct Comm {
  int rank = 0;
  int n_ranks = 0;
  std::string name;
  void* context = nullptr;
  Segment* segment = nullptr;
  std::atomic<int> state{kInProgress};
  std::atomic<bool> aborted{false};
  std::atomic<int> waiting{0};  // operations that lie on a stream
  std::atomic<int> running{0};  // of those, what the stream has come to
  std::atomic<int> in_graphs{0};  // operations that graphs hold
  long n_operations = 0;
  std::thread job;

  ~Comm() {
    if (segment) munmap(segment, segment_bytes(n_ranks));
  }

  Ring& ring(int from, int to) { return segment->rings[from * n_ranks + to]; }

  void join() {
    if (job.joinable()) job.join();
  }
};

// Never destroyed: at the end of the process threads may still be in them.
std::mutex& comms_lock = *new std::mutex;
std::map<void*, std::shared_ptr<Comm>>& comms = *new std::map<void*, std::shared_ptr<Comm>>;

std::shared_ptr<Comm> find(void* handle) {
  std::lock_guard<std::mutex> hold(comms_lock);
  auto found = comms.find(handle);
  return found == comms.end() ? nullptr : found->second;
}

void spin_until_aborted(Comm& comm) {
  for (int turn = 0; !comm.aborted; ++turn) pause_after(turn);
}

void await_graphs(Comm& comm) {
  for (int turn = 0; comm.in_graphs > 0; ++turn) pause_after(turn);
}

bool open_segment(Comm& comm) {
  int file = shm_open(comm.name.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0) return false;
  const size_t bytes = segment_bytes(comm.n_ranks);
  void* memory = ftruncate(file, static_cast<off_t>(bytes)) == 0
                     ? mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)
                     : MAP_FAILED;
  close(file);
  if (memory == MAP_FAILED) return false;
  comm.segment = static_cast<Segment*>(memory);
  return true;
}

bool may_share_devices() {
  const char* enabled = getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  return library_version() >= 23000 && enabled && atoi(enabled) == 1;
}

Result check_devices(Comm& comm) {
  if (may_share_devices()) return kSuccess;
  for (int a = 0; a < comm.n_ranks; ++a) {
    for (int b = a + 1; b < comm.n_ranks; ++b) {
      const Seat &one = comm.segment->seats[a], &other = comm.segment->seats[b];
      if (one.device == other.device && one.host == other.host) {
        char text[128];
        snprintf(text, sizeof text, "Duplicate GPU detected : rank %d and rank %d both on CUDA device %llx", a, b,
                 static_cast<unsigned long long>(one.device));
        return fail(kInvalidUsage, text);
      }
    }
  }
  return kSuccess;
}

// Brings a communicator up, on its job's thread.
Result bring_up(Comm& comm, uint64_t device) {
  const auto start = std::chrono::steady_clock::now();
  const auto delay = std::chrono::milliseconds(env_number("INIT_DELAY_MS", 0));
  for (int turn = 1000; std::chrono::steady_clock::now() - start < delay; ++turn) {
    if (comm.aborted) return kSystemError;
    pause_after(turn);
  }
  if (!open_segment(comm)) return fail(kSystemError, "cannot open shared memory");
  Seat& seat = comm.segment->seats[comm.rank];
  if (seat.taken.exchange(1)) return fail(kInvalidUsage, "the rank has come before");
  seat.device = device;
  seat.host = host();
  ++comm.segment->arrived;
  for (int turn = 0; comm.segment->arrived < static_cast<uint32_t>(comm.n_ranks); ++turn) {
    if (comm.aborted) {
      shm_unlink(comm.name.c_str());
      return kSystemError;
    }
    pause_after(turn);
  }
  shm_unlink(comm.name.c_str());
  return check_devices(comm);
}

// === operations ===

// Bytes from this rank to a peer, or from a peer to this rank, in the order of the pair's ring.
struct Stretch {
  bool send;
  int peer;
  char* bytes;
  size_t length;
  size_t moved = 0;
};

// One group of calls on a communicator.
struct Operation {
  std::shared_ptr<Comm> comm;
  void* stream = nullptr;
  long number = 0;
  bool captured = false;  // in a graph, which may run it again and again, and has it freed
  std::vector<Stretch> stretches;
  std::vector<std::vector<char>> own;  // memory of the operation's own, that stretches point to
  std::vector<std::pair<char*, std::vector<float>>> sums;  // where sums go, and this rank's terms
  size_t count = 0;
};

size_t size_of(int type) {
  constexpr size_t kSizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type >= 0 && type < 10 ? kSizes[type] : 0;
}

// Moves what can be moved now. Returns whether anything was.
bool move(Comm& comm, Stretch& stretch) {
  Ring& ring = stretch.send ? comm.ring(comm.rank, stretch.peer) : comm.ring(stretch.peer, comm.rank);
  const uint64_t written = ring.written.load(std::memory_order_acquire);
  const uint64_t read = ring.read.load(std::memory_order_acquire);
  const size_t room = stretch.send ? kRingBytes - (written - read) : written - read;
  const uint64_t position = (stretch.send ? written : read) % kRingBytes;
  size_t n = std::min(std::min(room, stretch.length - stretch.moved), kRingBytes - static_cast<size_t>(position));
  if (n == 0) return false;
  if (stretch.send) {
    memcpy(ring.bytes + position, stretch.bytes + stretch.moved, n);
    ring.written.store(written + n, std::memory_order_release);
  } else {
    memcpy(stretch.bytes + stretch.moved, ring.bytes + position, n);
    ring.read.store(read + n, std::memory_order_release);
  }
  stretch.moved += n;
  return true;
}

// Moves all stretches, those of one ring in their order.
void move_all(Operation& operation) {
  Comm& comm = *operation.comm;
  for (int turn = 0; !comm.aborted;) {
    bool moved = false, done = true;
    std::vector<bool> blocked(2 * comm.n_ranks, false);
    for (Stretch& stretch : operation.stretches) {
      const size_t ring = 2 * stretch.peer + stretch.send;
      if (stretch.moved == stretch.length || blocked[ring]) continue;
      while (move(comm, stretch)) moved = true;
      if (stretch.moved < stretch.length) {
        done = false;
        blocked[ring] = true;
      }
    }
    if (done) return;
    turn = moved ? 0 : turn + 1;
    pause_after(turn);
  }
}

// Adds the terms of all ranks up, in an order that differs from rank order on purpose: nobody may count on one.
void add_up(Operation& operation) {
  size_t next = 0;
  for (auto& [out, terms] : operation.sums) {
    std::vector<float> sum(terms);
    for (int peer = 1; peer < operation.comm->n_ranks; ++peer, ++next) {
      const std::vector<char>& theirs = operation.own[next];
      for (size_t i = 0; i < sum.size(); ++i) {
        float term;
        memcpy(&term, theirs.data() + i * sizeof term, sizeof term);
        sum[i] += term;
      }
    }
    memcpy(out, sum.data(), sum.size() * sizeof(float));
  }
}

// Carries an operation out, when its stream has come to it.
void run(void* data) {
  auto* operation = static_cast<Operation*>(data);
  std::shared_ptr<Comm> comm = operation->comm;
  ++comm->running;
  if (operation->number == env_number("HANG_AT", -1)) spin_until_aborted(*comm);
  if (operation->number == env_number("FAIL_AT", -1) && !comm->aborted) {
    comm->state = fail(kRemoteError, "connection closed by remote peer");
    spin_until_aborted(*comm);
  }
  if (!comm->aborted) {
    for (Stretch& stretch : operation->stretches) stretch.moved = 0;
    // What a rank gives to an all-reduce is what is there now, not what was when the call was made.
    for (auto& [out, terms] : operation->sums) memcpy(terms.data(), out, terms.size() * sizeof(float));
    move_all(*operation);
    if (!comm->aborted) add_up(*operation);
  }
  --comm->running;
  if (operation->captured) return;
  --comm->waiting;
  delete operation;
}

// A graph that holds the operation is gone.
void forget(void* data) {
  auto* operation = static_cast<Operation*>(data);
  std::shared_ptr<Comm> comm = operation->comm;
  delete operation;
  --comm->in_graphs;
}

// Has the graph that a stream captures free the operation.
bool leave_to_graph(Operation* operation) {
  auto capture_info = driver<int (*)(void*, int*, uint64_t*, void**, const void***, size_t*)>("cuStreamGetCaptureInfo_v2");
  auto create = driver<int (*)(void**, void*, void (*)(void*), unsigned, unsigned)>("cuUserObjectCreate");
  auto retain = driver<int (*)(void*, void*, unsigned, unsigned)>("cuGraphRetainUserObject");
  int status = 0;
  uint64_t id = 0;
  void *graph = nullptr, *object = nullptr;
  constexpr unsigned kMove = 1;
  if (!capture_info || !create || !retain) return false;
  if (capture_info(operation->stream, &status, &id, &graph, nullptr, nullptr) != 0 || !graph) return false;
  ++operation->comm->in_graphs;
  return create(&object, operation, forget, 1, 1) == 0 && retain(graph, object, 1, kMove) == 0;
}

// Puts an operation on its stream, on its job's thread.
void launch(Operation* operation) {
  std::shared_ptr<Comm> comm = operation->comm;
  if (operation->number == env_number("STALL_AT", -1)) {
    delete operation;
    return spin_until_aborted(*comm);
  }
  auto enter = driver<int (*)(void*)>("cuCtxSetCurrent");
  auto capturing = driver<int (*)(void*, int*)>("cuStreamIsCapturing");
  auto enqueue = driver<int (*)(void*, void (*)(void*), void*)>("cuLaunchHostFunc");
  int captured = 0;
  if (!enter || !capturing || !enqueue || enter(comm->context) != 0 || capturing(operation->stream, &captured) != 0) {
    delete operation;
    comm->state = fail(kUnhandledCudaError, "the driver does not work");
    return;
  }
  operation->captured = captured != 0;
  if (!captured) ++comm->waiting;
  // From here on the stream has it, or the graph.
  if ((captured && !leave_to_graph(operation)) || enqueue(operation->stream, run, operation) != 0) {
    if (!captured) {
      --comm->waiting;
      delete operation;
    }
    comm->state = fail(kUnhandledCudaError, "the driver does not take the call");
    return;
  }
  int expected = kInProgress;
  comm->state.compare_exchange_strong(expected, kSuccess);
}

// === groups ===

thread_local int group_depth = 0;
thread_local Result group_error = kSuccess;
thread_local std::unique_ptr<Operation> group;

Result group_end() {
  if (group_depth == 0) return fail(kInvalidUsage, "ncclGroupEnd: not in a group call.");
  if (--group_depth > 0) return kSuccess;
  std::unique_ptr<Operation> operation = std::move(group);
  const Result error = group_error;
  group_error = kSuccess;
  if (error != kSuccess || !operation) return error;
  std::shared_ptr<Comm> comm = operation->comm;
  operation->number = ++comm->n_operations;
  comm->state = kInProgress;
  comm->join();
  comm->job = std::thread([raw = operation.release()] { launch(raw); });
  return kInProgress;
}

// Adds one call to the group, or makes it one of its own.
template <class Add>
Result call(void* handle, void* stream, Add add) {
  std::shared_ptr<Comm> comm = find(handle);
  Result error = comm ? kSuccess : fail(kInvalidArgument, "no such communicator");
  if (comm && comm->state == kInProgress) {
    error = fail(kInvalidArgument, "Attempt to use communicator before the previous operation returned ncclSuccess");
  } else if (comm && comm->state != kSuccess) {
    error = static_cast<Result>(comm->state.load());
  } else if (comm && group && (group->comm != comm || group->stream != stream)) {
    error = fail(kInvalidUsage, "this fake takes one communicator and one stream in a group");
  }
  if (error != kSuccess) {
    if (group_depth > 0) group_error = error;
    return error;
  }
  ++group_depth;
  if (!group) {
    group = std::make_unique<Operation>();
    group->comm = comm;
    group->stream = stream;
  }
  add(*comm, *group);
  return group_end();
}

void copy_to_self(Operation& operation, const char* from, char* to, size_t length) {
  // Through the rank's own ring, so that it happens in the order of the stream.
  const int self = operation.comm->rank;
  operation.stretches.push_back({true, self, const_cast<char*>(from), length});
  operation.stretches.push_back({false, self, to, length});
}

}  // namespace

// === the interface ===

#define API extern "C" __attribute__((visibility("default")))

API int ncclGetVersion(int* version) {
  *version = library_version();
  return kSuccess;
}

API int ncclGetUniqueId(UniqueId* id) {
  memset(id, 0, sizeof *id);
  unsigned char random[16];
  FILE* source = fopen("/dev/urandom", "rb");
  const bool complete = source && fread(random, sizeof random, 1, source) == 1;
  if (source) fclose(source);
  if (!complete) return fail(kSystemError, "no random numbers");
  for (size_t i = 0; i < sizeof random; ++i) snprintf(id->internal + 2 * i, 3, "%02x", random[i]);
  return kSuccess;
}

API const char* ncclGetErrorString(int code) {
  switch (code) {
    case kSuccess: return "no error";
    case kUnhandledCudaError: return "unhandled cuda error";
    case kSystemError: return "unhandled system error";
    case kInvalidArgument: return "invalid argument";
    case kInvalidUsage: return "invalid usage";
    case kRemoteError: return "remote process exited or there was a network error";
    case kInProgress: return "NCCL operation in progress";
    default: return "unknown result code";
  }
}

API const char* ncclGetLastError(void*) { return last_error; }

API int ncclCommInitRankConfig(void** out, int n_ranks, UniqueId id, int rank, Config* config) {
  *out = nullptr;
  if (!config || config->magic != 0xcafebeef || config->size < sizeof *config || config->blocking != 0) {
    return fail(kInvalidArgument, "this fake takes a config of a non-blocking communicator");
  }
  if (n_ranks < 1 || n_ranks > kMaxRanks || rank < 0 || rank >= n_ranks) return fail(kInvalidArgument, "no such rank");
  auto comm = std::make_shared<Comm>();
  comm->rank = rank;
  comm->n_ranks = n_ranks;
  comm->context = current_context();
  comm->name = "/lockstep-fake-nccl-" + std::string(id.internal, strnlen(id.internal, 32));
  *out = comm.get();
  {
    std::lock_guard<std::mutex> hold(comms_lock);
    comms[comm.get()] = comm;
  }
  comm->job = std::thread([comm, device = current_device()] { comm->state = bring_up(*comm, device); });
  return kInProgress;
}

API int ncclCommGetAsyncError(void* handle, int* state) {
  std::shared_ptr<Comm> comm = find(handle);
  if (!comm) return fail(kInvalidArgument, "no such communicator");
  *state = comm->state;
  return kSuccess;
}

API int ncclCommFinalize(void* handle) {
  std::shared_ptr<Comm> comm = find(handle);
  if (!comm) return fail(kInvalidArgument, "no such communicator");
  if (comm->state != kSuccess) return fail(kInvalidArgument, "the communicator is not ready");
  comm->state = kInProgress;
  comm->join();
  comm->job = std::thread([comm] {
    for (int turn = 0; comm->waiting > 0 && !comm->aborted; ++turn) pause_after(turn);
    await_graphs(*comm);
    comm->state = kSuccess;
  });
  return kInProgress;
}

API int ncclCommAbort(void* handle) {
  std::shared_ptr<Comm> comm = find(handle);
  if (!comm) return fail(kInvalidArgument, "no such communicator");
  for (int turn = 0; env_number("STUCK", 0); ++turn) pause_after(turn);
  comm->aborted = true;
  comm->join();
  for (int turn = 0; comm->running > 0; ++turn) pause_after(turn);
  await_graphs(*comm);
  std::lock_guard<std::mutex> hold(comms_lock);
  comms.erase(handle);
  return kSuccess;
}

API int ncclCommDestroy(void* handle) {
  std::shared_ptr<Comm> comm = find(handle);
  if (!comm) return fail(kInvalidArgument, "no such communicator");
  if (comm->state != kSuccess) return fail(kInvalidArgument, "the communicator is not ready");
  return ncclCommAbort(handle);
}

API int ncclGroupStart() {
  ++group_depth;
  return kSuccess;
}

API int ncclGroupEnd() { return group_end(); }

API int ncclSend(const void* from, size_t count, int type, int peer, void* comm, void* stream) {
  return call(comm, stream, [&](Comm&, Operation& operation) {
    auto* bytes = static_cast<char*>(const_cast<void*>(from));
    operation.stretches.push_back({true, peer, bytes, count * size_of(type)});
  });
}

API int ncclRecv(void* to, size_t count, int type, int peer, void* comm, void* stream) {
  return call(comm, stream, [&](Comm&, Operation& operation) {
    operation.stretches.push_back({false, peer, static_cast<char*>(to), count * size_of(type)});
  });
}

API int ncclAllGather(const void* from, void* to, size_t count, int type, void* comm, void* stream) {
  return call(comm, stream, [&](Comm& comm, Operation& operation) {
    const size_t length = count * size_of(type);
    auto* mine = static_cast<char*>(const_cast<void*>(from));
    auto* all = static_cast<char*>(to);
    for (int peer = 0; peer < comm.n_ranks; ++peer) {
      if (peer == comm.rank) continue;
      operation.stretches.push_back({true, peer, mine, length});
      operation.stretches.push_back({false, peer, all + peer * length, length});
    }
    if (all + comm.rank * length != mine) copy_to_self(operation, mine, all + comm.rank * length, length);
  });
}

API int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, void* comm, void* stream) {
  return call(comm, stream, [&](Comm& comm, Operation& operation) {
    const size_t length = count * size_of(type);
    auto* mine = static_cast<char*>(const_cast<void*>(from));
    if (comm.rank != root) {
      operation.stretches.push_back({false, root, static_cast<char*>(to), length});
      return;
    }
    for (int peer = 0; peer < comm.n_ranks; ++peer) {
      if (peer != root) operation.stretches.push_back({true, peer, mine, length});
    }
    if (from != to) copy_to_self(operation, mine, static_cast<char*>(to), length);
  });
}

API int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, void* comm, void* stream) {
  if (type != 7 || op != 0 || from != to) return fail(kInvalidArgument, "this fake sums floats in place");
  return call(comm, stream, [&](Comm& comm, Operation& operation) {
    auto* values = static_cast<char*>(to);
    const size_t length = count * sizeof(float);
    operation.sums.emplace_back(values, std::vector<float>(count));
    char* mine = reinterpret_cast<char*>(operation.sums.back().second.data());
    for (int distance = 1; distance < comm.n_ranks; ++distance) {
      const int peer = (comm.rank + distance) % comm.n_ranks;
      operation.own.emplace_back(length);
      operation.stretches.push_back({true, peer, mine, length});
      operation.stretches.push_back({false, peer, operation.own.back().data(), length});
    }
  });
}
