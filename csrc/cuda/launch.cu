// What a launch needs to know about its device.
#include <memory>
#include <mutex>
#include <vector>

#include "launch.h"

namespace camkernels::cuda {
namespace {

// Never launched: the driver tells of it which of the architectures built for serves the device.
__global__ void architecture_probe_kernel() {}

// Kernels compiled for less than sm_90 know no clusters, also where the driver brings them to a newer device.
bool compiled_for_clusters() {
  cudaFuncAttributes attributes{};
  STD_CUDA_CHECK(
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(architecture_probe_kernel)));
  return attributes.ptxVersion >= 90;
}

Hardware query_hardware(int device) {
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

}  // namespace

const Hardware& hardware_of(int device) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Hardware>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) known.resize(static_cast<size_t>(device) + 1);
  std::unique_ptr<Hardware>& entry = known[static_cast<size_t>(device)];
  if (entry == nullptr) entry = std::make_unique<Hardware>(query_hardware(device));
  return *entry;
}

}  // namespace camkernels::cuda
