// camkernels._C: the CPU kernels register themselves with torch when it is loaded; what it exports to
// Python is information about the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"  // written by setup.py
#include "cpu/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of camkernels: build information and the choice of instruction set.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        for (const auto& [key, value] : camkernels::kBuildInfo) info[key] = value;
        return info;
      },
      "Compiler, torch version built against, and the CUDA architectures, as strings.");
  m.def(
      "kernel_resources",
      [] {
        py::list kernels;
        for (const auto& kernel : camkernels::kKernelResources) {
          py::dict row;
          row["kernel"] = kernel.name;
          row["arch"] = kernel.arch;
          row["registers"] = kernel.registers;
          row["stack"] = kernel.stack;
          row["spill_stores"] = kernel.spill_stores;
          row["spill_loads"] = kernel.spill_loads;
          row["shared"] = kernel.shared;
          kernels.append(row);
        }
        return kernels;
      },
      "Registers, stack, spills and static shared memory in bytes of every CUDA kernel, as ptxas gave them.");
  m.def(
      "cpu_capabilities",
      [] {
        std::vector<std::string> names;
        for (const camkernels::cpu::Kernels* kernels : camkernels::cpu::usable_kernels()) {
          names.emplace_back(kernels->name);
        }
        return names;
      },
      "Instruction sets that this processor runs and the CPU kernels are built for, widest first.");
  m.def("cpu_capability", [] { return camkernels::cpu::kernels().name; }, "The one in use.");
  m.def(
      "use_cpu_capability",
      [](const std::string& name) {
        for (const camkernels::cpu::Kernels* kernels : camkernels::cpu::usable_kernels()) {
          if (name == kernels->name) return camkernels::cpu::use_kernels(kernels);
        }
        throw std::invalid_argument("camkernels: CPU capability '" + name + "' is not usable here");
      },
      py::arg("name"), "Choose the instruction set of the CPU kernels, for the whole process.");
}
