// How the torch bindings launch a kernel and register themselves: on a tensor's device and the current
// stream, or in the emulator under CAMKERNELS_EMULATOR.
#pragma once

#ifndef CAMKERNELS_EMULATOR
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

#include <limits>
#include <stdexcept>
#include <string>

#include "../common.h"
#include "plan.h"

namespace camkernels::cuda {

// A size that kernels count in an int, with room for what they add to it before they compare.
inline int dimension_of(const Tensor& tensor, int64_t dimension) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const int64_t size = tensor.size(dimension);
  if (size > kMost) {
    throw std::runtime_error("camkernels: the CUDA kernels take a dimension of up to " +
                             std::to_string(kMost) + ", not " + std::to_string(size));
  }
  return static_cast<int>(size);
}

}  // namespace camkernels::cuda

#ifdef CAMKERNELS_EMULATOR
#include "emulated_launch.h"
#else

#define CAMKERNELS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CUDA, m)

namespace camkernels::cuda {

// `device` is the current one; the driver is asked once per device.
const Hardware& hardware_of(int device);

// Makes the tensor's device current while it lives.
class CudaLauncher {
 public:
  explicit CudaLauncher(const Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_), hardware_(hardware_of(device_)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  const Hardware& hardware() const { return hardware_; }

  template <typename Call>
  void run(void (*kernel)(Call), const LaunchShape& shape, const Call& call) const {
    if (shape.blocks > std::numeric_limits<int32_t>::max()) {
      throw std::runtime_error("camkernels: a launch of " + std::to_string(shape.blocks) +
                               " blocks is more than CUDA allows; split the batch");
    }
    constexpr int64_t kUnasked = 48 << 10;  // shared memory that a block gets without asking
    if (shape.shared > kUnasked) {
      // The device's limit rather than this launch's size: another thread may launch the kernel with more
      // between this call and the launch.
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(hardware_.shared_limit)));
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared);
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, call));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  const Hardware& hardware_;
  cudaStream_t stream_;
};

}  // namespace camkernels::cuda

#endif
