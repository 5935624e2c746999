// What kernels need of the machine, in one place: nvcc's, or the emulator's under CAMKERNELS_EMULATOR.
#pragma once

#include <cstdint>

#include "../shared/dtype.h"

#ifdef CAMKERNELS_EMULATOR
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace camkernels::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;
inline constexpr int64_t kSharedAlignment = 16;

#ifdef CAMKERNELS_EMULATOR

using emulator::cluster_arrive;
using emulator::cluster_arrive_relaxed;
using emulator::cluster_peer;
using emulator::cluster_rank;
using emulator::cluster_size;
using emulator::cluster_wait;
using emulator::load_global;
using emulator::SharedMemory;
using emulator::store_global;

#else

// Before sm_90 a block is a cluster of its own.
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}

// Releases this thread's shared memory writes to the cluster.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}

// Releases nothing.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#endif
}

// The same shared memory address in block `rank` of the cluster.
template <typename T>
__device__ __forceinline__ const T* cluster_peer(const T* address, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<const T*>(__cluster_map_shared_rank(address, static_cast<unsigned>(rank)));
#else
  return address;
#endif
}

// Hands out the block's dynamic shared memory piece by piece, in the same order in every thread.
class SharedMemory {
 public:
  __device__ __forceinline__ SharedMemory() {
    extern __shared__ uint4 dynamic_shared_memory[];
    next_ = reinterpret_cast<char*>(dynamic_shared_memory);
  }

  template <typename T>
  __device__ __forceinline__ T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + kSharedAlignment - 1) / kSharedAlignment *
             kSharedAlignment;
    return piece;
  }

 private:
  char* next_;
};

// Every byte of a feature map or an image is used once per kernel, so it should displace nothing in L1.
__device__ __forceinline__ uint4 load_global(const uint4* from) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(from));
  return value;
}

__device__ __forceinline__ void store_global(uint4* to, uint4 value) { __stcs(to, value); }

#endif

// For a block that has arrived and has nothing more to do: others may still read its shared memory.
__device__ __forceinline__ void leave_cluster(int size) {
  if (size > 1) cluster_wait();
}

// Counts the bytes that the same calls on a SharedMemory take.
class SharedSize {
 public:
  template <typename T>
  __host__ __device__ T* take(int64_t count) {
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kSharedAlignment - 1) / kSharedAlignment *
              kSharedAlignment;
    return nullptr;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

using Half = __half;
using BFloat16 = __nv_bfloat16;

__host__ __device__ __forceinline__ float to_float(float value) { return value; }
__host__ __device__ __forceinline__ float to_float(Half value) { return __half2float(value); }
__host__ __device__ __forceinline__ float to_float(BFloat16 value) { return __bfloat162float(value); }

template <typename T>
__host__ __device__ __forceinline__ T from_float(float value);
template <>
__host__ __device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__host__ __device__ __forceinline__ Half from_float<Half>(float value) {
  return __float2half_rn(value);
}
template <>
__host__ __device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Elements of a 16-byte access.
template <typename T>
inline constexpr int kVectorOf = 16 / static_cast<int>(sizeof(T));

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Vector {
  T at[kVec];
};

template <int kVec, typename T>
__device__ __forceinline__ Vector<T, kVec> load_vector(const T* from) {
  Vector<T, kVec> value;
  if constexpr (sizeof(value) == sizeof(uint4)) {
    const uint4 bits = load_global(reinterpret_cast<const uint4*>(from));
    __builtin_memcpy(&value, &bits, sizeof(bits));
  } else {
    static_assert(kVec == 1);
    value.at[0] = *from;
  }
  return value;
}

template <int kVec, typename T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kVec>& value) {
  if constexpr (sizeof(value) == sizeof(uint4)) {
    uint4 bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    store_global(reinterpret_cast<uint4*>(to), bits);
  } else {
    static_assert(kVec == 1);
    *to = value.at[0];
  }
}

__host__ __device__ __forceinline__ int size_of(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

// For the small tensors only (weights, maps): which dtype they have is decided at run time.
__device__ __forceinline__ float load_as_float(AnyArray from, int64_t index) {
  switch (from.dtype) {
    case DType::kFloat:
      return static_cast<const float*>(from.data)[index];
    case DType::kHalf:
      return to_float(static_cast<const Half*>(from.data)[index]);
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(from.data)[index]);
    default:
      return static_cast<float>(static_cast<const double*>(from.data)[index]);
  }
}

__device__ __forceinline__ double load_as_double(AnyArray from, int64_t index) {
  if (from.dtype == DType::kDouble) return static_cast<const double*>(from.data)[index];
  return static_cast<double>(load_as_float(from, index));
}

__device__ __forceinline__ void store_from_float(void* to, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kFloat:
      static_cast<float*>(to)[index] = value;
      break;
    case DType::kHalf:
      static_cast<Half*>(to)[index] = from_float<Half>(value);
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(to)[index] = from_float<BFloat16>(value);
      break;
    default:
      static_cast<double*>(to)[index] = static_cast<double>(value);
  }
}

template <typename Real>
__device__ __forceinline__ Real warp_sum(Real value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

}  // namespace camkernels::cuda
