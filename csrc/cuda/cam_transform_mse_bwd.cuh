// Gradients of the mean squared difference. With G = 2 * grad / count * E on one grid, where E = T(M) - M':
//
//   grad_features_t = -W^T G      grad_features = T^T (W^T G)      grad_weight = sum over images of G D^T
//
// with D = T(F) - F'. Of a Scale the gradients of both maps take the place of G and stand in scratch memory,
// [N, L, P + P'], since every tile of channels needs them.
#pragma once

#include "cam_transform_transpose.cuh"
#include "common_grid.cuh"

namespace camkernels::cuda {

// How the features' gradient is made of products with the weight.
enum class Spread : int {
  kPermuted,  // every cell is read by one other: one product, written twice
  kWhole,     // a block has all cells of the product, so that it can sum those that read a cell
  kSeparate,  // a product for either map; what a cell of M receives is summed beforehand
};

struct CamTransformMseBwd {
  CamTransform maps;
  CommonGrid grid;          // of a Scale
  const float* grad_means;  // [N, L]
  const float* kept;        // [N, L, P'] differences or, of a Scale, the larger of both maps
  void* grad_features;      // as features, or null
  void* grad_features_t;    // as features_t, or null
  void* grad_weight;        // [L, C], or null
  void* scratch;            // of cam_transform_mse_bwd_scratch(maps).total() bytes
  Transpose transpose;      // in scratch, where T is no permutation
  float* slopes;            // in scratch, of a Scale: [N, L, P + P']
  MapPlan plan;             // of the maps, or the tiling of a product
  Spread spread;
  int tiles_t;  // tiles of cells of grad_features_t, and of grad_features
  int tiles;

  // Of the cells that count: of a permutation all.
  __device__ float factor(int64_t image, int64_t label) const {
    const float grad = grad_means[image * maps.classes + label];
    const int count = transpose.counts == nullptr ? maps.pixels_t() : transpose.counts[maps.matrix_of(image)];
    return 2.0f * grad / static_cast<float>(max(count, 1));
  }
};

inline bool is_permutation(const CamTransform& call) {
  const auto straight = [](const Axis& axis, int size) {
    return axis.fraction == 0.0 && axis.begin == 0 && axis.end == size &&
           axis.offset == (axis.step == 1 ? 0 : size - 1);
  };
  return call.one_grid() && !call.geometry.affine && straight(call.geometry.rows, call.geometry.height) &&
         straight(call.geometry.columns, call.geometry.width);
}

// Sizes in bytes of what scratch memory holds.
struct ScratchSizes {
  int64_t readers;
  int64_t starts;
  int64_t counts;
  int64_t slopes;

