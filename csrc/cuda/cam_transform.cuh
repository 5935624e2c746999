// What the kernels of cam_transform_mse read: features of both maps through the transform, weights in tiles.
#pragma once

#include "../shared/transform.h"
#include "tile_product.cuh"

namespace camkernels::cuda {

inline constexpr int kRoomyThreads = 384;  // where two blocks need more than 64 registers a thread

struct CamTransform {
  const void* features;    // [N, C, P] or, channels_last, [N, P, C]
  const void* features_t;  // [N, C, P'], either way by itself
  AnyArray weight;         // [L, C]
  AnyArray matrix;         // [1 or N, 2, 3], or null
  Geometry geometry;
  int64_t images;
  int64_t classes;
  int64_t matrices;  // 1 or N
  int channels;
  Comparison comparison;
  DType features_dtype;
  bool channels_last;
  bool channels_last_t;

  __host__ __device__ int pixels() const { return geometry.height * geometry.width; }
  __host__ __device__ int pixels_t() const { return geometry.height_t * geometry.width_t; }
  __host__ __device__ bool one_grid() const { return comparison == Comparison::kOneGrid; }
  // Of a label: on one grid the differences T(M) - M', else M and behind it M'.
  __host__ __device__ int cells() const { return one_grid() ? pixels_t() : pixels() + pixels_t(); }
  __host__ __device__ int64_t matrix_of(int64_t image) const { return matrices == 1 ? 0 : image; }
  __host__ __device__ int64_t bytes_per_image() const {
    return int64_t{channels} * (pixels() + pixels_t()) * size_of(features_dtype);
  }
};

// What one cell of a label's product is made of.
struct CellRead {
  int moved;  // cell of `features`, or -1
  int still;  // cell of `features_t`, or -1
  int right;  // from `moved` to its neighbours: how many cells along the row, and along the map
  int down;
  float weight_x;
  float weight_y;

  // Nothing between this cell and the next: the next must not even be read, it may hold a NaN.
  __device__ bool single_x() const { return right == 0 && weight_x == 0.0f; }
  __device__ bool single_y() const { return down == 0 && weight_y == 0.0f; }
};

// The matrix of one image, in double: in float a position on the border would fall on either side of it.
struct Matrix {
  double at[6];
};

__device__ inline Matrix load_matrix(const CamTransform& call, int64_t image) {
  Matrix matrix = {};
  if (!call.geometry.affine) return matrix;
  const int64_t first = call.matrix_of(image) * 6;
#pragma unroll
  for (int i = 0; i < 6; ++i) matrix.at[i] = load_as_double(call.matrix, first + i);
  return matrix;
}

__device__ inline CellRead cell_read(const CamTransform& call, const Matrix& matrix, int cell) {
  CellRead read = {-1, -1, 0, 0, 0.0f, 0.0f};
  if (!call.one_grid()) {
    if (cell < call.pixels()) {
      read.moved = cell;
    } else {
      read.still = cell - call.pixels();
    }
    return read;
  }
  const int width_t = call.geometry.width_t;
  const CellTaps<float> taps = cell_taps<float>(call.geometry, matrix.at, cell / width_t, cell % width_t);
  if (!taps.valid) return read;
  read.moved = taps.y.low * call.geometry.width + taps.x.low;
  read.still = cell;
  read.right = taps.x.high - taps.x.low;
  read.down = (taps.y.high - taps.y.low) * call.geometry.width;
  read.weight_x = taps.x.weight;
  read.weight_y = taps.y.weight;
  return read;
}

// reads[j] for cell first + j, j < count; nothing is read of cells from `end` on.
__device__ inline void stage_reads(const CamTransform& call, int64_t image, int first, int end, int count,
                                   CellRead* reads) {
  const Matrix matrix = load_matrix(call, image);
#pragma unroll 1
  for (int j = threadIdx.x; j < count; j += blockDim.x) {
    reads[j] = first + j < end ? cell_read(call, matrix, first + j) : CellRead{-1, -1, 0, 0, 0.0f, 0.0f};
  }
}

// One image of a feature map: where a channel of a cell lies.
template <typename T>
struct Plane {
  const T* data;
  int channel_step;
  int cell_step;

