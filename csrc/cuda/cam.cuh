// Class activation maps and their gradients.
#pragma once

#include "cam_front.cuh"

namespace camkernels::cuda {

inline constexpr int kMapsPerCluster = 8;

struct CamFwd {
  CamFront front;
  AnyArray bias;  // [L], or null
  bool normalize;
};

template <typename T, bool kChannelsLast, int kMaps>
__global__ void __launch_bounds__(kThreads, kMaps == 1 ? 2 : 1)
    cam_fwd_kernel(const __grid_constant__ CamFwd call) {
  const CamFront& front = call.front;
  const int rank = cluster_rank();
  const int size = cluster_size();
  SharedMemory memory;
  const FrontBuffers buffers = take_front_buffers<T, kMaps>(memory, front, blockDim.x, size);
  const int groups = (front.maps + kMaps - 1) / kMaps;
  const int64_t item = blockIdx.x / size;
  const int64_t image = item / groups;
  const int first_map = static_cast<int>(item % groups) * kMaps;

  raw_maps<T, kChannelsLast, kMaps>(front, image, first_map, rank, size, buffers);
  if (call.normalize) {
    normalise_maps<T, kMaps>(front, image, first_map, rank, buffers);
  } else if (rank == 0) {
    const int pixels = front.pixels();
    const int here = min(kMaps, front.maps - first_map);
    for (int m = 0; m < here; ++m) {
      float bias = 0.0f;
      if (call.bias.data != nullptr) {
        const int64_t row = class_of(front.target, front.classes, front.maps, image, first_map + m);
        bias = row < 0 ? NAN : load_as_float(call.bias, row);
      }
      T* cam = static_cast<T*>(front.cam) + (image * front.maps + first_map + m) * pixels;  // [P]
      for (int p = threadIdx.x; p < pixels; p += blockDim.x) {
        cam[p] = from_float<T>(buffers.total[m * pixels + p] + bias);
      }
    }
  }
  leave_cluster(size);
}

template <typename T, bool kChannelsLast, typename Launcher>
void launch_cam_fwd_as(Launcher& launcher, const CamFwd& call) {
  const Hardware& hardware = launcher.hardware();
  const bool several = call.front.maps > 1 && front_bytes<T, kMapsPerCluster>(call.front, hardware.threads,
                                                                              1) <= hardware.shared_limit;
  if (several) {
    const LaunchShape shape = plan_front<T, kMapsPerCluster>("cam_fwd", hardware, call.front, 0);
    launcher.run(cam_fwd_kernel<T, kChannelsLast, kMapsPerCluster>, shape, call);
  } else {
    const LaunchShape shape = plan_front<T, 1>("cam_fwd", hardware, call.front, 0);
    launcher.run(cam_fwd_kernel<T, kChannelsLast, 1>, shape, call);
  }
}

// `launcher.run(kernel, shape, call)` starts a kernel; `launcher.hardware()` is what it starts it on.
template <typename Launcher>
void launch_cam_fwd(Launcher& launcher, CamFwd call) {
  plan_loads("cam_fwd", launcher.hardware(), call.front, {call.front.features});
  dispatch(call.front.features_dtype, [&](auto element) {
    using T = decltype(element);
    if (call.front.channels_last) {
      launch_cam_fwd_as<T, true>(launcher, call);
    } else {
      launch_cam_fwd_as<T, false>(launcher, call);
    }
  });
}

struct CamBwd {
  AnyArray grad_cam;     // [N, K, P]
  const void* features;  // [N, C, P] or, channels_last, [N, P, C]
  AnyArray weight;       // [L, C]
  AnyArray target;       // [N, K], or null: map k is of class k
  const float* cam;      // [N, K, P], normalised
  const float* extent;   // [N, K, 2], range of the raw maps
  void* grad_features;   // as features, or null
  void* grad_weight;     // [L, C], or null
  float* grad_bias;      // [L], or null
  float* scratch;        // cam_bwd_scratch(call) floats
  int64_t images;
  int64_t classes;
  int channels;
  int height;
  int width;
  int maps;
  float eps;
  DType features_dtype;
  bool channels_last;
  bool normalize;
  bool vectors;  // 16-byte accesses to features
  int rows;      // contiguous features: channels that are together a whole number of vectors
  int share;     // channels of one block

