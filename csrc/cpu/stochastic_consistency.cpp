// Torch bindings and threading of stochastic_consistency on the CPU.
#include <algorithm>
#include <numeric>

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

// Images of one class follow one another in `order`; with `adjacent`, only the images 2i and 2i + 1. Returns
// how many pairs there are.
int64_t group(const Tensor& target, bool adjacent, int64_t* order, int64_t* begin, int64_t* end) {
  const AnyArray classes = any_array(target);
  const int64_t images = target.size(0);
  std::iota(order, order + images, int64_t{0});
  if (!adjacent) {
    std::stable_sort(order, order + images,
                     [&](int64_t a, int64_t b) { return index_at(classes, a) < index_at(classes, b); });
  }
  int64_t pairs = 0;
  for (int64_t first = 0, last; first < images; first = last) {
    const int64_t most = adjacent ? std::min(images, first + 2 - first % 2) : images;
    last = first + 1;
    while (last < most && index_at(classes, order[last]) == index_at(classes, order[first])) ++last;
    std::fill(begin + first, begin + last, first);
    std::fill(end + first, end + last, last);
    pairs += (last - first) * (last - first - 1) / 2;
  }
  return pairs;
}

template <typename Real>
void mean_of(const Tensor& sums, int64_t distances, const Tensor& loss, const Tensor& divisor) {
  const Real* from = static_cast<const Real*>(sums.const_data_ptr());
  const Real count = static_cast<Real>(std::max<int64_t>(distances, 1));
  *static_cast<Real*>(divisor.mutable_data_ptr()) = count;
  *static_cast<Real*>(loss.mutable_data_ptr()) = static_cast<Real>(map_sum(from, sums.numel())) / count;
}

template <typename Real>
void quotient(const Tensor& grad, const Tensor& divisor, void* scale) {
  *static_cast<Real*>(scale) =
      *static_cast<const Real*>(grad.const_data_ptr()) / *static_cast<const Real*>(divisor.const_data_ptr());
}

}  // namespace

void stochastic_consistency_fwd_cpu(const Tensor& vectors, const Tensor& target, bool adjacent, bool squared,
                                    const Tensor& loss, const Tensor& order, const Tensor& begin,
                                    const Tensor& end, const Tensor& divisor) {
  const auto indices = [](const Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); };
  const int64_t pairs = group(target, adjacent, indices(order), indices(begin), indices(end));
  StochasticConsistency p = describe(vectors, order, begin, end, squared);
  const Tensor sums = torch::stable::new_empty(loss, {p.images, p.seeds});
  p.sums = sums.mutable_data_ptr();
  run_items(vectors,
            [&](int64_t first, int64_t last) { kernels().stochastic_consistency_fwd(p, first, last); });
  const auto mean = dtype_of(loss) == DType::kDouble ? mean_of<double> : mean_of<float>;
  mean(sums, pairs * p.seeds, loss, divisor);
}

void stochastic_consistency_bwd_cpu(const Tensor& vectors, const Tensor& grad_loss, const Tensor& order,
                                    const Tensor& begin, const Tensor& end, const Tensor& divisor,
                                    bool squared, const Tensor& grad_vectors) {
  StochasticConsistency p = describe(vectors, order, begin, end, squared);
  double scale;  // or a float in it
  (dtype_of(divisor) == DType::kDouble ? quotient<double> : quotient<float>)(grad_loss, divisor, &scale);
  p.scale = &scale;
  p.grad_vectors = grad_vectors.mutable_data_ptr();
  run_items(vectors,
            [&](int64_t first, int64_t last) { kernels().stochastic_consistency_bwd(p, first, last); });
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("stochastic_consistency_fwd", TORCH_BOX(&stochastic_consistency_fwd_cpu));
  m.impl("stochastic_consistency_bwd", TORCH_BOX(&stochastic_consistency_bwd_cpu));
}

}  // namespace camkernels::cpu
