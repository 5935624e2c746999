"""Choosing a backend, being told why not, and the doctor."""

import functools
import importlib
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from calls import CALLS
from cases import GPU, Case

import camkernels
from camkernels import _backend, _pass, focus_area, fused_cam, fused_negative_cam_loss, use_backend

# A call of each function that has no CUDA C++ kernels.
WITHOUT_CUDA = {call.op.function: call for call in CALLS if "cuda" not in call.op.backends}

CPU, CUDA, XPU, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "xpu", "mps"))


def python(code, **environment):
    """A fresh interpreter with another environment; a value of None removes the variable."""
    merged = {**os.environ, **environment}
    merged = {name: value for name, value in merged.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=merged)


def test_unknown_name():
    with pytest.raises(
        ValueError, match="use_backend: name is 'cdua'; allowed are auto, reference, cpu, triton, cuda"
    ):
        use_backend("cdua")


@pytest.mark.skipif(GPU, reason="the message is about a machine without a GPU")
def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve here: "):
        use_backend("cuda")


def test_a_dtype_that_a_backend_cannot_serve_says_why():
    case = Case(dtype=torch.float64)
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"fused_cam: backend 'triton' cannot serve .*float64"),
    ):
        fused_cam(case.features(), case.weight())


def test_auto_takes_the_compiled_kernels_on_the_cpu():
    assert _backend.resolve("fused_cam", "auto", CPU, torch.float32) == "cpu"


def test_auto_falls_back_to_the_reference_elsewhere():
    assert _backend.resolve("fused_cam", "auto", MPS, torch.float32) == "reference"
    assert _backend.resolve("fused_cam", "auto", CUDA, torch.float64) == "reference"


@pytest.mark.parametrize("call", WITHOUT_CUDA.values(), ids=WITHOUT_CUDA)
def test_auto_passes_over_a_backend_without_kernels_for_the_function(monkeypatch, call):
    """As on a machine where every backend serves, and where Triton does not."""
    backends = call.op.backends
    monkeypatch.setattr(_backend, "why_not", lambda *question: None)
    assert _backend.resolve("function", "auto", CUDA, torch.float32) == "cuda"
    assert _backend.resolve("function", "auto", CUDA, torch.float32, backends) == "triton"
    assert _backend.resolve("function", "auto", XPU, torch.float32, backends) == "triton"
    assert _backend.resolve("function", "auto", CPU, torch.float32, backends) == "cpu"
    assert _backend.resolve("function", "triton", CUDA, torch.float32, backends) == "triton"
    monkeypatch.setattr(_backend, "why_not", lambda backend, *rest: None if backend == "cuda" else "no")
    _backend.clear_caches()
    assert _backend.resolve("function", "auto", CUDA, torch.float32, backends) == "reference"


@pytest.mark.parametrize("everything_serves", [False, True])
@pytest.mark.parametrize("call", WITHOUT_CUDA.values(), ids=WITHOUT_CUDA)
def test_a_backend_without_kernels_for_the_function_says_so(monkeypatch, call, everything_serves):
    monkeypatch.setattr(_backend, "_main", "cuda")
    if everything_serves:
        monkeypatch.setattr(_backend, "why_not", lambda *question: None)
    case = Case()
    inputs = call.inputs(case)
    message = f"^{call.name}: backend 'cuda' has no kernels for it; use one of auto, reference, cpu, triton$"
    with pytest.raises(RuntimeError, match=message):
        call.outputs(case, inputs)


def test_the_ops_of_such_a_function_say_so_themselves():
    with pytest.raises(RuntimeError, match=r"focus_area_fwd: backend 'cuda' has no kernels"):
        torch.ops.camkernels.focus_area_fwd(torch.ones(1, 2, 3, 3), None, "cuda")


def test_a_name_that_is_no_string():
    with pytest.raises(TypeError, match="use_backend: name is a NoneType; allowed are auto"):
        use_backend(None)


