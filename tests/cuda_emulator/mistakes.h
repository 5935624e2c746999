// Kernels with a mistake each, to show that the emulator gives it away.
#pragma once

#include "cuda_emulator.h"

namespace emulator {

enum class Mistake : int {
  kNone,
  kNoBarrier,
  kNoClusterBarrier,
  kDivergingBarriers,
  kThreadLeavesEarly,
  kPartOfAWarpShuffles,
  kBeyondTheEnd,
};

struct Reverse {
  const float* from;  // [blocks * threads]
  float* to;          // [blocks * threads]
  Mistake mistake;
};

// to[i] = from[last - i], through the block's shared memory and that of the mirrored block of the cluster.
inline void reverse_kernel(Reverse call) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  SharedMemory memory;
  float* shared = memory.take<float>(threads);
  if (call.mistake == Mistake::kThreadLeavesEarly && thread == 3) return;
  const int at = call.mistake == Mistake::kBeyondTheEnd ? thread + 1 : thread;
  shared[at] = call.from[cluster_rank() * threads + thread];
  if (call.mistake == Mistake::kDivergingBarriers) {
    if (thread < threads / 2) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (call.mistake == Mistake::kPartOfAWarpShuffles && thread % 2 == 0) {
    shared[thread] = __shfl_xor_sync(0xffffffffu, shared[thread], 2);
  }
  if (call.mistake != Mistake::kNoBarrier) __syncthreads();
  float value = shared[threads - 1 - thread];
  if (cluster_size() > 1) {
    if (call.mistake != Mistake::kNoClusterBarrier) {
      cluster_arrive();
      cluster_wait();
    }
    value = cluster_peer(shared, cluster_size() - 1 - cluster_rank())[threads - 1 - thread];
    cluster_arrive();
    cluster_wait();
  }
  call.to[cluster_rank() * threads + thread] = value;
}

}  // namespace emulator
