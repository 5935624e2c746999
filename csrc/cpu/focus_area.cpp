// Torch binding and threading of focus_area on the CPU.
#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {

void focus_area_fwd_cpu(const Tensor& features, const Tensor& mask, const Tensor& coverage) {
  const FocusArea p{
      any_array(features), static_cast<bool*>(mask.mutable_data_ptr()), coverage.mutable_data_ptr(),
      features.size(1),    features.size(2) * features.size(3),         is_channels_last(features)};
  torch::stable::parallel_for(0, features.size(0), grain(p.channels * p.pixels),
                              [&](int64_t begin, int64_t end) { kernels().focus_area(p, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("focus_area_fwd", TORCH_BOX(&focus_area_fwd_cpu));
}

}  // namespace camkernels::cpu