@pytest.mark.skipif(GPU, reason="the message is about a machine without a GPU")
def test_triton_without_a_device_or_its_interpreter_says_so():
    code = "import camkernels; camkernels.use_backend('triton')"
    result = python(code, TRITON_INTERPRET=None)
    assert "backend 'triton' cannot serve here: no cuda device is visible" in result.stderr


def test_environment_variable():
    code = "import camkernels._backend as b; print(b.setting())"
    assert python(code, CAMKERNELS_BACKEND="").stdout.strip() == "auto"
    assert python(code, CAMKERNELS_BACKEND="reference").stdout.strip() == "reference"
    assert python(code, CAMKERNELS_BACKEND=None).stdout.strip() == "auto"


def test_a_wrong_environment_variable_is_reported_at_the_first_call():
    code = "import torch, camkernels; camkernels.fused_cam(torch.ones(1, 1, 2, 2), torch.ones(1, 1))"
    result = python(code, CAMKERNELS_BACKEND="gpu")
    assert "ValueError: CAMKERNELS_BACKEND is 'gpu'; allowed are auto" in result.stderr


def test_import_does_not_need_extension_triton_or_gpu():
    """With the extension and Triton hidden, everything is still there, through the reference."""
    code = """
import sys
sys.modules["camkernels._C"] = None
sys.modules["triton"] = None
import torch, camkernels
from camkernels import _backend
assert _backend.resolve("fused_cam", "auto", torch.device("cpu"), torch.float32) == "reference"
print(camkernels.fused_cam(torch.rand(1, 2, 3, 3), torch.rand(4, 2)).shape)
try:
    camkernels.use_backend("cpu")
except RuntimeError as error:
    print(error)
"""
    result = python(code, TRITON_INTERPRET=None)
    assert "torch.Size([1, 4, 3, 3])" in result.stdout, result.stderr
    assert "backend 'cpu' cannot serve here: the C++ extension" in result.stdout


def test_import_does_not_load_triton_or_compile():
    code = "import sys, camkernels; print([m for m in sys.modules if m in ('triton', 'camkernels._C')])"
    assert python(code, TRITON_INTERPRET=None).stdout.strip() == "[]"


def test_public_names_are_documented():
    for name in camkernels.__all__:
        if not name.startswith("_"):
            assert getattr(camkernels, name).__doc__


def test_half_built_package_explains_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "camkernels._C", None)
    assert "C++ extension" in _backend.extension_error()


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0;9.0;10.0+PTX", (8, 6), True),
        ("8.0;9.0;10.0+PTX", (9, 0), True),
        ("8.0;9.0;10.0+PTX", (12, 0), True),
        ("8.0;9.0;10.0+PTX", (7, 5), False),
        ("8.0 9.0", (10, 0), False),
        ("8.6", (8, 0), False),
        ("9.0a", (9, 0), True),
    ],
)
def test_which_devices_a_build_runs_on(architectures, capability, runs):
    assert _backend.runs_on(architectures, capability) == runs


@pytest.mark.skipif(GPU, reason="stands in for a GPU with Triton's interpreter")
def test_auto_leaves_to_triton_what_does_not_suit_the_cuda_kernels(monkeypatch):
    """Many maps, and maps too large for shared memory; a small call stays with the CUDA kernels."""
    resolve = _backend.resolve
    monkeypatch.setattr(
        _backend,
        "resolve",
        lambda name, asked, *rest: "cuda" if asked == "auto" else resolve(name, asked, *rest),
    )
    launched = []
    kernel = importlib.import_module("camkernels.triton.cam").cam_fwd
    stand_in = functools.wraps(kernel)(lambda *args: launched.append("triton"))  # with its parameters' names
    monkeypatch.setattr("camkernels.triton.cam.cam_fwd", stand_in)
    _pass.clear_caches()
    weight = torch.zeros(20, 1)
    fused_cam(torch.zeros(1, 1, 2, 2), weight)
    fused_cam(torch.zeros(1, 1, 130, 130), weight, torch.zeros(1, dtype=torch.int64))
    assert launched == ["triton", "triton"]
    fused_cam(torch.zeros(1, 1, 2, 2), weight, torch.zeros(1, dtype=torch.int64))
    assert launched == ["triton", "triton"]
    monkeypatch.setattr(_backend, "why_not", lambda *question: "Triton is not installed")
    fused_cam(torch.zeros(1, 1, 2, 2), weight)
    assert launched == ["triton", "triton"]
    _pass.clear_caches()  # of the stand-in


