// Torch bindings and threading of negative_cam_loss on the CPU, and the choice of negatives.
//
// The choice lives here rather than with the kernels: what the standard library's sort leaves out of line
// must not be compiled for more than the plainest instruction set (see annotations.h).
#include <algorithm>
#include <vector>

#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

constexpr char kName[] = "fused_negative_cam_loss";

// Images at most whose keys are made together, so that the weight is read once for all of them.
constexpr int64_t kKeyImages = 8;
// Bytes of features that stay in cache between the keys and the maps.
constexpr int64_t kCachedBytes = int64_t{8} << 20;
// Slots of one task: a small batch with many negatives is cut up for the threads.
constexpr int64_t kSlots = 512;

// Which classes an image does not show.
struct Targets {
  AnyArray labels;      // [N] or null
  const bool* present;  // [N, L] or null

  bool shows(int64_t image, int64_t label, int64_t classes) const {
    return present == nullptr ? index_at(labels, image) == label : present[image * classes + label];
  }
};

Targets targets_of(const Tensor& target, int64_t classes) {
  if (target.dim() == 2) return {{nullptr, DType::kFloat}, static_cast<const bool*>(target.const_data_ptr())};
  check_target(kName, target, classes);
  return {any_array(target), nullptr};
}

// Fills chosen [slots] and returns how many negatives there are: the classes of largest key, in rising order,
// then -1. Of equal keys the lower class comes first, and NaN is the greatest, as in torch.sort.
template <typename Real>
int64_t choose_negatives(const Real* keys, const Targets& targets, int64_t image, int64_t classes,
                         int64_t slots, std::vector<int32_t>& candidates, int32_t* chosen) {
  candidates.clear();
  for (int64_t l = 0; l < classes; ++l) {
    if (!targets.shows(image, l, classes)) candidates.push_back(static_cast<int32_t>(l));
  }
  const auto before = [keys](int32_t a, int32_t b) {
    const Real left = keys[a], right = keys[b];
    const bool left_nan = left != left, right_nan = right != right;
    if (left_nan != right_nan) return left_nan;
    return left_nan || left == right ? a < b : left > right;
  };
  const int64_t count = std::min<int64_t>(slots, static_cast<int64_t>(candidates.size()));
  if (count < static_cast<int64_t>(candidates.size())) {  // else all of them, in order as they are
    std::nth_element(candidates.begin(), candidates.begin() + count, candidates.end(), before);
    std::sort(candidates.begin(), candidates.begin() + count);
  }
  std::copy_n(candidates.begin(), count, chosen);
  std::fill(chosen + count, chosen + slots, -1);
  return count;
}

NegativeCamLoss describe(const Tensor& features, const Tensor& weight, const Tensor& chosen,
                         const Tensor& counts, bool uniform, double temperature) {
  NegativeCamLoss p{};
  p.branch = branch_of(features);
  p.classifier = {any_array(weight), nullptr, weight.size(0), weight.size(1)};
  p.images = features.size(0);
  p.slots = chosen.size(1);
  p.uniform = uniform;
  p.temperature = temperature;
  p.chosen = static_cast<const int32_t*>(chosen.const_data_ptr());
  p.counts = static_cast<const int32_t*>(counts.const_data_ptr());
  return p;
}

template <typename Real>
void choose_all(const NegativeCamLoss& p, const Targets& targets, int64_t first_image, int64_t last_image,
                int32_t* chosen, int32_t* counts) {
  const int64_t classes = p.classifier.classes;
  const int64_t count = last_image - first_image, threads = torch::stable::get_num_threads();
  const int64_t together = std::min(kKeyImages, (count + threads - 1) / threads);
  const int64_t blocks = (count + together - 1) / together;
  const int64_t made = p.logits.data == nullptr ? p.classifier.channels * (p.branch.cells() + classes) : 0;
  const int64_t cost = together * (made + 8 * classes);
  torch::stable::parallel_for(0, blocks, grain(cost), [&](int64_t begin, int64_t end) {
    std::vector<Real> keys(together * classes);
    std::vector<int32_t> candidates;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = first_image + block * together;
      const int64_t last = std::min(last_image, first + together);
      kernels().negative_keys(p, first, last, keys.data());
      for (int64_t n = first; n < last; ++n) {
        counts[n] =
            static_cast<int32_t>(choose_negatives(keys.data() + (n - first) * classes, targets, n, classes,
                                                  p.slots, candidates, chosen + n * p.slots));
      }
    }
  });
}

