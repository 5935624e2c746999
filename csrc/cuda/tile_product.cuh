// A block multiplies two matrices whose pieces it stages in shared memory, summing in registers.
#pragma once

#include <algorithm>

#include "device.cuh"
#include "plan.h"

namespace camkernels::cuda {

inline constexpr int kDepth = 32;  // of the sum's terms staged at a time: a warp's lanes can run along them
inline constexpr int kThreadRows = 4;
inline constexpr int kThreadColumns = 4;
inline constexpr int kLanesDown = 4;
inline constexpr int kLanesAcross = kWarp / kLanesDown;
inline constexpr int kWarpRows = kLanesDown * kThreadRows;
inline constexpr int kWarpColumns = kLanesAcross * kThreadColumns;
inline constexpr int kMostDown =
    5;  // 80 rows and, with 15 warps, 96 columns: registers of two blocks hold it

// How many warps share the rows and the columns of a tile, and how many the terms of each of its sums.
struct Tiling {
  int down;
  int across;
  int deep;

  __host__ __device__ int rows() const { return down * kWarpRows; }
  __host__ __device__ int columns() const { return across * kWarpColumns; }
  // Of staged rows: a multiple of 16 bytes that is not one of all banks.
  __host__ __device__ int left_stride() const { return rows() + 4; }
  __host__ __device__ int right_stride() const { return columns() + 4; }
  int threads() const { return down * across * deep * kWarp; }
};

// The factors of a tile's next terms: left [kDepth, rows], right [kDepth, columns].
struct Factors {
  float* left;
  float* right;
};

template <typename Memory>
__host__ __device__ Factors take_factors(Memory& memory, const Tiling& tiling) {
  Factors factors;
  factors.left = memory.template take<float>(int64_t{kDepth} * tiling.left_stride());
  factors.right = memory.template take<float>(int64_t{kDepth} * tiling.right_stride());
  return factors;
}

// Calls `load(fast, slow)` for fast < 32 * strips and slow < count: a warp's lanes run along `fast`,
// which stays with a thread for as long as it can. kInFlight calls at a time, so that loads need not wait for
// each other: `load` gives a value, `store(fast, slow, value)` takes it.
template <int kInFlight, typename Load, typename Store>
__device__ __forceinline__ void for_strips(int strips, int count, Load load, Store store) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int across = min(strips, static_cast<int>(blockDim.x) / kWarp);
  const int groups = static_cast<int>(blockDim.x) / kWarp / across;
  if (warp / across >= groups) return;
#pragma unroll 1
  for (int strip = warp % across; strip < strips; strip += across) {
    const int fast = strip * kWarp + lane;
#pragma unroll 1
    for (int first = warp / across; first < count; first += kInFlight * groups) {
      float values[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (first + u * groups < count) values[u] = load(fast, first + u * groups);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (first + u * groups < count) store(fast, first + u * groups, values[u]);
      }
    }
  }
}

// What a thread sums: rows [row, row + kThreadRows) and columns [column, column + kThreadColumns) of the
// tile, of the terms staged at a time its group's share.
struct TileSums {
  int row;
  int column;
  int group;
  float at[kThreadRows][kThreadColumns];

  __device__ __forceinline__ explicit TileSums(const Tiling& tiling) : at{} {
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    const int within = warp % (tiling.down * tiling.across);
    group = warp / (tiling.down * tiling.across);
    row = within / tiling.across * kWarpRows + lane / kLanesAcross * kThreadRows;
    column = within % tiling.across * kWarpColumns + lane % kLanesAcross * kThreadColumns;
  }

  // Adds the products of the first `depth` staged terms. With kByThemselves they are summed by themselves
  // first: of thousands of terms in a row, all alike, the rounding would grow with each.
  template <bool kByThemselves = false>
  __device__ __forceinline__ void add(const Tiling& tiling, const Factors& factors, int depth) {
    float part[kThreadRows][kThreadColumns] = {};
    if constexpr (kByThemselves) {
      add_to(part, tiling, factors, depth);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) at[i][j] += part[i][j];
      }
    } else {
      add_to(at, tiling, factors, depth);
    }
  }

  // The block's sums into `tile` [rows, columns] of that row stride, group after group, so that their order
  // is fixed; the block is synchronised.
  __device__ __forceinline__ void deposit(const Tiling& tiling, float* tile, int stride, int rows,
                                          int columns) const {
#pragma unroll 1
    for (int turn = 0; turn < tiling.deep; ++turn) {
      if (turn == group) {
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
          for (int j = 0; j < kThreadColumns; ++j) {
            if (row + i >= rows || column + j >= columns) continue;
            float& sum = tile[(row + i) * stride + column + j];
            sum = turn == 0 ? at[i][j] : sum + at[i][j];
          }
        }
      }
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ void add_to(float (&to)[kThreadRows][kThreadColumns], const Tiling& tiling,
                                         const Factors& factors, int depth) const {
    static_assert(kThreadRows == 4 && kThreadColumns == 4, "one 16-byte load each");
    const int begin = depth * group / tiling.deep;
    const int end = depth * (group + 1) / tiling.deep;
    const float* left = factors.left + begin * tiling.left_stride() + row;
    const float* right = factors.right + begin * tiling.right_stride() + column;
#pragma unroll 4
    for (int k = begin; k < end; ++k) {
      const float4 l = *reinterpret_cast<const float4*>(left);
      const float4 r = *reinterpret_cast<const float4*>(right);
      const float rows[kThreadRows] = {l.x, l.y, l.z, l.w};
      const float columns[kThreadColumns] = {r.x, r.y, r.z, r.w};
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) to[i][j] = fmaf(rows[i], columns[j], to[i][j]);
      }
      left += tiling.left_stride();
      right += tiling.right_stride();
    }
  }
};

// Rows of a tile that block `rank` of a cluster finishes.
struct RowShare {
  int begin;
  int end;
};

__device__ __forceinline__ RowShare row_share(int rows, int rank, int size) {
  return {rows * rank / size, rows * (rank + 1) / size};
}

// Sums columns [begin, end) of this block's share of rows over the cluster, in the order of ranks and in
// place: the others read only their own shares of this block's tile. No block may leave the kernel before
// leave_cluster. The block is synchronised.
__device__ inline void cluster_rows(float* tile, int stride, RowShare share, int begin, int end, int size) {
  if (size > 1) {
    cluster_arrive();
    cluster_wait();
#pragma unroll 1
    for (int row = share.begin + threadIdx.x / kWarp; row < share.end; row += blockDim.x / kWarp) {
#pragma unroll 1
      for (int column = begin + threadIdx.x % kWarp; column < end; column += kWarp) {
        float sum = 0.0f;
        for (int rank = 0; rank < size; ++rank) sum += cluster_peer(tile, rank)[row * stride + column];
        tile[row * stride + column] = sum;
      }
    }
  }
  __syncthreads();
  // Relaxed: it only keeps the others until this block's reads are over, which the barrier has seen to.
  if (size > 1) cluster_arrive_relaxed();
}

// Of `total` in tiles of at most `most`: as many as make the tiles even.
inline int64_t even_share(int64_t total, int64_t most) {
  const int64_t tiles = (total + most - 1) / most;
  return (total + tiles - 1) / tiles;
}

inline int warps_for(int64_t total, int each, int most) {
  return static_cast<int>((even_share(total, int64_t{each} * most) + each - 1) / each);
}

// The remaining warps share the terms of the sums.
inline Tiling with_depth(int warps, int down, int across) {
  return {down, across, std::min(warps / (down * across), kDepth / 4)};
}

}  // namespace camkernels::cuda
