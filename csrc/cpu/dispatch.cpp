// Chooses the instruction set at run time.
#include <atomic>

#include "kernels.h"

namespace camkernels::cpu {

extern const Kernels kPlainKernels;
#ifdef __x86_64__
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    usable.push_back(&kAvx512Kernels);
  }
  if (avx2) usable.push_back(&kAvx2Kernels);
#endif
  usable.push_back(&kPlainKernels);
  return usable;
}

namespace {
std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{usable_kernels().front()};
  return chosen;
}
}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }
void use_kernels(const Kernels* chosen) { current().store(chosen, std::memory_order_relaxed); }

}  // namespace camkernels::cpu
