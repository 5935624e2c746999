// Torch binding of stochastic_consistency_fwd and stochastic_consistency_bwd.
#include "launch.h"
#include "stochastic_consistency.cuh"

namespace camkernels::cuda {
namespace {

// vectors: [N, K, D]; order, begin, end: [N]
VectorGroups groups_of(const Tensor& vectors, const Tensor& order, const Tensor& begin, const Tensor& end,
                       bool squared) {
  VectorGroups groups{};
  groups.vectors = vectors.const_data_ptr();
  groups.order = static_cast<const int64_t*>(order.const_data_ptr());
  groups.begin = static_cast<const int64_t*>(begin.const_data_ptr());
  groups.end = static_cast<const int64_t*>(end.const_data_ptr());
  groups.images = vectors.size(0);
  groups.num_seeds = dimension_of(vectors, 1);
  groups.depth = dimension_of(vectors, 2);
  groups.dtype = dtype_of(vectors);
  groups.squared = squared;
  return groups;
}

}  // namespace

void stochastic_consistency_fwd_cuda(const Tensor& vectors, const Tensor& order, const Tensor& begin,
                                     const Tensor& end, bool squared, const Tensor& sums) {
  const StochasticConsistencyFwd call{groups_of(vectors, order, begin, end, squared),
                                      static_cast<float*>(sums.mutable_data_ptr())};
  CudaLauncher launcher(vectors);
  launch_stochastic_consistency_fwd(launcher, call);
}

void stochastic_consistency_bwd_cuda(const Tensor& vectors, const Tensor& scale, const Tensor& order,
                                     const Tensor& begin, const Tensor& end, bool squared,
                                     const Tensor& grad_vectors) {
  const StochasticConsistencyBwd call{groups_of(vectors, order, begin, end, squared),
                                      static_cast<const float*>(scale.const_data_ptr()),
                                      grad_vectors.mutable_data_ptr()};
  CudaLauncher launcher(vectors);
  launch_stochastic_consistency_bwd(launcher, call);
}

CAMKERNELS_CUDA_LIBRARY(m) {
  m.impl("stochastic_consistency_fwd", TORCH_BOX(&stochastic_consistency_fwd_cuda));
  m.impl("stochastic_consistency_bwd", TORCH_BOX(&stochastic_consistency_bwd_cuda));
}

}  // namespace camkernels::cuda