  __device__ __forceinline__ float at(int channel, int cell) const {
    return to_float(data[int64_t{channel} * channel_step + int64_t{cell} * cell_step]);
  }
};

template <typename T>
__device__ __forceinline__ Plane<T> plane_of(const void* features, int64_t image, int channels, int pixels,
                                             bool channels_last) {
  const T* data = static_cast<const T*>(features) + image * channels * pixels;
  if (channels_last) return {data, 1, channels};
  return {data, pixels, 1};
}

template <typename T>
__device__ __forceinline__ float moved_value(const Plane<T>& plane, int channel, const CellRead& read) {
  const float upper_left = plane.at(channel, read.moved);
  const float lower_left = plane.at(channel, read.moved + read.down);
  float upper = upper_left;
  float lower = lower_left;
  if (!read.single_x()) {
    upper = resample(upper_left, plane.at(channel, read.moved + read.right), read.weight_x);
    lower = resample(lower_left, plane.at(channel, read.moved + read.down + read.right), read.weight_x);
  }
  return read.single_y() ? upper : resample(upper, lower, read.weight_y);
}

// tile[c * channel_step + j * cell_step] = T(F) - F', or F or F', of channel first + c and reads[j];
// `channels` and `cells` are multiples of a warp. Channels from `end` on are 0.
template <typename T, bool kOneGrid, bool kCopies>
__device__ __forceinline__ void stage_features_as(const CamTransform& call, int64_t image, int first, int end,
                                                  int channels, const CellRead* reads, int cells, float* tile,
                                                  int channel_step, int cell_step) {
  constexpr int kInFlight = kCopies ? 4 : 2;  // as many as the registers of two blocks hold
  const Plane<T> plane = plane_of<T>(call.features, image, call.channels, call.pixels(), call.channels_last);
  const Plane<T> plane_t =
      plane_of<T>(call.features_t, image, call.channels, call.pixels_t(), call.channels_last_t);
  const auto value = [&](int c, int cell) {
    const CellRead& read = reads[cell];
    if (first + c >= end) return 0.0f;
    if constexpr (!kOneGrid) {
      return read.moved >= 0   ? plane.at(first + c, read.moved)
             : read.still >= 0 ? plane_t.at(first + c, read.still)
                               : 0.0f;
    } else {
      if (read.moved < 0) return 0.0f;
      const float still = plane_t.at(first + c, read.still);
      if constexpr (kCopies) return plane.at(first + c, read.moved) - still;
      return moved_value(plane, first + c, read) - still;
    }
  };
  // Lanes along what lies side by side.
  if (call.channels_last_t) {
    for_strips<kInFlight>(
        channels / kWarp, cells, [&](int c, int cell) { return value(c, cell); },
        [&](int c, int cell, float result) { tile[c * channel_step + cell * cell_step] = result; });
  } else {
    for_strips<kInFlight>(
        cells / kWarp, channels, [&](int cell, int c) { return value(c, cell); },
        [&](int cell, int c, float result) { tile[c * channel_step + cell * cell_step] = result; });
  }
}

template <typename T, bool kOneGrid>
__device__ __forceinline__ void stage_features(const CamTransform& call, int64_t image, int first, int end,
                                               int channels, const CellRead* reads, int cells, float* tile,
                                               int channel_step, int cell_step) {
  const Geometry& geometry = call.geometry;
  if (!kOneGrid || (!geometry.affine && geometry.rows.fraction == 0.0 && geometry.columns.fraction == 0.0)) {
    stage_features_as<T, kOneGrid, true>(call, image, first, end, channels, reads, cells, tile, channel_step,
                                         cell_step);
  } else {
    stage_features_as<T, kOneGrid, false>(call, image, first, end, channels, reads, cells, tile, channel_step,
                                          cell_step);
  }
}

// left[k][r] = weight[row + r][channel + k]; 0 for rows from `rows` on.
__device__ inline void stage_weight_rows(const CamTransform& call, const Tiling& tiling, int64_t row,
                                         int rows, int channel, int depth, float* left) {
  for_strips<2>(
      kDepth / kWarp, tiling.rows(),
      [&](int k, int r) {
        if (r >= rows || k >= depth) return 0.0f;
        return load_as_float(call.weight, (row + r) * call.channels + channel + k);
      },
      [&](int k, int r, float value) { left[k * tiling.left_stride() + r] = value; });
}

// left[k][r] = weight[label + k][channel + r]; 0 for channels from `channels` on.
__device__ inline void stage_weight_columns(const CamTransform& call, const Tiling& tiling, int64_t label,
                                            int depth, int channel, int channels, float* left) {
#pragma unroll 1
  for (int k = threadIdx.x / kWarp; k < depth; k += blockDim.x / kWarp) {
    for (int r = threadIdx.x % kWarp; r < tiling.rows(); r += kWarp) {
      left[k * tiling.left_stride() + r] =
          r < channels ? load_as_float(call.weight, (label + k) * call.channels + channel + r) : 0.0f;
    }
  }
}

struct MapBuffers {
  Factors factors;
  CellRead* reads;       // [columns]
  float* maps;           // [labels, cells]
  unsigned char* valid;  // [cells]: counts in the mean
};

template <typename Memory>
__host__ __device__ MapBuffers take_map_buffers(Memory& memory, const CamTransform& call,
                                                const Tiling& tiling, int labels) {
  MapBuffers buffers;
  buffers.factors = take_factors(memory, tiling);
  buffers.reads = memory.template take<CellRead>(tiling.columns());
  buffers.maps = memory.template take<float>(int64_t{labels} * call.cells());
  buffers.valid = memory.template take<unsigned char>(call.cells());
  return buffers;
}

// Cells [begin, end) of labels [label, label + labels) of an image into buffers.maps: the complete sums in
// the rows of the block's row_share, after which leave_cluster must follow. The block is synchronised.
template <typename T, bool kOneGrid>
__device__ void make_maps(const CamTransform& call, const Tiling& tiling, int64_t image, int64_t label,
                          int labels, int begin, int end, const MapBuffers& buffers) {
  const int rank = cluster_rank();
  const int size = cluster_size();
  const int cells = call.cells();
  const int64_t chunks = (call.channels + kDepth - 1) / kDepth;
  const int first_channel = static_cast<int>(chunks * rank / size) * kDepth;
  const int last_channel = min(static_cast<int>(chunks * (rank + 1) / size) * kDepth, call.channels);
#pragma unroll 1
  for (int first = begin; first < end; first += tiling.columns()) {
    stage_reads(call, image, first, end, tiling.columns(), buffers.reads);
    TileSums sums(tiling);
#pragma unroll 1
    for (int channel = first_channel; channel < last_channel; channel += kDepth) {
      const int depth = min(kDepth, last_channel - channel);
      __syncthreads();  // the reads are there; the factors before are no longer read
      stage_weight_rows(call, tiling, label, labels, channel, depth, buffers.factors.left);
      stage_features<T, kOneGrid>(call, image, channel, last_channel, kDepth, buffers.reads, tiling.columns(),
                                  buffers.factors.right, tiling.right_stride(), 1);
      __syncthreads();
      sums.add(tiling, buffers.factors, depth);
    }
    __syncthreads();  // all reads are there
    const int here = min(tiling.columns(), end - first);
#pragma unroll 1
    for (int j = threadIdx.x; j < here && kOneGrid; j += blockDim.x) {
      buffers.valid[first + j] = buffers.reads[j].still >= 0;
    }
    sums.deposit(tiling, buffers.maps + first, cells, labels, here);
  }
  cluster_rows(buffers.maps, cells, row_share(labels, rank, size), begin, end, size);
}

struct MapPlan {
  Tiling tiling;  // rows are labels, columns are cells of a map or of both
  int labels;     // of one block
};

// Of `cells` cells of every label, with `other_bytes` of shared memory for something else.
inline MapPlan plan_maps(const char* op, const Hardware& hardware, int threads, const CamTransform& call,
                         int cells, int64_t other_bytes) {
  const int warps = threads / kWarp;
  int down = warps_for(call.classes, kWarpRows, std::min(kMostDown, warps));
  // Without clusters, more blocks rather than large ones.
  const auto blocks = [&] {
    return call.images * ((call.classes + down * kWarpRows - 1) / (down * kWarpRows));
  };
  while (hardware.max_cluster == 1 && down > 1 && blocks() < hardware.multiprocessors) --down;
  const auto tiling_of = [&](int labels) {
    const int rows = (labels + kWarpRows - 1) / kWarpRows;
    return with_depth(warps, rows, warps_for(cells, kWarpColumns, std::min(8, warps / rows)));
  };
  const auto bytes = [&](int labels) {
    SharedSize size;
    take_map_buffers(size, call, tiling_of(labels), labels);
    return size.bytes() + other_bytes;
  };
  // As many labels as there are rows, but no more than leave room for a second block, unless these are too
  // few for it to be worth while.
  int labels = static_cast<int>(std::min<int64_t>(down * kWarpRows, call.classes));
  while (labels > kWarpRows && bytes(labels) > hardware.shared_limit / 2) --labels;
  while (labels > 1 && bytes(labels) > hardware.shared_limit) --labels;
  if (bytes(labels) > hardware.shared_limit) {
    throw too_large(op, call.geometry.height, call.geometry.width, bytes(labels), hardware.shared_limit);
  }
  labels = static_cast<int>(even_share(call.classes, labels));
  return {tiling_of(labels), labels};
}

inline LaunchShape map_shape(const Hardware& hardware, const CamTransform& call, const MapPlan& plan,
                             int64_t other_bytes) {
  SharedSize shared;
  take_map_buffers(shared, call, plan.tiling, plan.labels);
  const int64_t items = call.images * ((call.classes + plan.labels - 1) / plan.labels);
  const int cluster = choose_cluster(hardware, items, call.bytes_per_image());
  return {items * cluster, plan.tiling.threads(), cluster, shared.bytes() + other_bytes};
}

inline void check_maps(const char* op, const CamTransform& call) {
  check_pixels(op, call.geometry.height, call.geometry.width);
  check_pixels(op, call.geometry.height_t, call.geometry.width_t);
}

}  // namespace camkernels::cuda
