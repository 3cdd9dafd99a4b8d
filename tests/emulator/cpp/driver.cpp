// The CUDA driver API, as far as Lockstep and cudarc call it. Handles are pointers to our objects. A call checks what a
// driver would check, and does what the files beside this one do.

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

#include "api.h"
#include "environment.h"
#include "fault.h"
#include "launch.h"
#include "memory.h"
#include "module.h"
#include "stream.h"

using namespace emulator;

#define API extern "C" __attribute__((visibility("default")))
#define CHECK(expression) \
    if (CUresult check_result = (expression); check_result != CUDA_SUCCESS) return check_result

namespace {

constexpr size_t STATIC_SHARED_BYTES_MAX = 48 << 10;
constexpr size_t RESERVED_SHARED_BYTES = 1 << 10;  // per block, by the system
constexpr int MULTIPROCESSORS = 2;
constexpr int BLOCKS_PER_MULTIPROCESSOR_MAX = 32;
constexpr int THREADS_PER_MULTIPROCESSOR_MAX = 2048;

std::atomic<bool> initialized{false};
std::atomic<unsigned long long> n_overlapping{0};
thread_local Context* current_context = nullptr;

Context* context_of(CUdevice device) {
    static auto* contexts = [] {  // never destroyed: streams' OS threads use them until the process ends
        auto* all = new std::vector<std::unique_ptr<Context>>;
        for (int i = 0; i < environment().n_devices; i++) all->push_back(std::make_unique<Context>(i));
        return all;
    }();
    if (device < 0 || static_cast<size_t>(device) >= contexts->size()) return nullptr;
    return (*contexts)[device].get();
}

CUresult check_device(CUdevice device) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    return context_of(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

// Every call that works on the current context begins with this.
CUresult check_context() {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    return current_context->error;
}

// Null and the two predefined handles are the default stream.
Stream& resolve(Stream* stream) {
    return reinterpret_cast<size_t>(stream) <= 2 ? current_context->default_stream() : *stream;
}

CUresult check_no_capture(Stream& stream) {
    return stream.capturing() ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

// After a failure nothing runs any more, as on a GPU.
void submit(Stream& stream, Operation operation) {
    stream.submit([&context = stream.context, operation = std::move(operation)] {
        return context.error == CUDA_SUCCESS ? operation() : CUDA_SUCCESS;
    });
}

size_t dynamic_shared_bytes_max() { return (environment().architecture >= 90 ? 227 : 163) << 10; }

void* pointer(CUdeviceptr at) { return reinterpret_cast<void*>(at); }

CUresult check_device_memory(CUdeviceptr at, size_t bytes) {
    return bytes == 0 || memory().contains(Place::Device, pointer(at), bytes) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

// === Library, devices, contexts ===

API CUresult cuInit(unsigned) {
    if (environment().n_devices == 0) return CUDA_ERROR_NO_DEVICE;
    if (!initialized.exchange(true)) install_fault_handlers();
    return CUDA_SUCCESS;
}

API CUresult cuDriverGetVersion(int* version) {
    *version = environment().driver;
    return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult result, const char** name) {
    switch (result) {
#define X(constant, value, text) \
    case constant: *name = #constant; return CUDA_SUCCESS;
        CUDA_RESULTS(X)
#undef X
    }
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuGetErrorString(CUresult result, const char** text) {
    switch (result) {
#define X(constant, value, description) \
    case constant: *text = description; return CUDA_SUCCESS;
        CUDA_RESULTS(X)
#undef X
    }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuDeviceGetCount(int* count) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    *count = environment().n_devices;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    CHECK(check_device(ordinal));
    *device = ordinal;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetName(char* name, int bytes, CUdevice device) {
    CHECK(check_device(device));
    snprintf(name, bytes, "CPU emulator of CUDA");
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetUuid_v2(unsigned char* uuid, CUdevice device) {
    CHECK(check_device(device));
    memcpy(uuid, "emulated device", 15);
    uuid[15] = static_cast<unsigned char>(device);
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetUuid(unsigned char* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }

API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    CHECK(check_device(device));
    *bytes = environment().memory_bytes;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetPCIBusId(char* id, int bytes, CUdevice device) {
    CHECK(check_device(device));
    snprintf(id, bytes, "0000:%02X:00.0", device + 1);
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    CHECK(check_device(device));
    switch (attribute) {
        case MAX_THREADS_PER_BLOCK:
        case MAX_BLOCK_DIM_X:
        case MAX_BLOCK_DIM_Y: *value = THREADS_MAX; break;
        case MAX_BLOCK_DIM_Z: *value = 64; break;
        case MAX_GRID_DIM_X: *value = 0x7fffffff; break;
        case MAX_GRID_DIM_Y:
        case MAX_GRID_DIM_Z: *value = 65535; break;
        case MAX_SHARED_MEMORY_PER_BLOCK: *value = STATIC_SHARED_BYTES_MAX; break;
        case MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = dynamic_shared_bytes_max(); break;
        case MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = dynamic_shared_bytes_max() + RESERVED_SHARED_BYTES; break;
        case RESERVED_SHARED_MEMORY_PER_BLOCK: *value = RESERVED_SHARED_BYTES; break;
        case TOTAL_CONSTANT_MEMORY: *value = 64 << 10; break;
        case WARP_SIZE: *value = LANES; break;
        case MAX_REGISTERS_PER_BLOCK:
        case MAX_REGISTERS_PER_MULTIPROCESSOR: *value = 64 << 10; break;
        case CLOCK_RATE:
        case MEMORY_CLOCK_RATE: *value = 1'000'000; break;  // kHz
        case GLOBAL_MEMORY_BUS_WIDTH: *value = 128; break;
        case L2_CACHE_SIZE: *value = 1 << 20; break;
        case MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
        case MAX_THREADS_PER_MULTIPROCESSOR: *value = THREADS_PER_MULTIPROCESSOR_MAX; break;
        case MAX_BLOCKS_PER_MULTIPROCESSOR: *value = BLOCKS_PER_MULTIPROCESSOR_MAX; break;
        case CAN_MAP_HOST_MEMORY:
        case CONCURRENT_KERNELS:
        case ASYNC_ENGINE_COUNT:
        case UNIFIED_ADDRESSING:
        case MEMORY_POOLS_SUPPORTED: *value = 1; break;
        case COMPUTE_CAPABILITY_MAJOR: *value = environment().architecture / 10; break;
        case COMPUTE_CAPABILITY_MINOR: *value = environment().architecture % 10; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(Context** context, CUdevice device) {
    CHECK(check_device(device));
    *context = context_of(device);
    return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return check_device(device); }

API CUresult cuCtxSetCurrent(Context* context) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    current_context = context;
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(Context** context) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    *context = current_context;
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice* device) {
    CHECK(check_context());
    *device = current_context->device;
    return CUDA_SUCCESS;
}

API CUresult cuCtxSynchronize() {
    CHECK(check_context());
    return current_context->synchronize();
}
API CUresult cuCtxSetFlags(unsigned) { return check_context(); }
API CUresult cuCtxSetLimit(int, size_t) { return check_context(); }

// === Memory ===

API CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    CHECK(check_context());
    *total = environment().memory_bytes;
    *free = *total - memory().bytes_on(current_context->device);
    return CUDA_SUCCESS;
}

API CUresult cuMemAlloc_v2(CUdeviceptr* at, size_t bytes) {
    CHECK(check_context());
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    int device = current_context->device;
    if (bytes > environment().memory_bytes - memory().bytes_on(device)) return CUDA_ERROR_OUT_OF_MEMORY;
    void* start = memory().allocate(Place::Device, device, bytes);
    *at = reinterpret_cast<CUdeviceptr>(start);
    return start ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

API CUresult cuMemAllocAsync(CUdeviceptr* at, size_t bytes, Stream* stream) {
    CHECK(check_context());
    CHECK(check_no_capture(resolve(stream)));
    return cuMemAlloc_v2(at, bytes);
}

API CUresult cuMemFree_v2(CUdeviceptr at) {
    CHECK(check_context());
    if (at == 0) return CUDA_SUCCESS;
    CHECK(check_device_memory(at, 1));
    CHECK(current_context->synchronize());
    return memory().free(Place::Device, pointer(at)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuMemFreeAsync(CUdeviceptr at, Stream* stream) {
    CHECK(check_context());
    CHECK(check_device_memory(at, 1));
    CHECK(check_no_capture(resolve(stream)));
    submit(resolve(stream),
           [at] { return memory().free(Place::Device, pointer(at)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; });
    return CUDA_SUCCESS;
}

API CUresult cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    CHECK(check_context());
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    *at = memory().allocate(Place::PinnedHost, current_context->device, bytes);
    return *at ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API CUresult cuMemAllocHost_v2(void** at, size_t bytes) { return cuMemHostAlloc(at, bytes, 0); }

API CUresult cuMemFreeHost(void* at) {
    CHECK(check_context());
    CHECK(current_context->synchronize());
    return memory().free(Place::PinnedHost, at) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// Pageable memory is copied before the call returns, as a driver does through its staging buffer.
API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, Stream* handle) {
    CHECK(check_context());
    CHECK(check_device_memory(to, bytes));
    Stream& stream = resolve(handle);
    if (stream.capturing() || memory().contains(Place::PinnedHost, from, bytes)) {
        submit(stream, [=] { return memcpy(pointer(to), from, bytes), CUDA_SUCCESS; });
        return CUDA_SUCCESS;
    }
    const auto* first = static_cast<const unsigned char*>(from);
    submit(stream, [to, staged = std::vector<unsigned char>(first, first + bytes)] {
        return memcpy(pointer(to), staged.data(), staged.size()), CUDA_SUCCESS;
    });
    return CUDA_SUCCESS;
}

API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, Stream* handle) {
    CHECK(check_context());
    CHECK(check_device_memory(from, bytes));
    Stream& stream = resolve(handle);
    submit(stream, [=] { return memcpy(to, pointer(from), bytes), CUDA_SUCCESS; });
    if (stream.capturing() || memory().contains(Place::PinnedHost, to, bytes)) return CUDA_SUCCESS;
    return stream.synchronize();
}

API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, Stream* stream) {
    CHECK(check_context());
    CHECK(check_device_memory(to, bytes));
    CHECK(check_device_memory(from, bytes));
    submit(resolve(stream), [=] { return memmove(pointer(to), pointer(from), bytes), CUDA_SUCCESS; });
    return CUDA_SUCCESS;
}

API CUresult cuMemcpyPeerAsync(CUdeviceptr to, Context*, CUdeviceptr from, Context*, size_t bytes, Stream* stream) {
    return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
}

API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, Stream* stream) {
    CHECK(check_context());
    CHECK(check_device_memory(to, bytes));
    submit(resolve(stream), [=] { return memset(pointer(to), value, bytes), CUDA_SUCCESS; });
    return CUDA_SUCCESS;
}

API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t n, Stream* stream) {
    CHECK(check_context());
    CHECK(check_device_memory(to, 4 * n));
    submit(resolve(stream), [=] {
        for (size_t i = 0; i < n; i++) memcpy(static_cast<unsigned*>(pointer(to)) + i, &value, 4);
        return CUDA_SUCCESS;
    });
    return CUDA_SUCCESS;
}

API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    CHECK(cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr));
    return resolve(nullptr).synchronize();
}
API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    CHECK(cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr));
    return resolve(nullptr).synchronize();
}
API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    CHECK(cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr));
    return resolve(nullptr).synchronize();
}
API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
    CHECK(cuMemsetD8Async(to, value, bytes, nullptr));
    return resolve(nullptr).synchronize();
}

// === Modules and functions ===

API CUresult cuModuleLoadData(LoadedModule** module, const void* image) {
    CHECK(check_context());
    CUresult error;
    *module = load_module(image, error).release();
    return error;
}
API CUresult cuModuleLoadDataEx(LoadedModule** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}

API CUresult cuModuleLoad(LoadedModule** module, const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    std::vector<char> image{std::istreambuf_iterator<char>(file), {}};
    return image.size() < 64 ? CUDA_ERROR_INVALID_IMAGE : cuModuleLoadData(module, image.data());
}

API CUresult cuModuleUnload(LoadedModule* module) {
    CHECK(check_context());
    CUresult result = current_context->synchronize();
    delete module;
    return result;
}

API CUresult cuModuleGetFunction(Function** function, LoadedModule* module, const char* name) {
    CHECK(check_context());
    for (const auto& candidate : module->functions) {
        if (strcmp(candidate->kernel->name, name) != 0) continue;
        *function = candidate.get();
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_FOUND;
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, Function* function) {
    CHECK(check_context());
    switch (attribute) {
        case FUNC_MAX_THREADS_PER_BLOCK: *value = function->kernel->max_threads; break;
        // Of all kernels of the module: C++ does not tell whose variable is whose.
        case FUNC_SHARED_SIZE_BYTES: *value = function->module->shared_bytes; break;
        case FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->dynamic_shared_bytes_max; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(Function* function, CUfunction_attribute attribute, int value) {
    CHECK(check_context());
    if (attribute != FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    if (value < 0 || static_cast<size_t>(value) > dynamic_shared_bytes_max()) return CUDA_ERROR_INVALID_VALUE;
    function->dynamic_shared_bytes_max = value;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetCacheConfig(Function*, int) { return check_context(); }

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n_blocks, Function* function, int block_threads,
                                                                  size_t dynamic_shared_bytes, unsigned) {
    CHECK(check_context());
    size_t shared_bytes = function->module->shared_bytes + dynamic_shared_bytes + RESERVED_SHARED_BYTES;
    size_t by_shared = (dynamic_shared_bytes_max() + RESERVED_SHARED_BYTES) / shared_bytes;
    size_t by_threads = THREADS_PER_MULTIPROCESSOR_MAX / std::max(block_threads, 1);
    *n_blocks = std::min<size_t>({by_shared, by_threads, BLOCKS_PER_MULTIPROCESSOR_MAX});
    return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n_blocks, Function* function, int block_threads,
                                                         size_t dynamic_shared_bytes) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n_blocks, function, block_threads, dynamic_shared_bytes,
                                                                0);
}

// === Launches ===

static CUresult check_launch(const Function& function, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes) {
    bool empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
    bool wide =
        grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || block.x > 1024 || block.y > 1024 || block.z > 64;
    if (empty || wide || block.x * block.y * block.z > THREADS_MAX) return CUDA_ERROR_INVALID_VALUE;
    if (dynamic_shared_bytes > function.dynamic_shared_bytes_max) return CUDA_ERROR_INVALID_VALUE;
    if (block.x * block.y * block.z > function.kernel->max_threads) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    return CUDA_SUCCESS;
}

// Parameters are copied now: the caller's may be gone when the launch runs.
static std::shared_ptr<Launch> make_launch(const Function& function, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes,
                                           void** parameters, bool overlaps) {
    constexpr size_t SLOT_BYTES = 16;  // aligned for every type
    auto launch = std::make_shared<Launch>();
    launch->module = function.module->module;
    launch->kernel = function.kernel;
    launch->image = function.module->image;
    launch->shared_offset = function.module->shared_offset;
    launch->shared_bytes = function.module->shared_bytes;
    launch->dynamic_shared_bytes = dynamic_shared_bytes;
    launch->grid = grid;
    launch->block = block;
    launch->overlaps = overlaps;

    const Kernel& kernel = *function.kernel;
    std::vector<size_t> offsets;
    size_t bytes = 0;
    for (unsigned i = 0; i < kernel.n_parameters; i++) {
        offsets.push_back(bytes);
        bytes += (kernel.parameter_sizes[i] + SLOT_BYTES - 1) / SLOT_BYTES * SLOT_BYTES;
    }
    launch->parameter_bytes.resize(bytes);
    for (unsigned i = 0; i < kernel.n_parameters; i++) {
        launch->parameters.push_back(&launch->parameter_bytes[offsets[i]]);
        memcpy(launch->parameters[i], parameters[i], kernel.parameter_sizes[i]);
    }
    return launch;
}

// Whether the attributes say that the kernel may start before the one ahead of it has ended.
static CUresult read_attributes(const CUlaunchConfig& config, bool& overlaps) {
    overlaps = false;
    for (unsigned i = 0; i < config.n_attributes; i++) {
        const CUlaunchAttribute& attribute = config.attributes[i];
        if (attribute.id != PROGRAMMATIC_STREAM_SERIALIZATION) return CUDA_ERROR_NOT_SUPPORTED;
        overlaps = attribute.value != 0;
    }
    return overlaps && environment().architecture < 90 ? CUDA_ERROR_NOT_SUPPORTED : CUDA_SUCCESS;
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, Function* function, void** parameters, void** extra) {
    CHECK(check_context());
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    bool overlaps;
    CHECK(read_attributes(*config, overlaps));
    Dim3 grid = {config->grid_x, config->grid_y, config->grid_z};
    Dim3 block = {config->block_x, config->block_y, config->block_z};
    size_t dynamic_shared_bytes = config->dynamic_shared_bytes;
    CHECK(check_launch(*function, grid, block, dynamic_shared_bytes));
    auto launch = make_launch(*function, grid, block, dynamic_shared_bytes, parameters, overlaps);
    if (overlaps) n_overlapping++;
    submit(resolve(config->stream), [launch] {
        static std::atomic<unsigned long long> n_launches{0};
        if (++n_launches == environment().fail_launch) return CUDA_ERROR_LAUNCH_FAILED;
        run_launch(*launch);
        return CUDA_SUCCESS;
    });
    return CUDA_SUCCESS;
}

API CUresult cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned dynamic_shared_bytes, Stream* stream,
                            void** parameters, void** extra) {
    CUlaunchConfig config = {grid_x,  grid_y, grid_z, block_x, block_y, block_z, dynamic_shared_bytes, stream,
                             nullptr, 0};
    return cuLaunchKernelEx(&config, function, parameters, extra);
}

// Of our own: how many launches might overlap the kernel before them, for `overlapping_launches` of `lib.rs`.
API unsigned long long emulator_overlapping_launches() { return n_overlapping; }

API CUresult cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* data) {
    CHECK(check_context());
    submit(resolve(stream), [=] { return function(data), CUDA_SUCCESS; });
    return CUDA_SUCCESS;
}

// === Streams ===

API CUresult cuStreamCreate(Stream** stream, unsigned) {
    CHECK(check_context());
    *stream = new Stream(*current_context);
    return CUDA_SUCCESS;
}
API CUresult cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

API CUresult cuStreamDestroy_v2(Stream* stream) {
    CHECK(check_context());
    delete stream;
    return CUDA_SUCCESS;
}

API CUresult cuStreamSynchronize(Stream* stream) {
    CHECK(check_context());
    CHECK(check_no_capture(resolve(stream)));
    return resolve(stream).synchronize();
}

API CUresult cuStreamQuery(Stream* stream) {
    CHECK(check_context());
    CHECK(check_no_capture(resolve(stream)));
    if (!resolve(stream).idle()) return CUDA_ERROR_NOT_READY;
    return current_context->error;
}

API CUresult cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    CHECK(check_context());
    CHECK(check_no_capture(resolve(stream)));
    resolve(stream).submit(event->waiting());
    return CUDA_SUCCESS;
}