  __host__ __device__ int pixels() const { return height * width; }
  __device__ int64_t class_at(int64_t image, int map) const {
    return class_of(target, classes, maps, image, map);
  }
};

// Summed in double, because what all pixels of a map send to its extrema is much larger than what each keeps;
// rounded once, at the end.
using WideSums = MinMaxSums<double>;
using MapSums = MinMaxSums<float>;

__device__ __forceinline__ MapSums narrow(const WideSums& sums) {
  return {static_cast<float>(sums.low), static_cast<float>(sums.high), static_cast<float>(sums.low_ties),
          static_cast<float>(sums.high_ties)};
}

// One map per image: the gradient of a class is the sum over the rows of its images, one row of C + 1
// numbers (the last is the bias's) per image. Several maps: the sums that min-max needs of each map.
inline int64_t cam_bwd_scratch(const CamBwd& call) {
  return call.maps == 1 ? call.images * (call.channels + 1) : call.images * call.maps * 4;
}

__device__ inline void add(WideSums& sums, const WideSums& other) {
  sums.low += other.low;
  sums.high += other.high;
  sums.low_ties += other.low_ties;
  sums.high_ties += other.high_ties;
}

__device__ inline WideSums warp_sum(WideSums sums) {
  return {warp_sum(sums.low), warp_sum(sums.high), warp_sum(sums.low_ties), warp_sum(sums.high_ties)};
}

// Adds pixels first, first + step, ... of a map to its sums.
__device__ inline WideSums min_max_sums(const CamBwd& call, int64_t map, int first, int step) {
  WideSums sums = {};
#pragma unroll 1
  for (int p = first; p < call.pixels(); p += step) {
    const int64_t at = map * call.pixels() + p;
    accumulate<double>(sums, load_as_float(call.grad_cam, at), call.cam[at]);
  }
  return sums;
}

__device__ inline float raw_gradient(const CamBwd& call, int64_t map, int pixel, const MapSums& sums) {
  const int64_t at = map * call.pixels() + pixel;
  const float grad = load_as_float(call.grad_cam, at);
  if (!call.normalize) return grad;
  return normalise_backward(grad, call.cam[at], sums, call.extent[map * 2 + 1] - call.extent[map * 2],
                            call.eps);
}

struct RowBuffers {
  float* gradient;  // [P]: of the raw map
  float* weights;   // [share]
  float* sums;      // [share]: this block's piece of the image's row
  float* partial;  // [2 turns, rows in flight, 2, threads] or, channels_last, [elements of a vector, threads]
  WideSums* warps;  // [warps]
  float* totals;    // [warps]
};

inline constexpr int kRowsInFlight = 3;  // as many as the registers of two blocks hold

template <typename T, typename Memory>
__host__ __device__ RowBuffers take_row_buffers(Memory& memory, const CamBwd& call, int threads) {
  RowBuffers buffers;
  buffers.gradient = memory.template take<float>(call.pixels());
  buffers.weights = memory.template take<float>(call.share);
  buffers.sums = memory.template take<float>(call.share);
  const int per_thread = call.channels_last ? (call.vectors ? kVectorOf<T> : 1) : 2 * kRowsInFlight * 2;
  buffers.partial = memory.template take<float>(int64_t{per_thread} * threads);
  buffers.warps = memory.template take<WideSums>(threads / kWarp);
  buffers.totals = memory.template take<float>(threads / kWarp);
  return buffers;
}

// The raw map's gradient of one image in buffers.gradient, and what the bias receives of it; the block is
// synchronised.
__device__ inline float stage_gradient(const CamBwd& call, int64_t image, const RowBuffers& buffers) {
  const int warps = blockDim.x / kWarp;
  const int warp = threadIdx.x / kWarp;
  MapSums sums = {};
  if (call.normalize) {
    const WideSums own = warp_sum(min_max_sums(call, image, threadIdx.x, blockDim.x));
    if (threadIdx.x % kWarp == 0) buffers.warps[warp] = own;
    __syncthreads();
    WideSums all = {};
#pragma unroll 1
    for (int w = 0; w < warps; ++w) add(all, buffers.warps[w]);
    sums = narrow(all);
  }
  float total = 0.0f;
#pragma unroll 1
  for (int p = threadIdx.x; p < call.pixels(); p += blockDim.x) {
    const float gradient = raw_gradient(call, image, p, sums);
    buffers.gradient[p] = gradient;
    total += gradient;
  }
  total = warp_sum(total);
  if (threadIdx.x % kWarp == 0) buffers.totals[warp] = total;
  __syncthreads();
  if (call.normalize) return 0.0f;  // a constant cancels in min-max
  total = 0.0f;
  for (int w = 0; w < warps; ++w) total += buffers.totals[w];
  return total;
}

// Contiguous features, channels [begin, begin + count): the same walk over rows of whole vectors as in the
// front, writing the features' gradient and summing features * gradient per channel in one pass. A vector
// holds the end of one channel and perhaps the beginning of the next, so it gives two partial sums.
template <typename T, int kVec>
__device__ void backward_planes(const CamBwd& call, int64_t image, int begin, int count,
                                const RowBuffers& buffers) {
  constexpr int kLanesPerSum = 8;
  const int pixels = call.pixels();
  const int channels_per_row = kVec == 1 ? 1 : call.rows;
  const int row_elements = channels_per_row * pixels;
  const int row_vectors = row_elements / kVec;
  const int threads = blockDim.x;
  const int lanes = min(row_vectors, threads);
  const int groups = threads / lanes;
  const int group = threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  const int rows = count / channels_per_row;
  const int64_t base = (image * call.channels + begin) * pixels;
  const T* features = static_cast<const T*>(call.features) + base;
  T* grad_features = call.grad_features == nullptr ? nullptr : static_cast<T*>(call.grad_features) + base;
  const bool need_sums = call.grad_weight != nullptr;

#pragma unroll 1
  for (int tile = 0; tile < row_vectors; tile += lanes) {
    const int tile_end = min(tile + lanes, row_vectors);
    const bool active = group < groups && tile + lane < tile_end;
    const int element = active ? (tile + lane) * kVec : 0;
    const int low = element / pixels;
    const int high = min(low + 1, channels_per_row - 1);
    const int split = (low + 1) * pixels - element;
    float gradient[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) gradient[i] = buffers.gradient[(element + i) % pixels];

    int turn = 0;
#pragma unroll 1
    for (int first = 0; first < rows; first += groups * kRowsInFlight, turn ^= 1) {
      float* partial = buffers.partial + turn * kRowsInFlight * 2 * threads;
      const int64_t at = static_cast<int64_t>(first + group) * row_elements + element;
      const int step = groups * row_elements;
      if (active && need_sums) {
        Vector<T, kVec> loaded[kRowsInFlight] = {};
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          if (first + group + u * groups < rows) loaded[u] = load_vector<kVec>(features + at + u * step);
        }
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          float sum_low = 0.0f;
          float sum_high = 0.0f;
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const float product = to_float(loaded[u].at[i]) * gradient[i];
            sum_low += i < split ? product : 0.0f;
            sum_high += i < split ? 0.0f : product;
          }
          partial[(u * 2) * threads + threadIdx.x] = sum_low;
          partial[(u * 2 + 1) * threads + threadIdx.x] = sum_high;
        }
      }
      if (active && grad_features != nullptr) {
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          const int row = first + group + u * groups;
          if (row >= rows) break;
          const float weight_low = buffers.weights[row * channels_per_row + low];
          const float weight_high = buffers.weights[row * channels_per_row + high];
          Vector<T, kVec> result;
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            result.at[i] = from_float<T>((i < split ? weight_low : weight_high) * gradient[i]);
          }
          store_vector<kVec>(grad_features + at + u * step, result);
        }
      }
      if (!need_sums) continue;
      // Partial sums alternate between two buffers: one barrier per turn, not two.
      __syncthreads();
      const int here = min(groups * kRowsInFlight, rows - first) * channels_per_row;
