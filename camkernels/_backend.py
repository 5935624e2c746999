"""Which backend answers a call, and why another one cannot."""

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "CAMKERNELS_BACKEND"

# Fastest first, per device type. Devices that stand in no row are served by the reference.
_AUTO = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "triton"),
    "xpu": ("triton",),
}

# Backends that tests emulate on the CPU, so that they serve CPU tensors too.
emulated: set[str] = set()

# What resolve has answered, and what was found to work. A refusal is not kept: its cause may be mended.
_answers: dict[tuple[str, torch.device, torch.dtype, tuple[str, ...]], str] = {}
_working: set[tuple[str, torch.device, torch.dtype | None] | str] = set()


_Function = TypeVar("_Function", bound=Callable[..., object])


def _constant(function: _Function) -> _Function:
    """For what Dynamo cannot trace, such as a search for files: the answer becomes a constant of the graph.

    This is the mark that torch.compiler.assume_constant_result leaves, without importing all of Dynamo, which
    takes seconds, together with camkernels.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def clear_caches() -> None:
    """Forget all answers, after a change to what works here (``emulated``, a function replaced by a test)."""
    _answers.clear()
    _working.clear()


def extension_error() -> str | None:
    """Why ``camkernels._C`` (the C++ kernels for the CPU) is not there, or None if it is."""
    try:
        importlib.import_module("camkernels._C")
    except ImportError as error:
        if importlib.util.find_spec("camkernels._C") is None:
            return "the C++ extension is not built (install with a C++ compiler: pip install .)"
        return f"the C++ extension does not load: {error}"
    return None


def _built_for() -> str:
    from camkernels import _C

    return _C.build_info()["cuda_architectures"]


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``TORCH_CUDA_ARCH_LIST=architectures`` runs on a device: machine code within the
    major version, from its minor one on; PTX on everything newer."""
    for entry in architectures.replace(" ", ";").split(";"):
        major, minor = (int(digits) for digits in entry.removesuffix("+PTX").rstrip("a").split("."))
        if (major == capability[0] and minor <= capability[1]) or (
            entry.endswith("+PTX") and (major, minor) <= capability
        ):
            return True
    return False


def load_cuda_kernels() -> str | None:
    """Load the CUDA kernels' own library; the reason if that cannot be, None if it is loaded."""
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    library = next(Path(__file__).parent.glob("_cuda*.so"), None)
    if library is None:
        return "not built (nvcc was not found, or CAMKERNELS_CUDA=0, when camkernels was installed)"
    if _absent("cuda") is not None:
        return "no GPU is visible"
    reason = extension_error()  # it knows what the library was built for
    if reason is not None:
        return reason
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"its library does not load: {error}"
    return None


