// Kernels for the emulator's own tests: right ones, and the same with a mistake that it must give away.
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
  kWaitsWithoutArriving,
  kArrivesTwice,
  kNeverWaits,
  kReadsBetweenArriveAndWait,
  kReadsBeforeTheAtomic,
  kNeverWrites,
};

inline constexpr int kMostThreads = 128;

struct Reverse {
  const float* from;  // [blocks * threads]
  float* to;          // [blocks * threads]
  Mistake mistake;
  bool fixed;  // in static shared memory
};

// to[i] = from[last - i], through the block's shared memory and that of the mirrored block of the cluster.
inline void reverse_kernel(Reverse call) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  __shared__ float fixed[kMostThreads];
  SharedMemory memory;
  float* shared = call.fixed ? fixed : memory.take<float>(threads);
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
      if (call.mistake != Mistake::kWaitsWithoutArriving) cluster_arrive();
      if (call.mistake == Mistake::kArrivesTwice) cluster_arrive();
      if (call.mistake != Mistake::kReadsBetweenArriveAndWait) cluster_wait();
    }
    value = cluster_peer(shared, cluster_size() - 1 - cluster_rank())[threads - 1 - thread];
    cluster_arrive();
    if (call.mistake != Mistake::kNeverWaits) cluster_wait();
  }
  call.to[cluster_rank() * threads + thread] = value;
}

struct BlockSums {
  const int* values;  // [blocks * threads]
  int* sums;          // [blocks]
  Mistake mistake;
};

inline void block_sums_kernel(BlockSums call) {
  __shared__ int partial[kMostThreads];
  const int thread = static_cast<int>(threadIdx.x);
  if (call.mistake != Mistake::kNeverWrites) {
    partial[thread] = call.values[blockIdx.x * blockDim.x + threadIdx.x];
  }
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    if (call.mistake != Mistake::kNoBarrier) __syncthreads();
    if (thread < half) partial[thread] += partial[thread + half];
  }
  if (thread == 0) call.sums[blockIdx.x] = partial[0];
}

struct Histogram {
  const int* values;  // [blocks * threads]
  int* counts;        // [bins]
  int bins;           // up to kMostThreads
  Mistake mistake;
};

// Counts in each block, then of all blocks.
inline void histogram_kernel(Histogram call) {
  __shared__ int counts[kMostThreads];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < call.bins) counts[thread] = 0;
  __syncthreads();
  int& own = counts[call.values[blockIdx.x * blockDim.x + threadIdx.x]];
  if (call.mistake == Mistake::kReadsBeforeTheAtomic) {
    const int before = own;
    atomicExch(&own, before + 1);
  } else {
    atomicAdd(&own, 1);
  }
  __syncthreads();
  if (thread < call.bins) atomicAdd(&call.counts[thread], counts[thread]);
}

struct Tally {
  int sum;  // by atomicCAS
  int most;
  int least;
  int any_bits;
  int all_bits;
  int last;      // the last value that came
  int replaced;  // sum of all that came before
};

struct Tallying {
  const int* values;  // [blocks * threads]
  Tally* tally;
};

inline void tally_kernel(Tallying call) {
  const int value = call.values[blockIdx.x * blockDim.x + threadIdx.x];
  Tally& tally = *call.tally;
  for (int expected = 0;;) {
    const int found = atomicCAS(&tally.sum, expected, expected + value);
    if (found == expected) break;
    expected = found;
  }
  atomicMax(&tally.most, value);
  atomicMin(&tally.least, value);
  atomicOr(&tally.any_bits, value);
  atomicAnd(&tally.all_bits, value);
  atomicAdd(&tally.replaced, atomicExch(&tally.last, value));
}

struct Nothing {};

inline void empty_kernel(Nothing) {}

}  // namespace emulator
