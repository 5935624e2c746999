// Torch bindings and threading of local_activations on the CPU.
#include <algorithm>

#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

using torch::headeronly::ScalarType;

// Columns are shared out in whole vectors of the widest kind.
constexpr int64_t kColumnUnit = 16;
// Elements of the features that a thread holds in its own order.
constexpr int64_t kHeldElements = 512 << 10;
// Columns that a thread multiplies by the same rows of weight: their sums stay in the second-level cache.
constexpr int64_t kMostColumns = 256;

LocalActivations describe(const Tensor& features, const Tensor& weight) {
  LocalActivations p{};
  p.branch = branch_of(features);
  p.classifier = {any_array(weight), nullptr, weight.size(0) * weight.size(1), weight.size(2)};
  p.images = features.size(0);
  p.classifiers = weight.size(0);
  return p;
}

ScalarType accumulate_of(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void local_activations_fwd_cpu(const Tensor& features, const Tensor& weight,
                               const std::optional<Tensor>& bias, bool, const Tensor& activations,
                               const Tensor& attention, const Tensor& winner, const Tensor& attention_class) {
  LocalActivations p = describe(features, weight);
  p.bias = any_array(bias);
  p.activations = activations.mutable_data_ptr();
  p.attention = attention.mutable_data_ptr();
  p.winner = static_cast<uint8_t*>(output_pointer(winner));
  p.attention_class = static_cast<int32_t*>(output_pointer(attention_class));

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t columns = p.columns(), channels = p.classifier.channels;
  const int64_t most = std::clamp(kHeldElements / channels, kColumnUnit, kMostColumns);
  const int64_t units = ceil_div(columns, kColumnUnit);
  // As many blocks for every thread; with fewer columns than that the classes are shared out, too.
  const int64_t blocks = std::min(ceil_div(ceil_div(columns, most), threads) * threads, units);
  const int64_t parts = std::min(ceil_div(threads, blocks), p.classes() - 1);
  const Tensor values = torch::stable::new_empty(features, {parts, columns}, accumulate_of(features));
  const Tensor labels = torch::stable::new_empty(features, {parts, columns}, ScalarType::Int);
  p.part_attention = values.mutable_data_ptr();
  p.part_class = static_cast<int32_t*>(labels.mutable_data_ptr());
  const int64_t cost = channels * (p.classifier.classes / parts) * (columns / blocks);
  torch::stable::parallel_for(0, blocks * parts, grain(cost / 8), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / parts, part = task % parts;
      kernels().local_activations_fwd(p, block * units / blocks * kColumnUnit,
                                      std::min(columns, (block + 1) * units / blocks * kColumnUnit), part,
                                      part * p.classes() / parts, (part + 1) * p.classes() / parts);
    }
  });
  torch::stable::parallel_for(0, columns, grain(4 * parts), [&](int64_t begin, int64_t end) {
    kernels().local_attention(p, parts, begin, end);
  });
}

void local_activations_bwd_cpu(const Tensor& features, const Tensor& weight,
                               const std::optional<Tensor>& grad_activations,
                               const std::optional<Tensor>& grad_attention, const Tensor& winner,
                               const Tensor& attention_class, bool need_features, bool need_weight,
                               bool need_bias, const Tensor& grad_features, const Tensor& grad_weight,
                               const Tensor& grad_bias) {
  LocalActivations p = describe(features, weight);
  p.grad_activations = any_array(grad_activations);
  p.grad_attention = any_array(grad_attention);
  // Backward only reads what forward kept.
  p.winner = static_cast<uint8_t*>(const_cast<void*>(winner.const_data_ptr()));
  p.attention_class = static_cast<int32_t*>(const_cast<void*>(attention_class.const_data_ptr()));
  p.branch.grad = need_features ? grad_features.mutable_data_ptr() : nullptr;
  WeightSums sums(grad_weight, need_weight, accumulate_of(features));
  p.classifier.grad_weight = sums.data();
  if (need_features || need_weight) {
    const int64_t channels = p.classifier.channels, blocks = ceil_div(channels, kChannelBlock);
    const int64_t cost = p.columns() * p.classes() * kChannelBlock / 8;
    torch::stable::parallel_for(0, blocks, grain(cost), [&](int64_t begin, int64_t end) {
      kernels().local_activations_bwd(p, begin * kChannelBlock, std::min(channels, end * kChannelBlock));
    });
  }
  sums.finish();
  if (!need_bias) return;
  p.grad_bias = grad_bias.mutable_data_ptr();
  torch::stable::parallel_for(0, p.classes(), grain(4 * p.columns()), [&](int64_t begin, int64_t end) {
    kernels().local_activations_bias(p, begin, end);
  });
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("local_activations_fwd", TORCH_BOX(&local_activations_fwd_cpu));
  m.impl("local_activations_bwd", TORCH_BOX(&local_activations_bwd_cpu));
}

}  // namespace camkernels::cpu
