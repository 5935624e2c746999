// Torch binding of cam_transform_mse_fwd and cam_transform_mse_bwd.
#include <vector>

#include "cam_transform_mse.cuh"
#include "cam_transform_mse_bwd.cuh"
#include "launch.h"

namespace camkernels::cuda {
namespace {

// features: [N, C, H, W]; features_t: [N, C, H', W']; weight: [L, C]; matrix: [1 or N, 2, 3]; whole,
// fractions: see Resampling.flat in camkernels/transforms.py
CamTransform transform_of(const Tensor& features, const Tensor& features_t, const Tensor& weight,
                          const std::optional<Tensor>& matrix, const std::vector<int64_t>& whole,
                          const std::vector<double>& fractions, int64_t comparison) {
  CamTransform maps{};
  maps.features = features.const_data_ptr();
  maps.features_t = features_t.const_data_ptr();
  maps.weight = any_array(weight);
  maps.matrix = any_array(matrix);
  maps.geometry.affine = matrix.has_value();
  maps.geometry.height = dimension_of(features, 2);
  maps.geometry.width = dimension_of(features, 3);
  maps.geometry.height_t = dimension_of(features_t, 2);
  maps.geometry.width_t = dimension_of(features_t, 3);
  if (!whole.empty()) {
    maps.geometry.transposed = whole[0] != 0;
    maps.geometry.rows = {whole[1], whole[2], fractions[0], whole[3], whole[4]};
    maps.geometry.columns = {whole[5], whole[6], fractions[1], whole[7], whole[8]};
  }
  maps.images = features.size(0);
  maps.classes = weight.size(0);
  maps.matrices = matrix ? matrix->size(0) : 1;
  maps.channels = dimension_of(features, 1);
  maps.comparison = static_cast<Comparison>(comparison);
  maps.features_dtype = dtype_of(features);
  maps.channels_last = is_channels_last(features);
  maps.channels_last_t = is_channels_last(features_t);
  return maps;
}

}  // namespace

void cam_transform_mse_fwd_cuda(const Tensor& features, const Tensor& features_t, const Tensor& weight,
                                const std::optional<Tensor>& matrix, const std::vector<int64_t>& whole,
                                const std::vector<double>& fractions, int64_t comparison, bool keep,
                                const Tensor& means, const Tensor& kept) {
  CamTransformMseFwd call{};
  call.maps = transform_of(features, features_t, weight, matrix, whole, fractions, comparison);
  call.means = static_cast<float*>(means.mutable_data_ptr());
  call.kept = keep ? static_cast<float*>(kept.mutable_data_ptr()) : nullptr;
  CudaLauncher launcher(features);
  launch_cam_transform_mse_fwd(launcher, call);
}

void cam_transform_mse_bwd_cuda(const Tensor& grad_means, const Tensor& features, const Tensor& features_t,
                                const Tensor& weight, const std::optional<Tensor>& matrix, const Tensor& kept,
                                const std::vector<int64_t>& whole, const std::vector<double>& fractions,
                                int64_t comparison, bool need_features, bool need_features_t,
                                bool need_weight, const Tensor& grad_features, const Tensor& grad_features_t,
                                const Tensor& grad_weight) {
  CamTransformMseBwd call{};
  call.maps = transform_of(features, features_t, weight, matrix, whole, fractions, comparison);
  call.grad_means = static_cast<const float*>(grad_means.const_data_ptr());
  call.kept = static_cast<const float*>(kept.const_data_ptr());
  call.grad_features = need_features ? grad_features.mutable_data_ptr() : nullptr;
  call.grad_features_t = need_features_t ? grad_features_t.mutable_data_ptr() : nullptr;
  call.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  const Tensor scratch = torch::stable::new_empty(
      features, {cam_transform_mse_bwd_scratch(call.maps).total()}, torch::headeronly::ScalarType::Byte);
  call.scratch = scratch.mutable_data_ptr();
  CudaLauncher launcher(features);
  launch_cam_transform_mse_bwd(launcher, call);
}

CAMKERNELS_CUDA_LIBRARY(m) {
  m.impl("cam_transform_mse_fwd", TORCH_BOX(&cam_transform_mse_fwd_cuda));
  m.impl("cam_transform_mse_bwd", TORCH_BOX(&cam_transform_mse_bwd_cuda));
}

}  // namespace camkernels::cuda
