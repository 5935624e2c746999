"""What nvcc and ptxas say of the CUDA kernels, for every architecture they are built for."""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import camkernels
from camkernels import _C

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Kernels that read features or images: memory-bound, so two of their blocks must fit a multiprocessor. That
# leaves a thread 64 registers where a block has 512 threads, 80 where it has 384.
STREAMING = (
    (r"cam_fwd_kernel<\w+, (true|false), 1>", 64),
    (r"cam_bwd_rows_kernel<\w+, (true|false)>", 64),
    (r"cam_erase_fwd_kernel<\w+, (true|false), (true|false)>", 64),
    (r"cam_erase_bwd_soft_kernel<\w+>", 64),
    (r"cam_erase_bwd_hard_kernel", 64),
    (r"cam_seeds_fwd_kernel<\w+, (true|false), true>", 64),
    (r"cam_seeds_bwd_kernel<\w+>", 64),
    (r"cam_transform_mse_fwd_kernel<\w+, true>", 64),
    (r"cam_transform_mse_fwd_kernel<\w+, false>", 80),
    (r"cam_transform_features_kernel<\w+>", 64),
    (r"cam_transform_weight_kernel<\w+, (true|false)>", 80),
    (r"cam_transform_slopes_kernel<\w+>", 80),
)


def load_parser():
    spec = importlib.util.spec_from_file_location("ptxas", ROOT / "tools" / "ptxas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_afresh(nvcc, folder):
    """Resources of all kernels for all architectures; every source must compile."""

    def compile_one(source):
        command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-DUSE_CUDA"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}"]
        command += [f"-I{Path(torch.__file__).parent / 'include'}"]
        command += [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
        command += ["-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return load_parser().parse(result.stdout + result.stderr)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        return [row for rows in pool.map(compile_one, sources) for row in rows]


def nvcc_of():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """As the build of this installation recorded them; where it left CUDA out, of a fresh compilation."""
    recorded = _C.kernel_resources()
    if recorded:
        return recorded
    nvcc = nvcc_of()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    return compile_afresh(nvcc, tmp_path_factory.mktemp("cuda"))


def built_architectures():
    listed = _C.build_info()["cuda_architectures"]
    if not listed:
        return ARCHITECTURES
    return tuple(f"sm_{a.removesuffix('+PTX').replace('.', '')}" for a in re.split("[; ]", listed))


def test_nothing_spills(resources):
    spilling = [row for row in resources if row["spill_stores"] or row["spill_loads"] or row["stack"]]
    assert not spilling


@pytest.mark.parametrize("pattern, registers", STREAMING)
def test_streaming_kernels_fill_half_a_multiprocessor(resources, pattern, registers):
    rows = [row for row in resources if re.search(rf"\b{pattern}\(", row["kernel"])]
    assert {row["arch"] for row in rows} == set(built_architectures())
    assert max(row["registers"] for row in rows) <= registers


def test_shared_memory_is_all_dynamic(resources):
    """In the emulator an access past the end of a static array would go unnoticed."""
    assert {row["shared"] for row in resources} == {0}


def unstable(names):
    """Those of the mangled names that are functions, tables or variables of torch's C++ libraries."""
    return [name for name in names if re.match(r"_Z(T[VIST]|GV)?N[KVRO]*(2at|3c10|5torch|6caffe2)", name)]


@pytest.fixture
def library():
    built = next(Path(camkernels.__file__).parent.glob("_cuda*.so"), None)
    if built is None:
        pytest.skip("camkernels was installed without its CUDA kernels")
    return built


def test_library_loads_beside_any_torch_that_has_cuda(library):
    """It names the library of its symbols, whether or not the torch of the build had that."""
    command = ["readelf", "--dynamic", "--wide", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\) .*\[(.+)\]", listing)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)


def test_library_needs_only_the_stable_abi(library):
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("nm is not installed")
    command = [tool, "-D", "--undefined-only", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not unstable(names)


def test_unstable_names_are_found():
    functions = ["_ZN3c105ErrorC1Ev", "_ZNK2at6Tensor4sizeEl", "_ZN5torch8autograd3runEv"]
    objects = ["_ZTVN3c105ErrorE", "_ZTIN2at6TensorE", "_ZTSN6caffe28TypeMetaE", "_ZN3c1010kSomethingE"]
    stable = ["aoti_torch_new_empty", "_ZNSt6vectorIlE4sizeEv", "cudaLaunchKernelExC", "_ZTVN2my1AE"]
    assert unstable([*functions, *stable, *objects]) == [*functions, *objects]


def test_the_parser_reads_what_ptxas_prints():
    text = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90'
ptxas info    : Function properties for _Z3addPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function 'plain' for 'sm_100'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, 360 bytes cmem[0]
"""
    first, second = load_parser().parse(text)
    assert first["kernel"] in ("add(float*)", "_Z3addPf")
    del first["kernel"]
    assert first == {
        "arch": "sm_90",
        "registers": 42,
        "stack": 16,
        "spill_stores": 8,
        "spill_loads": 4,
        "shared": 1024,
    }
    assert second == {
        "kernel": "plain",
        "arch": "sm_100",
        "registers": 7,
        "stack": 0,
        "spill_stores": 0,
        "spill_loads": 0,
        "shared": 0,
    }
