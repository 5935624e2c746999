// Lets one header serve the host compiler and nvcc.
#pragma once

#ifdef __CUDACC__
#define CAMKERNELS_HD __host__ __device__ __forceinline__
#else
#define CAMKERNELS_HD inline
#endif
