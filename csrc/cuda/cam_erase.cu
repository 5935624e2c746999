// Torch binding of cam_erase_fwd and cam_erase_bwd.
#include <vector>

#include "cam_binding.h"
#include "cam_erase.cuh"

namespace camkernels::cuda {
namespace {

// images: [N, D, H0, W0]; cam: [N, 1, H, W]
Erasing erasing_of(const Tensor& images, const Tensor& cam, double threshold, double sharpness,
                   const std::vector<double>& fill, bool nearest) {
  Erasing erasing{};
  erasing.images = images.size(0);
  erasing.depth = dimension_of(images, 1);
  erasing.image_height = dimension_of(images, 2);
  erasing.image_width = dimension_of(images, 3);
  erasing.map_height = dimension_of(cam, 2);
  erasing.map_width = dimension_of(cam, 3);
  erasing.threshold = static_cast<float>(threshold);
  erasing.sharpness = static_cast<float>(sharpness);
  erasing.dtype = dtype_of(images);
  erasing.nearest = nearest;
  erasing.channels_last = is_channels_last(images);
  set_fill(erasing, fill.data(), static_cast<int64_t>(fill.size()));
  return erasing;
}

}  // namespace

void cam_erase_fwd_cuda(const Tensor& features, const Tensor& weight, const Tensor& target,
                        const Tensor& images, double threshold, double sharpness, std::vector<double> fill,
                        bool nearest, double eps, const Tensor& erased, const Tensor& cam,
                        const Tensor& cam32, const Tensor& extent) {
  CamEraseFwd call{};
  call.front = front_of(features, weight, target, eps, cam, cam32, extent);
  call.erasing = erasing_of(images, cam, threshold, sharpness, fill, nearest);
  call.images = images.const_data_ptr();
  call.erased = erased.mutable_data_ptr();
  CudaLauncher launcher(features);
  launch_cam_erase_fwd(launcher, call);
}

void cam_erase_bwd_cuda(const Tensor& grad_erased, const std::optional<Tensor>& grad_cam,
                        const std::optional<Tensor>& images, const Tensor& cam, double threshold,
                        double sharpness, std::vector<double> fill, bool nearest, bool need_images,
                        bool need_map, const Tensor& grad_images, const Tensor& grad_map) {
  CamEraseBwd call{};
  call.erasing = erasing_of(grad_erased, cam, threshold, sharpness, fill, nearest);
  call.grad_erased = grad_erased.const_data_ptr();
  call.images = images ? images->const_data_ptr() : nullptr;
  call.cam = static_cast<const float*>(cam.const_data_ptr());
  call.grad_cam = any_array(grad_cam);
  call.grad_images = need_images ? grad_images.mutable_data_ptr() : nullptr;
  call.grad_map = need_map ? static_cast<float*>(grad_map.mutable_data_ptr()) : nullptr;
  CudaLauncher launcher(grad_erased);
  launch_cam_erase_bwd(launcher, call);
}

CAMKERNELS_CUDA_LIBRARY(m) {
  m.impl("cam_erase_fwd", TORCH_BOX(&cam_erase_fwd_cuda));
  m.impl("cam_erase_bwd", TORCH_BOX(&cam_erase_bwd_cuda));
}

}  // namespace camkernels::cuda
