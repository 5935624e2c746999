// The front that cam, cam_erase and cam_seeds share: channel sum, cluster sum, min-max.
//
// A cluster of blocks makes up to kMaps maps of one image. Contiguous features: each block sums a share of
// the channels over all pixels; channels_last: all channels over a share of the pixels. Shares meet through
// distributed shared memory, after which every block holds the complete maps and normalises them by itself.
#pragma once

#ifdef CAMKERNELS_DEBUG
#include <cassert>
#endif
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>

#include "../shared/min_max.h"
#include "device.cuh"
#include "plan.h"

namespace camkernels::cuda {

inline constexpr int kWeights = 4096;  // floats of shared memory for weights; more channels come in turns

struct CamFront {
  const void* features;  // [N, C, P] or, channels_last, [N, P, C]
  AnyArray weight;       // [L, C]
  AnyArray target;       // [N, K], or null: map k is of class k
  void* cam;             // [N, K, P], dtype of features
  float* cam32;          // [N, K, P], or null
  float* extent;         // [N, K, 2], or null
  int64_t images;
  int64_t classes;
  int channels;
  int height;
  int width;
  int maps;
  float eps;
  DType features_dtype;
  bool channels_last;
  bool vectors;  // 16-byte loads of features
  int rows;      // contiguous features: this many channels together are a whole number of vectors

