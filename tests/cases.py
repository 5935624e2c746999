"""Inputs that kernels get wrong, and the machinery to run an op on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import closeness
import pytest
import torch
from torch import Tensor

import camkernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Every backend that has kernels, with a device that it runs on here; on a CPU Triton is interpreted.
KERNEL_BACKENDS = [("cpu", "cpu"), ("triton", DEVICE), *([("cuda", "cuda")] if GPU else [])]
BACKENDS = [("reference", DEVICE), *KERNEL_BACKENDS]


def without_cuda(backends: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """For ops that have no CUDA C++ kernels."""
    return [(backend, device) for backend, device in backends if backend != "cuda"]


# Triton's interpreter computes in NumPy, which warns of inf - inf and the like.
may_hold_infinities = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

LAYOUTS = ("contiguous", "channels_last", "strided", "offset")
MAPS = ("signed", "ties", "constant", "nan")
SHAPES = ((7, 7), (14, 14), (1, 1), (5, 9), (1, 23), (33, 40))


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # every second column of something wider
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "offset":  # starts 1 element into its storage: no 16-byte alignment
        flat = tensor.new_full((tensor.numel() + 1,), torch.nan)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    return tensor.contiguous()


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    shape: tuple[int, int] = (7, 7)
    maps: str = "signed"
    images: int = 3
    channels: int = 33
    classes: int = 6
    image_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    image_size: tuple[int, int] = (37, 29)
    depth: int = 3
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        height, width = self.shape
        return f"{str(self.dtype)[6:]}-{self.layout}-{height}x{width}-{self.maps}"

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def features(self) -> Tensor:
        draw = self.generator()
        shape = (self.images, self.channels, *self.shape)
        values = torch.randn(shape, generator=draw)
        if self.maps in ("ties", "constant"):
            # Small integers: sums are exact in every order, so ties are ties on every backend.
            values = torch.randint(0, 3, shape, generator=draw).float()
            values *= torch.rand((self.images, 1, *self.shape), generator=draw) < 0.6
        if self.maps == "constant":
            values = values[..., :1, :1].expand(shape).clone()
        if self.maps == "nan":
            values[-1, 0, -1, -1] = torch.nan
        return lay_out(values.to(self.device, self.dtype), self.layout)

    def weight(self) -> Tensor:
        draw = self.generator()
        shape = (self.classes, self.channels)
        values = torch.randn(shape, generator=draw)
        if self.maps in ("ties", "constant"):
            values = torch.randint(1, 4, shape, generator=draw).float()
        return values.to(self.device, self.weight_dtype or self.dtype)

    def bias(self) -> Tensor:
        values = torch.randn(self.classes, generator=self.generator())
        return values.to(self.device, self.weight_dtype or self.dtype)

    def target(self, maps: int | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
        shape = (self.images,) if maps is None else (self.images, maps)
        return torch.randint(0, self.classes, shape, generator=self.generator()).to(self.device, dtype)

    def pictures(self) -> Tensor:
        values = torch.randn((self.images, self.depth, *self.image_size), generator=self.generator())
        return lay_out(values.to(self.device, self.image_dtype or self.dtype), self.layout)


def matrix(backend: str) -> list[Case]:
    """Each dtype with each layout, each shape with each kind of map; on the CPU and a GPU all together."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16, *([torch.float64] if backend == "cpu" else [])]
    if backend == "triton" and not GPU:  # the interpreter is slow
        cases = [Case(dtype=dtype, layout=layout, maps="ties") for dtype in dtypes for layout in LAYOUTS]
        return cases + [
            Case(shape=shape, maps=maps, images=2, channels=9, layout=("contiguous", "channels_last")[i % 2])
            for i, (shape, maps) in enumerate((s, m) for s in SHAPES for m in MAPS)
        ]
    return [
        Case(dtype=dtype, layout=layout, shape=shape, maps=maps)
        for dtype in dtypes
        for layout in LAYOUTS
        for shape in SHAPES
        for maps in MAPS
    ]


def placed_matrix(backends: Sequence[tuple[str, str]] = KERNEL_BACKENDS) -> list[tuple[str, Case]]:
    return [
        (backend, replace(case, device=device)) for backend, device in backends for case in matrix(backend)
    ]


@dataclass
class Outcome:
    values: list[Tensor]
    grads: list[Tensor | None]

    def results(self) -> list[Tensor | None]:
        return [*self.values, *self.grads]


def run(
    backend: str,
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    *args: Any,
    needed: Sequence[bool] | None = None,
    **options: Any,
) -> Outcome:
    """Values, and gradients of ``inputs`` for the same random output gradients on every backend and dtype."""
    needed = needed or [True] * len(inputs)
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]

    def compute() -> Outcome:
        with camkernels.use_backend(backend):
            result = function(*leaves, *args, **options)
            values = list(result) if isinstance(result, tuple) else [result]
            draw = torch.Generator().manual_seed(1)
            grads = [torch.randn(v.shape, generator=draw).to(v.device, v.dtype) for v in values]
            kept = [(v, g) for v, g in zip(values, grads, strict=True) if v.requires_grad]
            found = iter(
                torch.autograd.grad([v for v, _ in kept], wanted, [g for _, g in kept], allow_unused=True)
                if kept
                else [None] * len(wanted)
            )
        return Outcome([v.detach() for v in values], [next(found) if need else None for need in needed])

    outcome = compute()
    if backend == "reference" and all(leaf.dtype == torch.float64 for leaf in leaves):
        closeness.remember(outcome.results(), lambda: compute().results())
    return outcome


def as_plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For PyTorch's own run: as they are, but float64 as float32 (see closeness.py)."""
    return [x.detach().cpu().to(torch.float32 if x.dtype == torch.float64 else x.dtype) for x in tensors]


def as_double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().cpu().double() for x in tensors]


def peak_bytes(function: Callable[[], Any], device: str) -> tuple[int, Any]:
    """The most memory that is held at once beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most, result
