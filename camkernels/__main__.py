"""``python -m camkernels doctor``: versions, devices, and which backends work here or why they do not."""

import argparse
import json
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

import camkernels
from camkernels import _backend

_ASK_GPUS = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from camkernels.__main__ import report_gpus
report_gpus()
"""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _report(device: str, name: str) -> dict[str, Any]:
    """What the doctor says of a device: its name, why each backend does not work there, what auto takes."""
    return {
        "device": device,
        "name": name,
        "reasons": {backend: _backend.why_not(backend, device) for backend in _backend.BACKENDS},
        "auto": _backend.resolve("doctor", "auto", torch.device(device), torch.float32),
    }


def report_gpus() -> None:
    """Print the reports of all GPUs as JSON. This initialises CUDA."""
    reports = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = f"{properties.name}, sm_{properties.major}{properties.minor}"
        reports.append(_report(f"cuda:{index}", name))
    for index in range(torch.xpu.device_count()):
        reports.append(_report(f"xpu:{index}", torch.xpu.get_device_name(index)))
    print(json.dumps(reports))


def _gpus() -> list[dict[str, Any]]:
    """The reports of all GPUs, made in a process of its own: a process in which CUDA is initialised cannot be
    forked, and a GPU that does not answer must not take the other reports with it."""
    if not torch.cuda.device_count() and not torch.xpu.device_count():
        return []
    command = [sys.executable, "-c", _ASK_GPUS, json.dumps(sys.path)]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        error = answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"]
        print(f"{'GPUs':<18} cannot be asked: {error[-1]}")
        return []
    reports: list[dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    return reports


def doctor() -> None:
    rows = [
        ("camkernels", camkernels.__version__),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("triton", _version("triton")),
        ("python", platform.python_version()),
    ]
    if _backend.extension_error() is None:
        from camkernels import _C

        info = _C.build_info()
        rows.append(
            ("built with", f"{info['compiler']}; torch {info['torch']}, for {info['torch_target']} and newer")
        )
        rows.append(
            ("built for CUDA", f"{info['cuda']} ({info['cuda_architectures']})" if info["cuda"] else "no")
        )
        rows.append(("CPU kernels", f"{_C.cpu_capability()}, of {', '.join(_C.cpu_capabilities())}"))
    processor = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    reports = [_report("cpu", processor), *_gpus()]
    rows += [(f"device {report['device']}", report["name"]) for report in reports]
    rows.append(
        ("backend asked for", f"{_backend.setting()} ({_backend.ENVIRONMENT_VARIABLE} or use_backend)")
    )
    rows.append(("scikit-image", f"{_version('scikit-image')} (camkernels.metrics needs it)"))
    for label, value in rows:
        print(f"{label:<18} {value}")

    print()
    for backend in _backend.BACKENDS:
        for report in reports:
            reason = report["reasons"][backend]
            works = "works" if reason is None else f"no: {reason}"
            print(f"{backend:<10} on {report['device']:<6} {works}")
    print()
    for report in reports:
        print(f"auto on {report['device']}: {report['auto']}")
    asked = _backend.setting()
    reason = _backend.works_nowhere(asked) if _backend.check(asked) != "auto" else None
    if reason is not None:
        raise SystemExit(f"backend {asked!r} was asked for and cannot serve here: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m camkernels", description=__doc__)
    parser.add_argument("command", choices=["doctor"], help="doctor: what works on this machine, and why not")
    parser.parse_args()
    try:
        doctor()
    except ValueError as error:  # a wrong name in CAMKERNELS_BACKEND
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