// === Events ===

API CUresult cuEventCreate(Event** event, unsigned) {
    CHECK(check_context());
    *event = new Event;
    return CUDA_SUCCESS;
}

API CUresult cuEventDestroy_v2(Event* event) {
    CHECK(check_context());
    delete event;
    return CUDA_SUCCESS;
}

API CUresult cuEventRecord(Event* event, Stream* stream) {
    CHECK(check_context());
    CHECK(check_no_capture(resolve(stream)));
    event->record(resolve(stream));
    return CUDA_SUCCESS;
}

API CUresult cuEventQuery(Event* event) {
    CHECK(check_context());
    if (!event->completed()) return CUDA_ERROR_NOT_READY;
    return current_context->error;
}

API CUresult cuEventSynchronize(Event* event) {
    CHECK(check_context());
    event->wait();
    return current_context->error;
}

API CUresult cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    if (environment().driver < 12080) return CUDA_ERROR_NOT_SUPPORTED;  // a real one does not even have the function
    CHECK(check_context());
    if (!start->completed() || !end->completed()) return CUDA_ERROR_NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(end->at() - start->at()).count();
    return CUDA_SUCCESS;
}
API CUresult cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    CHECK(check_context());
    if (!start->completed() || !end->completed()) return CUDA_ERROR_NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(end->at() - start->at()).count();
    return CUDA_SUCCESS;
}