  __host__ __device__ int pixels() const { return height * width; }
};

struct FrontBuffers {
  float* weights;  // [kMaps, channels of this turn]
  float* partial;  // [elements of a vector, threads]
  float* map;      // [kMaps, P]: this block's share of the sum
  float* total;    // [kMaps, P]: the sum over the cluster; the same as map where a cluster is one block
  float* extrema;  // [kMaps, warps, 2]
};

// Without maps where the caller has another place for them, which then must be a cluster of one block.
template <typename T, int kMaps, typename Memory>
__host__ __device__ FrontBuffers take_front_buffers(Memory& memory, const CamFront& front, int threads,
                                                    int cluster, bool with_maps = true) {
  FrontBuffers buffers;
  buffers.weights = memory.template take<float>(kWeights);
  buffers.partial =
      memory.template take<float>(front.channels_last ? 0 : threads * (front.vectors ? kVectorOf<T> : 1));
  buffers.map = with_maps ? memory.template take<float>(int64_t{kMaps} * front.pixels()) : nullptr;
  buffers.total = cluster == 1 ? buffers.map : memory.template take<float>(int64_t{kMaps} * front.pixels());
  buffers.extrema = memory.template take<float>(kMaps * (threads / kWarp) * 2);
  return buffers;
}

// The class of a map; -1 where there is none or where the index is outside [0, classes).
__device__ __forceinline__ int64_t class_of(AnyArray target, int64_t classes, int maps, int64_t image,
                                            int map) {
  if (map >= maps) return -1;
  if (target.data == nullptr) return map;
  const int64_t at = image * maps + map;
  const int64_t index = target.dtype == DType::kInt64 ? static_cast<const int64_t*>(target.data)[at]
                                                      : static_cast<const int32_t*>(target.data)[at];
#ifdef CAMKERNELS_DEBUG
  assert(index >= 0 && index < classes);
#endif
  return index >= 0 && index < classes ? index : -1;
}

// weights[m][c - begin] for c in [begin, begin + count); NaN for a class that does not exist, so that its map
// shows it.
template <int kMaps>
__device__ void stage_weights(const CamFront& front, int64_t image, int first_map, int begin, int count,
                              float* weights) {
#pragma unroll 1
  for (int m = 0; m < kMaps; ++m) {
    const int64_t row = class_of(front.target, front.classes, front.maps, image, first_map + m);
#pragma unroll 1
    for (int c = threadIdx.x; c < count; c += blockDim.x) {
      weights[m * count + c] = row < 0 ? NAN : load_as_float(front.weight, row * front.channels + begin + c);
    }
  }
}

// Contiguous features. Pixels may be odd in number (7 x 7), yet loads are of 16 bytes: front.rows channels
// together, a row, are a whole number of vectors. A thread keeps one vector position of the row and walks
// over rows, so its accumulators stay with one (channel of the row, pixel) each. A vector spans two
// channels at most, because vectors are used only where a map has at least a vector's pixels.
template <typename T, int kVec, int kMaps>
__device__ void sum_planes(const CamFront& front, int64_t image, int first_map, int rank, int size,
                           const FrontBuffers& buffers) {
  constexpr int kInFlight = kMaps == 1 ? 4 : kVec <= 4 ? 2 : 1;  // as many as the registers hold
  const int pixels = front.pixels();
  const int channels_per_row = kVec == 1 ? 1 : front.rows;
  const int row_elements = channels_per_row * pixels;
  const int row_vectors = row_elements / kVec;
  const int threads = blockDim.x;
  const int lanes = min(row_vectors, threads);
  const int groups = threads / lanes;
  const int group = threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  const int64_t rows = front.channels / channels_per_row;
  const int begin = static_cast<int>(rows * rank / size);
  const int end = static_cast<int>(rows * (rank + 1) / size);
  const int turn = kWeights / (kMaps * channels_per_row);
  const T* features = static_cast<const T*>(front.features) + image * front.channels * pixels;  // [C, P]

#pragma unroll 1
  for (int tile = 0; tile < row_vectors; tile += lanes) {
    const bool active = group < groups && tile + lane < row_vectors;
    const int element = (tile + lane) * kVec;
    const int low = element / pixels;
    const int high = min(low + 1, channels_per_row - 1);
    const int split = (low + 1) * pixels - element;  // elements of the vector in channel `low`

    float sums[kMaps][kVec] = {};
#pragma unroll 1
    for (int first = begin; first < end; first += turn) {
      const int count = min(turn, end - first);
      const int staged = count * channels_per_row;
      __syncthreads();  // weights of the turn before are no longer read
      stage_weights<kMaps>(front, image, first_map, first * channels_per_row, staged, buffers.weights);
      __syncthreads();
      if (!active) continue;
      const T* from = features + static_cast<int64_t>(first + group) * row_elements + element;
      const float* weights = buffers.weights + group * channels_per_row;
      const int step = groups * row_elements;
      const auto add = [&](const Vector<T, kVec>& loaded) {
#pragma unroll
        for (int m = 0; m < kMaps; ++m) {
          const float weight_low = weights[m * staged + low];
          const float weight_high = weights[m * staged + high];
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            sums[m][i] = fmaf(i < split ? weight_low : weight_high, to_float(loaded.at[i]), sums[m][i]);
          }
        }
        weights += groups * channels_per_row;
      };
      int left = count - group;
#pragma unroll 1
      for (; left > (kInFlight - 1) * groups; left -= kInFlight * groups) {
        Vector<T, kVec> loaded[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) loaded[u] = load_vector<kVec>(from + u * step);
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) add(loaded[u]);
        from += kInFlight * static_cast<int64_t>(step);
      }
#pragma unroll 1
      for (; left > 0; left -= groups) {
        add(load_vector<kVec>(from));
        from += step;
      }
    }

#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      __syncthreads();  // partial sums of the map or tile before are no longer read
      if (active) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) buffers.partial[i * threads + threadIdx.x] = sums[m][i];
      }
      __syncthreads();
      const int tile_begin = tile * kVec;
      const int tile_end = min(tile + lanes, row_vectors) * kVec;
      // The tile's own pixels, which may be few of many. Each is first met in the row's first channel.
      const int tile_pixels = min(pixels, tile_end - tile_begin);
#pragma unroll 1
      for (int first = tile_begin + threadIdx.x; first < tile_begin + tile_pixels; first += threads) {
        float* slot = buffers.map + m * pixels + first % pixels;
        float sum = first < pixels ? 0.0f : *slot;
        for (int at = first; at < tile_end; at += pixels) {
          const float* partial = buffers.partial + (at % kVec) * threads + (at - tile_begin) / kVec;
          for (int g = 0; g < groups; ++g) sum += partial[g * lanes];
        }
        *slot = sum;
      }
    }
  }
}

