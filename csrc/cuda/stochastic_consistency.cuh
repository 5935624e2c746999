// Distances between the seed vectors of the images of one group, and their gradients.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace camkernels::cuda {

// Place s of `order` holds image order[s]; its group is what places [begin[s], end[s]) hold.
struct VectorGroups {
  const void* vectors;   // [N, K, D]
  const int64_t* order;  // [N]
  const int64_t* begin;  // [N]
  const int64_t* end;    // [N]
  int64_t images;
  int num_seeds;
  int depth;
  DType dtype;
  bool squared;
};

struct StochasticConsistencyFwd {
  VectorGroups groups;
  float* sums;  // [N, K]
};

struct StochasticConsistencyBwd {
  VectorGroups groups;
  const float* scale;  // []
  void* grad_vectors;  // [N, K, D]
};

inline constexpr int kGroupThreads = 256;
inline constexpr int kColumns = 4096;    // of a gradient in shared memory; longer ones come in turns
inline constexpr int kNeighbours = 128;  // distances in shared memory; larger groups come in turns

// Where seed `seed` of the image at `place` begins: [D]
__device__ __forceinline__ int64_t vector_offset(const VectorGroups& groups, int64_t place, int seed) {
  return (groups.order[place] * groups.num_seeds + seed) * groups.depth;
}

template <typename T>
__device__ __forceinline__ const T* vector_at(const VectorGroups& groups, int64_t place, int seed) {
  return static_cast<const T*>(groups.vectors) + vector_offset(groups, place, seed);
}

// One column of a group's vectors, counted from that of the first of them: the differences of neighbours are
// exact where the vectors themselves, far from 0, would be rounded in their sum.
template <typename T>
struct Column {
  const VectorGroups& groups;
  int64_t begin;
  int64_t end;
  int seed;
  int column;
  float first;

  __device__ Column(const VectorGroups& all, int64_t from, int64_t to, int k, int d)
      : groups(all), begin(from), end(to), seed(k), column(d), first(0.0f) {
    first = value(begin);
  }
  __device__ float value(int64_t place) const {
    return to_float(vector_at<T>(groups, place, seed)[column]) - first;
  }
  __device__ float mean() const {
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t place = begin; place < end; ++place) sum += value(place);
    return sum / static_cast<float>(end - begin);
  }
};

// In every lane of a warp, in an order that is always the same.
template <typename T>
__device__ float distance_between(const T* one, const T* other, int depth) {
  float sum = 0.0f;
#pragma unroll 4
  for (int d = threadIdx.x % kWarp; d < depth; d += kWarp) {
    const float difference = to_float(one[d]) - to_float(other[d]);
    sum = fmaf(difference, difference, sum);
  }
  return sqrtf(warp_sum(sum));
}

// A block for each place and seed. Squared: the place where its group begins has the sum over all the group's
// pairs, which is its size times the sum of squared deviations from its mean. Plain: a place has the sum over
// its pairs with those after it; a warp takes some of these.
template <typename T>
__global__ void __launch_bounds__(kGroupThreads)
    stochastic_consistency_fwd_kernel(const __grid_constant__ StochasticConsistencyFwd call) {
  const VectorGroups& groups = call.groups;
  const int64_t place = blockIdx.x / groups.num_seeds;
  const int seed = static_cast<int>(blockIdx.x % groups.num_seeds);
  const int64_t begin = groups.begin[place];
  const int64_t end = groups.end[place];
  const int warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  SharedMemory memory;
  float* totals = memory.take<float>(warps);

  float sum = 0.0f;
  if (!groups.squared) {
    const T* own = vector_at<T>(groups, place, seed);
#pragma unroll 1
    for (int64_t other = place + 1 + warp; other < end; other += warps) {
      sum += distance_between(own, vector_at<T>(groups, other, seed), groups.depth);
    }
  } else if (place == begin && end - begin > 1) {
#pragma unroll 1
    for (int d = threadIdx.x; d < groups.depth; d += blockDim.x) {
      const Column<T> column(groups, begin, end, seed, d);
      const float mean = column.mean();
#pragma unroll 4
      for (int64_t other = begin; other < end; ++other) {
        const float deviation = column.value(other) - mean;
        sum = fmaf(deviation, deviation, sum);
      }
    }
    sum = warp_sum(sum);
  }
  if (threadIdx.x % kWarp == 0) totals[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int w = 0; w < warps; ++w) total += totals[w];
  call.sums[place * groups.num_seeds + seed] =
      groups.squared ? static_cast<float>(end - begin) * total : total;
}

