"""Builds the extension modules with ninja; all metadata is in pyproject.toml.

camkernels/_C      pybind11 module with the CPU kernels, compiled once per instruction set
camkernels/_cuda   a plain library with the CUDA kernels, if nvcc is there; loaded when torch has CUDA

Environment: CAMKERNELS_CUDA=0|1 leaves the CUDA kernels out, or insists on them; TORCH_CUDA_ARCH_LIST
(default 8.0;9.0;10.0+PTX); CAMKERNELS_DEBUG=1 adds device assertions; MAX_JOBS; CXX; CUDA_HOME.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))

TORCH_TARGET = (2, 11)  # the stable ABI promises that what targets 2.11 runs on every later torch
ARCHITECTURES = "8.0;9.0;10.0+PTX"
# name, table, bytes of a vector register, compiler flags
INSTRUCTION_SETS = {
    "plain": ("kPlainKernels", 16, ""),
    "avx2": ("kAvx2Kernels", 32, "-mavx2 -mfma -mf16c"),
    "avx512": (
        "kAvx512Kernels",
        64,
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
    ),
}


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "camkernels: torch is not installed where camkernels is built. Install torch >= 2.11 and use "
            "`pip install --no-build-isolation .`, or let pip fetch it: `pip install .`"
        )
    return Path(spec.origin).parent


def find_nvcc() -> Path | None:
    """nvcc itself, not the link or script that a PATH may hold: its folder tells where headers are."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if found is None or not Path(found).exists():
        return None
    dry = subprocess.run([found, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    return Path(top[1]).resolve() / "bin" / "nvcc" if top else Path(found).resolve()


def wanted_nvcc() -> Path | None:
    choice = os.environ.get("CAMKERNELS_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"camkernels: CAMKERNELS_CUDA is {choice!r}; allowed are 0 and 1")
    if choice == "0":
        print("camkernels: CUDA kernels left out (CAMKERNELS_CUDA=0); CPU, Triton and reference work")
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if choice == "1":
            raise SystemExit("camkernels: CAMKERNELS_CUDA=1, but nvcc is neither under CUDA_HOME nor on PATH")
        print("camkernels: nvcc not found, CUDA kernels left out; CPU, Triton and reference work")
    return nvcc


def gencode_flags(architectures: str) -> list[str]:
    flags = []
    for entry in architectures.replace(" ", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"camkernels: TORCH_CUDA_ARCH_LIST holds {entry!r}; an entry is like 9.0 or 10.0+PTX"
            )
        arch = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


class NinjaBuild(build_ext):
    def run(self) -> None:
        out = Path(self.build_temp).resolve()
        out.mkdir(parents=True, exist_ok=True)
        module = Path(self.get_ext_fullpath("camkernels._C")).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        cuda_library = module.parent / "_cuda.so"
        nvcc = wanted_nvcc()
        write_ninja_file(out, module, cuda_library, nvcc)
        if nvcc is None:
            cuda_library.unlink(missing_ok=True)
        else:
            run_ninja(out, "cuda")
        write_build_info(out, nvcc)
        run_ninja(out, "cpu")

    def get_outputs(self) -> list[str]:
        module = Path(self.get_ext_fullpath("camkernels._C"))
        cuda_library = module.parent / "_cuda.so"
        return [str(module), *([str(cuda_library)] if cuda_library.exists() else [])]


def run_ninja(folder: Path, goal: str) -> None:
    import ninja

    jobs = os.environ.get("MAX_JOBS")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-j", jobs] if jobs else []), goal]
    if subprocess.run(command).returncode:
        raise SystemExit("camkernels: the build failed; the compiler's message is above")


def write_ninja_file(out: Path, module: Path, cuda_library: Path, nvcc: Path | None) -> None:
    import pybind11
    from ninja import ninja_syntax

    torch = torch_folder()
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    includes = f"-I'{out}' -I'{ROOT / 'csrc'}' -isystem '{torch / 'include'}'"
    python = f"-isystem '{sysconfig.get_path('include')}' -isystem '{pybind11.get_include()}'"
    shared = "-dynamiclib -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    instruction_sets = INSTRUCTION_SETS if x86 else {"plain": INSTRUCTION_SETS["plain"]}

    with (out / "build.ninja").open("w") as file:
        ninja = ninja_syntax.Writer(file, width=110)
        ninja.variable("cxx", os.environ.get("CXX", "c++"))
        # no-math-errno and no-trapping-math change no result, but let comparisons and roots vectorise.
        ninja.variable(
            "flags",
            f"-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -fno-math-errno "
            f"-fno-trapping-math {target} {includes}",
        )
        ninja.rule("cxx", "$cxx -MMD -MF $out.d $flags $extra -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"$cxx {shared} $in -L'{torch / 'lib'}' $libraries -o $out")
        objects = []

        def compile_cpp(name: str, source: Path, extra: str = "") -> None:
            objects.append(name)
            ninja.build([name], "cxx", [str(source)], variables={"extra": extra})

        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            if source.name != "kernels.cpp":
                compile_cpp(f"{source.stem}.o", source)
        for name, (table, vector_bytes, isa) in instruction_sets.items():
            extra = (
                f'{isa} -DCAMKERNELS_ISA="\\"{name}\\"" -DCAMKERNELS_TABLE={table} '
                f"-DCAMKERNELS_VECTOR_BYTES={vector_bytes}"
            )
            compile_cpp(f"kernels_{name}.o", ROOT / "csrc/cpu/kernels.cpp", extra)
        compile_cpp("module.o", ROOT / "csrc/module.cpp", python)
        ninja.build([str(module)], "link", objects, variables={"libraries": "-ltorch_cpu"})
        ninja.build(["cpu"], "phony", [str(module)])

        if nvcc is not None:
            home = nvcc.parent.parent
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
            debug = os.environ.get("CAMKERNELS_DEBUG") == "1"
            ninja.variable("nvcc", str(nvcc))
            ninja.variable(
                "nvcc_flags",
                f"-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v "
                f"-lineinfo -DUSE_CUDA {'-DCAMKERNELS_DEBUG ' if debug else ''}{target} "
                f"{includes.replace('-isystem ', '-I')} "
                f"{' '.join(gencode_flags(architectures))}",
            )
            # The log is kept: kernel_resources() reports the registers and spills that ptxas saw.
            ninja.rule(
                "nvcc",
                "$nvcc -MD -MF $out.d $nvcc_flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
                depfile="$out.d",
                deps="gcc",
            )
            sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
            kernels = [f"cuda_{source.stem}.o" for source in sources]
            for kernel, source in zip(kernels, sources, strict=True):
                ninja.build([kernel], "nvcc", [str(source)])
            # A CPU-only torch has no libtorch_cuda.so to link against; an empty library of that name lets one
            # build serve every torch that has CUDA.
            ninja.rule("stub", "$cxx -shared -x c /dev/null -Wl,-soname,$soname -o $out")
            ninja.build(["libtorch_cuda.so"], "stub", variables={"soname": "libtorch_cuda.so"})
            stub = f"-Wl,--push-state,--no-as-needed '{out / 'libtorch_cuda.so'}' -Wl,--pop-state"
            folder = home / "lib64" if (home / "lib64").exists() else home / "lib"
            libraries = f"-ltorch_cpu {stub} -L'{folder}' -lcudart_static -lrt -lpthread -ldl"
            ninja.build(
                [str(cuda_library)],
                "link",
                kernels,
                implicit=["libtorch_cuda.so"],
                variables={"libraries": libraries},
            )
            ninja.build(["cuda"], "phony", [str(cuda_library)])


def write_build_info(out: Path, nvcc: Path | None) -> None:
    """build_info.h, only touched if it changes, so that an unchanged build compiles nothing."""
    import ptxas

    version = (torch_folder() / "version.py").read_text()
    match = re.search(r"__version__ = '([^']+)'", version)
    compiler = subprocess.run(
        [os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True
    ).stdout
    info = {
        "compiler": compiler.splitlines()[0] if compiler else "",
        "torch": match[1] if match else "",
        "torch_target": ".".join(map(str, TORCH_TARGET)),
        "cuda": "",
        "cuda_architectures": "",
    }
    kernels = []
    if nvcc is not None:
        release = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
        found = re.search(r"release ([\d.]+)", release)
        info["cuda"] = found[1] if found else "unknown"
        info["cuda_architectures"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        for log in sorted(out.glob("cuda_*.o.log")):
            kernels += ptxas.parse(log.read_text())

    def quoted(value: object) -> str:
        text = str(value)
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = [
        "// Written by setup.py.",
        "#pragma once",
        "#include <string>",
        "#include <utility>",
        "#include <vector>",
        "namespace camkernels {",
        "struct KernelResources {",
        "  const char* name;",
        "  const char* arch;",
        "  int registers, stack, spill_stores, spill_loads, shared;",
        "};",
        "inline const std::vector<std::pair<const char*, const char*>> kBuildInfo = {",
        *(f"    {{{quoted(key)}, {quoted(value)}}}," for key, value in info.items()),
        "};",
        "inline const std::vector<KernelResources> kKernelResources = {",
        *(
            f"    {{{quoted(k['kernel'])}, {quoted(k['arch'])}, {k['registers']}, {k['stack']}, "
            f"{k['spill_stores']}, {k['spill_loads']}, {k['shared']}}},"
            for k in kernels
        ),
        "};",
        "}  // namespace camkernels",
        "",
    ]
    header = out / "build_info.h"
    text = "\n".join(lines)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


setup(
    ext_modules=[Extension("camkernels._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
