// Seed pixels of the peak of a class activation map, the vectors there, and those vectors' gradient.
#pragma once

#include "../shared/sort_key.h"
#include "cam_front.cuh"

namespace camkernels::cuda {

inline constexpr int kDigitBits = 8;
inline constexpr int kBins = 1 << kDigitBits;

struct CamSeedsFwd {
  CamFront front;
  const void* seed_features;  // [N, D, P] or, channels_last, [N, P, D]
  const float* noise;         // [N, P], or null: candidates in raster order
  void* vectors;              // [N, K, D]
  int64_t* indices;           // [N, K]
  int64_t* count;             // [N]
  int64_t* scratch;           // [N, scratch_words()], or null: keys and choice are in shared memory
  int num_seeds;
  int depth;
  float threshold;
  DType seeds_dtype;
  bool seeds_channels_last;
  bool seed_vectors;  // 16-byte accesses to seed_features and vectors
  int places;         // of choice: a power of two, as sorting wants it

  __host__ __device__ int64_t key_words() const { return (int64_t{front.pixels()} + 1) / 2; }
  __host__ __device__ int64_t scratch_words() const { return key_words() + places; }
};

struct Bin {
  int digit;
  int above;  // candidates of larger digits
  int size;   // candidates of this one
};

struct SeedBuffers {
  uint32_t* keys;    // [P]: larger is chosen first; 0 is no candidate
  uint64_t* choice;  // [places]: see entry_of
  int* histogram;    // [kBins]
  int* counts;       // [warps]
  Bin* bin;          // [1]
  int* taken;        // [1]
};

template <typename Memory>
__host__ __device__ SeedBuffers take_seed_buffers(Memory& memory, const CamSeedsFwd& call, int threads,
                                                  bool in_shared) {
  SeedBuffers buffers;
  buffers.keys = in_shared ? memory.template take<uint32_t>(call.front.pixels()) : nullptr;
  buffers.choice = in_shared ? memory.template take<uint64_t>(call.places) : nullptr;
  buffers.histogram = memory.template take<int>(kBins);
  buffers.counts = memory.template take<int>(threads / kWarp);
  buffers.bin = memory.template take<Bin>(1);
  buffers.taken = memory.template take<int>(1);
  return buffers;
}

// A pixel with its key as one number: of equal keys the lower pixel is the larger entry. No two are equal,
// and 0 is less than each.
__device__ __forceinline__ uint64_t entry_of(uint32_t key, int pixel, int last) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(last - pixel);
}

__device__ __forceinline__ int pixel_of(uint64_t entry, int last) {
  return last - static_cast<int>(static_cast<uint32_t>(entry));
}

// Keys of all pixels; returns how many are candidates. Where none is, all pixels are keyed by the map, so
// that the first of them is torch.argmax's. A thread keys the pixels that it looks at in choose.
__device__ inline int stage_keys(const CamSeedsFwd& call, int64_t image, const float* map,
                                 const SeedBuffers& buffers) {
  const int pixels = call.front.pixels();
  int count = 0;
#pragma unroll 1
  for (int p = threadIdx.x; p < pixels; p += blockDim.x) {
    uint32_t key = kNoKey;
    if (map[p] > call.threshold) key = call.noise == nullptr ? 1u : sort_key(call.noise[image * pixels + p]);
    buffers.keys[p] = key;
    count += key != kNoKey;
  }
  count = warp_sum(count);
  if (threadIdx.x % kWarp == 0) buffers.counts[threadIdx.x / kWarp] = count;
  __syncthreads();
  count = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) count += buffers.counts[warp];
  if (count == 0) {
#pragma unroll 1
    for (int p = threadIdx.x; p < pixels; p += blockDim.x) buffers.keys[p] = sort_key(map[p]);
  }
  return count;
}