// channels_last features: a warp takes some pixels at a time, its lanes the channels.
template <typename T, int kVec, int kMaps>
__device__ void sum_pixels(const CamFront& front, int64_t image, int first_map, int rank, int size,
                           const FrontBuffers& buffers) {
  constexpr int kPixels = kMaps == 1 ? 4 : 1;
  const int pixels = front.pixels();
  const int begin = static_cast<int>(static_cast<int64_t>(pixels) * rank / size);
  const int end = static_cast<int>(static_cast<int64_t>(pixels) * (rank + 1) / size);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  const int turn = kWeights / kMaps;
  const T* features = static_cast<const T*>(front.features) + image * front.channels * pixels;  // [P, C]

  // A block adds nothing to the pixels of the others.
  for (int i = threadIdx.x; i < kMaps * pixels; i += blockDim.x) buffers.map[i] = 0.0f;
#pragma unroll 1
  for (int first = 0; first < front.channels; first += turn) {
    const int count = min(turn, front.channels - first);
    __syncthreads();  // the zeros are there; weights of the turn before are no longer read
    stage_weights<kMaps>(front, image, first_map, first, count, buffers.weights);
    __syncthreads();
#pragma unroll 1
    for (int pixel = begin + warp * kPixels; pixel < end; pixel += warps * kPixels) {
      const T* from = features + static_cast<int64_t>(pixel) * front.channels + first;
      float sums[kPixels][kMaps] = {};
#pragma unroll 1
      for (int c = lane * kVec; c < count; c += kWarp * kVec) {
        Vector<T, kVec> loaded[kPixels];
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
          // The last pixel again where there are fewer: its sum is not kept.
          const int64_t step = min(j, end - 1 - pixel);
          loaded[j] = load_vector<kVec>(from + step * front.channels + c);
        }
#pragma unroll
        for (int m = 0; m < kMaps; ++m) {
          const float* weights = buffers.weights + m * count + c;
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const float weight = weights[i];
#pragma unroll
            for (int j = 0; j < kPixels; ++j)
              sums[j][m] = fmaf(weight, to_float(loaded[j].at[i]), sums[j][m]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
#pragma unroll
        for (int m = 0; m < kMaps; ++m) {
          const float sum = warp_sum(sums[j][m]);
          if (lane == 0 && pixel + j < end) buffers.map[m * pixels + pixel + j] += sum;
        }
      }
    }
  }
}

// Sums `count` floats of every block of the cluster into `total`, in the order of ranks. No block may leave
// the kernel before leave_cluster: others read its shared memory.
__device__ inline void cluster_sum(const float* share, float* total, int count, int size) {
  if (size > 1) {
    cluster_arrive();
    cluster_wait();
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      float sum = 0.0f;
      for (int rank = 0; rank < size; ++rank) sum += cluster_peer(share, rank)[i];
      total[i] = sum;
    }
  }
  __syncthreads();
  // Relaxed: it only keeps the others until this block's reads are over. They are, because the sums made of
  // them have just been made visible to the block, and nobody writes to a share again.
  if (size > 1) cluster_arrive_relaxed();
}

// Raw maps of one image, first_map on, in buffers.total; the block is synchronised.
template <typename T, bool kChannelsLast, int kMaps>
__device__ void raw_maps(const CamFront& front, int64_t image, int first_map, int rank, int size,
                         const FrontBuffers& buffers) {
  if constexpr (kChannelsLast) {
    if (front.vectors) {
      sum_pixels<T, kVectorOf<T>, kMaps>(front, image, first_map, rank, size, buffers);
    } else {
      sum_pixels<T, 1, kMaps>(front, image, first_map, rank, size, buffers);
    }
  } else {
    if (front.vectors) {
      sum_planes<T, kVectorOf<T>, kMaps>(front, image, first_map, rank, size, buffers);
    } else {
      sum_planes<T, 1, kMaps>(front, image, first_map, rank, size, buffers);
    }
  }
  cluster_sum(buffers.map, buffers.total, kMaps * front.pixels(), size);
}

__device__ inline Extrema<float> warp_merge(Extrema<float> extrema) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Extrema<float> other = {__shfl_xor_sync(kFullWarp, extrema.low, distance),
                                  __shfl_xor_sync(kFullWarp, extrema.high, distance)};
    extrema = merge(extrema, other);
  }
  return extrema;
}