  int64_t total() const { return readers + starts + counts + slopes; }
};

inline ScratchSizes cam_transform_mse_bwd_scratch(const CamTransform& maps) {
  constexpr auto kInt = static_cast<int64_t>(sizeof(int));
  constexpr auto kReader = static_cast<int64_t>(sizeof(Reader));
  constexpr auto kFloat = static_cast<int64_t>(sizeof(float));
  check_maps("cam_transform_mse_bwd", maps);
  if (!maps.one_grid()) return {0, 0, 0, maps.images * maps.classes * maps.cells() * kFloat};
  if (is_permutation(maps)) return {};
  return {maps.matrices * 4 * maps.pixels_t() * kReader, maps.matrices * (maps.pixels() + 1) * kInt,
          maps.matrices * kInt, 0};
}

// Shared memory of a warp that walks over the common grid.
__host__ __device__ inline int64_t fine_floats(const CamTransform& maps) {
  if (maps.comparison != Comparison::kBilinear) return 0;
  return fine_floats(maps.geometry.width, maps.geometry.width_t);
}

// Of a Scale: makes the smaller map of some labels of one image again, and the gradients of both.
template <typename T>
__global__ void __launch_bounds__(kRoomyThreads, 2)
    cam_transform_slopes_kernel(const __grid_constant__ CamTransformMseBwd call) {
  const CamTransform& maps = call.maps;
  const int64_t item = blockIdx.x / cluster_size();
  const int64_t groups = (maps.classes + call.plan.labels - 1) / call.plan.labels;
  const int64_t image = item / groups;
  const int64_t label = item % groups * call.plan.labels;
  const int labels = static_cast<int>(min(int64_t{call.plan.labels}, maps.classes - label));
  const int cells = maps.cells();
  const int pixels = maps.pixels();
  const bool first = pixels >= maps.pixels_t();  // M was kept
  const int warp = threadIdx.x / kWarp;
  SharedMemory memory;
  const MapBuffers buffers = take_map_buffers(memory, maps, call.plan.tiling, call.plan.labels);
  float* fine = memory.take<float>(fine_floats(maps) * (blockDim.x / kWarp));
  make_maps<T, false>(maps, call.plan.tiling, image, label, labels, first ? pixels : 0,
                      first ? cells : pixels, buffers);

  const RowShare share = row_share(labels, cluster_rank(), cluster_size());
#pragma unroll 1
  for (int row = share.begin + warp; row < share.end; row += blockDim.x / kWarp) {
    const int64_t at = image * maps.classes + label + row;
    float* map = buffers.maps + row * cells;
    float* map_t = map + pixels;
    float* larger = first ? map : map_t;
    const int most = first ? pixels : maps.pixels_t();
#pragma unroll 1
    for (int cell = threadIdx.x % kWarp; cell < most; cell += kWarp)
      larger[cell] = call.kept[at * most + cell];
    __syncwarp();
    const float factor = 2.0f * call.grad_means[at];
    float* slope = call.slopes + at * cells;
    if (maps.comparison == Comparison::kBilinear) {
      const FineBuffers own = {fine + warp * fine_floats(maps), call.grid.one.width + call.grid.other.width};
      bilinear_gradient(call.grid, map, map_t, factor, own, slope, slope + pixels);
    } else {
#pragma unroll 1
      for (int side = 0; side < 2; ++side) {
        nearest_gradient(side == 0 ? map : map_t, side == 0 ? call.grid.one : call.grid.other,
                         side == 0 ? map_t : map, side == 0 ? call.grid.other : call.grid.one, factor,
                         side == 0 ? slope : slope + pixels);
      }
    }
  }
  leave_cluster(cluster_size());
}

// What a cell of M' (`transformed`) or M receives of a label.
__device__ __forceinline__ float map_gradient(const CamTransformMseBwd& call, int64_t image, int64_t label,
                                              bool transformed, int cell) {
  const CamTransform& maps = call.maps;
  const int64_t at = (image * maps.classes + label) * maps.cells();
  if (!maps.one_grid()) return call.slopes[at + (transformed ? maps.pixels() : 0) + cell];
  const float* kept = call.kept + at;
  const float factor = call.factor(image, label);
  if (transformed) return -factor * kept[cell];
  const Reader* readers = call.transpose.readers_of(maps, image);
  const int* starts = call.transpose.starts_of(maps, image);
  float sum = 0.0f;
#pragma unroll 1
  for (int i = starts[cell]; i < starts[cell + 1]; ++i)
    sum = fmaf(readers[i].weight, kept[readers[i].cell], sum);
  return factor * sum;
}

// Writes value(channel, cell) for channels [first, first + channels) and cells [begin, end) of a gradient of
// one image, lanes along what lies side by side.
template <typename T, typename Value>
__device__ __forceinline__ void write_gradient(void* grad, int64_t image, int all_channels, int pixels,
                                               bool channels_last, int first, int channels, int begin,
                                               int end, Value value) {
  const int warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  T* image_grad = static_cast<T*>(grad) + image * all_channels * pixels;
  if (channels_last) {
#pragma unroll 1
    for (int cell = begin + warp; cell < end; cell += warps) {
      T* to = image_grad + int64_t{cell} * all_channels + first;
      for (int c = lane; c < channels; c += kWarp) to[c] = from_float<T>(value(c, cell));
    }
  } else {
#pragma unroll 1
    for (int c = warp; c < channels; c += warps) {
      T* to = image_grad + int64_t{first + c} * pixels;
      for (int cell = begin + lane; cell < end; cell += kWarp) to[cell] = from_float<T>(value(c, cell));
    }
  }
}

// Gradients of both feature maps: a block takes a tile of channels and cells of one image, all labels.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    cam_transform_features_kernel(const __grid_constant__ CamTransformMseBwd call) {
  const CamTransform& maps = call.maps;
  const Tiling& tiling = call.plan.tiling;
  const int cell_tiles = call.tiles_t + call.tiles;
  const int channel_tiles = (maps.channels + tiling.rows() - 1) / tiling.rows();
  const int cell_tile = static_cast<int>(blockIdx.x % cell_tiles);
  const int channel = static_cast<int>(blockIdx.x / cell_tiles % channel_tiles) * tiling.rows();
  const int64_t image = blockIdx.x / cell_tiles / channel_tiles;
  const int channels = min(tiling.rows(), maps.channels - channel);
  const bool separate = call.spread == Spread::kSeparate;
  const bool transformed = cell_tile < call.tiles_t;
  const int begin = (transformed ? cell_tile : cell_tile - call.tiles_t) * tiling.columns();
  const int end = min(begin + tiling.columns(), transformed ? maps.pixels_t() : maps.pixels());
  const int stride = tiling.columns() + 1;  // columns of the tile fall into different banks
  SharedMemory memory;
  const Factors factors = take_factors(memory, tiling);
  float* tile = memory.take<float>(int64_t{tiling.rows()} * stride);  // [channels, cells]

