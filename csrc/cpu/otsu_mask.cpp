// Torch binding and threading of otsu_mask on the CPU.
#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {

void otsu_mask_fwd_cpu(const Tensor& maps, int64_t bins, const Tensor& mask, const Tensor& threshold) {
  const OtsuMask p{any_array(maps), static_cast<bool*>(mask.mutable_data_ptr()), threshold.mutable_data_ptr(),
                   maps.size(1), static_cast<int>(bins)};
  torch::stable::parallel_for(0, maps.size(0), grain(8 * (p.pixels + p.bins)),
                              [&](int64_t begin, int64_t end) { kernels().otsu_mask_fwd(p, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) { m.impl("otsu_mask_fwd", TORCH_BOX(&otsu_mask_fwd_cpu)); }

}  // namespace camkernels::cpu
