// Torch bindings and threading of cam_transform_mse on the CPU.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

// Classes that one task takes: a small batch with many classes is cut up for the threads.
constexpr int64_t kForwardClasses = 512;
constexpr int64_t kSlopeClasses = 64;

Axis axis_of(const int64_t* whole, double fraction) {
  return {whole[0], whole[1], fraction, whole[2], whole[3]};
}

// whole, fractions: see Resampling.flat in camkernels/transforms.py
CamTransformMse describe(const Tensor& features, const Tensor& features_t, const Tensor& weight,
                         const std::optional<Tensor>& matrix, const std::vector<int64_t>& whole,
                         const std::vector<double>& fractions, int64_t comparison) {
  CamTransformMse p{};
  p.maps = branch_of(features);
  p.maps_t = branch_of(features_t);
  p.classifier = {any_array(weight), nullptr, weight.size(0), weight.size(1)};
  p.matrix = any_array(matrix);
  p.matrix_per_image = matrix && matrix->size(0) > 1;
  p.comparison = static_cast<Comparison>(comparison);
  p.images = features.size(0);
  p.geometry.affine = matrix.has_value();
  p.geometry.height = static_cast<int>(p.maps.height);
  p.geometry.width = static_cast<int>(p.maps.width);
  p.geometry.height_t = static_cast<int>(p.maps_t.height);
  p.geometry.width_t = static_cast<int>(p.maps_t.width);
  if (!whole.empty()) {
    p.geometry.transposed = whole[0] != 0;
    p.geometry.rows = axis_of(&whole[1], fractions[0]);
    p.geometry.columns = axis_of(&whole[5], fractions[1]);
  }
  return p;
}

// Calls run(image, first class, last class) for every image of a range, in parallel; tasks have at most
// `most` classes, all about as many.
template <typename Run>
void for_class_blocks(const CamTransformMse& p, int64_t images, int64_t most, Run&& run) {
  const int64_t blocks = (p.classifier.classes + most - 1) / most;
  const int64_t per_task = (p.classifier.classes + blocks - 1) / blocks;
  const int64_t cells = p.maps.cells() + p.maps_t.cells();
  const int64_t common = p.comparison == Comparison::kBilinear ? std::lcm(p.maps.height, p.maps_t.height) *
                                                                     std::lcm(p.maps.width, p.maps_t.width)
                                                               : cells;
  const int64_t cost = (p.classifier.channels * cells + common) * std::min(p.classifier.classes, per_task);
  torch::stable::parallel_for(0, images * blocks, grain(cost), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      // Images go fastest: their weights are then still in cache.
      const int64_t first = task / images * per_task;
      run(task % images, first, std::min(p.classifier.classes, first + per_task));
    }
  });
}

void run_backward(const CamTransformMse& p, int64_t image_begin, int64_t image_end) {
  const int64_t cells = p.maps.cells() + p.maps_t.cells();
  for_channel_blocks(p.classifier, (image_end - image_begin) * p.classifier.classes * cells,
                     [&](int64_t begin, int64_t end) {
                       kernels().cam_transform_mse_bwd(p, image_begin, image_end, begin, end);
                     });
}

}  // namespace

void cam_transform_mse_fwd_cpu(const Tensor& features, const Tensor& features_t, const Tensor& weight,
                               const std::optional<Tensor>& matrix, const std::vector<int64_t>& whole,
                               const std::vector<double>& fractions, int64_t comparison, bool keep,
                               const Tensor& means, const Tensor& kept) {
  CamTransformMse p = describe(features, features_t, weight, matrix, whole, fractions, comparison);
  p.means = means.mutable_data_ptr();
  p.kept = keep ? kept.mutable_data_ptr() : nullptr;
  for_class_blocks(p, p.images, kForwardClasses, [&](int64_t image, int64_t begin, int64_t end) {
    kernels().cam_transform_mse_fwd(p, image, begin, end);
  });
}

void cam_transform_mse_bwd_cpu(const Tensor& grad_means, const Tensor& features, const Tensor& features_t,
                               const Tensor& weight, const std::optional<Tensor>& matrix, const Tensor& kept,
                               const std::vector<int64_t>& whole, const std::vector<double>& fractions,
                               int64_t comparison, bool need_features, bool need_features_t, bool need_weight,
                               const Tensor& grad_features, const Tensor& grad_features_t,
                               const Tensor& grad_weight) {
  const auto accumulate = grad_means.scalar_type();
  CamTransformMse p = describe(features, features_t, weight, matrix, whole, fractions, comparison);
  p.grad_means = grad_means.const_data_ptr();
  p.kept = const_cast<void*>(kept.const_data_ptr());  // backward only reads it
  p.maps.grad = need_features ? grad_features.mutable_data_ptr() : nullptr;
  p.maps_t.grad = need_features_t ? grad_features_t.mutable_data_ptr() : nullptr;
  WeightSums sums(grad_weight, need_weight, accumulate);
  p.classifier.grad_weight = sums.data();

  if (p.comparison == Comparison::kOneGrid) {
    run_backward(p, 0, p.images);
  } else {
    // A few images at a time: what is held of the gradients of their maps is an eighth of the maps, or a
    // small part of the gradients of the features where that is more.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t little =
        std::max(p.images / 8, p.images * p.classifier.channels / (32 * p.classifier.classes));
    const int64_t chunk = std::clamp<int64_t>(little, 1, std::min(p.images, 2 * threads));
    const Tensor slopes = torch::stable::new_empty(
        features, {chunk * p.classifier.classes * (p.maps.cells() + p.maps_t.cells())}, accumulate);
    const int64_t item = grad_means.element_size();
    p.slope = slopes.mutable_data_ptr();
    p.slope_t = static_cast<char*>(p.slope) + chunk * p.classifier.classes * p.maps.cells() * item;
    for (int64_t first = 0; first < p.images; first += chunk) {
      const int64_t count = std::min(chunk, p.images - first);
      for_class_blocks(p, count, kSlopeClasses, [&](int64_t image, int64_t begin, int64_t end) {
        kernels().cam_transform_mse_slopes(p, first, first + image, begin, end);
      });
      run_backward(p, first, first + count);
    }
  }
  sums.finish();
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("cam_transform_mse_fwd", TORCH_BOX(&cam_transform_mse_fwd_cpu));
  m.impl("cam_transform_mse_bwd", TORCH_BOX(&cam_transform_mse_bwd_cpu));
}

}  // namespace camkernels::cpu
