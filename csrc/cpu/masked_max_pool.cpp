// Torch bindings and threading of masked_max_pool on the CPU.
#include <algorithm>

#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

// Channels of one task at most: of channels_last features, as many maxima as stay in the first-level cache.
constexpr int64_t kChannels = 2048;
// At least, so that a pixel's channels are some cache lines.
constexpr int64_t kFewestChannels = 128;

// Calls run(image, first channel, last channel) for all of them, in parallel.
template <typename Run>
void for_channels(int64_t images, int64_t channels, int64_t pixels, Run&& run) {
  const int64_t wanted = (2 * torch::stable::get_num_threads() + images - 1) / images;
  const int64_t width = std::clamp((channels + wanted - 1) / wanted, kFewestChannels, kChannels);
  const int64_t blocks = (channels + width - 1) / width;
  torch::stable::parallel_for(0, images * blocks, grain(std::min(width, channels) * pixels),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t item = begin; item < end; ++item) {
                                  const int64_t first = item % blocks * width;
                                  run(item / blocks, first, std::min(channels, first + width));
                                }
                              });
}

}  // namespace

void masked_max_pool_fwd_cpu(const Tensor& features, const Tensor& mask, const Tensor& pooled,
                             const Tensor& index) {
  MaskedMaxPool p{};
  p.features = any_array(features);
  p.mask = static_cast<const bool*>(mask.const_data_ptr());
  p.pooled = pooled.mutable_data_ptr();
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.channels = features.size(1);
  p.pixels = features.size(2) * features.size(3);
  p.channels_last = is_channels_last(features);
  for_channels(features.size(0), p.channels, p.pixels, [&](int64_t image, int64_t begin, int64_t end) {
    kernels().masked_max_pool_fwd(p, image, begin, end);
  });
}

void masked_max_pool_bwd_cpu(const Tensor& grad, const Tensor& mask, const Tensor& index, bool,
                             const Tensor& grad_features) {
  MaskedMaxPool p{};
  p.grad = any_array(grad);
  p.mask = static_cast<const bool*>(mask.const_data_ptr());
  p.index = static_cast<int32_t*>(const_cast<void*>(index.const_data_ptr()));  // backward only reads it
  p.grad_features = grad_features.mutable_data_ptr();
  p.channels = grad_features.size(1);
  p.pixels = grad_features.size(2) * grad_features.size(3);
  p.channels_last = is_channels_last(grad_features);
  p.streamed = worth_streaming(grad_features.numel());
  for_channels(grad.size(0), p.channels, p.pixels, [&](int64_t image, int64_t begin, int64_t end) {
    kernels().masked_max_pool_bwd(p, image, begin, end);
  });
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("masked_max_pool_fwd", TORCH_BOX(&masked_max_pool_fwd_cpu));
  m.impl("masked_max_pool_bwd", TORCH_BOX(&masked_max_pool_bwd_cpu));
}

}  // namespace camkernels::cpu