def test_meta_tensors_give_shapes():
    case = Case()
    arguments = (x.to("meta") for x in (case.features(), case.weight(), case.target(), case.pictures()))
    erased, cam = camkernels.fused_cam_erase(*arguments)
    assert (erased.device.type, erased.shape, cam.shape) == ("meta", (3, 3, 37, 29), (3, 7, 7))
    features, weight = (x.to("meta").requires_grad_() for x in (case.features(), case.weight()))
    target = case.target().to("meta")
    for kind in ("mse", "uniform"):
        loss = fused_negative_cam_loss(features, weight, target, kind=kind)
        grads = torch.autograd.grad(loss, (features, weight))
        assert (loss.device.type, loss.shape) == ("meta", ())
        assert [x.shape for x in grads] == [features.shape, weight.shape]
    mask, coverage = focus_area(features)
    assert (mask.device.type, mask.dtype, mask.shape, coverage.shape) == ("meta", torch.bool, (3, 7, 7), (3,))


def test_an_answer_is_found_once(monkeypatch):
    asked = []
    why_not = _backend.why_not
    monkeypatch.setattr(_backend, "why_not", lambda *question: asked.append(question) or why_not(*question))
    for _ in range(3):
        assert _backend.resolve("fused_cam", "auto", torch.device("cpu"), torch.float32) == "cpu"
    assert asked == [("cpu", CPU, torch.float32)]
    _backend.clear_caches()
    _backend.resolve("fused_cam", "auto", CPU, torch.float32)
    assert len(asked) == 2


def test_a_refusal_is_not_kept(monkeypatch):
    """Its cause may be mended, in a notebook say."""
    monkeypatch.setattr(_backend, "extension_error", lambda: "not built")
    refused = r"^fused_cam: backend 'cpu' cannot serve cpu tensors of torch.float32: not built$"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=refused):
            _backend.resolve("fused_cam", "cpu", CPU, torch.float32)
        with pytest.raises(RuntimeError, match=r"^use_backend: backend 'cpu' cannot serve here: not built$"):
            use_backend("cpu")
    monkeypatch.setattr(_backend, "extension_error", lambda: None)
    assert _backend.resolve("fused_cam", "cpu", CPU, torch.float32) == "cpu"
    use_backend("cpu")


@pytest.mark.skipif(GPU, reason="the message is about a machine without a GPU")
def test_an_emulated_backend_serves_the_cpu(monkeypatch):
    assert _backend.why_not("cuda", "cpu") == "it serves NVIDIA GPUs, not cpu"
    monkeypatch.setattr(_backend, "emulated", {"cuda"})
    assert _backend.why_not("cuda", "cpu") is None
    assert _backend.why_not("cuda", "cpu", torch.float64) == "it computes in float32, not float64"
    assert _backend.why_not("cuda", "cuda") is not None
    assert _backend.resolve("fused_cam", "cuda", CPU, torch.float32) == "cuda"
    assert _backend.resolve("fused_cam", "auto", CPU, torch.float32) == "cpu"


def without_jit():
    module = ModuleType("triton")
    module.__spec__ = ModuleSpec("triton", None)
    return module


@pytest.mark.parametrize(
    "make", [MagicMock, lambda: ModuleType("triton"), without_jit], ids=["mock", "no spec", "no JITFunction"]
)
def test_a_stand_in_for_triton_is_told_apart(monkeypatch, make):
    """Documentation builds put one there."""
    stand_in = make()
    monkeypatch.setitem(sys.modules, "triton", stand_in)
    kind = type(stand_in).__name__
    reason = f"the module triton is not Triton, but a {kind} without JITFunction (a mock?)"
    assert _backend.why_not("triton", "cuda") == _backend.why_not("triton", "cpu") == reason


