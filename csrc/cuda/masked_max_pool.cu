// Torch binding of masked_max_pool_fwd and masked_max_pool_bwd.
#include "launch.h"
#include "masked_max_pool.cuh"

namespace camkernels::cuda {

// features: [N, C, H, W]; mask: [N, H, W]; pooled, index: [N, C]
void masked_max_pool_fwd_cuda(const Tensor& features, const Tensor& mask, const Tensor& pooled,
                              const Tensor& index) {
  MaskedMaxPoolFwd call{};
  call.features = features.const_data_ptr();
  call.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  call.pooled = pooled.mutable_data_ptr();
  call.index = static_cast<int32_t*>(index.mutable_data_ptr());
  call.images = features.size(0);
  call.channels = dimension_of(features, 1);
  call.height = dimension_of(features, 2);
  call.width = dimension_of(features, 3);
  call.dtype = dtype_of(features);
  call.channels_last = is_channels_last(features);
  CudaLauncher launcher(features);
  launch_masked_max_pool_fwd(launcher, call);
}

// grad, index: [N, C]; mask: [N, H, W]; grad_features: [N, C, H, W]
void masked_max_pool_bwd_cuda(const Tensor& grad, const Tensor& mask, const Tensor& index,
                              bool /* channels_last */, const Tensor& grad_features) {
  MaskedMaxPoolBwd call{};
  call.grad = grad.const_data_ptr();
  call.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  call.index = static_cast<const int32_t*>(index.const_data_ptr());
  call.grad_features = grad_features.mutable_data_ptr();
  call.images = grad.size(0);
  call.channels = dimension_of(grad, 1);
  call.height = dimension_of(grad_features, 2);
  call.width = dimension_of(grad_features, 3);
  call.dtype = dtype_of(grad);
  call.channels_last = is_channels_last(grad_features);
  CudaLauncher launcher(grad);
  launch_masked_max_pool_bwd(launcher, call);
}

CAMKERNELS_CUDA_LIBRARY(m) {
  m.impl("masked_max_pool_fwd", TORCH_BOX(&masked_max_pool_fwd_cuda));
  m.impl("masked_max_pool_bwd", TORCH_BOX(&masked_max_pool_bwd_cuda));
}

}  // namespace camkernels::cuda
