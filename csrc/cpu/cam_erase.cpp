// Torch bindings and threading of cam_erase on the CPU.
#include <algorithm>
#include <vector>

#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

std::vector<double> fill_of_channels(const std::vector<double>& fill, int64_t depth) {
  return fill.size() == 1 ? std::vector<double>(depth, fill[0]) : fill;
}

CamErase describe(const Tensor& like, const Tensor& map, const std::vector<double>& fill, double threshold,
                  double sharpness, bool nearest) {
  CamErase p{};
  p.image_dtype = dtype_of(like);
  p.cam = map.const_data_ptr();
  p.fill = fill.data();
  p.height = map.size(2);
  p.width = map.size(3);
  p.depth = like.size(1);
  p.image_height = like.size(2);
  p.image_width = like.size(3);
  p.channels_last = is_channels_last(like);
  p.nearest = nearest;
  p.streamed = worth_streaming(like.numel());
  p.threshold = threshold;
  p.sharpness = sharpness;
  return p;
}

}  // namespace

void cam_erase_fwd_cpu(const Tensor& features, const Tensor& weight, const Tensor& target,
                       const Tensor& images, double threshold, double sharpness,
                       const std::vector<double>& fill, bool nearest, double eps, const Tensor& erased,
                       const Tensor& cam, const Tensor& cam32, const Tensor& extent) {
  check_target("fused_cam_erase", target, weight.size(0));
  launch_cam_fwd(features, weight, target, std::nullopt, true, eps, cam, cam32, extent);
  const std::vector<double> colours = fill_of_channels(fill, images.size(1));
  const Tensor& map = cam32.numel() == 0 ? cam : cam32;
  CamErase p = describe(images, map, colours, threshold, sharpness, nearest);
  p.images = any_array(images);
  p.erased = erased.mutable_data_ptr();
  const DType accumulate = dtype_of(map);
  // A small batch is cut into bands of rows so that every thread has some.
  const int64_t count = images.size(0), threads = torch::stable::get_num_threads();
  const int64_t bands = std::min(p.image_height, std::max<int64_t>(1, (threads + count - 1) / count));
  const int64_t pixels = p.depth * p.image_height * p.image_width;
  torch::stable::parallel_for(0, count * bands, grain(pixels / bands), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t band = item % bands;
      kernels().cam_erase_fwd(p, accumulate, item / bands, band * p.image_height / bands,
                              (band + 1) * p.image_height / bands);
    }
  });
}

void cam_erase_bwd_cpu(const Tensor& grad_erased, const std::optional<Tensor>& grad_cam,
                       const std::optional<Tensor>& images, const Tensor& cam, double threshold,
                       double sharpness, const std::vector<double>& fill, bool nearest, bool need_images,
                       bool need_map, const Tensor& grad_images, const Tensor& grad_map) {
  const std::vector<double> colours = fill_of_channels(fill, grad_erased.size(1));
  CamErase p = describe(grad_erased, cam, colours, threshold, sharpness, nearest);
  p.images = any_array(images);
  p.grad_erased = grad_erased.const_data_ptr();
  p.grad_cam = any_array(grad_cam);
  p.erased = need_images ? grad_images.mutable_data_ptr() : nullptr;
  p.grad_map = need_map ? grad_map.mutable_data_ptr() : nullptr;
  const DType accumulate = dtype_of(cam);
  const int64_t pixels = p.depth * p.image_height * p.image_width;
  torch::stable::parallel_for(0, grad_erased.size(0), grain(pixels), [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) kernels().cam_erase_bwd(p, accumulate, image);
  });
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("cam_erase_fwd", TORCH_BOX(&cam_erase_fwd_cpu));
  m.impl("cam_erase_bwd", TORCH_BOX(&cam_erase_bwd_cpu));
}

}  // namespace camkernels::cpu
