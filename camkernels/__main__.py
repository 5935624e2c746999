"""``python -m camkernels doctor``: versions, devices, and which backends work here or why they do not."""

import argparse
import platform
from importlib import metadata

import torch

import camkernels
from camkernels import _backend


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    """Device type and name of everything that torch sees."""
    found = [("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(("cuda", f"{properties.name}, sm_{properties.major}{properties.minor}"))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found += [("xpu", torch.xpu.get_device_name(i)) for i in range(torch.xpu.device_count())]
    return found


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
    for kind, name in _devices():
        rows.append((f"device {kind}", name))
    rows.append(
        ("backend asked for", f"{_backend.setting()} ({_backend.ENVIRONMENT_VARIABLE} or use_backend)")
    )
    rows.append(("scikit-image", f"{_version('scikit-image')} (camkernels.metrics needs it)"))
    for label, value in rows:
        print(f"{label:<18} {value}")

    print()
    kinds = list(dict.fromkeys(kind for kind, _ in _devices()))
    for backend in _backend.BACKENDS:
        for kind in kinds:
            reason = _backend.why_not(backend, kind)
            print(f"{backend:<10} on {kind:<5} {'works' if reason is None else f'no: {reason}'}")
    print()
    for kind in kinds:
        print(f"auto on {kind}: {_backend.resolve('doctor', 'auto', kind, torch.float32)}")
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
