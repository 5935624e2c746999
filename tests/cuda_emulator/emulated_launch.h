// What csrc/cuda/launch.h is to a GPU: bindings compiled with it serve CPU tensors, and kernels run in the
// emulator.
#pragma once

#include "cuda_emulator.h"

#define CAMKERNELS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(camkernels_emulated, CPU, m)

namespace camkernels::cuda {

// What a test fixes about the machine (set_machine in driver.cpp).
inline Hardware emulated_hardware{};
inline uint64_t emulated_seed = 0;

class CudaLauncher {
 public:
  explicit CudaLauncher(const Tensor& /* tensor */) {}

  const Hardware& hardware() const { return emulated_hardware; }

  template <typename Call>
  void run(void (*kernel)(Call), const LaunchShape& shape, const Call& call) {
    emulator::Machine::instance().run(kernel, {shape.blocks, shape.threads, shape.cluster, shape.shared},
                                      call, seed_++);
  }

 private:
  uint64_t seed_ = emulated_seed;
};

}  // namespace camkernels::cuda
