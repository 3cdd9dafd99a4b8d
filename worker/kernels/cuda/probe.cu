// The smallest kernel there is: tests compile, cache, load and launch it.
#include "device.cuh"

// y = a x + y over n values, each rounded once. FACTOR, a compile-time constant, multiplies x first.
extern "C" __global__ void __launch_bounds__(256) axpy(float a, const float* x, float* y, u32 n) {
    begin_kernel();
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = fmaf(a, x[i] * float(FACTOR), y[i]);
}