  TileSums sums(tiling);
#pragma unroll 1
  for (int64_t label = 0; label < maps.classes; label += kDepth) {
    const int depth = static_cast<int>(min(int64_t{kDepth}, maps.classes - label));
    __syncthreads();  // the factors before are no longer read
    stage_weight_columns(maps, tiling, label, depth, channel, channels, factors.left);
    for_strips<2>(
        tiling.columns() / kWarp, depth,
        [&](int j, int k) {
          return begin + j < end ? map_gradient(call, image, label + k, transformed, begin + j) : 0.0f;
        },
        [&](int j, int k, float value) { factors.right[k * tiling.right_stride() + j] = value; });
    __syncthreads();
    sums.add(tiling, factors, depth);
  }
  sums.deposit(tiling, tile, stride, channels, end - begin);

  if (transformed && call.grad_features_t != nullptr) {
    write_gradient<T>(call.grad_features_t, image, maps.channels, maps.pixels_t(), maps.channels_last_t,
                      channel, channels, begin, end,
                      [&](int c, int cell) { return tile[c * stride + cell - begin]; });
  }
  if (call.grad_features == nullptr || (separate && transformed)) return;
  if (separate) {
    write_gradient<T>(call.grad_features, image, maps.channels, maps.pixels(), maps.channels_last, channel,
                      channels, begin, end, [&](int c, int cell) { return tile[c * stride + cell - begin]; });
  } else if (call.spread == Spread::kWhole) {
    const Reader* readers = call.transpose.readers_of(maps, image);
    const int* starts = call.transpose.starts_of(maps, image);
    write_gradient<T>(call.grad_features, image, maps.channels, maps.pixels(), maps.channels_last, channel,
                      channels, 0, maps.pixels(), [&](int c, int cell) {
                        float sum = 0.0f;
                        for (int i = starts[cell]; i < starts[cell + 1]; ++i) {
                          sum = fmaf(-readers[i].weight, tile[c * stride + readers[i].cell], sum);
                        }
                        return sum;
                      });
  } else {
    // Cell by cell of the transformed map, to where it reads.
    const int warp = threadIdx.x / kWarp;
    const int warps = blockDim.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    const Matrix none = {};
    T* grad = static_cast<T*>(call.grad_features) + image * maps.channels * maps.pixels();
    if (maps.channels_last) {
#pragma unroll 1
      for (int cell = begin + warp; cell < end; cell += warps) {
        T* to = grad + int64_t{cell_read(maps, none, cell).moved} * maps.channels + channel;
        for (int c = lane; c < channels; c += kWarp) to[c] = from_float<T>(-tile[c * stride + cell - begin]);
      }
    } else {
#pragma unroll 1
      for (int cell = begin + lane; cell < end; cell += kWarp) {
        T* to = grad + int64_t{channel} * maps.pixels() + cell_read(maps, none, cell).moved;
        for (int c = warp; c < channels; c += warps) {
          to[int64_t{c} * maps.pixels()] = from_float<T>(-tile[c * stride + cell - begin]);
        }
      }
    }
  }
}