def _cuda_error(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it serves NVIDIA GPUs, not {device.type}"
    if torch.version.hip is not None:
        return "it serves NVIDIA GPUs, not AMD's"
    reason = load_cuda_kernels()
    # A tensor's device has an index; a question about GPUs in general has none. The capability is asked
    # only of the former: asking initialises CUDA, after which the process can no longer fork.
    if reason is not None or device.index is None:
        return reason
    if device.index >= torch.cuda.device_count():
        return f"there is no device {device.index}"
    capability = torch.cuda.get_device_capability(device.index)
    if runs_on(_built_for(), capability):
        return None
    return f"built for {_built_for()}, which {device} ({capability[0]}.{capability[1]}) cannot run"


def triton_error() -> str | None:
    """Why the Triton kernels are not there, or None if they are, loaded."""
    try:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
    except ValueError:
        pass  # a module was put there by hand, which the next lines tell apart
    try:
        triton = importlib.import_module("triton")
        if not isinstance(getattr(triton, "JITFunction", None), type):
            kind = type(triton).__name__
            return f"the module triton is not Triton, but a {kind} without JITFunction (a mock?)"
        if "camkernels.triton.front" not in sys.modules and triton.knobs.runtime.interpret != _interpreted():
            # Triton's own functions and ours would be of two kinds, and could not call each other.
            asked = os.environ.get("TRITON_INTERPRET")
            return f"TRITON_INTERPRET is {asked!r}, but was not when triton was imported; set it before"
        importlib.import_module("camkernels.triton.front")
    except Exception as error:  # a broken Triton must not take the other backends with it
        return f"Triton does not load: {error}"
    return None


def _interpreted() -> bool:
    """Whether the loaded Triton runs its kernels in its interpreter, that is on CPU tensors."""
    triton = importlib.import_module("triton")
    return not isinstance(triton.language.sum, triton.JITFunction)


def _interpreter_error() -> str | None:
    """Why the Triton kernels do not run on CPU tensors, or None if they do."""
    asked = os.environ.get("TRITON_INTERPRET", "")
    came = ""
    # Where the variable is not set, importing triton to ask it would only settle that it does not interpret.
    if asked != "" or "triton" in sys.modules:
        reason = triton_error()
        if reason is not None:
            return reason
        if _interpreted():
            return None
        if importlib.import_module("triton").knobs.runtime.interpret:
            came = f"TRITON_INTERPRET is {asked!r}, but was not when triton was imported; "
        elif asked != "":
            came = f"TRITON_INTERPRET is {asked!r}, which Triton takes for no; "
    return (
        f"it serves GPUs, not cpu ({came}TRITON_INTERPRET=1, set before triton is imported, runs it on CPU "
        "tensors, slowly)"
    )


def _triton_error(device: torch.device) -> str | None:
    if device.type == "cpu":
        return _interpreter_error()
    return triton_error() if device.type in ("cuda", "xpu") else f"it serves GPUs, not {device.type}"


def _reason(backend: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    if backend == "reference":
        return None
    if backend == "cpu":
        return extension_error() if device.type == "cpu" else f"it serves CPU tensors, not {device.type}"
    if dtype == torch.float64:
        return "it computes in float32, not float64"
    if device.type == "cpu" and backend in emulated:
        return None
    return _cuda_error(device) if backend == "cuda" else _triton_error(device)


def why_not(backend: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str | None:
    """The reason for which ``backend`` cannot serve tensors of that device and dtype, or None.

    A device without an index stands for all of its type; the answer then does not initialise CUDA.
    """
    device = torch.device(device)
    question = (backend, device, dtype)
    if question in _working:
        return None
    reason = _reason(*question)
    if reason is None:
        _working.add(question)
    return reason


def check(name: str) -> str:
    allowed = ", ".join(("auto", *BACKENDS))
    if not isinstance(name, str):
        raise TypeError(f"use_backend: name is a {type(name).__name__}; allowed are {allowed}")
    if name != "auto" and name not in BACKENDS:
        source = ENVIRONMENT_VARIABLE if os.environ.get(ENVIRONMENT_VARIABLE) == name else "use_backend: name"
        raise ValueError(f"{source} is {name!r}; allowed are {allowed}")
    return name


def _absent(device_type: str) -> str | None:
    # Not is_available(): for CUDA that initialises the driver, and no forked process can use it any more.
    # device_count() asks NVML.
    count = {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count}
    return None if device_type not in count or count[device_type]() else f"no {device_type} device is visible"


@_constant
def works_nowhere(name: str) -> str | None:
    """Why no device of this machine can use the backend, or None if one can."""
    if name in _working:
        return None
    reasons: dict[str, str] = {}
    for device in ("cpu", "cuda", "xpu"):
        reason = why_not(name, device) or _absent(device)
        if reason is None:
            _working.add(name)
            return None
        reasons[device] = reason
    said_of = {"cpu": ("cpu",), "triton": ("cuda", "cpu"), "cuda": ("cuda",)}[name]
    return "; ".join(dict.fromkeys(reasons[device] for device in said_of))


@_constant
def resolve(
    function: str,
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    backends: tuple[str, ...] = BACKENDS,
) -> str:
    """The backend that serves this call of ``function``, which ``backends`` have."""
    try:
        return _answers[requested, device, dtype, backends]
    except KeyError:
        answer = _resolve(function, requested, device, dtype, backends)
        _answers[requested, device, dtype, backends] = answer
        return answer


def _resolve(
    function: str, requested: str, device: torch.device, dtype: torch.dtype, backends: tuple[str, ...]
) -> str:
    if device.type == "meta" and requested != "reference":
        return "meta"  # shapes only: the op's fake kernel answers
    if requested == "auto":
        for backend in _AUTO.get(device.type, ()):
            if backend in backends and why_not(backend, device, dtype) is None:
                return backend
        return "reference"
    if check(requested) not in backends:
        others = ", ".join(("auto", *backends))
        raise RuntimeError(f"{function}: backend {requested!r} has no kernels for it; use one of {others}")
    reason = why_not(requested, device, dtype)
    if reason is not None:
        raise RuntimeError(
            f"{function}: backend {requested!r} cannot serve {device} tensors of {dtype}: {reason}"
        )
    return requested


# The main thread's choice. An unset variable and an empty one mean the same. A wrong name is reported at the
# first call: an import never fails.
_main = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


class _Level:
    """One choice of a thread: the first is its own, the others are those of the ``with`` blocks it is in."""

    def __init__(self, name: str | None, block: "use_backend | None" = None) -> None:
        self.name = name  # None: the thread chose nothing
        self.block = block
        self.set_by: use_backend | None = None  # the object that was made last in this level


class _Choices(threading.local):
    """The choices of the thread that looks. Plain attributes, for Dynamo guards on them; it cannot trace a
    ContextVar."""

    def __init__(self) -> None:
        self.is_main = threading.get_ident() == threading.main_thread().ident
        self.levels = [_Level(_main if self.is_main else None)]
        self.name: str | None = None  # of the last level; None in the main thread, whose name is _main

    def apply(self) -> None:
        global _main
        if self.is_main:
            _main = self.levels[-1].name or _main
        else:
            self.name = self.levels[-1].name


_choices = _Choices()


def setting() -> str:
    """The backend asked for in this thread: ``"auto"`` or one of ``BACKENDS``."""
    own = _choices.name
    return _main if own is None else own


class use_backend:  # noqa: N801  (reads as a function, as torch.no_grad does)
    """Choose the backend of all later calls; as a context manager, of those inside it.

        camkernels.use_backend("reference")
        with camkernels.use_backend("triton"):
            erased, cam = fused_cam_erase(...)

    A backward pass uses the backend that its forward pass was given. The environment variable
    ``CAMKERNELS_BACKEND`` gives the first choice.

    Threads: the choice belongs to the thread that makes it, as with ``torch.no_grad``. A thread that chose
    nothing follows the main thread, so that the threads of autograd and of ``DataParallel`` do as it does.

    Blocks: a ``with`` block ends with the choice that held before it, whatever was chosen inside. Before the
    block of ``with use_backend(name):`` is before the object was made; an object made earlier, with another
    choice since, gives back what held when it was entered. One object may be entered many times, nested and
    in several threads.

    asyncio: tasks of one thread share its choice. A task that awaits inside a block lets the others run with
    the block's choice; the one entered last holds. When all blocks have ended, in whatever order, what
    held before them holds again.

    Args:
        name: ``"auto"`` (the fastest that serves the device), ``"reference"``, ``"cpu"``, ``"triton"`` or
            ``"cuda"``.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: ``name`` is none of these.
        RuntimeError: that backend works on no device of this machine; the message says why.
    """

    def __init__(self, name: str) -> None:
        reason = works_nowhere(name) if check(name) != "auto" else None
        if reason is not None:
            raise RuntimeError(f"use_backend: backend {name!r} cannot serve here: {reason}")
        level = _choices.levels[-1]
        self._name = name
        self._before = level.name
        level.name, level.set_by = name, self
        _choices.apply()

    def __enter__(self) -> None:
        level = _choices.levels[-1]
        if level.set_by is self:  # nobody chose since: the block begins before this object was made
            level.name = self._before
        _choices.levels.append(_Level(self._name, self))
        _choices.apply()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # By its object and not as the last one: blocks of generators and of tasks end in any order.
        for level in reversed(_choices.levels):
            if level.block is self:
                _choices.levels.remove(level)
                _choices.apply()
                return
        raise RuntimeError(f"use_backend: this thread is in no block of use_backend({self._name!r})")
