// Matrix products of a warp.
#pragma once

#include "machine.h"

namespace emulator {

// D += A B. Each element sums in the order of k, starting from what it holds, and rounds after each product. (A tensor
// core rounds in other places: results agree with a GPU's to a few units in the last place, not in the bits.)
void multiply(Warp* warp, bool f16);

}  // namespace emulator