#pragma unroll 1
      for (int start = 0; start < here; start += threads / kLanesPerSum) {
        const int item = start + threadIdx.x / kLanesPerSum;
        const int row = item / channels_per_row;  // counted from `first`
        const int channel = item % channels_per_row;
        float sum = 0.0f;
        if (item < here) {
          const int from = row / groups * 2 * threads + row % groups * lanes - tile;
          const int vector_begin = max(channel * pixels / kVec, tile);
          const int vector_end = min(((channel + 1) * pixels - 1) / kVec + 1, tile_end);
          for (int v = vector_begin + threadIdx.x % kLanesPerSum; v < vector_end; v += kLanesPerSum) {
            // A vector that begins before the channel does ends in it.
            sum += partial[from + v + (v * kVec < channel * pixels ? threads : 0)];
          }
        }
#pragma unroll
        for (int distance = kLanesPerSum / 2; distance > 0; distance /= 2) {
          sum += __shfl_xor_sync(kFullWarp, sum, distance);
        }
        if (item < here && threadIdx.x % kLanesPerSum == 0) {
          float& total = buffers.sums[first * channels_per_row + item];
          total = tile == 0 ? sum : total + sum;
        }
      }
    }
    __syncthreads();  // the tile's partial sums are no longer read
  }
}