// A cluster makes a tile of labels and channels of the weight's gradient, its blocks each of some images.
template <typename T, bool kOneGrid>
__global__ void __launch_bounds__(kRoomyThreads, 2)
    cam_transform_weight_kernel(const __grid_constant__ CamTransformMseBwd call) {
  const CamTransform& maps = call.maps;
  const Tiling& tiling = call.plan.tiling;
  const int rank = cluster_rank();
  const int size = cluster_size();
  const int64_t item = blockIdx.x / size;
  const int channel_tiles = (maps.channels + tiling.columns() - 1) / tiling.columns();
  const int channel = static_cast<int>(item % channel_tiles) * tiling.columns();
  const int64_t label = item / channel_tiles * tiling.rows();
  const int channels = min(tiling.columns(), maps.channels - channel);
  const int labels = static_cast<int>(min(int64_t{tiling.rows()}, maps.classes - label));
  const int cells = maps.cells();
  const int per_image = (cells + kDepth - 1) / kDepth;
  const int64_t chunks = maps.images * per_image;
  const int64_t end = chunks * (rank + 1) / size;
  SharedMemory memory;
  const Factors factors = take_factors(memory, tiling);
  CellRead* reads = memory.take<CellRead>(kDepth);
  float* tile = memory.take<float>(int64_t{tiling.rows()} * tiling.columns());  // [labels, channels]

  TileSums sums(tiling);
#pragma unroll 1
  for (int64_t chunk = chunks * rank / size; chunk < end; ++chunk) {
    const int64_t image = chunk / per_image;
    const int first = static_cast<int>(chunk % per_image) * kDepth;
    const int depth = min(kDepth, cells - first);
    __syncthreads();  // the factors before are no longer read
    stage_reads(maps, image, first, cells, kDepth, reads);
    for_strips<2>(
        1, tiling.rows(),
        [&](int k, int r) {
          if (r >= labels || k >= depth) return 0.0f;
          const int64_t at = (image * maps.classes + label + r) * cells + first + k;
          if constexpr (!kOneGrid) return call.slopes[at];
          return call.factor(image, label + r) * call.kept[at];
        },
        [&](int k, int r, float value) { factors.left[k * tiling.left_stride() + r] = value; });
    __syncthreads();  // the reads are there
    stage_features<T, kOneGrid>(maps, image, channel, maps.channels, tiling.columns(), reads, kDepth,
                                factors.right, 1, tiling.right_stride());
    __syncthreads();
    sums.add<true>(tiling, factors, depth);
  }
  sums.deposit(tiling, tile, tiling.columns(), labels, channels);
  const RowShare share = row_share(labels, rank, size);
  cluster_rows(tile, tiling.columns(), share, 0, channels, size);
  for (int row = share.begin + threadIdx.x / kWarp; row < share.end; row += blockDim.x / kWarp) {
    for (int c = threadIdx.x % kWarp; c < channels; c += kWarp) {
      store_from_float(call.grad_weight, maps.weight.dtype, (label + row) * maps.channels + channel + c,
                       tile[row * tiling.columns() + c]);
    }
  }
  leave_cluster(size);
}

template <typename T, typename Launcher>
void launch_cam_transform_features(Launcher& launcher, CamTransformMseBwd call) {
  const CamTransform& maps = call.maps;
  const int warps = launcher.hardware().threads / kWarp;
  const auto strips = [](int cells) { return (cells + kWarpColumns - 1) / kWarpColumns; };
  constexpr int kMostStrips = 8;
  const int most = std::min(kMostStrips, warps);
  int across = warps_for(std::max(maps.pixels(), maps.pixels_t()), kWarpColumns, std::min(4, warps));
  if (is_permutation(maps)) {
    call.spread = Spread::kPermuted;
  } else if (maps.one_grid() && strips(maps.pixels_t()) <= most) {
    call.spread = Spread::kWhole;
    across = strips(maps.pixels_t());
  } else {
    call.spread = Spread::kSeparate;
  }
  call.plan.tiling =
      with_depth(warps, warps_for(maps.channels, kWarpRows, std::min(kMostStrips, warps / across)), across);
  const auto tiles = [&](int cells) { return (cells + across * kWarpColumns - 1) / (across * kWarpColumns); };
  const bool separate = call.spread == Spread::kSeparate;
  call.tiles_t = !separate || call.grad_features_t != nullptr ? tiles(maps.pixels_t()) : 0;
  call.tiles = separate && call.grad_features != nullptr ? tiles(maps.pixels()) : 0;
  SharedSize shared;
  const Tiling& tiling = call.plan.tiling;
  take_factors(shared, tiling);
  shared.take<float>(int64_t{tiling.rows()} * (tiling.columns() + 1));
  const int64_t channel_tiles = (maps.channels + tiling.rows() - 1) / tiling.rows();
  launcher.run(cam_transform_features_kernel<T>,
               LaunchShape{maps.images * channel_tiles * (call.tiles_t + call.tiles), tiling.threads(), 1,
                           shared.bytes()},
               call);
}

