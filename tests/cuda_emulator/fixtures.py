"""The emulator as a fixture, built once for all workers of a test run."""

import fcntl
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from camkernels import _backend

from . import emulation
from .emulation import Emulator


def _shared(factory: pytest.TempPathFactory) -> Path:
    """A folder that all of xdist's workers see, and no other run."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def built(factory: pytest.TempPathFactory, sanitize: bool) -> Path:
    folder = _shared(factory) / ("emulator_sanitized" if sanitize else "emulator")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be building it
        done = folder / "done"
        if not done.exists():
            done.write_text(str(emulation.build(folder, sanitize)))
        return Path(done.read_text())


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler is installed")
    given = os.environ.get(emulation.SANITIZE)
    return Path(given) if given else built(tmp_path_factory, sanitize=False)


@pytest.fixture
def emulator(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """The emulated CUDA kernels, in the place of the Triton backend's launchers."""
    kernels = Emulator.load(library)
    monkeypatch.setitem(sys.modules, "camkernels.triton", kernels)
    monkeypatch.setattr(_backend, "why_not", lambda *_: None)
    assert importlib.import_module("camkernels.triton") is kernels
    return kernels
