// Host side decisions that need no torch: how a launch is cut up, and for which machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.cuh"

namespace camkernels::cuda {

inline constexpr int kThreads = 512;
inline constexpr int kMaxCluster = 8;  // what every sm_90 device can schedule

struct Hardware {
  int multiprocessors;
  int max_cluster;                    // 1: no clusters
  int64_t shared_limit;               // bytes of shared memory that a block may have
  int threads = kThreads;             // a multiple of a warp
  int64_t smallest_share = 16 << 10;  // bytes of input below which a block is not worth having
  bool vectors = true;                // 16-byte accesses where the data allow
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  int cluster;
  int64_t shared;
};

// Blocks for each of `items`: enough to fill the machine several times over, so that no multiprocessor
// waits long for the last one, but none with next to nothing to do.
inline int choose_cluster(const Hardware& hardware, int64_t items, int64_t bytes_per_item) {
  constexpr int kWaves = 4;
  int cluster = 1;
  while (cluster < hardware.max_cluster && items * cluster < int64_t{kWaves} * hardware.multiprocessors &&
         bytes_per_item / (2 * cluster) >= hardware.smallest_share) {
    cluster *= 2;
  }
  return cluster;
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline std::runtime_error too_large(const char* op, int64_t height, int64_t width, int64_t bytes,
                                    int64_t limit) {
  return std::runtime_error(std::string(op) + ": a map of " + std::to_string(height) + " x " +
                            std::to_string(width) + " needs " + std::to_string(bytes) +
                            " bytes of shared memory, this GPU allows a block " + std::to_string(limit) +
                            "; use camkernels.use_backend(\"triton\") for it");
}

// Of one map: a vector's 8 elements or a cluster's 8 maps times as many are still an int.
inline constexpr int64_t kMaxPixels = int64_t{1} << 27;

// Before anything counts the pixels of a map in an int.
inline void check_pixels(const char* op, int64_t height, int64_t width) {
  if (height * width <= kMaxPixels) return;
  throw std::runtime_error(std::string(op) + ": a map of " + std::to_string(height) + " x " +
                           std::to_string(width) + " has more pixels than the CUDA kernels take (" +
                           std::to_string(kMaxPixels) + "); use camkernels.use_backend(\"triton\") for it");
}

// Calls `function` with a value of the element type.
template <typename Function>
void dispatch(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat:
      return function(float{});
    case DType::kHalf:
      return function(Half{});
    case DType::kBFloat16:
      return function(BFloat16{});
    default:
      throw std::runtime_error("camkernels: CUDA kernels compute in float32, not float64");
  }
}

}  // namespace camkernels::cuda