// One warp: the bin in which the entry of rank `wanted`, counted from 1 at the largest digit down, lies.
__device__ inline void find_bin(const int* histogram, int wanted, Bin* bin) {
  constexpr int kOwn = kBins / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int highest = kBins - 1 - lane * kOwn;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += histogram[highest - i];
  int upto = sum;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int before = __shfl_sync(kFullWarp, upto, max(lane - distance, 0));
    if (lane >= distance) upto += before;
  }
  int above = upto - sum;
  if (above >= wanted || upto < wanted) return;
  int digit = highest;
  while (above + histogram[digit] < wanted) above += histogram[digit--];
  *bin = {digit, above, histogram[digit]};
}

// The `wanted` largest entries of `candidates`, in any order, in the choice. A radix select: digit by digit
// the bin that holds the last entry wanted, until all of that bin is. The block is synchronised.
__device__ inline void choose(int pixels, int candidates, int wanted, const SeedBuffers& buffers) {
  const int last = pixels - 1;
  uint64_t mask = 0;   // digits that are known
  uint64_t least = 0;  // of the last entry wanted
  int left = wanted;
#pragma unroll 1
  for (int shift = 64 - kDigitBits; shift >= 0 && candidates > wanted; shift -= kDigitBits) {
    if (shift < 32 && last >> shift == 0) continue;  // the digit is 0 in all entries
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) buffers.histogram[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int p = threadIdx.x; p < pixels; p += blockDim.x) {
      const uint32_t key = buffers.keys[p];
      const uint64_t entry = entry_of(key, p, last);
      if (key != kNoKey && (entry & mask) == least) {
        atomicAdd(&buffers.histogram[static_cast<int>(entry >> shift) & (kBins - 1)], 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_bin(buffers.histogram, left, buffers.bin);
    __syncthreads();
    const Bin bin = *buffers.bin;
    least |= static_cast<uint64_t>(bin.digit) << shift;
    mask |= static_cast<uint64_t>(kBins - 1) << shift;
    left -= bin.above;
    if (bin.size == left) break;
  }
  if (threadIdx.x == 0) *buffers.taken = 0;
  __syncthreads();
#pragma unroll 1
  for (int p = threadIdx.x; p < pixels; p += blockDim.x) {
    const uint32_t key = buffers.keys[p];
    const uint64_t entry = entry_of(key, p, last);
    if (key != kNoKey && (entry & mask) >= least) buffers.choice[atomicAdd(buffers.taken, 1)] = entry;
  }
  __syncthreads();
}

// Sorts the choice, largest first: a bitonic network over the next power of two. The block is synchronised.
__device__ inline void sort_choice(uint64_t* choice, int count) {
  int places = 1;
  while (places < count) places *= 2;
  for (int i = count + threadIdx.x; i < places; i += blockDim.x) choice[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int run = 2; run <= places; run *= 2) {
#pragma unroll 1
    for (int distance = run / 2; distance > 0; distance /= 2) {
#pragma unroll 1
      for (int i = threadIdx.x; i < places / 2; i += blockDim.x) {
        const int one = 2 * i - (i & (distance - 1));
        const int other = one + distance;
        const uint64_t first = choice[one];
        const uint64_t second = choice[other];
        if ((first < second) == ((one & run) == 0)) {
          choice[one] = second;
          choice[other] = first;
        }
      }
      // Up to a warp's width apart, pairs stay within the 2 * kWarp entries that one warp handles.
      const int next = distance > 1 ? distance / 2 : run;
      if (max(distance, next) > kWarp) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
  __syncthreads();
}

// Copies the vectors of an image's seeds from contiguous features, share `rank` of `size`: tiles of seeds and
// channels, read plane by plane and written vector by vector. tile: [kWeights], free to use.
template <typename Element, typename SeedAt>
__device__ void gather_planes(const CamSeedsFwd& call, int64_t image, int rank, int size, float* tile,
                              SeedAt seed_at) {
  constexpr int kInFlight = 4;
  const int64_t pixels = call.front.pixels();
  const int most_seeds = min(call.num_seeds, kWeights / (kWarp + 1));
  const int whole_warps = (kWeights / most_seeds - 1) / kWarp * kWarp;
  const int evenly = static_cast<int>((call.depth + int64_t{size} * kWarp - 1) / (size * kWarp)) * kWarp;
  const int most_channels = min(whole_warps, evenly);
  const int stride = most_channels + 1;  // odd: neither seeds nor channels share a bank
  const int seed_tiles = (call.num_seeds + most_seeds - 1) / most_seeds;
  const int64_t tiles = int64_t{seed_tiles} * ((call.depth + most_channels - 1) / most_channels);
  const Element* from = static_cast<const Element*>(call.seed_features) + image * call.depth * pixels;
  Element* to = static_cast<Element*>(call.vectors) + image * call.num_seeds * call.depth;
  Element* staged = reinterpret_cast<Element*>(tile);  // [seeds, stride]
#pragma unroll 1
  for (int64_t t = tiles * rank / size; t < tiles * (rank + 1) / size; ++t) {
    const int first_seed = static_cast<int>(t % seed_tiles) * most_seeds;
    const int first_channel = static_cast<int>(t / seed_tiles) * most_channels;
    const int seeds = min(most_seeds, call.num_seeds - first_seed);
    const int channels = min(most_channels, call.depth - first_channel);
    const int elements = seeds * channels;
    __syncthreads();  // the tile before is no longer read
#pragma unroll 1
    for (int first = threadIdx.x; first < elements; first += kInFlight * blockDim.x) {
      Element values[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = first + u * static_cast<int>(blockDim.x);
        if (i < elements)
          values[u] = from[(first_channel + i / seeds) * pixels + seed_at(first_seed + i % seeds)];
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = first + u * static_cast<int>(blockDim.x);
        if (i < elements) staged[i % seeds * stride + i / seeds] = values[u];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < elements; i += blockDim.x) {
      const int seed = i / channels;
      const int channel = i % channels;
      to[static_cast<int64_t>(first_seed + seed) * call.depth + first_channel + channel] =
          staged[seed * stride + channel];
    }
  }
}

// The same from channels_last features, where a vector lies in one piece.
template <typename Element, int kVec, typename SeedAt>
__device__ void gather_pixels(const CamSeedsFwd& call, int64_t image, int rank, int size, SeedAt seed_at) {
  constexpr int kInFlight = 4;
  const int threads = blockDim.x;
  const int columns = call.depth / kVec;
  const int64_t pieces = int64_t{call.num_seeds} * columns;
  const int64_t end = pieces * (rank + 1) / size;
  const Element* from =
      static_cast<const Element*>(call.seed_features) + image * call.front.pixels() * call.depth;
  Element* to = static_cast<Element*>(call.vectors) + image * call.num_seeds * call.depth;
  int64_t piece = pieces * rank / size + threadIdx.x;
  int64_t seed = piece / columns;
  int column = static_cast<int>(piece % columns);
#pragma unroll 1
  for (; piece < end; piece += kInFlight * threads) {
    Vector<Element, kVec> values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (piece + u * threads < end) {
        const int64_t pixel = seed_at(static_cast<int>(seed));
        values[u] = load_vector<kVec>(from + pixel * call.depth + column * kVec);
      }
      seed += threads / columns;
      column += threads % columns;
      if (column >= columns) {
        column -= columns;
        ++seed;
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (piece + u * threads < end) store_vector<kVec>(to + (piece + u * threads) * kVec, values[u]);
    }
  }
}

template <typename Element, typename SeedAt>
__device__ void gather_as(const CamSeedsFwd& call, int64_t image, int rank, int size, float* tile,
                          SeedAt seed_at) {
  if (!call.seeds_channels_last) {
    gather_planes<Element>(call, image, rank, size, tile, seed_at);
  } else if (call.seed_vectors) {
    gather_pixels<Element, kVectorOf<Element>>(call, image, rank, size, seed_at);
  } else {
    gather_pixels<Element, 1>(call, image, rank, size, seed_at);
  }
}

// kInShared false: a map too large for shared memory, by a block for each image that works in the outputs and
// in scratch memory.
template <typename T, bool kChannelsLast, bool kInShared>
__global__ void __launch_bounds__(kThreads, kInShared ? 2 : 1)
    cam_seeds_fwd_kernel(const __grid_constant__ CamSeedsFwd call) {
  const CamFront& front = call.front;
  const int rank = kInShared ? cluster_rank() : 0;
  const int size = kInShared ? cluster_size() : 1;
  const int64_t image = blockIdx.x / size;
  const int pixels = front.pixels();
  SharedMemory memory;
  FrontBuffers maps = take_front_buffers<T, 1>(memory, front, blockDim.x, size, kInShared);
  if constexpr (!kInShared) {
    float* map = front.cam32 == nullptr ? static_cast<float*>(front.cam) : front.cam32;
    maps.map = maps.total = map + image * pixels;
  }
  raw_maps<T, kChannelsLast, 1>(front, image, 0, rank, size, maps);
  normalise_maps<T, 1>(front, image, 0, rank, maps);

  SeedBuffers buffers = take_seed_buffers(memory, call, blockDim.x, kInShared);
  if constexpr (!kInShared) {
    int64_t* scratch = call.scratch + image * call.scratch_words();
    buffers.keys = reinterpret_cast<uint32_t*>(scratch);
    buffers.choice = reinterpret_cast<uint64_t*>(scratch + call.key_words());
  }
  // Every block of the cluster has the map and makes the same choice of it.
  const int candidates = stage_keys(call, image, maps.total, buffers);
  const int chosen = min(max(candidates, 1), call.num_seeds);
  choose(pixels, candidates == 0 ? pixels : candidates, chosen, buffers);
  sort_choice(buffers.choice, chosen);
  const auto seed_at = [&](int k) {
    return pixel_of(buffers.choice[k < chosen ? k : k % chosen], pixels - 1);
  };
  if (rank == 0) {
    int64_t* indices = call.indices + image * call.num_seeds;
#pragma unroll 1
    for (int k = threadIdx.x; k < call.num_seeds; k += blockDim.x) indices[k] = seed_at(k);
    if (threadIdx.x == 0) call.count[image] = candidates;
  }
  // Copied as integers: a NaN keeps its bits.
  if (size_of(call.seeds_dtype) == 4) {
    gather_as<uint32_t>(call, image, rank, size, maps.weights, seed_at);
  } else {
    gather_as<uint16_t>(call, image, rank, size, maps.weights, seed_at);
  }
  leave_cluster(size);
}

inline constexpr int kSeedThreads = 256;
inline constexpr int kSeedPixels = 224;        // of one block: as many as 48 KB of shared memory hold
inline constexpr int kSeedTurn = 128;          // seeds staged together
inline constexpr int kSeedStride = kWarp + 1;  // neither pixels nor channels share a bank

struct CamSeedsBwd {
  const void* grad_vectors;  // [N, K, D]
  const int64_t* indices;    // [N, K]
  void* grad_seed_features;  // [N, D, P] or, channels_last, [N, P, D]
  int64_t images;
  int num_seeds;
  int depth;
  int height;
  int width;
  DType dtype;
  bool channels_last;
  bool add;  // to what grad_seed_features holds

  __host__ __device__ int pixels() const { return height * width; }
  __host__ __device__ int pixel_tiles() const { return (pixels() + kSeedPixels - 1) / kSeedPixels; }
  // Tiles are alike, so that no block has next to nothing to do.
  __host__ __device__ int tile_pixels() const { return (pixels() + pixel_tiles() - 1) / pixel_tiles(); }
};

struct ScatterBuffers {
  float* sums;    // [pixels of the block, kSeedStride]
  float* staged;  // [kSeedTurn, kWarp]: gradients of the seeds within the block's pixels
  int* places;    // [kSeedTurn]: their pixels, counted from the block's first; -1 elsewhere
  int* touched;   // [pixels of the block]: whether a seed was there
};

template <typename Memory>
__host__ __device__ ScatterBuffers take_scatter_buffers(Memory& memory, int tile_pixels) {
  ScatterBuffers buffers;
  buffers.sums = memory.template take<float>(tile_pixels * kSeedStride);
  buffers.staged = memory.template take<float>(kSeedTurn * kWarp);
  buffers.places = memory.template take<int>(kSeedTurn);
  buffers.touched = memory.template take<int>(tile_pixels);
  return buffers;
}

// A block takes a warp's width of channels and some pixels of an image. Its warps divide the pixels, so that
// each adds up its seeds in their order, and writes nothing that another does.
template <typename T>
__global__ void __launch_bounds__(kSeedThreads)
    cam_seeds_bwd_kernel(const __grid_constant__ CamSeedsBwd call) {
  const int pixels = call.pixels();
  const int pixel_tiles = call.pixel_tiles();
  const int tile_pixels = call.tile_pixels();
  const int channel_tiles = (call.depth + kWarp - 1) / kWarp;
  const int first_pixel = static_cast<int>(blockIdx.x % pixel_tiles) * tile_pixels;
  const int first_channel = static_cast<int>(blockIdx.x / pixel_tiles % channel_tiles) * kWarp;
  const int64_t image = blockIdx.x / pixel_tiles / channel_tiles;
  const int here = min(tile_pixels, pixels - first_pixel);
  const int channels = min(kWarp, call.depth - first_channel);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  SharedMemory memory;
  const ScatterBuffers buffers = take_scatter_buffers(memory, tile_pixels);
  for (int i = threadIdx.x; i < here * kSeedStride; i += blockDim.x) buffers.sums[i] = 0.0f;
  for (int i = threadIdx.x; i < here; i += blockDim.x) buffers.touched[i] = 0;

#pragma unroll 1
  for (int first = 0; first < call.num_seeds; first += kSeedTurn) {
    const int seeds = min(kSeedTurn, call.num_seeds - first);
    __syncthreads();  // the zeros are there; the turn before is no longer read
#pragma unroll 4
    for (int k = warp; k < kSeedTurn; k += warps) {
      int place = -1;
      if (k < seeds) {
        const int64_t seed = image * call.num_seeds + first + k;
        const int64_t offset = call.indices[seed] - first_pixel;
        if (offset >= 0 && offset < here) {
          place = static_cast<int>(offset);
          if (lane < channels) {
            const T* from = static_cast<const T*>(call.grad_vectors) + seed * call.depth + first_channel;
            buffers.staged[k * kWarp + lane] = to_float(from[lane]);
          }
        }
      }
      if (lane == 0) buffers.places[k] = place;
    }
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < seeds; k += kWarp) {
      const int own = buffers.places[k + lane];
      unsigned left = __ballot_sync(kFullWarp, own >= 0 && own % warps == warp);
      for (; left != 0; left &= left - 1) {
        const int seed = k + __ffs(left) - 1;
        const int place = buffers.places[seed];
        if (lane < channels) buffers.sums[place * kSeedStride + lane] += buffers.staged[seed * kWarp + lane];
        if (lane == 0) buffers.touched[place] = 1;
      }
    }
  }
  __syncthreads();

  T* grads = static_cast<T*>(call.grad_seed_features) + image * call.depth * pixels;
  const auto write = [&](T* to, int place, int channel) {
    if (call.add && buffers.touched[place] == 0) return;
    const float before = call.add ? to_float(*to) : 0.0f;
    *to = from_float<T>(before + buffers.sums[place * kSeedStride + channel]);
  };
  if (call.channels_last) {
    for (int place = warp; place < here; place += warps) {
      T* to = grads + static_cast<int64_t>(first_pixel + place) * call.depth + first_channel;
      if (lane < channels) write(to + lane, place, lane);
    }
  } else {
    for (int channel = warp; channel < channels; channel += warps) {
      T* to = grads + static_cast<int64_t>(first_channel + channel) * pixels + first_pixel;
      for (int place = lane; place < here; place += kWarp) write(to + place, place, channel);
    }
  }
}

template <typename T>
int64_t seeds_shared(const CamSeedsFwd& call, int threads) {
  SharedSize size;
  take_seed_buffers(size, call, threads, true);
  return size.bytes() + front_bytes<T, 1>(call.front, threads, 1);
}

// Fills in what follows from the sizes; returns how many words of scratch memory, int64_t, the call wants.
inline int64_t plan_cam_seeds_fwd(const Hardware& hardware, CamSeedsFwd& call) {
  dispatch(call.seeds_dtype, [](auto) {});  // float64 is refused before anything is planned for it
  plan_loads("cam_seeds_fwd", hardware, call.front, {call.front.features});
  call.seed_vectors = hardware.vectors && call.depth % (16 / size_of(call.seeds_dtype)) == 0 &&
                      aligned(call.seed_features) && aligned(call.vectors);
  const int most = std::min(call.num_seeds, call.front.pixels());
  call.places = 1;
  while (call.places < most) call.places *= 2;
  int64_t shared = 0;
  dispatch(call.front.features_dtype,
           [&](auto element) { shared = seeds_shared<decltype(element)>(call, hardware.threads); });
  if (shared <= hardware.shared_limit) return 0;
  // Rows of channels that are loaded together are counted in an int.
  constexpr int64_t kMostElements = std::numeric_limits<int32_t>::max() / 4;
  if (int64_t{call.front.rows} * call.front.pixels() > kMostElements) call.front.vectors = false;
  return call.front.images * call.scratch_words();
}

template <typename T, bool kChannelsLast, typename Launcher>
void launch_cam_seeds_fwd_as(Launcher& launcher, const CamSeedsFwd& call) {
  const Hardware& hardware = launcher.hardware();
  SharedSize own;
  take_seed_buffers(own, call, hardware.threads, call.scratch == nullptr);
  if (call.scratch == nullptr) {
    const int64_t bytes = int64_t{2} * call.num_seeds * call.depth * size_of(call.seeds_dtype);
    const LaunchShape shape = plan_front<T, 1>("cam_seeds_fwd", hardware, call.front, bytes, own.bytes());
    launcher.run(cam_seeds_fwd_kernel<T, kChannelsLast, true>, shape, call);
  } else {
    SharedSize front;
    take_front_buffers<T, 1>(front, call.front, hardware.threads, 1, false);
    const LaunchShape shape{call.front.images, hardware.threads, 1, front.bytes() + own.bytes()};
    launcher.run(cam_seeds_fwd_kernel<T, kChannelsLast, false>, shape, call);
  }
}

// After plan_cam_seeds_fwd; with scratch memory, if that asked for some.
template <typename Launcher>
void launch_cam_seeds_fwd(Launcher& launcher, const CamSeedsFwd& call) {
  dispatch(call.front.features_dtype, [&](auto element) {
    using T = decltype(element);
    if (call.front.channels_last) {
      launch_cam_seeds_fwd_as<T, true>(launcher, call);
    } else {
      launch_cam_seeds_fwd_as<T, false>(launcher, call);
    }
  });
}

template <typename Launcher>
void launch_cam_seeds_bwd(Launcher& launcher, const CamSeedsBwd& call) {
  check_pixels("cam_seeds_bwd", call.height, call.width);
  const int64_t channel_tiles = (int64_t{call.depth} + kWarp - 1) / kWarp;
  SharedSize size;
  take_scatter_buffers(size, call.tile_pixels());
  const int threads = std::min(launcher.hardware().threads, kSeedThreads);
  const LaunchShape shape{call.images * channel_tiles * call.pixel_tiles(), threads, 1, size.bytes()};
  dispatch(call.dtype,
           [&](auto element) { launcher.run(cam_seeds_bwd_kernel<decltype(element)>, shape, call); });
}

}  // namespace camkernels::cuda