// channels_last features: a thread keeps a vector of channels and walks over pixels.
template <typename T, int kVec>
__device__ void backward_pixels(const CamBwd& call, int64_t image, int begin, int count,
                                const RowBuffers& buffers) {
  const int pixels = call.pixels();
  const int threads = blockDim.x;
  const int lanes = count / kVec;
  const int groups = threads / lanes;
  const int group = threadIdx.x / lanes;
  const int channel = threadIdx.x % lanes * kVec;
  const int64_t base = image * call.channels * pixels + begin + channel;
  const T* features = static_cast<const T*>(call.features) + base;
  T* grad_features = call.grad_features == nullptr ? nullptr : static_cast<T*>(call.grad_features) + base;
  const bool need_sums = call.grad_weight != nullptr;
  if (group < groups) {
    float weights[kVec];
    float sums[kVec] = {};
#pragma unroll
    for (int i = 0; i < kVec; ++i) weights[i] = buffers.weights[channel + i];
#pragma unroll 1
    for (int first = group; first < pixels; first += groups * kRowsInFlight) {
      const int64_t at = static_cast<int64_t>(first) * call.channels;
      const int64_t step = static_cast<int64_t>(groups) * call.channels;
      if (need_sums) {
        Vector<T, kVec> loaded[kRowsInFlight] = {};
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          if (first + u * groups < pixels) loaded[u] = load_vector<kVec>(features + at + u * step);
        }
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          if (first + u * groups >= pixels) break;
          const float gradient = buffers.gradient[first + u * groups];
#pragma unroll
          for (int i = 0; i < kVec; ++i) sums[i] = fmaf(to_float(loaded[u].at[i]), gradient, sums[i]);
        }
      }
      if (grad_features != nullptr) {
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u) {
          if (first + u * groups >= pixels) break;
          const float gradient = buffers.gradient[first + u * groups];
          Vector<T, kVec> result;
#pragma unroll
          for (int i = 0; i < kVec; ++i) result.at[i] = from_float<T>(weights[i] * gradient);
          store_vector<kVec>(grad_features + at + u * step, result);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) buffers.partial[i * threads + threadIdx.x] = sums[i];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < count; c += threads) {
    float sum = 0.0f;
    for (int g = 0; g < groups; ++g) sum += buffers.partial[c % kVec * threads + g * lanes + c / kVec];
    buffers.sums[c] = sum;
  }
  __syncthreads();
}

