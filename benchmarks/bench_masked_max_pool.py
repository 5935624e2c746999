"""masked_max_pool in both layouts: ``python -m pytest benchmarks/bench_masked_max_pool.py --rows all``."""

from collections.abc import Mapping
from typing import Any

import harness
import maps
import measure
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import masked_max_pool
from camkernels.reference import masked_max_pool as reference_masked_max_pool

TINY = {"id": "tiny", "N": 2, "C": 8, "HW": [2, 2]}


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    images, channels, device = row["N"], row["C"], generator.device
    # Not ReLU'd: in small maps a channel may be 0 everywhere, and which of equal pixels has the gradient is
    # nothing that forms have to agree in.
    features = torch.randn(images, channels, *row["HW"], generator=generator, device=device)
    features = features.abs_().to(dtype=dtype, memory_format=maps.LAYOUTS[variant])
    grad = torch.randn(images, channels, generator=generator, device=device).to(dtype)
    return harness.Inputs(
        args=(features.requires_grad_(), maps.regions(images, *row["HW"], generator)),
        options={},
        differentiable=(0,),
        grads=(grad,),
    )


def eager(features: Tensor, mask: Tensor) -> Tensor:
    """As a user would write it; ``amax`` takes longer, forward and backward."""
    return F.adaptive_max_pool2d(features * mask[:, None], 1).flatten(1)


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    pixels = row["HW"][0] * row["HW"][1]
    features = row["N"] * row["C"] * pixels * dtype.itemsize
    pooled = row["N"] * row["C"] * dtype.itemsize  # or its gradient
    if direction == "forward":
        moved = features + row["N"] * pixels + pooled
        return measure.Cost(bytes=moved, flops=2 * row["N"] * row["C"] * pixels)
    return measure.Cost(bytes=features + row["N"] * pixels + pooled + kept_bytes(row), flops=0)


def kept_bytes(row: Mapping[str, Any]) -> int:
    """The pixel of each maximum."""
    return int(row["N"] * row["C"] * 4)


OP = harness.Op(
    name="masked_max_pool",
    variants=lambda row: tuple(maps.LAYOUTS),
    tiny=lambda variant: TINY,
    reference=reference_masked_max_pool,
    eager=eager,
    fused=masked_max_pool,
    make=make,
    cost=cost,
    check=harness.as_close_as_eager("pooled", "grad_features"),
    kept_bytes=kept_bytes,
)


def test_masked_max_pool(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
