"""Choosing a backend, being told why not, and the doctor."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from cases import GPU, Case

import camkernels
from camkernels import (
    _backend,
    _library,
    attention_boxes,
    crop_and_zoom,
    focus_area,
    fused_cam,
    fused_local_activations,
    fused_negative_cam_loss,
    local_level_loss,
    masked_max_pool,
    otsu_mask,
    stochastic_consistency,
    use_backend,
)

IMAGES, MASK, CLASS = torch.ones(1, 2, 3, 3), torch.ones(1, 3, 3).bool(), torch.zeros(1, dtype=torch.int64)
# Functions without CUDA C++ kernels, by the modules of their ops.
WITHOUT_CUDA = {
    "focus_area": lambda: focus_area(IMAGES),
    "negative_cam_loss": lambda: fused_negative_cam_loss(IMAGES, torch.ones(4, 2), CLASS),
    "local_activations": lambda: fused_local_activations(IMAGES, torch.ones(1, 3, 2)),
    "local_level_loss": lambda: local_level_loss(IMAGES, MASK, CLASS),
    "attention_boxes": lambda: attention_boxes(MASK),
    "crop_and_zoom": lambda: crop_and_zoom(IMAGES, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 2),
    "otsu_mask": lambda: otsu_mask(IMAGES),
    "masked_max_pool": lambda: masked_max_pool(IMAGES, MASK),
    "stochastic_consistency": lambda: stochastic_consistency(IMAGES[0][None, 0], CLASS),
}


def python(code, **environment):
    """A fresh interpreter with another environment; a value of None removes the variable."""
    merged = {**os.environ, **environment}
    merged = {name: value for name, value in merged.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=merged)


def test_setter_and_context_manager():
    start = _backend.setting()
    use_backend("reference")
    assert _backend.setting() == "reference"
    with use_backend("cpu"):
        assert _backend.setting() == "cpu"
        with use_backend("auto"):
            assert _backend.setting() == "auto"
        assert _backend.setting() == "cpu"
    assert _backend.setting() == "reference"
    use_backend(start)


def test_an_error_inside_restores_too():
    start = _backend.setting()
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert _backend.setting() == start


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
    assert _backend.resolve("fused_cam", "auto", "cpu", torch.float32) == "cpu"


def test_auto_falls_back_to_the_reference_elsewhere():
    assert _backend.resolve("fused_cam", "auto", "mps", torch.float32) == "reference"
    assert _backend.resolve("fused_cam", "auto", "cuda", torch.float64) == "reference"


@pytest.mark.parametrize("op", WITHOUT_CUDA)
def test_auto_passes_over_a_backend_without_kernels_for_the_function(monkeypatch, op):
    """As on a machine where every backend serves, and where Triton does not."""
    backends = importlib.import_module(f"camkernels.ops.{op}").BACKENDS
    monkeypatch.setattr(_backend, "why_not", lambda *question: None)
    assert _backend.resolve("function", "auto", "cuda", torch.float32) == "cuda"
    assert _backend.resolve("function", "auto", "cuda", torch.float32, backends) == "triton"
    assert _backend.resolve("function", "auto", "xpu", torch.float32, backends) == "triton"
    assert _backend.resolve("function", "auto", "cpu", torch.float32, backends) == "cpu"
    assert _backend.resolve("function", "triton", "cuda", torch.float32, backends) == "triton"
    monkeypatch.setattr(_backend, "why_not", lambda backend, *rest: None if backend == "cuda" else "no")
    assert _backend.resolve("function", "auto", "cuda", torch.float32, backends) == "reference"


@pytest.mark.parametrize("everything_serves", [False, True])
@pytest.mark.parametrize("op", WITHOUT_CUDA)
def test_a_backend_without_kernels_for_the_function_says_so(monkeypatch, op, everything_serves):
    monkeypatch.setattr(_backend, "_setting", "cuda")
    if everything_serves:
        monkeypatch.setattr(_backend, "why_not", lambda *question: None)
    function = f"fused_{op}" if op in ("negative_cam_loss", "local_activations") else op
    message = f"^{function}: backend 'cuda' has no kernels for it; use one of auto, reference, cpu, triton$"
    with pytest.raises(RuntimeError, match=message):
        WITHOUT_CUDA[op]()


def test_the_ops_of_such_a_function_say_so_themselves():
    with pytest.raises(RuntimeError, match=r"focus_area_fwd: backend 'cuda' has no kernels"):
        torch.ops.camkernels.focus_area_fwd(torch.ones(1, 2, 3, 3), "cuda")


def test_a_context_manager_entered_twice():
    chosen = use_backend("reference")
    with chosen:
        assert _backend.setting() == "reference"
    assert _backend.setting() == "auto"
    with chosen:
        assert _backend.setting() == "reference"


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
assert _backend.resolve("fused_cam", "auto", "cpu", torch.float32) == "reference"
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


def test_doctor():
    result = subprocess.run([sys.executable, "-m", "camkernels", "doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in (
        f"camkernels         {camkernels.__version__}",
        "reference  on cpu   works",
        "cpu        on cpu   works",
    ):
        assert line in result.stdout
    assert "cuda       on cpu   no: it serves NVIDIA GPUs, not cpu" in result.stdout


def test_public_names_are_documented():
    for name in camkernels.__all__:
        if not name.startswith("_"):
            assert getattr(camkernels, name).__doc__


def test_half_built_package_explains_itself(monkeypatch):
    _backend.extension_error.cache_clear()
    monkeypatch.setitem(sys.modules, "camkernels._C", None)
    try:
        assert "C++ extension" in _backend.extension_error()
    finally:
        _backend.extension_error.cache_clear()


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
    assert _library.runs_on(architectures, capability) == runs


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
    monkeypatch.setattr("camkernels.triton.cam_fwd", lambda *args: launched.append("triton"))
    weight = torch.zeros(20, 1)
    fused_cam(torch.zeros(1, 1, 2, 2), weight)
    fused_cam(torch.zeros(1, 1, 130, 130), weight, torch.zeros(1, dtype=torch.int64))
    assert launched == ["triton", "triton"]
    fused_cam(torch.zeros(1, 1, 2, 2), weight, torch.zeros(1, dtype=torch.int64))
    assert launched == ["triton", "triton"]
    monkeypatch.setattr(_backend, "why_not", lambda *question: "Triton is not installed")
    fused_cam(torch.zeros(1, 1, 2, 2), weight)
    assert launched == ["triton", "triton"]


def test_doctor_fails_where_the_backend_asked_for_cannot_serve():
    command = [sys.executable, "-m", "camkernels", "doctor"]
    wrong = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CAMKERNELS_BACKEND": "foo"}
    )
    assert wrong.returncode != 0
    assert "CAMKERNELS_BACKEND is 'foo'" in wrong.stderr


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