// One map per image; a block takes a share of the channels of one image.
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 2) cam_bwd_rows_kernel(const __grid_constant__ CamBwd call) {
  const int shares = (call.channels + call.share - 1) / call.share;
  const int64_t image = blockIdx.x / shares;
  const int begin = static_cast<int>(blockIdx.x % shares) * call.share;
  const int count = min(call.share, call.channels - begin);
  SharedMemory memory;
  const RowBuffers buffers = take_row_buffers<T>(memory, call, blockDim.x);
  const int64_t row = call.class_at(image, 0);
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    buffers.weights[c] = row < 0 ? NAN : load_as_float(call.weight, row * call.channels + begin + c);
  }
  const float bias = stage_gradient(call, image, buffers);
  if constexpr (kChannelsLast) {
    if (call.vectors) {
      backward_pixels<T, kVectorOf<T>>(call, image, begin, count, buffers);
    } else {
      backward_pixels<T, 1>(call, image, begin, count, buffers);
    }
  } else {
    if (call.vectors) {
      backward_planes<T, kVectorOf<T>>(call, image, begin, count, buffers);
    } else {
      backward_planes<T, 1>(call, image, begin, count, buffers);
    }
  }
  float* sums = call.scratch + image * (call.channels + 1);  // [C + 1]
  if (call.grad_weight != nullptr) {
    for (int c = threadIdx.x; c < count; c += blockDim.x) sums[begin + c] = buffers.sums[c];
  }
  if (call.grad_bias != nullptr && begin == 0 && threadIdx.x == 0) sums[call.channels] = bias;
}

inline constexpr int kTileThreads = 256;
inline constexpr int kPerThread = 8;  // channels of a thread; times warps, the channels of a block
inline constexpr int kTileMaps = 16;
inline constexpr int kTileClasses = 8;

// One map per image: adds up the rows of each class, in the order of images. A block takes one class and as
// many columns as it has threads; column C is the bias's.
__global__ void __launch_bounds__(kTileThreads) cam_bwd_classes_kernel(const __grid_constant__ CamBwd call) {
  const int threads = blockDim.x;
  const int warps = threads / kWarp;
  const int chunks = call.channels / threads + 1;
  const int64_t row = blockIdx.x / chunks;
  const int64_t column = blockIdx.x % chunks * static_cast<int64_t>(threads) + threadIdx.x;
  SharedMemory memory;
  unsigned* votes = memory.take<unsigned>(warps);
  const bool wanted = column < call.channels ? call.grad_weight != nullptr
                                             : column == call.channels && call.grad_bias != nullptr;
  float sum = 0.0f;
#pragma unroll 1
  for (int64_t first = 0; first < call.images; first += threads) {
    const int64_t own = first + threadIdx.x;
    const unsigned vote = __ballot_sync(kFullWarp, own < call.images && call.class_at(own, 0) == row);
    if (threadIdx.x % kWarp == 0) votes[threadIdx.x / kWarp] = vote;
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < warps; ++w) {
      for (unsigned left = votes[w]; left != 0; left &= left - 1) {
        const int64_t image = first + w * kWarp + __ffs(left) - 1;
        if (wanted) sum += call.scratch[image * (call.channels + 1) + column];
      }
    }
    __syncthreads();  // the votes are no longer read
  }
  if (!wanted) return;
  if (column < call.channels) {
    store_from_float(call.grad_weight, call.weight.dtype, row * call.channels + column, sum);
  } else {
    call.grad_bias[row] = sum;
  }
}

// Several maps per image: the sums that min-max needs, a warp per map.
__global__ void __launch_bounds__(kTileThreads) cam_bwd_sums_kernel(const __grid_constant__ CamBwd call) {
  const int64_t warp = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarp;
  const int64_t maps = call.images * call.maps;
  const int64_t map = warp < maps ? warp : maps - 1;
  const MapSums sums = narrow(warp_sum(min_max_sums(call, map, threadIdx.x % kWarp, kWarp)));
  if (warp < maps && threadIdx.x % kWarp == 0) reinterpret_cast<MapSums*>(call.scratch)[map] = sums;
}

