// What every torch binding of the kernels needs, on the CPU and on the GPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "shared/dtype.h"

namespace camkernels {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    default:
      STD_TORCH_CHECK(false, "camkernels: a tensor of this dtype has no kernel");
  }
  return DType::kFloat;
}

inline AnyArray any_array(const Tensor& tensor) { return {tensor.const_data_ptr(), dtype_of(tensor)}; }

inline AnyArray any_array(const std::optional<Tensor>& tensor) {
  return tensor ? any_array(*tensor) : AnyArray{nullptr, DType::kFloat};
}

// An output that nobody asked for comes as an empty tensor: null tells the kernel not to write it.
inline void* output_pointer(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr();
}

// Callers hand over dense tensors only, so one stride tells the layout.
inline bool is_channels_last(const Tensor& tensor) { return tensor.size(1) > 1 && tensor.stride(1) == 1; }

}  // namespace camkernels
