"""Builds the CUDA bindings for the emulator, and lets backend "cuda" serve CPU tensors with them."""

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from camkernels import _backend, _pass, use_backend

_T = TypeVar("_T")
FOLDER = Path(__file__).parent
CUDA = FOLDER.parent.parent / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent
SANITIZE = "CAMKERNELS_EMULATOR_SANITIZE"
EMULATED = torch.library.Library("camkernels_emulated", "DEF")  # filled by the bindings, for CPU tensors


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def sampled(cases: Iterable[_T], step: int) -> list[_T]:
    """All cases; under the sanitizers, several times slower, a part of them."""
    return list(cases)[:: step if SANITIZE in os.environ else 1]


def build(folder: Path, sanitize: bool) -> Path:
    """The shared library; sanitized, it wants the sanitizer's runtime loaded before Python starts."""
    library = folder / ("emulator_sanitized.so" if sanitize else "emulator.so")
    found = compiler()
    assert found is not None
    # With more optimisation compiling takes longer by more than the tests then take less.
    sanitizers = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    command = [found, *(sanitizers if sanitize else ["-O1"]), "-std=c++20", "-fPIC", "-shared"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-DCAMKERNELS_EMULATOR", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{FOLDER}", "-isystem", str(TORCH / "include")]
    # All in one unit: torch's headers take longer to compile than the kernels. launch.cu asks CUDA's driver.
    for source in sorted(CUDA.glob("*.cu")):
        command += ["-include", str(source)] if source.name != "launch.cu" else []
    command += [str(FOLDER / "driver.cpp"), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def built(folder: Path, sanitize: bool) -> Path:
    """The library of this test run, whose temporary folder is given: of all of xdist's workers together."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / ("emulator_sanitized" if sanitize else "emulator")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be building it
        done = folder / "done"
        if not done.exists():
            done.write_text(str(build(folder, sanitize)))
        return Path(done.read_text())


def sanitizer_runtimes() -> list[str]:
    """What to preload so that a plain Python can load the sanitized library; empty if there is none."""
    found = compiler()
    if found is None:
        return []
    paths = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [found, f"-print-file-name={name}"]
        answer = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if not Path(answer).is_absolute():
            return []
        paths.append(str(Path(answer).resolve()))
    return paths


class Launch(NamedTuple):
    blocks: int
    threads: int
    cluster: int
    shared: int  # bytes
    kernel: str


class Emulator:
    """The machine that the kernels of a loaded library run on."""

    def __init__(self, library: Path) -> None:
        load(library)
        self.set()

    def set(
        self,
        *,
        seed: int = 0,  # of the order of threads
        threads: int = 64,
        cluster: int = 1,  # the most blocks in one; reached where there is enough to share out
        vectors: bool = True,
        shared_limit: int = 227 << 10,  # bytes that a block may have; as on sm_90
    ) -> None:
        """What is not given is as above."""
        torch.ops.camkernels_emulator.set_machine(seed, threads, cluster, vectors, shared_limit)

    def launches(self) -> list[Launch]:
        """Since ``set``."""
        lines = torch.ops.camkernels_emulator.launches().splitlines()
        fields = (line.split(maxsplit=4) for line in lines)
        return [Launch(*map(int, numbers), kernel) for *numbers, kernel in fields]

    def kernels(self) -> list[str]:
        """Those launched since ``set``, in turn: ``cam_fwd`` for ``cam_fwd_kernel``."""
        return [re.findall(r"(\w+)_kernel\b", launch.kernel)[0] for launch in self.launches()]


@cache
def load(library: Path) -> None:
    for schema in _pass.CPP_SCHEMAS.values():
        EMULATED.define(schema)
    torch.ops.load_library(library)


def clear_caches() -> None:
    _pass.clear_caches()
    _backend.clear_caches()


@contextmanager
def serving(library: Path) -> Iterator[Emulator]:
    """Backend "cuda" serves CPU tensors inside, and is chosen; memory that nobody has written holds NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    cpp = _pass.CPP_LIBRARIES["cuda"]
    torch.use_deterministic_algorithms(True)
    _pass.CPP_LIBRARIES["cuda"] = EMULATED.ns
    _backend.emulated.add("cuda")
    clear_caches()
    try:
        with use_backend("cuda"):
            yield Emulator(library)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        _pass.CPP_LIBRARIES["cuda"] = cpp
        _backend.emulated.discard("cuda")
        clear_caches()
