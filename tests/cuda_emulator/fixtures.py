"""The emulator as a fixture, built once for all workers of a test run."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from camkernels import _backend

from . import emulation
from .emulation import Emulator


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler is installed")
    given = os.environ.get(emulation.SANITIZE)
    return Path(given) if given else emulation.built(tmp_path_factory.getbasetemp(), sanitize=False)


@pytest.fixture
def emulator(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """The emulated CUDA kernels, in the place of the Triton backend's launchers."""
    kernels = Emulator.load(library)
    monkeypatch.setitem(sys.modules, "camkernels.triton", kernels)
    monkeypatch.setattr(_backend, "why_not", lambda *_: None)
    assert importlib.import_module("camkernels.triton") is kernels
    return kernels
