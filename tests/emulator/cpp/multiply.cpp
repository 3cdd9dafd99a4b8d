#include "multiply.h"

#include <cstring>

namespace emulator {
namespace {

typedef float Row __attribute__((vector_size(32)));  // of 8 elements

void widen(const unsigned* pairs, bool f16, float (&wide)[64]) {
    const auto* halves = reinterpret_cast<const unsigned short*>(pairs);
    if (f16) {
        for (int i = 0; i < 64; i++) {
            _Float16 half;
            memcpy(&half, &halves[i], 2);
            wide[i] = half;
        }
    } else {
        for (int i = 0; i < 64; i++) {
            unsigned bits = static_cast<unsigned>(halves[i]) << 16;
            memcpy(&wide[i], &bits, 4);
        }
    }
}

}  // namespace

void multiply(Warp* warp, bool f16) {
    float transposed[64], a[64];
    Row b[16];
    for (int half = 0; half < 2; half++) {
        widen(warp->b[half], f16, transposed);
        for (int k = 0; k < 8; k++) {
            for (int column = 0; column < 8; column++) b[8 * half + k][column] = transposed[8 * column + k];
        }
    }
    for (int half = 0; half < 2; half++) {
        Row d[8];
        memcpy(d, warp->d[half], sizeof d);
        for (int k_half = 0; k_half < 2; k_half++) {
            widen(warp->a[2 * k_half + half], f16, a);
            for (int k = 0; k < 8; k++) {
#pragma GCC unroll 8  // keeps d in registers
                for (int row = 0; row < 8; row++) {
                    Row broadcast = a[8 * row + k] - Row{};
                    d[row] = __builtin_ia32_vfmaddps256(broadcast, b[8 * k_half + k], d[row]);
                }
            }
        }
        memcpy(warp->d[half], d, sizeof d);
    }
}

}  // namespace emulator
