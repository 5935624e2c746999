// From tensors to the front's parameters.
#pragma once

#include "cam_front.cuh"
#include "launch.h"

namespace camkernels::cuda {

// features: [N, C, H, W]; weight: [L, C]; target: [N, K]; cam, cam32: [N, K, H, W]; extent: [N, K, 2]
inline CamFront front_of(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& target,
                         double eps, const Tensor& cam, const Tensor& cam32, const Tensor& extent) {
  CamFront front{};
  front.features = features.const_data_ptr();
  front.weight = any_array(weight);
  front.target = any_array(target);
  front.cam = cam.mutable_data_ptr();
  front.cam32 = static_cast<float*>(output_pointer(cam32));
  front.extent = static_cast<float*>(output_pointer(extent));
  front.images = features.size(0);
  front.classes = weight.size(0);
  front.channels = dimension_of(features, 1);
  front.height = dimension_of(features, 2);
  front.width = dimension_of(features, 3);
  front.maps = dimension_of(cam, 1);
  front.eps = static_cast<float>(eps);
  front.features_dtype = dtype_of(features);
  front.channels_last = is_channels_last(features);
  return front;
}

}  // namespace camkernels::cuda
