// Checks and thread grain that the CPU bindings share.
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

// Items of `cost` operations each that make a task worth handing to a thread (about 10 microseconds).
inline int64_t grain(int64_t cost) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost)); }

}  // namespace camkernels::cpu