def test_a_triton_that_does_not_load_says_so(monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise OSError('no libtriton')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert _backend.why_not("triton", "cuda") == "Triton does not load: no libtriton"


HINT = "TRITON_INTERPRET=1, set before triton is imported, runs it on CPU tensors, slowly"


def test_asking_for_triton_on_the_cpu_does_not_load_it():
    """The user may set the variable after reading this; it would be too late then."""
    code = """
import os, sys, camkernels
from camkernels import _backend
print(_backend.why_not("triton", "cpu"), "triton" in sys.modules)
os.environ["TRITON_INTERPRET"] = "1"
print(_backend.why_not("triton", "cpu"))
"""
    refusal, answer = python(code, TRITON_INTERPRET=None).stdout.splitlines()
    assert refusal == f"it serves GPUs, not cpu ({HINT}) False"
    assert answer == "None"


def test_the_interpreter_asked_for_too_late_or_not_in_its_words():
    """After triton was imported, and after our kernels were."""
    code = """
import os, triton
from camkernels import _backend
for value in ("1", None, "1", "2", "0"):
    if value is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = value
    print(_backend.why_not("triton", "cpu"))
"""
    result = python(code, TRITON_INTERPRET=None)
    late = "TRITON_INTERPRET is '1', but was not when triton was imported; "
    assert result.stdout.splitlines() == [
        late + "set it before",  # our kernels are not loaded: they would be of another kind than Triton's own
        f"it serves GPUs, not cpu ({HINT})",
        f"it serves GPUs, not cpu ({late}{HINT})",
        f"it serves GPUs, not cpu (TRITON_INTERPRET is '2', which Triton takes for no; {HINT})",
        f"it serves GPUs, not cpu (TRITON_INTERPRET is '0', which Triton takes for no; {HINT})",
    ], result.stderr


def test_a_value_that_triton_takes_for_yes():
    """A half type, which the kernels treat apart in the interpreter."""
    code = """
import torch, camkernels
features, weight = torch.randn(1, 16, 4, 4).bfloat16(), torch.randn(5, 16).bfloat16()
with camkernels.use_backend("triton"):
    ours = camkernels.fused_cam(features, weight)
print(ours.shape, torch.allclose(ours, camkernels.fused_cam(features, weight), atol=0.02))
from camkernels.triton import front
print(front.INTERPRETED.value)
"""
    result = python(code, TRITON_INTERPRET="true")
    assert result.stdout.splitlines() == ["torch.Size([1, 5, 4, 4]) True", "True"], result.stderr


def test_backends_stand_alone_and_can_be_imported_again():
    """Nothing else of ours is imported, nothing is left behind, and the extension loads twice."""
    code = """
import importlib, sys, types
import torch

def load():
    for name in [name for name in sys.modules if name.split(".")[0] == "camkernels"]:
        del sys.modules[name]
    package = types.ModuleType("camkernels")  # without running __init__.py
    package.__path__ = [PATH]
    sys.modules["camkernels"] = package
    return importlib.import_module("camkernels._backend")

first = load()
print([name for name in sys.modules if name.startswith("camkernels.")])
first.use_backend("reference")
for backend in (load(), importlib.reload(load())):
    print(backend.setting(), backend.extension_error())
    print(backend.resolve("f", "auto", torch.device("cpu"), torch.float32), backend._built_for().__class__)
"""
    path = str(Path(camkernels.__file__).parent)
    result = python(code.replace("PATH", repr(path)), CAMKERNELS_BACKEND=None)
    loaded, *answers = result.stdout.splitlines()
    assert loaded == "['camkernels._backend']", result.stderr
    assert answers == ["auto None", "cpu <class 'str'>"] * 2
