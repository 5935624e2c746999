// Torch bindings and threading of the CAM kernels on the CPU.
#include <algorithm>

#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

template <typename Real>
void sum_bias(const CamBwd& p, Real* grad_bias) {
  const Real* grad = static_cast<const Real*>(p.grad_raw);
  for (int64_t index = 0; index < p.images * p.maps; ++index) {
    grad_bias[p.target.data == nullptr ? index % p.maps : index_at(p.target, index)] +=
        map_sum(grad + index * p.pixels, p.pixels);
  }
}

void sum_bias(const CamBwd& p, bool wide, void* grad_bias) {
  if (wide) {
    sum_bias(p, static_cast<double*>(grad_bias));
  } else {
    sum_bias(p, static_cast<float*>(grad_bias));
  }
}

}  // namespace

CamFwd describe_cam_fwd(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& target,
                        const std::optional<Tensor>& bias, bool normalize, double eps, const Tensor& cam,
                        const Tensor& cam32, const Tensor& extent) {
  return {any_array(features),
          any_array(weight),
          any_array(target),
          any_array(bias),
          cam.mutable_data_ptr(),
          output_pointer(cam32),
          normalize ? extent.mutable_data_ptr() : nullptr,
          features.size(1),
          features.size(2) * features.size(3),
          cam.size(1),
          is_channels_last(features),
          eps};
}

void launch_cam_fwd(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& target,
                    const std::optional<Tensor>& bias, bool normalize, double eps, const Tensor& cam,
                    const Tensor& cam32, const Tensor& extent) {
  const CamFwd p = describe_cam_fwd(features, weight, target, bias, normalize, eps, cam, cam32, extent);
  const int64_t blocks = features.size(0) * ((p.maps + kMapBlock - 1) / kMapBlock);
  const int64_t cost = p.channels * p.pixels * std::min(p.maps, kMapBlock);
  torch::stable::parallel_for(0, blocks, grain(cost),
                              [&](int64_t begin, int64_t end) { kernels().cam_fwd(p, begin, end); });
}

void cam_fwd_cpu(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& target,
                 const std::optional<Tensor>& bias, bool normalize, double eps, const Tensor& cam,
                 const Tensor& cam32, const Tensor& extent) {
  check_target("fused_cam", target, weight.size(0));
  launch_cam_fwd(features, weight, target, bias, normalize, eps, cam, cam32, extent);
}

void cam_bwd_cpu(const Tensor& grad_cam, const Tensor& features, const Tensor& weight,
                 const std::optional<Tensor>& target, const Tensor& cam, const Tensor& extent, bool normalize,
                 double eps, bool need_features, bool need_weight, bool need_bias,
                 const Tensor& grad_features, const Tensor& grad_weight, const Tensor& grad_bias) {
  const bool wide = features.scalar_type() == torch::headeronly::ScalarType::Double;
  const auto accumulate = wide ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  const int64_t images = features.size(0), channels = features.size(1), maps = grad_cam.size(1);
  const int64_t pixels = features.size(2) * features.size(3);
  const Tensor grad_raw = torch::stable::new_empty(features, {images, maps, pixels}, accumulate);
  WeightSums sums(grad_weight, need_weight, accumulate);

  const CamBwd p{any_array(grad_cam),
                 any_array(features),
                 any_array(weight),
                 any_array(target),
                 normalize ? cam.const_data_ptr() : nullptr,
                 normalize ? extent.const_data_ptr() : nullptr,
                 grad_raw.mutable_data_ptr(),
                 need_features ? grad_features.mutable_data_ptr() : nullptr,
                 sums.data(),
                 images,
                 channels,
                 pixels,
                 maps,
                 is_channels_last(features),
                 worth_streaming(features.numel()),
                 eps};
  torch::stable::parallel_for(0, images * maps, grain(4 * pixels),
                              [&](int64_t begin, int64_t end) { kernels().cam_bwd_maps(p, begin, end); });
  if (need_features || need_weight) {
    // Long runs of channels for one map; short ones for many, whose products then stay in cache.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t share = (channels + threads - 1) / threads;
    const int64_t block = std::min((share + 15) / 16 * 16, maps > 8 ? int64_t{64} : channels);
    const int64_t blocks = (channels + block - 1) / block;
    torch::stable::parallel_for(
        0, blocks, grain(images * pixels * block * maps), [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; ++b) {
            kernels().cam_bwd_channels(p, b * block, std::min(channels, (b + 1) * block));
          }
        });
  }
  sums.finish();
  if (need_bias) {
    Tensor out = grad_bias;
    torch::stable::zero_(out);
    if (!normalize) sum_bias(p, wide, grad_bias.mutable_data_ptr());
  }
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("cam_fwd", TORCH_BOX(&cam_fwd_cpu));
  m.impl("cam_bwd", TORCH_BOX(&cam_bwd_cpu));
}

}  // namespace camkernels::cpu
