"""Compiles the Triton kernels for GPUs that need not be here, and prints what each needs as JSON.

Runs in a process of its own, without TRITON_INTERPRET: the public functions are called on CPU tensors, and
instead of starting, a kernel's launch is recorded. So what is compiled is what a launcher would start.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default, which it warns about without a GPU

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import camkernels
import camkernels.triton
from camkernels import _backend, transforms
from camkernels.triton.front import HALF_TYPES

CAPABILITIES = (80, 90, 100)
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
    modules = [module for name, module in sys.modules.items() if name.startswith("camkernels.triton.")]
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
    """What the launchers start for typical inputs: each dtype, both layouts, each option."""
    launches: dict[str, tuple[Any, ...]] = {}

    def run(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        launch = describe(kernel, args, kwargs)
        launches.setdefault(repr(launch), launch)

    JITFunction.run = run
    _backend.why_not = lambda *_: None  # recording needs no GPU
    camkernels.use_backend("triton")

    def features_of(
        dtype: torch.dtype, layout: torch.memory_format, size: int, channels: int = 256
    ) -> Tensor:
        return torch.empty((2, channels, size, size), dtype=dtype, memory_format=layout, requires_grad=True)

    def backward(*outputs: Tensor) -> None:
        torch.autograd.backward(
            [out for out in outputs if out.requires_grad],
            [torch.empty_like(o) for o in outputs if o.requires_grad],
        )

    layouts = torch.contiguous_format, torch.channels_last
    # Features and weight; the last pair is autocast's.
    dtypes = (
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    )
    target = torch.empty((2, 3), dtype=torch.int64)
    many = torch.empty((2, 20), dtype=torch.int64)
    several, logits = torch.empty((2, 365), dtype=torch.bool), torch.empty((2, 365))
    negatives = (
        (7, 1000, 2048, "mse", target[:, 0], None, 100),
        (7, 365, 256, "uniform", several, logits, 20),
        (40, 365, 256, "uniform", target[:, 0], logits, 364),
        (14, 365, 256, "mse", target[:, 0], None, 20),
    )
    pairs = (
        (transforms.HorizontalFlip(), 7, 7, 14),
        (transforms.HorizontalFlip(), 9, 9, 80),
        (transforms.Rotate90(1), 14, 14, 365),
        (transforms.Translate(-0.2, 0.1), 7, 7, 14),
        (transforms.Affine([[0.9, 0.2, 0.0], [-0.2, 0.9, 0.1]]), 9, 9, 80),
        (transforms.Translate(0.0, 0.2), 40, 40, 80),
        (transforms.Scale(192), 7, 6, 14),
        (transforms.Affine(torch.eye(2, 3).expand(2, 2, 3)), 40, 40, 14),
        (transforms.Scale(192, "bilinear"), 8, 9, 80),
    )
    for (dtype, weight_dtype), layout in itertools.product(dtypes, layouts):
        if dtype == torch.float16 and layout == torch.channels_last:
            continue  # as bfloat16's but for a conversion
        weight = torch.empty((365, 256), dtype=weight_dtype, requires_grad=True)
        bias = torch.empty(365, dtype=weight_dtype, requires_grad=True)
        for size in (7, 14, 40):
            features = features_of(dtype, layout, size)
            backward(camkernels.fused_cam(features, weight, target[:, 0]))
            backward(camkernels.fused_cam(features, weight))
        backward(camkernels.fused_cam(features, weight, target, bias=bias, normalize=False))
        backward(camkernels.fused_cam(features, weight, many, bias=bias, normalize=False))
        features = features_of(dtype, layout, 14)
        for sharpness, mode, need_images in (
            (None, "bilinear", True),
            (None, "nearest", False),
            (10.0, "bilinear", False),
            (10.0, "bilinear", True),
            (10.0, "nearest", False),
        ):
            images = torch.empty((2, 3, 224, 224), dtype=dtype, requires_grad=need_images)
            backward(
                *camkernels.fused_cam_erase(
                    features,
                    weight,
                    target[:, 0],
                    images.contiguous(memory_format=layout),
                    sharpness=sharpness,
                    mode=mode,
                    fill=(0.1, 0.2, 0.3) if need_images else 0.0,
                )
            )
        for size, num_seeds, sampling, depth in (
            (7, 20, "random", None),  # vectors of the features themselves: two gradients meet in one
            (28, 100, "random", 2048),
            (40, 3, "first", 768),
        ):
            seeds = camkernels.fused_cam_seeds(
                features_of(dtype, layout, size),
                weight,
                target[:, 0],
                num_seeds,
                seed_features=None if depth is None else features_of(dtype, layout, size, depth),
                sampling=sampling,
            )
            backward(seeds.vectors, seeds.cam)
        for depth, squared in itertools.product((64, 2048), (True, False)):
            vectors = torch.empty((8, 3, depth), dtype=dtype, requires_grad=True)
            backward(
                camkernels.stochastic_consistency(vectors, torch.zeros(8, dtype=torch.int64), squared=squared)
            )
        # One of each layout for half types: what remains differs in the size of a block alone.
        sampled = negatives[layouts.index(layout) :: 2][: 2 if dtype == torch.float32 else 1]
        for size, classes, channels, kind, target_of, scores, num_negatives in sampled:
            features = features_of(dtype, layout, size, channels)
            camkernels.focus_area(features)
            backward(
                camkernels.fused_negative_cam_loss(
                    features,
                    torch.empty((classes, channels), dtype=weight_dtype, requires_grad=True),
                    target_of,
                    bias=bias[:1].expand(classes),
                    logits=scores,
                    num_negatives=num_negatives,
                    kind=kind,
                )
            )
        for transform, size, size_t, classes in pairs[layouts.index(layout) :: 2]:
            backward(
                camkernels.fused_cam_transform_mse(
                    features_of(dtype, layout, size),
                    features_of(dtype, layouts[size % 2], size_t),
                    weight[:classes],
                    transform,
                    reduction="none",
                )
            )
    for dtype, weight_dtype, layout, size, classifiers, classes, with_bias in (
        (torch.float16, torch.float16, layouts[0], 14, 16, 201, True),
        (torch.float32, torch.float32, layouts[0], 14, 16, 201, False),
        (torch.bfloat16, torch.float32, layouts[1], 7, 5, 11, True),
        (torch.float32, torch.float32, layouts[1], 80, 1, 201, True),
    ):
        leaves = [
            torch.empty((classifiers, classes, *depth), dtype=weight_dtype, requires_grad=True)
            for depth in ((256,), ())
        ]
        local = camkernels.fused_local_activations(
            features_of(dtype, layout, size), leaves[0], leaves[1] if with_bias else None
        )
        backward(*(local if with_bias else local[:1]))
    # Weights that load singly, for rows are no whole number of vectors.
    camkernels.fused_local_activations(
        features_of(torch.float16, layouts[1], 7, 100),
        torch.empty((3, 30, 100), dtype=torch.float16),
        torch.empty((3, 30)),
    )
    mask = torch.empty((2, 14, 14), dtype=torch.bool)
    camkernels.attention_boxes(mask)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)
    for dtype, layout in (*itertools.product(dtypes[0][:1], layouts), *zip(HALF_TYPES, layouts, strict=True)):
        backward(camkernels.masked_max_pool(features_of(dtype, layout, 14), mask))
        backward(camkernels.crop_and_zoom(features_of(dtype, layout, 224, 3), whole, 112))
    for dtype, classes, bins in (
        (torch.float32, 201, 256),
        (torch.float32, 1001, 4096),
        (torch.float32, 2000, 2),
        (torch.bfloat16, 201, 256),
    ):
        activations = features_of(dtype, torch.contiguous_format, 14, classes)
        camkernels.otsu_mask(activations[:, 0], bins=bins)
        backward(camkernels.local_level_loss(activations, mask, torch.zeros(2, dtype=torch.int64)))
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
