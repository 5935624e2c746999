// Kernels for the emulator's own tests: right ones, and the same with a mistake that it must give away.
#pragma once

#include <string_view>

#include "cuda_emulator.h"

namespace emulator {

inline constexpr int kMostThreads = 128;

struct Reverse {
  const float* from;  // [blocks * threads]
  float* to;          // [blocks * threads]
  std::string_view mistake;
  bool fixed;  // in static shared memory
};

// to[i] = from[last - i], through the block's shared memory and that of the mirrored block of the cluster.
inline void reverse_kernel(Reverse call) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  __shared__ float fixed[kMostThreads];
  SharedMemory memory;
  float* shared = call.fixed ? fixed : memory.take<float>(threads);
  if (call.mistake == "thread_leaves_early" && thread == 3) return;
  const int at = call.mistake == "beyond_the_end" ? thread + 1 : thread;
  shared[at] = call.from[cluster_rank() * threads + thread];
  if (call.mistake == "diverging_barriers") {
    if (thread < threads / 2) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (call.mistake == "part_of_a_warp_shuffles" && thread % 2 == 0) {
    shared[thread] = __shfl_xor_sync(0xffffffffu, shared[thread], 2);
  }
  if (call.mistake != "no_barrier") __syncthreads();
  float value = shared[threads - 1 - thread];
  if (cluster_size() > 1) {
    if (call.mistake != "no_cluster_barrier") {
      if (call.mistake != "waits_without_arriving") cluster_arrive();
      if (call.mistake == "arrives_twice") cluster_arrive();
      if (call.mistake != "reads_between_arrive_and_wait") cluster_wait();
    }
    value = cluster_peer(shared, cluster_size() - 1 - cluster_rank())[threads - 1 - thread];
    cluster_arrive();
    if (call.mistake != "never_waits") cluster_wait();
  }
  call.to[cluster_rank() * threads + thread] = value;
}

struct BlockSums {
  const int* values;  // [blocks * threads]
  int* sums;          // [blocks]
  std::string_view mistake;
};

inline void block_sums_kernel(BlockSums call) {
  __shared__ int partial[kMostThreads];
  const int thread = static_cast<int>(threadIdx.x);
  if (call.mistake != "never_writes") {
    partial[thread] = call.values[blockIdx.x * blockDim.x + threadIdx.x];
  }
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    if (call.mistake != "no_barrier") __syncthreads();
    if (thread < half) partial[thread] += partial[thread + half];
  }
  if (thread == 0) call.sums[blockIdx.x] = partial[0];
}

struct Histogram {
  const int* values;  // [blocks * threads]
  int* counts;        // [bins]
  int bins;           // up to kMostThreads
  std::string_view mistake;
};

// Counts in each block, then of all blocks.
inline void histogram_kernel(Histogram call) {
  __shared__ int counts[kMostThreads];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < call.bins) counts[thread] = 0;
  __syncthreads();
  int& own = counts[call.values[blockIdx.x * blockDim.x + threadIdx.x]];
  if (call.mistake == "reads_before_the_atomic") {
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
