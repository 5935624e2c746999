// Checks, descriptions and threading that the CPU bindings share.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "../common.h"
#include "kernels.h"

namespace camkernels::cpu {

inline int64_t index_at(const AnyArray& array, int64_t i) {
  return array.dtype == DType::kInt32 ? static_cast<const int32_t*>(array.data)[i]
                                      : static_cast<const int64_t*>(array.data)[i];
}

// std::out_of_range becomes an IndexError in Python.
inline void check_target(const char* function, const std::optional<Tensor>& target, int64_t classes) {
  if (!target) return;
  const AnyArray indices = any_array(*target);
  for (int64_t i = 0; i < target->numel(); ++i) {
    const int64_t index = index_at(indices, i);
    if (index < 0 || index >= classes) {
      throw std::out_of_range(std::string(function) + ": target holds class " + std::to_string(index) +
                              "; weight has " + std::to_string(classes) + " classes, so it must be in [0, " +
                              std::to_string(classes) + ")");
    }
  }
}

// The front of every op that starts from class activation maps; `target` has been checked.
CamFwd describe_cam_fwd(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& target,
                        const std::optional<Tensor>& bias, bool normalize, double eps, const Tensor& cam,
                        const Tensor& cam32, const Tensor& extent);
void launch_cam_fwd(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& target,
                    const std::optional<Tensor>& bias, bool normalize, double eps, const Tensor& cam,
                    const Tensor& cam32, const Tensor& extent);

// Whether an output is so large that what is written is out of cache before anything reads it.
inline bool worth_streaming(int64_t elements) {
  constexpr int64_t kCached = int64_t{1} << 20;  // about a core's share of the caches, in elements
  return elements > kCached;
}

inline Branch branch_of(const Tensor& features) {
  Branch branch{};
  branch.features = any_array(features);
  branch.height = features.size(2);
  branch.width = features.size(3);
  branch.channels_last = is_channels_last(features);
  branch.streamed = worth_streaming(features.numel());
  return branch;
}

// The sum of a map: of runs, since a long sum of single numbers would lose digits; in lanes, which need not
// wait for each other.
template <typename Real>
double map_sum(const Real* map, int64_t pixels) {
  constexpr int64_t kLanes = 4, kRun = 32 * kLanes;
  double total = 0;
  for (int64_t first = 0; first < pixels; first += kRun) {
    const int64_t end = std::min(pixels, first + kRun);
    double lanes[kLanes] = {};
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(map[i + lane]);
    }
    for (; i < end; ++i) lanes[0] += static_cast<double>(map[i]);
    total += (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
  return total;
}

// Items of `cost` operations each that make a task worth handing to a thread (about 10 microseconds).
inline int64_t grain(int64_t cost) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost)); }

// Calls run(first channel, last channel) for blocks of all channels, in parallel; `values` numbers of maps,
// of all images, meet each channel.
template <typename Run>
void for_channel_blocks(const Classifier& classifier, int64_t values, Run&& run) {
  // With many classes the sums of a narrower block stay in cache.
  const int64_t block = classifier.classes <= 1024 ? kChannelBlock : kChannelBlock / 2;
  const int64_t blocks = (classifier.channels + block - 1) / block;
  torch::stable::parallel_for(0, blocks, grain(block * values / 8), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      run(b * block, std::min(classifier.channels, (b + 1) * block));
    }
  });
}

// The weight's gradient while it is summed: in the accumulation type, in place where the weight is of it.
class WeightSums {
 public:
  WeightSums(const Tensor& grad_weight, bool needed, torch::headeronly::ScalarType accumulate)
      : grad_weight_(grad_weight), sums_(grad_weight), needed_(needed) {
    if (!needed) return;
    direct_ = grad_weight.scalar_type() == accumulate;
    if (!direct_) {
      sums_ = torch::stable::new_empty(grad_weight, grad_weight.sizes(), accumulate);
    }
    torch::stable::zero_(sums_);
  }

  void* data() const { return needed_ ? sums_.mutable_data_ptr() : nullptr; }
  void finish() {
    if (needed_ && !direct_) torch::stable::copy_(grad_weight_, sums_);
  }

 private:
  Tensor grad_weight_, sums_;
  bool needed_, direct_ = true;
};

}  // namespace camkernels::cpu
