"""The products of the CPU kernels, for every width of vector, also those that this processor lacks."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("vector_bytes", [16, 32, 64])
def test_against_plain_loops(vector_bytes, tmp_path):
    program = tmp_path / "cpu_products"
    wide = vector_bytes > 16 and platform.machine() in ("x86_64", "AMD64")
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    command += ["-mavx2", "-mfma", "-mf16c"] if wide and has_avx2() else []
    command += [f"-DCAMKERNELS_VECTOR_BYTES={vector_bytes}", "-fsanitize=address,undefined"]
    command += [str(ROOT / "tests" / "cpu_products.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def has_avx2():
    from camkernels import _C

    return "avx2" in _C.cpu_capabilities()
