"""Which backend answers a call, and why another one cannot."""

import importlib
import importlib.util
import os
from functools import cache
from types import TracebackType

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "CAMKERNELS_BACKEND"

# Fastest first, per device type. Devices that stand in no row are served by the reference.
_AUTO = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "triton"),
    "xpu": ("triton",),
}


# An unset variable and an empty one mean the same. A wrong name is reported at the first call: an import
# never fails.
_setting = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


@cache
def extension_error() -> str | None:
    """Why ``camkernels._C`` (the C++ kernels for the CPU) is not there, or None if it is."""
    try:
        importlib.import_module("camkernels._C")
    except ImportError as error:
        if importlib.util.find_spec("camkernels._C") is None:
            return "the C++ extension is not built (install with a C++ compiler: pip install .)"
        return f"the C++ extension does not load: {error}"
    return None


@cache
def cuda_library_error() -> str | None:
    """Why the CUDA kernels are not loaded, or None if they are."""
    from camkernels import _library

    return _library.load_cuda_kernels()


@cache
def triton_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module("camkernels.triton")
    except Exception as error:  # a broken Triton must not take the other backends with it
        return f"Triton does not load: {error}"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, that is on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def why_not(backend: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """The reason for which ``backend`` cannot serve tensors of that device and dtype, or None."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return f"it serves CPU tensors, not {device_type}" if device_type != "cpu" else extension_error()
    if dtype == torch.float64:
        return "it computes in float32, not float64"
    if backend == "cuda":
        if device_type != "cuda" or torch.version.hip is not None:
            return f"it serves NVIDIA GPUs, not {device_type}"
        return cuda_library_error()
    if device_type not in ("cuda", "xpu") and not (device_type == "cpu" and interpreting()):
        return f"it serves GPUs, not {device_type} (TRITON_INTERPRET=1 runs it on CPU tensors, slowly)"
    return triton_error()


def check(name: str) -> str:
    allowed = ", ".join(("auto", *BACKENDS))
    if not isinstance(name, str):
        raise TypeError(f"use_backend: name is a {type(name).__name__}; allowed are {allowed}")
    if name != "auto" and name not in BACKENDS:
        source = ENVIRONMENT_VARIABLE if os.environ.get(ENVIRONMENT_VARIABLE) == name else "use_backend: name"
        raise ValueError(f"{source} is {name!r}; allowed are {allowed}")
    return name


def _absent(device_type: str) -> str | None:
    present = {"cuda": torch.cuda.is_available, "xpu": torch.xpu.is_available}
    return (
        None
        if device_type not in present or present[device_type]()
        else f"no {device_type} device is visible"
    )


def works_nowhere(name: str) -> str | None:
    """Why no device of this machine can use the backend, or None if one can."""
    reasons = {device: why_not(name, device) or _absent(device) for device in ("cpu", "cuda", "xpu")}
    return reasons["cpu" if name == "cpu" else "cuda"] if all(reasons.values()) else None


def setting() -> str:
    """The backend asked for: ``"auto"`` or one of ``BACKENDS``."""
    return _setting


def resolve(
    function: str,
    requested: str,
    device_type: str,
    dtype: torch.dtype,
    backends: tuple[str, ...] = BACKENDS,
) -> str:
    """The backend that serves this call of ``function``, which ``backends`` have."""
    if device_type == "meta":
        return "meta"  # shapes only: the op's fake kernel answers
    if requested == "auto":
        for backend in _AUTO.get(device_type, ()):
            if backend in backends and why_not(backend, device_type, dtype) is None:
                return backend
        return "reference"
    if check(requested) not in backends:
        others = ", ".join(("auto", *backends))
        raise RuntimeError(f"{function}: backend {requested!r} has no kernels for it; use one of {others}")
    reason = why_not(requested, device_type, dtype)
    if reason is not None:
        raise RuntimeError(
            f"{function}: backend {requested!r} cannot serve {device_type} tensors of {dtype}: {reason}"
        )
    return requested


# resolve looks for files and libraries, which Dynamo cannot trace; its answer is a constant of the graph.
# This is the mark that torch.compiler.assume_constant_result leaves, without importing all of Dynamo, which
# takes seconds, together with camkernels.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


class use_backend:  # noqa: N801  (reads as a function, as torch.no_grad does)
    """Choose the backend of all later calls; as a context manager, of those inside it.

        camkernels.use_backend("reference")
        with camkernels.use_backend("triton"):
            erased, cam = fused_cam_erase(...)

    A backward pass uses the backend that its forward pass was given. The choice is the process's, not a
    thread's. The environment variable ``CAMKERNELS_BACKEND`` gives its first value.

    Args:
        name: ``"auto"`` (the fastest that serves the device), ``"reference"``, ``"cpu"``, ``"triton"`` or
            ``"cuda"``.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: ``name`` is none of these.
        RuntimeError: that backend works on no device of this machine; the message says why.
    """

    def __init__(self, name: str) -> None:
        global _setting
        reason = works_nowhere(name) if check(name) != "auto" else None
        if reason is not None:
            raise RuntimeError(f"use_backend: backend {name!r} cannot serve here: {reason}")
        self._name = name
        self._previous = _setting
        _setting = name

    def __enter__(self) -> None:
        global _setting
        _setting = self._name  # again, for an object that is entered twice

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _setting
        _setting = self._previous
