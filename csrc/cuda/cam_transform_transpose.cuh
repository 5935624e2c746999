// The transpose of a transform on one grid: of each cell of a map the cells of the transformed map that read
// it. Gradients are sums over these, in their order, whatever the threads do.
#pragma once

#include "cam_transform.cuh"

namespace camkernels::cuda {

// One cell of the transformed map that reads a cell of the map, and with which weight.
struct Reader {
  int cell;
  float weight;
};

// One for each matrix; one in all where there is none, or one for all images. I is their number.
struct Transpose {
  Reader* readers;  // [I, 4 * P']: those of cell 0, of cell 1, ...
  int* starts;      // [I, P + 1]: of each cell's readers
  int* counts;      // [I]: cells of the transformed map that count

  __device__ Reader* readers_of(const CamTransform& maps, int64_t image) const {
    return readers + maps.matrix_of(image) * 4 * maps.pixels_t();
  }
  __device__ int* starts_of(const CamTransform& maps, int64_t image) const {
    return starts + maps.matrix_of(image) * (maps.pixels() + 1);
  }
};

inline constexpr int kTransposeThreads = 512;

// With how much weight a cell read through `read` reads `cell`, and whether it does; a weight of 0 counts, as
// a NaN goes through it.
__device__ __forceinline__ bool reads_cell(const CellRead& read, int cell, float* weight) {
  if (read.moved < 0) return false;
  const int distance = cell - read.moved;
  const bool upper = distance == 0 || distance == read.right;
  const bool lower = distance == read.down || distance == read.down + read.right;
  if (!upper && !lower) return false;
  const int column = upper ? distance : distance - read.down;  // where `down` is 1, `right` is 0
  float x = 1.0f;
  if (read.right != 0) x = column == 0 ? 1.0f - read.weight_x : read.weight_x;
  float y = 1.0f;
  if (read.down != 0) y = upper ? 1.0f - read.weight_y : read.weight_y;
  *weight = x * y;
  return true;
}

// Sums of the values of all threads before this one, and in `total` of all; the block is synchronised.
__device__ inline int sum_before(int value, int* memory, int* total) {
  const int threads = blockDim.x;
  int* from = memory;
  int* to = memory + threads;
  from[threadIdx.x] = value;
  __syncthreads();
  for (int distance = 1; distance < threads; distance *= 2) {
    const int other = static_cast<int>(threadIdx.x) - distance;
    to[threadIdx.x] = from[threadIdx.x] + (other < 0 ? 0 : from[other]);
    __syncthreads();
    int* const swapped = from;
    from = to;
    to = swapped;
  }
  const int before = from[threadIdx.x] - value;
  *total = from[threads - 1];
  __syncthreads();
  return before;
}

struct TransposeCall {
  CamTransform maps;
  Transpose transpose;
};

// A block per matrix.
__global__ void __launch_bounds__(kTransposeThreads)
    cam_transform_transpose_kernel(const __grid_constant__ TransposeCall call) {
  const CamTransform& maps = call.maps;
  const int threads = blockDim.x;
  const int64_t item = blockIdx.x;
  const int pixels_t = maps.pixels_t();
  SharedMemory memory;
  CellRead* reads = memory.take<CellRead>(threads);
  int* sums = memory.take<int>(2 * threads);
  Reader* readers = call.transpose.readers_of(maps, item);
  int* starts = call.transpose.starts_of(maps, item);

  int start = 0;
  int valid = 0;
#pragma unroll 1
  for (int first = 0; first < maps.pixels(); first += threads) {
    const int cell = first + threadIdx.x;
    int at = 0;
    // Once to count, once to write.
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      int count = 0;
#pragma unroll 1
      for (int begin = 0; begin < pixels_t; begin += threads) {
        __syncthreads();  // the reads before are no longer needed
        stage_reads(maps, item, begin, pixels_t, threads, reads);
        __syncthreads();
        if (first == 0 && turn == 0) valid += reads[threadIdx.x].still >= 0;
        const int here = min(threads, pixels_t - begin);
        for (int j = 0; j < here && cell < maps.pixels(); ++j) {
          float weight;
          if (!reads_cell(reads[j], cell, &weight)) continue;
          if (turn == 1) readers[at + count] = {begin + j, weight};
          ++count;
        }
      }
      if (turn == 1) break;
      int total;
      at = start + sum_before(count, sums, &total);
      if (cell < maps.pixels()) starts[cell] = at;
      start += total;
    }
  }
  int total;
  sum_before(valid, sums, &total);
  if (threadIdx.x == 0) {
    starts[maps.pixels()] = start;
    call.transpose.counts[item] = total;
  }
}

template <typename Launcher>
void launch_cam_transform_transpose(Launcher& launcher, const CamTransform& maps,
                                    const Transpose& transpose) {
  const int threads = std::min(launcher.hardware().threads, kTransposeThreads);
  SharedSize shared;
  shared.take<CellRead>(threads);
  shared.take<int>(2 * threads);
  launcher.run(cam_transform_transpose_kernel, LaunchShape{maps.matrices, threads, 1, shared.bytes()},
               TransposeCall{maps, transpose});
}

}  // namespace camkernels::cuda
