// Ops that set the emulated machine up and tell what it did, and those that run the kernels of mistakes.h.
#include <cxxabi.h>
#include <dlfcn.h>

#include "../../csrc/cuda/launch.h"
#include "mistakes.h"

namespace camkernels::cuda {
namespace {

void set_machine(int64_t seed, int64_t threads, int64_t cluster, bool vectors, int64_t shared_limit) {
  emulated_seed = static_cast<uint64_t>(seed);
  emulated_hardware = {};
  emulated_hardware.multiprocessors = 1 << 20;  // so that a cluster takes as many blocks as it may
  emulated_hardware.max_cluster = static_cast<int>(cluster);
  emulated_hardware.shared_limit = shared_limit;
  emulated_hardware.threads = static_cast<int>(threads);
  emulated_hardware.smallest_share = 0;
  emulated_hardware.vectors = vectors;
  emulator::Machine& machine = emulator::Machine::instance();
  machine.max_shared = std::min(shared_limit, emulator::kMaxShared);
  machine.launches.clear();
}

// Since set_machine; a line each: blocks, threads, cluster, bytes of shared memory, kernel.
std::string launches() {
  std::string lines;
  for (const auto& [kernel, shape] : emulator::Machine::instance().launches) {
    for (const int64_t number :
         {shape.blocks, int64_t{shape.threads}, int64_t{shape.cluster}, shape.shared}) {
      lines += std::to_string(number) + " ";
    }
    Dl_info symbol{};
    dladdr(kernel, &symbol);
    const std::unique_ptr<char, void (*)(void*)> name(
        abi::__cxa_demangle(symbol.dli_sname, nullptr, nullptr, nullptr), std::free);
    lines += std::string(name.get()) + "\n";
  }
  return lines;
}

template <typename Call>
void run(void (*kernel)(Call), int64_t blocks, int64_t shared, const Call& call) {
  const Hardware& hardware = emulated_hardware;
  const emulator::Shape shape{blocks, hardware.threads, hardware.max_cluster, shared};
  emulator::Machine::instance().run(kernel, shape, call, emulated_seed);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

int64_t blocks_of(const Tensor& values) { return values.numel() / emulated_hardware.threads; }

// values, result: [blocks * threads]
void reverse(const Tensor& values, const Tensor& result, std::string_view mistake, bool fixed) {
  run(emulator::reverse_kernel, blocks_of(values), int64_t{4} * emulated_hardware.threads,
      emulator::Reverse{data<float>(values), data<float>(result), mistake, fixed});
}

// values: [blocks * threads]; sums: [blocks]
void block_sums(const Tensor& values, const Tensor& sums, std::string_view mistake) {
  run(emulator::block_sums_kernel, blocks_of(values), 0,
      emulator::BlockSums{data<int>(values), data<int>(sums), mistake});
}

// values: [blocks * threads]; counts: [bins]
void histogram(const Tensor& values, const Tensor& counts, std::string_view mistake) {
  run(emulator::histogram_kernel, blocks_of(values), 0,
      emulator::Histogram{data<int>(values), data<int>(counts), dimension_of(counts, 0), mistake});
}

// values: [blocks * threads]; counters: those of Tally
void tally(const Tensor& values, const Tensor& counters) {
  run(emulator::tally_kernel, blocks_of(values), 0,
      emulator::Tallying{data<int>(values), data<emulator::Tally>(counters)});
}

void launch(int64_t blocks, int64_t shared) {
  run(emulator::empty_kernel, blocks, shared, emulator::Nothing{});
}

}  // namespace

STABLE_TORCH_LIBRARY(camkernels_emulator, m) {
  m.def("set_machine(int seed, int threads, int cluster, bool vectors, int shared_limit) -> ()");
  m.def("launches() -> str");
  m.def("reverse(Tensor values, Tensor(a!) result, str mistake, bool fixed) -> ()");
  m.def("block_sums(Tensor values, Tensor(a!) sums, str mistake) -> ()");
  m.def("histogram(Tensor values, Tensor(a!) counts, str mistake) -> ()");
  m.def("tally(Tensor values, Tensor(a!) counters) -> ()");
  m.def("launch(int blocks, int shared) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_emulator, CompositeExplicitAutograd, m) {
  m.impl("set_machine", TORCH_BOX(&set_machine));
  m.impl("launches", TORCH_BOX(&launches));
  m.impl("reverse", TORCH_BOX(&reverse));
  m.impl("block_sums", TORCH_BOX(&block_sums));
  m.impl("histogram", TORCH_BOX(&histogram));
  m.impl("tally", TORCH_BOX(&tally));
  m.impl("launch", TORCH_BOX(&launch));
}

}  // namespace camkernels::cuda