template <typename Real>
void sum_bias(const NegativeCamLoss& p, Real* grad_bias) {
  const int64_t pixels = p.branch.cells();
  const double scale = 2 * static_cast<double>(*static_cast<const Real*>(p.grad)) /
                       (static_cast<double>(pixels) * static_cast<double>(p.images));
  std::vector<double> sums(p.classifier.classes);
  for (int64_t n = 0; n < p.images; ++n) {
    for (int64_t slot = n * p.slots; slot < n * p.slots + p.counts[n]; ++slot) {
      const Real* kept = static_cast<const Real*>(p.kept) + slot * pixels;
      sums[p.chosen[slot]] += map_sum(kept, pixels) * scale / p.counts[n];
    }
  }
  for (size_t l = 0; l < sums.size(); ++l) grad_bias[l] = static_cast<Real>(sums[l]);
}

}  // namespace

void negative_cam_loss_fwd_cpu(const Tensor& features, const Tensor& weight, const Tensor& target,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& logits,
                               int64_t, bool uniform, double level, double temperature, bool keep,
                               const Tensor& losses, const Tensor& positive, const Tensor& counts,
                               const Tensor& chosen, const Tensor& kept) {
  NegativeCamLoss p = describe(features, weight, chosen, counts, uniform, temperature);
  const Targets targets = targets_of(target, p.classifier.classes);
  p.bias = any_array(bias);
  p.logits = any_array(logits);
  p.level = level;
  p.losses = losses.mutable_data_ptr();
  p.kept = keep ? kept.mutable_data_ptr() : nullptr;
  p.positive = static_cast<int32_t*>(positive.mutable_data_ptr());
  const auto choose = dtype_of(losses) == DType::kDouble ? choose_all<double> : choose_all<float>;

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t image_bytes = p.classifier.channels * p.branch.cells() * features.element_size();
  const int64_t step = threads * kKeyImages;
  const int64_t chunk = logits ? p.images : std::max(kCachedBytes / image_bytes / step, int64_t{1}) * step;
  const int64_t wanted = p.images < threads ? threads : 1;
  const int64_t blocks = std::max((p.slots + kSlots - 1) / kSlots, std::min(wanted, (p.slots + 15) / 16));
  const int64_t per_task = (p.slots + blocks - 1) / blocks;
  const int64_t cost = p.classifier.channels * p.branch.cells() * per_task;
  for (int64_t first = 0; first < p.images; first += chunk) {
    const int64_t count = std::min(chunk, p.images - first);
    choose(p, targets, first, first + count, static_cast<int32_t*>(chosen.mutable_data_ptr()),
           static_cast<int32_t*>(counts.mutable_data_ptr()));
    torch::stable::parallel_for(0, count * blocks, grain(cost), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slot = task % blocks * per_task;
        kernels().negative_cam_loss_fwd(p, first + task / blocks, std::min(p.slots, slot),
                                        std::min(p.slots, slot + per_task));
      }
    });
  }
}

void negative_cam_loss_bwd_cpu(const Tensor& features, const Tensor& weight, const Tensor& grad,
                               const Tensor& chosen, const Tensor& counts, const Tensor& kept, bool uniform,
                               double temperature, bool need_features, bool need_weight, bool need_bias,
                               const Tensor& grad_features, const Tensor& grad_weight,
                               const Tensor& grad_bias) {
  NegativeCamLoss p = describe(features, weight, chosen, counts, uniform, temperature);
  p.kept = const_cast<void*>(kept.const_data_ptr());  // backward only reads it
  p.grad = grad.const_data_ptr();
  p.branch.grad = need_features ? grad_features.mutable_data_ptr() : nullptr;
  WeightSums sums(grad_weight, need_weight, grad.scalar_type());
  p.classifier.grad_weight = sums.data();
  if (need_features || need_weight) {
    for_channel_blocks(p.classifier, p.images * p.slots * p.branch.cells(),
                       [&](int64_t begin, int64_t end) { kernels().negative_cam_loss_bwd(p, begin, end); });
  }
  sums.finish();
  if (!need_bias) return;
  if (dtype_of(grad) == DType::kDouble) {
    sum_bias(p, static_cast<double*>(grad_bias.mutable_data_ptr()));
  } else {
    sum_bias(p, static_cast<float*>(grad_bias.mutable_data_ptr()));
  }
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("negative_cam_loss_fwd", TORCH_BOX(&negative_cam_loss_fwd_cpu));
  m.impl("negative_cam_loss_bwd", TORCH_BOX(&negative_cam_loss_bwd_cpu));
}

}  // namespace camkernels::cpu
