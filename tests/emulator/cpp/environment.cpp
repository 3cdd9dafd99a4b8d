#include "environment.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace emulator {
namespace {

unsigned long long read(const char* name, unsigned long long otherwise) {
    const char* text = getenv(name);
    if (!text || !*text) return otherwise;
    char* end;
    unsigned long long value = strtoull(text, &end, 10);
    if (*end) {
        fprintf(stderr, "emulator: %s=%s is no number\n", name, text);
        abort();
    }
    return value;
}

}  // namespace

const Environment& environment() {
    static const Environment read_once = {
        static_cast<int>(read("LOCKSTEP_EMULATOR_DEVICES", 8)),
        static_cast<int>(read("LOCKSTEP_EMULATOR_ARCH", 90)),
        static_cast<int>(read("LOCKSTEP_EMULATOR_DRIVER", 13000)),
        read("LOCKSTEP_EMULATOR_MEMORY", 8ull << 30),
        static_cast<unsigned>(std::max(read("LOCKSTEP_EMULATOR_THREADS", 2), 1ull)),
        read("LOCKSTEP_EMULATOR_SEED", 1),
        read("LOCKSTEP_EMULATOR_FAIL_LAUNCH", 0),
        read("LOCKSTEP_EMULATOR_FAIL_GRAPHS", 0) != 0,
    };
    return read_once;
}

}  // namespace emulator
