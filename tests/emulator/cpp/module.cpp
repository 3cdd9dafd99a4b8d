#include "module.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "environment.h"
#include "launch.h"

namespace emulator {
namespace {

constexpr size_t DYNAMIC_SHARED_BYTES_DEFAULT = 48 << 10;  // more must be asked for with cuFuncSetAttribute

// The driver API gives no size; the linker puts the section headers last.
size_t image_bytes(const void* image) {
    const auto* header = static_cast<const Elf64_Ehdr*>(image);
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return 0;
    return header->e_shoff + size_t(header->e_shentsize) * header->e_shnum;
}

// The file stays open as long as the module: dlopen takes a name that it has seen for what it has loaded by it, and the
// number of a closed file is given out again.
bool open_image(LoadedModule& loaded, const void* image, size_t bytes) {
    loaded.image = memfd_create("emulated kernels", MFD_CLOEXEC);
    if (loaded.image < 0 || write(loaded.image, image, bytes) != static_cast<ssize_t>(bytes)) return false;
    loaded.handle = dlopen(("/proc/self/fd/" + std::to_string(loaded.image)).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!loaded.handle) fprintf(stderr, "emulator: %s\n", dlerror());
    return loaded.handle;
}

// sm_90 code runs on 9.x with x >= 0; sm_90a on 9.0 alone.
bool runs_here(const char* architecture) {
    char* end;
    long built_for = strtol(architecture, &end, 10);
    long here = environment().architecture;
    return *end ? built_for == here : built_for / 10 == here / 10 && built_for <= here;
}

// The __shared__ variables are the thread-local storage of the shared object.
void find_shared_memory(LoadedModule& loaded) {
    struct Search {
        const unsigned char* address;  // allocates the calling thread's copy
        LoadedModule& loaded;
        Elf64_Addr base;
    } search = {loaded.module->shared_memory(), loaded, 0};
    link_map* map;
    dlinfo(loaded.handle, RTLD_DI_LINKMAP, &map);
    search.base = map->l_addr;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto& search = *static_cast<Search*>(data);
            if (info->dlpi_addr != search.base) return 0;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                if (info->dlpi_phdr[i].p_type == PT_TLS) search.loaded.shared_bytes = info->dlpi_phdr[i].p_memsz;
            }
            search.loaded.shared_offset = search.address - static_cast<unsigned char*>(info->dlpi_tls_data);
            return 1;
        },
        &search);
}

}  // namespace

LoadedModule::~LoadedModule() {
    if (handle) dlclose(handle);
    if (image >= 0) close(image);
}

std::unique_ptr<LoadedModule> load_module(const void* image, CUresult& error) {
    error = CUDA_ERROR_INVALID_IMAGE;
    size_t bytes = image_bytes(image);
    if (bytes == 0) return nullptr;

    error = CUDA_ERROR_NO_BINARY_FOR_GPU;
    auto loaded = std::make_unique<LoadedModule>();
    if (!open_image(*loaded, image, bytes)) return nullptr;
    loaded->module = static_cast<const Module*>(dlsym(loaded->handle, "emulator_module"));
    if (!loaded->module || strcmp(loaded->module->version, EMULATOR_VERSION) != 0) return nullptr;
    if (!runs_here(loaded->module->architecture)) return nullptr;

    *loaded->module->runtime = &runtime;
    find_shared_memory(*loaded);
    for (unsigned i = 0; i < loaded->module->n_kernels; i++) {
        loaded->functions.push_back(std::make_unique<Function>(
            Function{loaded.get(), &loaded->module->kernels[i], DYNAMIC_SHARED_BYTES_DEFAULT}));
    }
    error = CUDA_SUCCESS;
    return loaded;
}

}  // namespace emulator
