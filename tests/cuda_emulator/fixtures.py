"""The emulator as a fixture, built once for all workers of a test run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import emulation
from .emulation import Emulator


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler is installed")
    given = os.environ.get(emulation.SANITIZE)
    return Path(given) if given else emulation.built(tmp_path_factory.getbasetemp(), sanitize=False)


@pytest.fixture
def emulator(library: Path) -> Iterator[Emulator]:
    """Backend "cuda" serves CPU tensors, and is chosen."""
    with emulation.serving(library) as machine:
        yield machine
