// Torch bindings and threading of stochastic_consistency on the CPU.
#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

StochasticConsistency describe(const Tensor& vectors, const Tensor& order, const Tensor& begin,
                               const Tensor& end, bool squared) {
  StochasticConsistency p{};
  p.vectors = any_array(vectors);
  p.order = static_cast<const int64_t*>(order.const_data_ptr());
  p.begin = static_cast<const int64_t*>(begin.const_data_ptr());
  p.end = static_cast<const int64_t*>(end.const_data_ptr());
  p.images = vectors.size(0);
  p.seeds = vectors.size(1);
  p.depth = vectors.size(2);
  p.squared = squared;
  return p;
}

template <typename Run>
void run_items(const Tensor& vectors, Run run) {
  torch::stable::parallel_for(0, vectors.size(0) * vectors.size(1), grain(4 * vectors.size(2)), run);
}

}  // namespace

void stochastic_consistency_fwd_cpu(const Tensor& vectors, const Tensor& order, const Tensor& begin,
                                    const Tensor& end, bool squared, const Tensor& sums) {
  StochasticConsistency p = describe(vectors, order, begin, end, squared);
  p.sums = sums.mutable_data_ptr();
  run_items(vectors,
            [&](int64_t first, int64_t last) { kernels().stochastic_consistency_fwd(p, first, last); });
}

void stochastic_consistency_bwd_cpu(const Tensor& vectors, const Tensor& scale, const Tensor& order,
                                    const Tensor& begin, const Tensor& end, bool squared,
                                    const Tensor& grad_vectors) {
  StochasticConsistency p = describe(vectors, order, begin, end, squared);
  p.scale = scale.const_data_ptr();
  p.grad_vectors = grad_vectors.mutable_data_ptr();
  run_items(vectors,
            [&](int64_t first, int64_t last) { kernels().stochastic_consistency_bwd(p, first, last); });
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("stochastic_consistency_fwd", TORCH_BOX(&stochastic_consistency_fwd_cpu));
  m.impl("stochastic_consistency_bwd", TORCH_BOX(&stochastic_consistency_bwd_cpu));
}

}  // namespace camkernels::cpu