__device__ inline float stored_gradient(const CamBwd& call, int64_t map, int pixel) {
  MapSums sums = {};
  if (call.normalize) sums = reinterpret_cast<const MapSums*>(call.scratch)[map];
  return raw_gradient(call, map, pixel, sums);
}

// Several maps per image: grad_features[c, p] = sum over maps of weight[class, c] * gradient[map, p], a block
// per image and tile of channels and pixels, lanes along pixels.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 4)
    cam_bwd_features_kernel(const __grid_constant__ CamBwd call) {
  const int pixels = call.pixels();
  const int warps = blockDim.x / kWarp;
  const int tile_channels = warps * kPerThread;
  const int pixel_tiles = (pixels + kWarp - 1) / kWarp;
  const int channel_tiles = (call.channels + tile_channels - 1) / tile_channels;
  const int pixel_begin = static_cast<int>(blockIdx.x % pixel_tiles) * kWarp;
  const int channel_begin = static_cast<int>(blockIdx.x / pixel_tiles % channel_tiles) * tile_channels;
  const int64_t image = blockIdx.x / pixel_tiles / channel_tiles;
  SharedMemory memory;
  float* weights = memory.take<float>(kTileMaps * tile_channels);  // [maps, channels]
  float* gradients = memory.take<float>(kTileMaps * kWarp);        // [maps, pixels]
  const int lane = threadIdx.x % kWarp;
  const int own = threadIdx.x / kWarp * kPerThread;

  float sums[kPerThread] = {};
#pragma unroll 1
  for (int first = 0; first < call.maps; first += kTileMaps) {
    const int count = min(kTileMaps, call.maps - first);
    __syncthreads();  // the tile before is no longer read
    for (int i = threadIdx.x; i < count * tile_channels; i += blockDim.x) {
      const int64_t row = call.class_at(image, first + i / tile_channels);
      const int channel = channel_begin + i % tile_channels;
      weights[i] = channel >= call.channels ? 0.0f
                   : row < 0                ? NAN
                                            : load_as_float(call.weight, row * call.channels + channel);
    }
    for (int i = threadIdx.x; i < count * kWarp; i += blockDim.x) {
      const int pixel = pixel_begin + i % kWarp;
      gradients[i] =
          pixel < pixels ? stored_gradient(call, image * call.maps + first + i / kWarp, pixel) : 0.0f;
    }
    __syncthreads();
#pragma unroll 1
    for (int m = 0; m < count; ++m) {
      const float gradient = gradients[m * kWarp + lane];
#pragma unroll
      for (int c = 0; c < kPerThread; ++c)
        sums[c] = fmaf(weights[m * tile_channels + own + c], gradient, sums[c]);
    }
  }
  const int pixel = pixel_begin + lane;
  if (pixel >= pixels) return;
  T* grad_features = static_cast<T*>(call.grad_features) + image * call.channels * pixels;
#pragma unroll
  for (int c = 0; c < kPerThread; ++c) {
    const int64_t channel = channel_begin + own + c;
    if (channel >= call.channels) break;
    grad_features[call.channels_last ? static_cast<int64_t>(pixel) * call.channels + channel
                                     : channel * pixels + pixel] = from_float<T>(sums[c]);
  }
}

