// The driver as other libraries know it.
#pragma once

#include <dlfcn.h>

// By name, like the real ones, so that it is whichever driver the process has.
template <class F>
F driver(const char* symbol) {
    static void* library = dlopen("libcuda.so.1", RTLD_NOW);
    return library ? reinterpret_cast<F>(dlsym(library, symbol)) : nullptr;
}

inline void* current_context() {
    void* context = nullptr;
    if (auto get = driver<int (*)(void**)>("cuCtxGetCurrent")) get(&context);
    return context;
}