template <typename T, typename Launcher>
void launch_cam_transform_weight(Launcher& launcher, CamTransformMseBwd call) {
  const CamTransform& maps = call.maps;
  const Hardware& hardware = launcher.hardware();
  const int warps = std::min(hardware.threads, kRoomyThreads) / kWarp;
  const int down = warps_for(maps.classes, kWarpRows, std::min(kMostDown, warps));
  const int across = warps_for(maps.channels, kWarpColumns, std::min(2, warps / down));
  call.plan.tiling = with_depth(warps, down, across);
  const Tiling& tiling = call.plan.tiling;
  SharedSize shared;
  take_factors(shared, tiling);
  shared.take<CellRead>(kDepth);
  shared.take<float>(int64_t{tiling.rows()} * tiling.columns());
  const int64_t items = (maps.classes + tiling.rows() - 1) / tiling.rows() *
                        ((maps.channels + tiling.columns() - 1) / tiling.columns());
  const int64_t bytes = maps.images * maps.bytes_per_image() * tiling.columns() / maps.channels;
  const int cluster = choose_cluster(hardware, items, bytes);
  launcher.run(maps.one_grid() ? cam_transform_weight_kernel<T, true> : cam_transform_weight_kernel<T, false>,
               LaunchShape{items * cluster, tiling.threads(), cluster, shared.bytes()}, call);
}

template <typename T, typename Launcher>
void launch_cam_transform_slopes(Launcher& launcher, CamTransformMseBwd call) {
  const CamTransform& maps = call.maps;
  const Hardware& hardware = launcher.hardware();
  const int threads = std::min(hardware.threads, kRoomyThreads);
  SharedSize fine;
  fine.take<float>(fine_floats(maps) * (threads / kWarp));
  call.plan = plan_maps("cam_transform_mse_bwd", hardware, threads, maps,
                        std::min(maps.pixels(), maps.pixels_t()), fine.bytes());
  call.grid = common_grid_of(maps.geometry);
  launcher.run(cam_transform_slopes_kernel<T>, map_shape(hardware, maps, call.plan, fine.bytes()), call);
}

template <typename Launcher>
void launch_cam_transform_mse_bwd(Launcher& launcher, CamTransformMseBwd call) {
  const CamTransform& maps = call.maps;
  const ScratchSizes sizes = cam_transform_mse_bwd_scratch(maps);
  char* scratch = static_cast<char*>(call.scratch);
  if (sizes.slopes != 0) {
    call.slopes = reinterpret_cast<float*>(scratch);
  } else if (sizes.readers != 0) {
    call.transpose.readers = reinterpret_cast<Reader*>(scratch);
    call.transpose.starts = reinterpret_cast<int*>(scratch + sizes.readers);
    call.transpose.counts = reinterpret_cast<int*>(scratch + sizes.readers + sizes.starts);
    launch_cam_transform_transpose(launcher, maps, call.transpose);
  }
  dispatch(maps.features_dtype, [&](auto element) {
    using T = decltype(element);
    if (!maps.one_grid()) launch_cam_transform_slopes<T>(launcher, call);
    if (call.grad_features != nullptr || call.grad_features_t != nullptr) {
      launch_cam_transform_features<T>(launcher, call);
    }
    if (call.grad_weight != nullptr) launch_cam_transform_weight<T>(launcher, call);
  });
}

}  // namespace camkernels::cuda