// Several maps per image: grad_weight of a tile of classes and channels, a block walking over all images, so
// that the order of the sum is fixed and nothing of N * K * C is stored. Lanes are pixels.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) cam_bwd_weight_kernel(const __grid_constant__ CamBwd call) {
  constexpr int kStride = kWarp + 1;  // columns of the feature tile fall into different banks
  const int pixels = call.pixels();
  const int tile_channels = blockDim.x / kWarp * kPerThread;
  const int channel_tiles = (call.channels + tile_channels - 1) / tile_channels;
  const int channel_begin = static_cast<int>(blockIdx.x % channel_tiles) * tile_channels;
  const int64_t class_begin = static_cast<int64_t>(blockIdx.x / channel_tiles) * kTileClasses;
  SharedMemory memory;
  float* tile = memory.take<float>(tile_channels * kStride);    // [channels, pixels]
  float* gradients = memory.take<float>(kTileClasses * kWarp);  // [classes, pixels]
  const int lane = threadIdx.x % kWarp;
  const int own = threadIdx.x / kWarp * kPerThread;

  float sums[kTileClasses][kPerThread] = {};
#pragma unroll 1
  for (int64_t image = 0; image < call.images; ++image) {
    bool found = call.target.data == nullptr;
    for (int m = threadIdx.x; m < call.maps && call.target.data != nullptr; m += blockDim.x) {
      const int64_t row = call.class_at(image, m);
      found = found || (row >= class_begin && row < class_begin + kTileClasses);
    }
    if (!__syncthreads_or(found)) continue;
    const T* features = static_cast<const T*>(call.features) + image * call.channels * pixels;
#pragma unroll 1
    for (int pixel_begin = 0; pixel_begin < pixels; pixel_begin += kWarp) {
      __syncthreads();  // the tile before is no longer read
#pragma unroll 1
      for (int i = threadIdx.x; i < tile_channels * kWarp; i += blockDim.x) {
        const int c = call.channels_last ? i % tile_channels : i / kWarp;
        const int p = call.channels_last ? i / tile_channels : i % kWarp;
        const int64_t channel = channel_begin + c;
        const int64_t pixel = pixel_begin + p;
        float value = 0.0f;
        if (channel < call.channels && pixel < pixels) {
          value = to_float(
              features[call.channels_last ? pixel * call.channels + channel : channel * pixels + pixel]);
        }
        tile[c * kStride + p] = value;
      }
#pragma unroll 1
      for (int i = threadIdx.x; i < kTileClasses * kWarp; i += blockDim.x) {
        const int64_t row = class_begin + i / kWarp;
        const int pixel = pixel_begin + i % kWarp;
        float gradient = 0.0f;
        if (pixel < pixels && row < call.classes) {
          if (call.target.data == nullptr) {
            gradient = stored_gradient(call, image * call.maps + row, pixel);
          } else {
            for (int m = 0; m < call.maps; ++m) {
              if (call.class_at(image, m) == row)
                gradient += stored_gradient(call, image * call.maps + m, pixel);
            }
          }
        }
        gradients[i] = gradient;
      }
      __syncthreads();
      float values[kPerThread];
#pragma unroll
      for (int c = 0; c < kPerThread; ++c) values[c] = tile[(own + c) * kStride + lane];
#pragma unroll
      for (int k = 0; k < kTileClasses; ++k) {
        const float gradient = gradients[k * kWarp + lane];
#pragma unroll
        for (int c = 0; c < kPerThread; ++c) sums[k][c] = fmaf(gradient, values[c], sums[k][c]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kTileClasses; ++k) {
#pragma unroll
    for (int c = 0; c < kPerThread; ++c) {
      const float sum = warp_sum(sums[k][c]);
      const int64_t channel = channel_begin + own + c;
      if (lane == 0 && class_begin + k < call.classes && channel < call.channels) {
        store_from_float(call.grad_weight, call.weight.dtype, (class_begin + k) * call.channels + channel,
                         sum);
      }
    }
  }
}

// Several maps per image: grad_bias, a warp per class.
__global__ void __launch_bounds__(kTileThreads) cam_bwd_bias_kernel(const __grid_constant__ CamBwd call) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  float sum = 0.0f;
#pragma unroll 1
  for (int64_t map = 0; map < call.images * call.maps && row < call.classes && !call.normalize; ++map) {
    if (call.class_at(map / call.maps, static_cast<int>(map % call.maps)) != row) continue;
    for (int p = lane; p < call.pixels(); p += kWarp) {
      sum += load_as_float(call.grad_cam, map * call.pixels() + p);
    }
  }
  sum = warp_sum(sum);
  if (lane == 0 && row < call.classes) call.grad_bias[row] = sum;
}

template <typename T, typename Launcher>
void launch_cam_bwd_rows(Launcher& launcher, CamBwd call) {
  const Hardware& hardware = launcher.hardware();
  constexpr int64_t kWaves = 4;
  constexpr int kSmallestShare = 32;
  call.share = hardware.threads;
  while (call.share > kSmallestShare &&
         call.images * ((call.channels + call.share - 1) / call.share) < kWaves * hardware.multiprocessors) {
    call.share /= 2;
  }
  call.share = std::min(call.share, call.channels);
  SharedSize size;
  take_row_buffers<T>(size, call, hardware.threads);
  if (size.bytes() > hardware.shared_limit) {
    throw too_large("cam_bwd", call.height, call.width, size.bytes(), hardware.shared_limit);
  }
  const int64_t shares = (call.channels + call.share - 1) / call.share;
  const LaunchShape shape{call.images * shares, hardware.threads, 1, size.bytes()};
  if (call.channels_last) {
    launcher.run(cam_bwd_rows_kernel<T, true>, shape, call);
  } else {
    launcher.run(cam_bwd_rows_kernel<T, false>, shape, call);
  }
  if (call.grad_weight == nullptr && call.grad_bias == nullptr) return;
  const int threads = std::min(hardware.threads, kTileThreads);
  SharedSize votes;
  votes.take<unsigned>(threads / kWarp);
  launcher.run(cam_bwd_classes_kernel,
               LaunchShape{call.classes * (call.channels / threads + 1), threads, 1, votes.bytes()}, call);
}

template <typename T, typename Launcher>
void launch_cam_bwd_tiles(Launcher& launcher, const CamBwd& call) {
  const int threads = std::min(launcher.hardware().threads, kTileThreads);
  const int64_t warps = threads / kWarp;
  const int tile_channels = static_cast<int>(warps) * kPerThread;
  const int64_t channel_tiles = (call.channels + tile_channels - 1) / tile_channels;
  if (call.normalize) {
    launcher.run(cam_bwd_sums_kernel,
                 LaunchShape{(call.images * call.maps + warps - 1) / warps, threads, 1, 0}, call);
  }
  if (call.grad_features != nullptr) {
    const int64_t pixel_tiles = (call.pixels() + kWarp - 1) / kWarp;
    SharedSize size;
    size.take<float>(kTileMaps * tile_channels);
    size.take<float>(kTileMaps * kWarp);
    launcher.run(cam_bwd_features_kernel<T>,
                 LaunchShape{call.images * channel_tiles * pixel_tiles, threads, 1, size.bytes()}, call);
  }
  if (call.grad_weight != nullptr) {
    SharedSize size;
    size.take<float>(tile_channels * (kWarp + 1));
    size.take<float>(kTileClasses * kWarp);
    launcher.run(cam_bwd_weight_kernel<T>,
                 LaunchShape{(call.classes + kTileClasses - 1) / kTileClasses * channel_tiles, threads, 1,
                             size.bytes()},
                 call);
  }
  if (call.grad_bias != nullptr) {
    launcher.run(cam_bwd_bias_kernel, LaunchShape{(call.classes + warps - 1) / warps, threads, 1, 0}, call);
  }
}

template <typename Launcher>
void launch_cam_bwd(Launcher& launcher, CamBwd call) {
  plan_loads("cam_bwd", launcher.hardware(), call, {call.features, call.grad_features});
  dispatch(call.features_dtype, [&](auto element) {
    if (call.maps == 1) {
      launch_cam_bwd_rows<decltype(element)>(launcher, call);
    } else {
      launch_cam_bwd_tiles<decltype(element)>(launcher, call);
    }
  });
}

}  // namespace camkernels::cuda
