// Compiled kernels, loaded: what `cuModuleLoadData` takes is the shared object that the fake NVRTC made.
#pragma once

#include <memory>
#include <vector>

#include "api.h"
#include "machine.h"

namespace emulator {

struct LoadedModule;

// A CUfunction.
struct Function {
    const LoadedModule* module;
    const Kernel* kernel;
    size_t dynamic_shared_bytes_max;
};

struct LoadedModule {
    ~LoadedModule();

    int image = -1;          // file descriptor of the shared object
    void* handle = nullptr;  // of dlopen
    const Module* module = nullptr;
    // Where an OS thread's copy of the __shared__ variables begins, before `module->shared_memory()`, and its size.
    size_t shared_offset = 0, shared_bytes = 0;
    std::vector<std::unique_ptr<Function>> functions;
};

// Null result on failure, with the reason in `error`.
std::unique_ptr<LoadedModule> load_module(const void* image, CUresult& error);

}  // namespace emulator
