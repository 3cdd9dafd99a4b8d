// Device memory, which is host memory that knows its bounds, and pinned host memory.
#pragma once

#include <map>
#include <mutex>

#include "api.h"

namespace emulator {

enum class Place { Device, PinnedHost };

// All allocations of the process. What is not written holds 0xFF bytes, NaNs in every format. The page after an
// allocation cannot be touched, and the up to 255 bytes before it, which alignment asks for, are looked at when it is
// freed.
class Memory {
  public:
    // Null when the system has no more.
    void* allocate(Place place, int device, size_t bytes);
    // False for what is no allocation's start.
    bool free(Place place, void* at);
    // Whether all these bytes lie in one allocation.
    bool contains(Place place, const void* at, size_t bytes);
    // Of all allocations on a device.
    size_t bytes_on(int device);

  private:
    struct Allocation {
        Place place;
        int device;
        size_t bytes;
        void* mapping;
        size_t mapping_bytes;
    };

    std::mutex mutex_;
    std::map<const unsigned char*, Allocation> allocations_;
};

Memory& memory();

}  // namespace emulator
