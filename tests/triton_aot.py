"""Compiles the Triton kernels for GPUs that need not be here, and prints what each needs as JSON.

Runs in a process of its own, without TRITON_INTERPRET: the public functions are called on CPU tensors, and
instead of starting, a kernel's launch is recorded. So what is compiled is what a launcher would start.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default, which it warns about without a GPU

import torch
import triton
from calls import CALLS
from cases import Case
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import camkernels
import camkernels.triton
from camkernels import _backend

CAPABILITIES = (80, 90, 100)
TYPICAL = Case(images=2, channels=256, classes=365, image_size=(224, 224))
AUTOCAST = replace(TYPICAL, dtype=torch.bfloat16, weight_dtype=torch.float32, layout="channels_last")
CASES = (
    replace(TYPICAL, classes=14),
    replace(TYPICAL, shape=(14, 14), layout="channels_last"),
    replace(TYPICAL, shape=(40, 40), classes=80),
    replace(TYPICAL, dtype=torch.float16, shape=(14, 14)),
    replace(TYPICAL, dtype=torch.float16, channels=100, classes=30),  # no whole number of vectors
    replace(AUTOCAST, channels=2048, classes=1000),
)
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")
ALIGNED = [["tt.divisibility", 16]]


def kernels() -> dict[str, JITFunction]:
    """Every kernel of the package, by name."""
    names = [found.name for found in pkgutil.iter_modules(camkernels.triton.__path__)]
    modules = [importlib.import_module(f"camkernels.triton.{name}") for name in names]
    found = {name: value for module in modules for name, value in vars(module).items()}
    return {
        name: value for name, value in found.items() if isinstance(value, JITFunction) and "_kernel" in name
    }


def specialise(value: Any, by_value: bool = True) -> tuple[Any, Any, Any]:
    """Type, constant value and attributes that Triton gives an argument at a launch."""
    if isinstance(value, tuple):
        return tuple(specialise(item, by_value)[0] for item in value), None, None
    if isinstance(value, Tensor):
        return POINTERS[value.dtype], None, ALIGNED if value.data_ptr() % 16 == 0 else None
    if isinstance(value, float):
        return "fp32", None, None
    if value is None or isinstance(value, bool) or (value == 1 and by_value):
        return "constexpr", value, None
    return "i32" if value < 2**31 else "i64", None, ALIGNED if value % 16 == 0 else None


def describe(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    kwargs.pop("grid"), kwargs.pop("warmup")
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given.pop(parameter.name)
        kind, constant, attribute = (
            ("constexpr", value, None)
            if parameter.is_constexpr
            else specialise(value, not parameter.do_not_specialize)
        )
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = constant
        if attribute:
            attributes[(place,)] = attribute
    assert not given, f"{kernel.__name__} has no {list(given)}"
    return kernel.__name__, signature, constants, attributes, options


def record() -> list[tuple[Any, ...]]:
    """What the launchers start for every call, on typical inputs."""
    launches: dict[str, tuple[Any, ...]] = {}

    def run(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        launch = describe(kernel, args, kwargs)
        launches.setdefault(repr(launch), launch)

    JITFunction.run = run
    _backend.why_not = lambda *_: None  # recording needs no GPU
    camkernels.use_backend("triton")

    for case in CASES:
        for call in CALLS:
            inputs = call.inputs(case)
            outputs = [x for x in call.outputs(case, inputs) if x.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    return list(launches.values())


def examine(what: str, cubin: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, what, cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_for(capability: int, launch: tuple[Any, ...]) -> dict[str, Any]:
    name, signature, constants, attributes, options = launch
    source = ASTSource(kernels()[name], signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = examine("--dump-resource-usage", cubin.name)
        (registers,), (stack,) = (re.findall(rf"\b{key}:(\d+)", usage) for key in ("REG", "STACK"))
        # Disassembling takes longer than compiling; without a stack there is nowhere to spill to.
        sass = examine("--dump-sass", cubin.name) if int(stack) else ""
        assert "EXIT" in sass or not int(stack), "no machine code in the dump"
    ptx = compiled.asm["ptx"]
    return {
        "kernel": name,
        "capability": capability,
        "case": {k: v for k, v in signature.items() if v != "constexpr"} | constants,
        "registers": int(registers),
        # Counted in the machine code: a stack frame may be there that nothing goes to.
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "float_operations": sorted(set(re.findall(r"\b(?:add|sub|mul|fma|div)\.[\w.]*f32", ptx))),
        "shared_bytes": compiled.metadata.shared,
        "widest_load": max(map(int, re.findall(r"ld\.global[\w.:]*\.v(\d)", ptx)), default=1),
    }


def jobs_of(launches: list[tuple[Any, ...]]) -> list[tuple[int, tuple[Any, ...]]]:
    """All launches for sm_90, and of each kernel every eighth for the others."""
    jobs = []
    seen: Counter[str] = Counter()
    for launch in launches:
        name = launch[0]
        sampled = seen[name] % 8 == 0
        seen[name] += 1
        jobs += [(capability, launch) for capability in CAPABILITIES if sampled or capability == 90]
    return jobs


def main() -> None:
    jobs = jobs_of(record())
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        compiled = list(pool.map(compile_for, *zip(*jobs, strict=True), chunksize=4))
    print(json.dumps({"kernels": sorted(kernels()), "compiled": compiled}))


if __name__ == "__main__":
    main()
