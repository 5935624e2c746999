// Launching a kernel on a tensor's device and the current stream, for the torch bindings.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "../common.h"
#include "plan.h"

namespace camkernels::cuda {

// Never launched: the driver tells of it which of the architectures built for serves the device.
static __global__ void architecture_probe_kernel() {}

// Kernels compiled for less than sm_90 know no clusters, also where the driver brings them to a newer device.
inline bool compiled_for_clusters() {
  cudaFuncAttributes attributes{};
  STD_CUDA_CHECK(
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(architecture_probe_kernel)));
  return attributes.ptxVersion >= 90;
}

// `device` is the current one.
inline Hardware query_hardware(int device) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
    return value;
  };
  Hardware hardware{};
  hardware.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  hardware.max_cluster =
      attribute(cudaDevAttrClusterLaunch) != 0 && compiled_for_clusters() ? kMaxCluster : 1;
  hardware.shared_limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  hardware.threads = kThreads;
  return hardware;
}

// Asked of the driver once per device.
inline const Hardware& hardware_of(int device) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Hardware>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) known.resize(static_cast<size_t>(device) + 1);
  std::unique_ptr<Hardware>& entry = known[static_cast<size_t>(device)];
  if (entry == nullptr) entry = std::make_unique<Hardware>(query_hardware(device));
  return *entry;
}

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
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shape.shared)));
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