// Squared: a block for each place, seed and as many columns as it has threads; the block of the place where
// a group begins writes the gradients of the whole group.
template <typename T>
__global__ void __launch_bounds__(kGroupThreads)
    stochastic_consistency_bwd_squared_kernel(const __grid_constant__ StochasticConsistencyBwd call) {
  const VectorGroups& groups = call.groups;
  const int threads = blockDim.x;
  const int chunks = (groups.depth + threads - 1) / threads;
  const int d = static_cast<int>(blockIdx.x % chunks) * threads + static_cast<int>(threadIdx.x);
  const int seed = static_cast<int>(blockIdx.x / chunks % groups.num_seeds);
  const int64_t place = blockIdx.x / chunks / groups.num_seeds;
  const int64_t begin = groups.begin[place];
  const int64_t end = groups.end[place];
  if (place != begin || d >= groups.depth) return;
  const bool alone = end - begin == 1;  // it may hold inf or NaN
  const float slope = 2.0f * *call.scale * static_cast<float>(end - begin);
  const Column<T> column(groups, begin, end, seed, d);
  const float mean = column.mean();
#pragma unroll 4
  for (int64_t other = begin; other < end; ++other) {
    T* to = static_cast<T*>(call.grad_vectors) + vector_offset(groups, other, seed);
    to[d] = from_float<T>(alone ? 0.0f : slope * (column.value(other) - mean));
  }
}

struct DistanceBuffers {
  float* sums;      // [columns of a turn]
  float* inverses;  // [kNeighbours]: 1 / distance, 0 at distance 0
};

template <typename Memory>
__host__ __device__ DistanceBuffers take_distance_buffers(Memory& memory, int depth) {
  DistanceBuffers buffers;
  buffers.sums = memory.template take<float>(depth < kColumns ? depth : kColumns);
  buffers.inverses = memory.template take<float>(kNeighbours);
  return buffers;
}

// Plain: a block for each place and seed. Warps find the distances to the others of the group, then threads
// add up their columns of the unit vectors.
template <typename T>
__global__ void __launch_bounds__(kGroupThreads)
    stochastic_consistency_bwd_plain_kernel(const __grid_constant__ StochasticConsistencyBwd call) {
  const VectorGroups& groups = call.groups;
  const int64_t place = blockIdx.x / groups.num_seeds;
  const int seed = static_cast<int>(blockIdx.x % groups.num_seeds);
  const int64_t begin = groups.begin[place];
  const int64_t end = groups.end[place];
  const int warps = blockDim.x / kWarp;
  const T* own = vector_at<T>(groups, place, seed);
  T* grads = static_cast<T*>(call.grad_vectors) + vector_offset(groups, place, seed);
  SharedMemory memory;
  const DistanceBuffers buffers = take_distance_buffers(memory, groups.depth);
#pragma unroll 1
  for (int first_column = 0; first_column < groups.depth; first_column += kColumns) {
    const int columns = min(kColumns, groups.depth - first_column);
    for (int d = threadIdx.x; d < columns; d += blockDim.x) buffers.sums[d] = 0.0f;
#pragma unroll 1
    for (int64_t first = begin; first < end; first += kNeighbours) {
      const int count = static_cast<int>(min(int64_t{kNeighbours}, end - first));
      __syncthreads();  // the inverses of the turn before are no longer read
#pragma unroll 1
      for (int i = threadIdx.x / kWarp; i < count; i += warps) {
        const float distance =
            first + i == place ? 0.0f
                               : distance_between(own, vector_at<T>(groups, first + i, seed), groups.depth);
        if (threadIdx.x % kWarp == 0) buffers.inverses[i] = distance == 0.0f ? 0.0f : 1.0f / distance;
      }
      __syncthreads();
#pragma unroll 1
      for (int d = threadIdx.x; d < columns; d += blockDim.x) {
        const float value = to_float(own[first_column + d]);
        float sum = buffers.sums[d];
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
          const float other = to_float(vector_at<T>(groups, first + i, seed)[first_column + d]);
          sum += (value - other) * buffers.inverses[i];
        }
        buffers.sums[d] = sum;
      }
    }
    // Each thread reads the columns that it has summed.
    for (int d = threadIdx.x; d < columns; d += blockDim.x) {
      grads[first_column + d] = from_float<T>(end - begin == 1 ? 0.0f : *call.scale * buffers.sums[d]);
    }
  }
}

template <typename Launcher>
void launch_stochastic_consistency_fwd(Launcher& launcher, const StochasticConsistencyFwd& call) {
  const int threads = std::min(launcher.hardware().threads, kGroupThreads);
  SharedSize size;
  size.take<float>(threads / kWarp);
  const LaunchShape shape{call.groups.images * call.groups.num_seeds, threads, 1, size.bytes()};
  dispatch(call.groups.dtype, [&](auto element) {
    launcher.run(stochastic_consistency_fwd_kernel<decltype(element)>, shape, call);
  });
}

template <typename Launcher>
void launch_stochastic_consistency_bwd(Launcher& launcher, const StochasticConsistencyBwd& call) {
  const VectorGroups& groups = call.groups;
  const int threads = std::min(launcher.hardware().threads, kGroupThreads);
  const int64_t vectors = groups.images * groups.num_seeds;
  dispatch(groups.dtype, [&](auto element) {
    using T = decltype(element);
    if (groups.squared) {
      const int64_t chunks = (int64_t{groups.depth} + threads - 1) / threads;
      launcher.run(stochastic_consistency_bwd_squared_kernel<T>, LaunchShape{vectors * chunks, threads, 1, 0},
                   call);
    } else {
      SharedSize size;
      take_distance_buffers(size, groups.depth);
      launcher.run(stochastic_consistency_bwd_plain_kernel<T>, LaunchShape{vectors, threads, 1, size.bytes()},
                   call);
    }
  });
}

}  // namespace camkernels::cuda
