#include "memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulator {
namespace {

constexpr size_t PAGE_BYTES = 4096;
constexpr size_t ALIGNMENT = 256;  // as the driver promises
constexpr unsigned char POISON = 0xff;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

void* Memory::allocate(Place place, int device, size_t bytes) {
    size_t usable = round_up(bytes, PAGE_BYTES);
    size_t mapping_bytes = usable + PAGE_BYTES;
    void* mapping =
        mmap(nullptr, mapping_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return nullptr;
    unsigned char* guard = static_cast<unsigned char*>(mapping) + usable;
    mprotect(guard, PAGE_BYTES, PROT_NONE);
    unsigned char* start = guard - round_up(bytes, ALIGNMENT);
    memset(start, POISON, guard - start);
    std::lock_guard lock(mutex_);
    allocations_[start] = {place, device, bytes, mapping, mapping_bytes};
    return start;
}

bool Memory::free(Place place, void* at) {
    Allocation allocation;
    {
        std::lock_guard lock(mutex_);
        auto found = allocations_.find(static_cast<unsigned char*>(at));
        if (found == allocations_.end() || found->second.place != place) return false;
        allocation = found->second;
        allocations_.erase(found);
    }
    const auto* start = static_cast<const unsigned char*>(at);
    for (size_t i = allocation.bytes; i < round_up(allocation.bytes, ALIGNMENT); i++) {
        if (start[i] == POISON) continue;
        fprintf(stderr, "emulator: byte %zu of an allocation of %zu bytes was written\n", i, allocation.bytes);
        abort();
    }
    munmap(allocation.mapping, allocation.mapping_bytes);
    return true;
}

bool Memory::contains(Place place, const void* at, size_t bytes) {
    std::lock_guard lock(mutex_);
    const auto* first = static_cast<const unsigned char*>(at);
    auto after = allocations_.upper_bound(first);
    if (after == allocations_.begin()) return false;
    const auto& [start, allocation] = *--after;
    size_t offset = first - start;
    return allocation.place == place && offset <= allocation.bytes && bytes <= allocation.bytes - offset;
}

size_t Memory::bytes_on(int device) {
    std::lock_guard lock(mutex_);
    size_t sum = 0;
    for (const auto& [_, allocation] : allocations_) {
        if (allocation.place == Place::Device && allocation.device == device) sum += allocation.bytes;
    }
    return sum;
}

Memory& memory() {
    static Memory* whole_process = new Memory;  // never destroyed: OS threads may run until the process ends
    return *whole_process;
}

}  // namespace emulator