// === Graphs: the recorded operations, in their order ===

API CUresult cuStreamBeginCapture_v2(Stream* stream, int) {
    CHECK(check_context());
    if (reinterpret_cast<size_t>(stream) <= 2) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    CHECK(check_no_capture(*stream));
    stream->begin_capture();
    return CUDA_SUCCESS;
}

API CUresult cuStreamEndCapture(Stream* stream, Graph** graph) {
    CHECK(check_context());
    *graph = stream->end_capture().release();
    return *graph ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuStreamIsCapturing(Stream* stream, int* status) {
    CHECK(check_context());
    *status = resolve(stream).capturing() ? 1 : 0;  // active or none
    return CUDA_SUCCESS;
}

API CUresult cuStreamGetCaptureInfo_v2(Stream* stream, int* status, unsigned long long* id, Graph** graph, const void***,
                                       size_t*) {
    CHECK(check_context());
    Graph* captured = resolve(stream).captured();
    *status = captured ? 1 : 0;
    if (id) *id = reinterpret_cast<size_t>(captured);
    if (graph) *graph = captured;
    return CUDA_SUCCESS;
}

// A handle is its maker's reference, which is handed over to a graph.
API CUresult cuUserObjectCreate(std::shared_ptr<UserObject>** object, void* data, void (*destroy)(void*),
                                unsigned n_references, unsigned) {
    if (n_references != 1) return CUDA_ERROR_NOT_SUPPORTED;
    *object = new std::shared_ptr<UserObject>(std::make_shared<UserObject>(data, destroy));
    return CUDA_SUCCESS;
}

API CUresult cuGraphRetainUserObject(Graph* graph, std::shared_ptr<UserObject>* object, unsigned n_references,
                                     unsigned flags) {
    constexpr unsigned MOVE = 1;
    if (n_references != 1 || flags != MOVE) return CUDA_ERROR_NOT_SUPPORTED;
    graph->retained.push_back(std::move(*object));
    delete object;
    return CUDA_SUCCESS;
}

API CUresult cuGraphInstantiateWithFlags(Graph** executable, const Graph* graph, unsigned long long) {
    CHECK(check_context());
    if (environment().fail_graphs) return CUDA_ERROR_NOT_SUPPORTED;
    *executable = new Graph(*graph);
    return CUDA_SUCCESS;
}
API CUresult cuGraphUpload(Graph*, Stream*) { return check_context(); }

API CUresult cuGraphLaunch(Graph* executable, Stream* stream) {
    CHECK(check_context());
    CHECK(check_no_capture(resolve(stream)));
    std::vector<Operation> operations = executable->operations;
    operations.push_back([retained = executable->retained] { return CUDA_SUCCESS; });
    resolve(stream).submit_all(operations);
    return CUDA_SUCCESS;
}

API CUresult cuGraphExecDestroy(Graph* executable) {
    CHECK(check_context());
    delete executable;
    return CUDA_SUCCESS;
}
API CUresult cuGraphDestroy(Graph* graph) { return cuGraphExecDestroy(graph); }
