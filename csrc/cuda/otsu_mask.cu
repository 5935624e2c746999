// Torch binding of otsu_mask_fwd.
#include "launch.h"
#include "otsu_mask.cuh"

namespace camkernels::cuda {

// maps, mask: [M, P]; threshold: [M]
void otsu_mask_fwd_cuda(const Tensor& maps, int64_t bins, const Tensor& mask, const Tensor& threshold) {
  OtsuMaskFwd call{};
  call.maps = maps.const_data_ptr();
  call.mask = static_cast<bool*>(mask.mutable_data_ptr());
  call.threshold = threshold.mutable_data_ptr();
  call.count = maps.size(0);
  call.pixels = maps.size(1);
  call.bins = static_cast<int>(bins);
  call.dtype = dtype_of(maps);
  CudaLauncher launcher(maps);
  launch_otsu_mask_fwd(launcher, call);
}

CAMKERNELS_CUDA_LIBRARY(m) {
  m.impl("otsu_mask_fwd", TORCH_BOX(&otsu_mask_fwd_cuda));
}

}  // namespace camkernels::cuda
