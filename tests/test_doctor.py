"""The doctor, and machines with GPUs, as if this were one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import GPU
from test_backend import CUDA, python

import camkernels
from camkernels import __main__, _backend, use_backend


@pytest.fixture
def two_gpus(monkeypatch):
    """As if here were two GPUs, of which the build serves the first. What initialises CUDA is an error, but
    for the capability of a device that a tensor lies on."""

    def initialise(*arguments):
        raise AssertionError("this initialises CUDA")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (7, 5)].__getitem__)
    for name in ("is_available", "_lazy_init", "init", "get_device_properties", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, initialise)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 0)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([folder / "_cuda.so"]))
    monkeypatch.setattr(_backend, "_built_for", lambda: "8.0;9.0")
    monkeypatch.setattr(_backend, "triton_error", lambda: None)
    return SimpleNamespace(initialise=initialise)


def test_a_device_that_the_build_cannot_serve_does_not_take_the_others_with_it(two_gpus):
    newer, older = torch.device("cuda:0"), torch.device("cuda:1")
    reason = "built for 8.0;9.0, which cuda:1 (7.5) cannot run"
    for first, second in ((newer, older), (older, newer)):
        _backend.clear_caches()
        for device in (first, second):
            expected = {newer: "cuda", older: "triton"}[device]
            assert _backend.resolve("fused_cam", "auto", device, torch.float32) == expected
    assert _backend.why_not("cuda", newer) is None
    assert _backend.why_not("cuda", "cuda:1") == reason
    assert _backend.why_not("cuda", "cuda:2") == "there is no device 2"
    assert _backend.resolve("fused_cam", "cuda", newer, torch.float32) == "cuda"
    with pytest.raises(RuntimeError) as refused:
        _backend.resolve("fused_cam", "cuda", older, torch.float32)
    assert str(refused.value) == (
        f"fused_cam: backend 'cuda' cannot serve cuda:1 tensors of torch.float32: {reason}"
    )


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_choosing_a_backend_does_not_initialise_cuda(two_gpus, monkeypatch, backend):
    monkeypatch.setattr(torch.cuda, "get_device_capability", two_gpus.initialise)
    assert _backend.why_not(backend, "cuda") is None
    assert _backend.works_nowhere(backend) is None
    with use_backend(backend):
        assert _backend.setting() == backend
    assert _backend.resolve("fused_cam", backend, CUDA, torch.float32) == backend


def test_doctor():
    result = subprocess.run([sys.executable, "-m", "camkernels", "doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in (
        f"camkernels         {camkernels.__version__}",
        "reference  on cpu    works",
        "cpu        on cpu    works",
    ):
        assert line in result.stdout
    assert "cuda       on cpu    no: it serves NVIDIA GPUs, not cpu" in result.stdout


def test_doctor_fails_where_the_backend_asked_for_cannot_serve():
    command = [sys.executable, "-m", "camkernels", "doctor"]
    wrong = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CAMKERNELS_BACKEND": "foo"}
    )
    assert wrong.returncode != 0
    assert "CAMKERNELS_BACKEND is 'foo'" in wrong.stderr


def test_the_doctor_does_not_initialise_cuda(two_gpus, monkeypatch, capsys):
    """What it says of GPUs comes from a process of its own."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", two_gpus.initialise)
    started = []
    refused = dict.fromkeys(_backend.BACKENDS) | {"cuda": "too old"}
    reports = [{"device": "cuda:1", "name": "H200, sm_90", "reasons": refused, "auto": "triton"}]

    def run(command, **options):
        started.append(command)
        return subprocess.CompletedProcess(
            command, 0, stdout=f"a warning\n{json.dumps(reports)}\n", stderr=""
        )

    monkeypatch.setattr(__main__, "subprocess", SimpleNamespace(run=run))
    __main__.doctor()
    assert len(started) == 1
    said = capsys.readouterr().out.splitlines()
    for line in (
        "device cuda:1      H200, sm_90",
        "triton     on cuda:1 works",
        "cuda       on cuda:1 no: too old",
        "auto on cuda:1: triton",
        "auto on cpu: cpu",
    ):
        assert line in said


def test_the_doctor_says_when_gpus_do_not_answer(two_gpus, monkeypatch, capsys):
    """The process that asks is a real one, which ends with an error."""
    monkeypatch.setattr(__main__, "_ASK_GPUS", "raise SystemExit('no driver')")
    __main__.doctor()
    said = capsys.readouterr().out.splitlines()
    assert "GPUs               cannot be asked: no driver" in said
    assert "auto on cpu: cpu" in said


def test_the_process_that_asks_gpus_finds_this_package(two_gpus, monkeypatch):
    """And not another one that is installed."""
    tell = "import camkernels; print(json.dumps([camkernels.__file__, callable(report_gpus)]))"
    monkeypatch.setattr(__main__, "_ASK_GPUS", __main__._ASK_GPUS.replace("report_gpus()", tell))
    assert __main__._gpus() == [camkernels.__file__, True]


def test_the_report_of_each_gpu(two_gpus, monkeypatch, capsys):
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    __main__.report_gpus()
    newer, older = json.loads(capsys.readouterr().out)
    assert (newer["device"], newer["name"], newer["auto"]) == ("cuda:0", "NVIDIA H200, sm_90", "cuda")
    assert newer["reasons"] == {
        "reference": None,
        "cpu": "it serves CPU tensors, not cuda",
        "triton": None,
        "cuda": None,
    }
    assert (older["device"], older["auto"]) == ("cuda:1", "triton")
    assert older["reasons"]["cuda"] == "built for 8.0;9.0, which cuda:1 (7.5) cannot run"


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_process_that_asked_may_fork():
    code = """
import os, torch, camkernels
from camkernels.__main__ import doctor
camkernels.use_backend("triton")
doctor()
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    print(torch.zeros(1, device="cuda").sum().item())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    result = python(code, TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr
