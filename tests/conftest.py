"""Without a GPU the Triton kernels run in Triton's interpreter, which must be said before it is imported."""

import os
import tempfile
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if asked := os.environ.get("ATEN_CPU_CAPABILITY"):
    # Inductor's disk cache does not tell the instruction sets apart, and code for one fails beside another.
    cache = Path(tempfile.gettempdir()) / f"torchinductor-{asked}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one worker a core; test_properties.py and others set more where it matters

import pytest

import camkernels
from camkernels import _backend


@pytest.fixture(autouse=True)
def restore_backend():
    """No test leaves its choice of backend to the next one, nor answers from what it has replaced."""
    _backend.clear_caches()
    with camkernels.use_backend(_backend.setting()):
        yield
    _backend.clear_caches()
