// Mean squared difference of transformed heatmaps and the heatmaps of transformed images. On one grid the
// transform and the channel sum commute, so that the features' difference is multiplied once; of a Scale both
// maps are made and compared on their common grid. The gradients are in cam_transform_mse_bwd.cuh.
#pragma once

#include "cam_transform.cuh"
#include "common_grid.cuh"

namespace camkernels::cuda {

struct CamTransformMseFwd {
  CamTransform maps;
  CommonGrid grid;  // of a Scale
  float* means;     // [N, L]
  float* kept;      // [N, L, P'] differences or, of a Scale, the larger of both maps, raw; or null
  MapPlan plan;
};

// A cluster makes the maps of some labels of one image; of each label one of its blocks makes the mean.
template <typename T, bool kOneGrid>
__global__ void __launch_bounds__(kOneGrid ? kThreads : kRoomyThreads, 2)
    cam_transform_mse_fwd_kernel(const __grid_constant__ CamTransformMseFwd call) {
  const CamTransform& maps = call.maps;
  const int64_t item = blockIdx.x / cluster_size();
  const int64_t groups = (maps.classes + call.plan.labels - 1) / call.plan.labels;
  const int64_t image = item / groups;
  const int64_t label = item % groups * call.plan.labels;
  const int labels = static_cast<int>(min(int64_t{call.plan.labels}, maps.classes - label));
  const int cells = maps.cells();
  SharedMemory memory;
  const MapBuffers buffers = take_map_buffers(memory, maps, call.plan.tiling, call.plan.labels);
  make_maps<T, kOneGrid>(maps, call.plan.tiling, image, label, labels, 0, cells, buffers);
  const RowShare share = row_share(labels, cluster_rank(), cluster_size());

  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int row = share.begin + threadIdx.x / kWarp; row < share.end; row += blockDim.x / kWarp) {
    const float* map = buffers.maps + row * cells;
    const int64_t at = image * maps.classes + label + row;
    if constexpr (kOneGrid) {
      float* kept = call.kept == nullptr ? nullptr : call.kept + at * cells;
      float sum = 0.0f;
      int count = 0;
#pragma unroll 1
      for (int cell = lane; cell < cells; cell += kWarp) {
        // Not a product with 0: of a cell that does not count a weight may have made a NaN.
        const float difference = buffers.valid[cell] ? map[cell] : 0.0f;
        if (kept != nullptr) kept[cell] = difference;
        sum = fmaf(difference, difference, sum);
        count += buffers.valid[cell];
      }
      sum = warp_sum(sum);
      count = warp_sum(count);
      if (lane == 0) call.means[at] = sum / static_cast<float>(max(count, 1));
    } else {
      const CommonGrid& grid = call.grid;
      const float* map_t = map + maps.pixels();
      const bool first = maps.pixels() >= maps.pixels_t();
      const int most = first ? maps.pixels() : maps.pixels_t();
      const float* larger = first ? map : map_t;
      for (int cell = lane; cell < most && call.kept != nullptr; cell += kWarp) {
        call.kept[at * most + cell] = larger[cell];
      }
      float mean;
      if (maps.comparison == Comparison::kBilinear) {
        mean = bilinear_mean(grid, map, map_t);
      } else {
        mean = nearest_mean(larger, first ? grid.one : grid.other, first ? map_t : map,
                            first ? grid.other : grid.one);
      }
      mean = warp_sum(mean);
      if (lane == 0) call.means[at] = mean;
    }
  }
  leave_cluster(cluster_size());
}

template <typename Launcher>
void launch_cam_transform_mse_fwd(Launcher& launcher, CamTransformMseFwd call) {
  const char* op = "cam_transform_mse_fwd";
  const Hardware& hardware = launcher.hardware();
  check_maps(op, call.maps);
  const int threads = call.maps.one_grid() ? kThreads : kRoomyThreads;
  call.plan = plan_maps(op, hardware, std::min(hardware.threads, threads), call.maps, call.maps.cells(), 0);
  if (!call.maps.one_grid()) call.grid = common_grid_of(call.maps.geometry);
  const LaunchShape shape = map_shape(hardware, call.maps, call.plan, 0);
  dispatch(call.maps.features_dtype, [&](auto element) {
    using T = decltype(element);
    launcher.run(
        call.maps.one_grid() ? cam_transform_mse_fwd_kernel<T, true> : cam_transform_mse_fwd_kernel<T, false>,
        shape, call);
  });
}

}  // namespace camkernels::cuda
