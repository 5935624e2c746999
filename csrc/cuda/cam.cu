// Torch binding of cam_fwd and cam_bwd.
#include "cam.cuh"
#include "cam_binding.h"

namespace camkernels::cuda {

void cam_fwd_cuda(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& target,
                  const std::optional<Tensor>& bias, bool normalize, double eps, const Tensor& cam,
                  const Tensor& cam32, const Tensor& extent) {
  CamFwd call{};
  call.front = front_of(features, weight, target, eps, cam, cam32, extent);
  call.bias = any_array(bias);
  call.normalize = normalize;
  CudaLauncher launcher(features);
  launch_cam_fwd(launcher, call);
}

void cam_bwd_cuda(const Tensor& grad_cam, const Tensor& features, const Tensor& weight,
                  const std::optional<Tensor>& target, const Tensor& cam, const Tensor& extent,
                  bool normalize, double eps, bool need_features, bool need_weight, bool need_bias,
                  const Tensor& grad_features, const Tensor& grad_weight, const Tensor& grad_bias) {
  CamBwd call{};
  call.grad_cam = any_array(grad_cam);
  call.features = features.const_data_ptr();
  call.weight = any_array(weight);
  call.target = any_array(target);
  call.cam = normalize ? static_cast<const float*>(cam.const_data_ptr()) : nullptr;
  call.extent = normalize ? static_cast<const float*>(extent.const_data_ptr()) : nullptr;
  call.grad_features = need_features ? grad_features.mutable_data_ptr() : nullptr;
  call.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  call.grad_bias = need_bias ? static_cast<float*>(grad_bias.mutable_data_ptr()) : nullptr;
  call.images = features.size(0);
  call.classes = weight.size(0);
  call.channels = dimension_of(features, 1);
  call.height = dimension_of(features, 2);
  call.width = dimension_of(features, 3);
  call.maps = dimension_of(grad_cam, 1);
  call.eps = static_cast<float>(eps);
  call.features_dtype = dtype_of(features);
  call.channels_last = is_channels_last(features);
  call.normalize = normalize;
  const Tensor scratch =
      torch::stable::new_empty(features, {cam_bwd_scratch(call)}, torch::headeronly::ScalarType::Float);
  call.scratch = static_cast<float*>(scratch.mutable_data_ptr());
  CudaLauncher launcher(features);
  launch_cam_bwd(launcher, call);
}

CAMKERNELS_CUDA_LIBRARY(m) {
  m.impl("cam_fwd", TORCH_BOX(&cam_fwd_cuda));
  m.impl("cam_bwd", TORCH_BOX(&cam_bwd_cuda));
}

}  // namespace camkernels::cuda
