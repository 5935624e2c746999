// Torch bindings and threading of local_level_loss on the CPU.
#include <stdexcept>
#include <string>
#include <vector>

#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

// How many images count; each of them must have a class.
int64_t count_images(const Tensor& target, int64_t classes, int64_t ignored) {
  const AnyArray labels = any_array(target);
  int64_t counted = 0;
  for (int64_t i = 0; i < target.numel(); ++i) {
    const int64_t label = index_at(labels, i);
    if (label == ignored) continue;
    ++counted;
    if (label < 0 || label >= classes) {
      throw std::out_of_range("local_level_loss: target holds class " + std::to_string(label) +
                              "; activations has " + std::to_string(classes) +
                              " classes beside the background, so it must be in [0, " +
                              std::to_string(classes) + ")");
    }
  }
  return counted;
}

// How many pixels of each mask are true.
std::vector<int64_t> count_attended(const Tensor& mask, int64_t pixels) {
  std::vector<int64_t> counts(mask.size(0));
  const uint8_t* masks = static_cast<const uint8_t*>(mask.const_data_ptr());
  torch::stable::parallel_for(0, mask.size(0), grain(pixels / 8), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t i = 0; i < pixels; ++i) counts[n] += masks[n * pixels + i] != 0;
    }
  });
  return counts;
}

template <typename Kernel>
void run_tiles(const Tensor& activations, const Tensor& mask, const Tensor& target, int64_t ignored,
               LocalLevelLoss& p, Kernel kernel) {
  p.images = activations.size(0);
  p.classes = activations.size(1);
  p.pixels = activations.size(2) * activations.size(3);
  p.ignored = ignored;
  p.counted = count_images(target, p.classes - 1, ignored);
  const std::vector<int64_t> attended = count_attended(mask, p.pixels);
  p.activations = any_array(activations);
  p.mask = static_cast<const bool*>(mask.const_data_ptr());
  p.target = any_array(target);
  p.attended = attended.data();
  torch::stable::parallel_for(0, p.images * p.tiles(), grain(4 * kLossTile * p.classes),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

void local_level_loss_fwd_cpu(const Tensor& activations, const Tensor& mask, const Tensor& target,
                              int64_t ignore_index, const Tensor& losses) {
  LocalLevelLoss p{};
  p.losses = losses.mutable_data_ptr();
  run_tiles(activations, mask, target, ignore_index, p, kernels().local_level_loss_fwd);
}

void local_level_loss_bwd_cpu(const Tensor& activations, const Tensor& mask, const Tensor& target,
                              const Tensor& grad, int64_t ignore_index, const Tensor& grad_activations) {
  LocalLevelLoss p{};
  p.grad = grad.const_data_ptr();
  p.grad_activations = grad_activations.mutable_data_ptr();
  run_tiles(activations, mask, target, ignore_index, p, kernels().local_level_loss_bwd);
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("local_level_loss_fwd", TORCH_BOX(&local_level_loss_fwd_cpu));
  m.impl("local_level_loss_bwd", TORCH_BOX(&local_level_loss_bwd_cpu));
}

}  // namespace camkernels::cpu
