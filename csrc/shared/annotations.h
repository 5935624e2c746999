// Lets one header serve the host compiler and nvcc.
#pragma once

#ifdef __CUDACC__
#define CAMKERNELS_HD __host__ __device__ __forceinline__
#else
// always_inline: the CPU kernels are compiled once per instruction set, and a copy left out of line would
// be merged by the linker into one that older processors cannot run.
#define CAMKERNELS_HD __attribute__((always_inline)) inline
#endif
