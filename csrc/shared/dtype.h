// Scalars whose type is known at run time only: class indices, classifier weights, small maps.
#pragma once

#include <cstdint>

namespace camkernels {

enum class DType : int { kFloat, kHalf, kBFloat16, kDouble, kInt32, kInt64 };

// A read-only array and its element type; data is null where the tensor was not given.
struct AnyArray {
  const void* data;
  DType dtype;
};

}  // namespace camkernels
