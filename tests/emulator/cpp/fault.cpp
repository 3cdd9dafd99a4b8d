#include "fault.h"

#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "environment.h"

namespace emulator {
namespace {

constexpr size_t SIGNAL_STACK_BYTES = 256 << 10;

thread_local const Block* watched = nullptr;
struct sigaction previous_actions[NSIG];

// " at FILE:LINE" of the kernel's source before `code`, where a call returns to, if binutils are there to ask. Of the
// calls that were inlined into one another it is the innermost that is not the prelude's. Nothing for null.
std::string source_line(const Launch& launch, const void* code) {
    const char* call = static_cast<const char*>(code) - 1;
    Dl_info module;
    if (!code || !dladdr(call, &module)) return "";
    char command[128];
    snprintf(command, sizeof command, "addr2line -is -e /proc/%d/fd/%d 0x%zx 2>/dev/null", getpid(), launch.image,
             call - static_cast<const char*>(module.dli_fbase));
    FILE* lines = popen(command, "r");
    if (!lines) return "";
    std::string found;
    for (char line[256]; found.empty() && fgets(line, sizeof line, lines);) {
        std::string text(line);
        bool of_prelude = text.rfind("device.cuh:", 0) == 0;
        if (!of_prelude && text[0] != '?') found = " at " + text.substr(0, text.find_first_of(" \n"));
    }
    pclose(lines);
    return found;
}

std::string describe(Dim3 at) {
    char text[64];
    snprintf(text, sizeof text, "(%u, %u, %u)", at.x, at.y, at.z);
    return text;
}

// What a thread of a block that cannot go on is about.
std::string state(const Block& block, unsigned i) {
    const ScheduledWarp& warp = block.warps[i / LANES];
    unsigned lane = i % LANES;
    if (warp.exited >> lane & 1) return "have exited";
    if (warp.at_barrier >> lane & 1) return "wait at __syncthreads";
    char mask[16];
    snprintf(mask, sizeof mask, "%08x", warp.masks[lane]);
    return std::string("wait at ") + warp.operations[lane] + " for the lanes " + mask;
}

// The same for neighbours that can be told of in one line.
std::pair<std::string, const void*> group(const Block& block, unsigned i) {
    const ScheduledWarp& warp = block.warps[i / LANES];
    bool exited = warp.exited >> i % LANES & 1;
    return {state(block, i), exited ? nullptr : warp.call_sites[i % LANES]};
}

void report_signal(int signal, siginfo_t* info, void* context) {
    if (watched && watched->current) {
        char what[64] = "misaligned address, array index or shift out of bounds";
        if (signal != SIGILL) snprintf(what, sizeof what, "no such memory: %p", info->si_addr);
        auto code = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
        abort_thread(*watched, *watched->current, what, reinterpret_cast<char*>(code) + 1);
    }
    const struct sigaction& previous = previous_actions[signal];
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else {
        sigaction(signal, &previous, nullptr);  // the instruction faults again
    }
}

}  // namespace

void abort_thread(const Block& block, const Thread& thread, const std::string& what, const void* code) {
    std::string line = source_line(*block.launch, code);
    fprintf(stderr, "emulator: kernel %s, block %s, thread %s: %s%s\n", block.launch->kernel->name,
            describe(block.index).c_str(), describe(thread.thread_idx).c_str(), what.c_str(), line.c_str());
    abort();
}

void abort_deadlock(const Block& block) {
    fprintf(stderr, "emulator: kernel %s, block %s: threads wait for one another (seed %llu)\n",
            block.launch->kernel->name, describe(block.index).c_str(), environment().seed);
    for (unsigned first = 0, next; first < block.n_threads; first = next) {
        auto [what, code] = group(block, first);
        for (next = first + 1; next < block.n_threads && group(block, next) == group(block, first);) next++;
        std::string line = source_line(*block.launch, code);
        fprintf(stderr, "emulator:   threads %u to %u %s%s\n", first, next - 1, what.c_str(), line.c_str());
    }
    abort();
}

void install_fault_handlers() {
    struct sigaction action = {};
    action.sa_sigaction = report_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int signal : {SIGSEGV, SIGBUS, SIGILL}) sigaction(signal, &action, &previous_actions[signal]);
}

// A fibre's stack may be what has run out: the OS thread needs another one for its signals.
void watch_faults(const Block* block) {
    thread_local std::unique_ptr<char[]> signal_stack;
    if (!signal_stack) {
        signal_stack.reset(new char[SIGNAL_STACK_BYTES]);
        stack_t stack = {};
        stack.ss_sp = signal_stack.get();
        stack.ss_size = SIGNAL_STACK_BYTES;
        sigaltstack(&stack, nullptr);
    }
    watched = block;
}

}  // namespace emulator
