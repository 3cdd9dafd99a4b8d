// How a kernel's fault ends the process: with the kernel, the block, the thread and the line of source.
#pragma once

#include <string>

#include "block.h"

namespace emulator {

// `code` is where a call in the kernel returns to; null for no place.
[[noreturn]] void abort_thread(const Block& block, const Thread& thread, const std::string& what, const void* code);

// The threads of the block wait for one another.
[[noreturn]] void abort_deadlock(const Block& block);

// From now on memory faults of kernels are reported.
void install_fault_handlers();

// Names the block that the calling OS thread runs, null for none.
void watch_faults(const Block* block);

}  // namespace emulator