// Normalises buffers.total in place and lets rank 0 write the outputs; the block is synchronised.
template <typename T, int kMaps>
__device__ void normalise_maps(const CamFront& front, int64_t image, int first_map, int rank,
                               const FrontBuffers& buffers) {
  const int pixels = front.pixels();
  const int warps = blockDim.x / kWarp;
  const int here = min(kMaps, front.maps - first_map);
#pragma unroll 1
  for (int m = 0; m < here; ++m) {
    const float* map = buffers.total + m * pixels;
    // Threads without a pixel start from pixel 0, which changes no extremum.
    Extrema<float> extrema = {map[0], map[0]};
#pragma unroll 1
    for (int p = threadIdx.x; p < pixels; p += blockDim.x)
      extrema = merge(extrema, Extrema<float>{map[p], map[p]});
    extrema = warp_merge(extrema);
    if (threadIdx.x % kWarp == 0) {
      float* slot = buffers.extrema + (m * warps + threadIdx.x / kWarp) * 2;
      slot[0] = extrema.low;
      slot[1] = extrema.high;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int m = 0; m < here; ++m) {
    Extrema<float> extrema = {buffers.extrema[m * warps * 2], buffers.extrema[m * warps * 2 + 1]};
    for (int warp = 1; warp < warps; ++warp) {
      const float* slot = buffers.extrema + (m * warps + warp) * 2;
      extrema = merge(extrema, Extrema<float>{slot[0], slot[1]});
    }
    const int64_t map = image * front.maps + first_map + m;
#pragma unroll 1
    for (int p = threadIdx.x; p < pixels; p += blockDim.x) {
      const float y = normalise(buffers.total[m * pixels + p], extrema, front.eps);
      buffers.total[m * pixels + p] = y;
      if (rank != 0) continue;
      static_cast<T*>(front.cam)[map * pixels + p] = from_float<T>(y);
      if (front.cam32 != nullptr) front.cam32[map * pixels + p] = y;
    }
    if (rank == 0 && threadIdx.x == 0) {
      front.extent[map * 2] = extrema.low;
      front.extent[map * 2 + 1] = extrema.high;
    }
  }
  __syncthreads();
}

// Fills in vectors and rows of a call that reads or writes feature maps at `pointers`.
template <typename Call>
void plan_loads(const char* op, const Hardware& hardware, Call& call,
                std::initializer_list<const void*> pointers) {
  check_pixels(op, call.height, call.width);
  const int vector = 16 / size_of(call.features_dtype);
  call.rows = vector / std::gcd(call.pixels(), vector);
  const bool fits = call.channels_last ? call.channels % vector == 0
                                       : call.pixels() >= vector && call.channels % call.rows == 0;
  call.vectors = hardware.vectors && fits && std::all_of(pointers.begin(), pointers.end(), aligned);
}

template <typename T, int kMaps>
int64_t front_bytes(const CamFront& front, int threads, int cluster) {
  SharedSize size;
  take_front_buffers<T, kMaps>(size, front, threads, cluster);
  return size.bytes();
}

// Cluster and shared memory of a launch that starts with the front; `other_bytes` is what an image costs
// besides its features, `other_shared` what a block needs besides the front's buffers.
template <typename T, int kMaps>
LaunchShape plan_front(const char* op, const Hardware& hardware, const CamFront& front, int64_t other_bytes,
                       int64_t other_shared = 0) {
  const int64_t items = front.images * ((front.maps + kMaps - 1) / kMaps);
  const int64_t bytes = static_cast<int64_t>(front.channels) * front.pixels() * size_of(front.features_dtype);
  int cluster = choose_cluster(hardware, items, bytes + other_bytes);
  const auto shared_with = [&](int blocks) {
    return front_bytes<T, kMaps>(front, hardware.threads, blocks) + other_shared;
  };
  if (shared_with(cluster) > hardware.shared_limit) cluster = 1;
  const int64_t shared = shared_with(cluster);
  if (shared > hardware.shared_limit) {
    throw too_large(op, front.height, front.width, shared, hardware.shared_limit);
  }
  return {items * cluster, hardware.threads, cluster, shared};
}

}  // namespace camkernels::cuda
