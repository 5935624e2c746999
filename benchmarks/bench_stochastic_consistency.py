"""stochastic_consistency of all pairs, squared and plain: ``python -m pytest <this file> --rows all``."""

from collections.abc import Mapping
from typing import Any

import harness
import measure
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import stochastic_consistency
from camkernels.reference import stochastic_consistency as reference_stochastic_consistency

VARIANTS = ("squared", "plain")
TINY = {"id": "tiny", "N": 4, "K": 2, "D": 8, "images_per_class": 2}


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    images, device = row["N"], generator.device
    vectors = torch.randn(images, row["K"], row["D"], generator=generator, device=device)
    grad = torch.rand((), generator=generator, device=device) + 0.5
    return harness.Inputs(
        args=(
            vectors.to(dtype).requires_grad_(),
            torch.arange(images, device=device) // row["images_per_class"],
        ),
        options={"squared": variant == "squared"},
        differentiable=(0,),
        grads=(grad.to(dtype),),
    )


def eager(vectors: Tensor, target: Tensor, *, squared: bool) -> Tensor:
    """As a user would write it: all images against all, and those of one class counted once."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    same = torch.triu(target[:, None] == target, 1)
    distances = (wide[:, None] - wide).square().sum(3)  # [N, N, K]
    if not squared:
        # The root has no derivative at 0, where an image meets itself.
        distances = distances.masked_fill(~same[..., None], 1).sqrt()
    return ((distances.mean(2) * same).sum() / same.sum()).to(vectors.dtype)


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    numbers = row["N"] * row["K"] * row["D"]
    read = numbers * dtype.itemsize + row["N"] * 8 + dtype.itemsize  # the loss is as large as its gradient
    written = 0 if direction == "forward" else numbers * dtype.itemsize
    # Squared: the mean of a class, and what each vector is off it; plain: each pair by itself.
    visits = 2 if variant == "squared" else row["images_per_class"] - 1
    return measure.Cost(bytes=read + written, flops=2 * visits * numbers)


def kept_bytes(row: Mapping[str, Any]) -> int:
    """For each image its place among those of its class and where these begin and end; how many pairs."""
    return int(row["N"] * 3 * 8 + 4)


OP = harness.Op(
    name="stochastic_consistency",
    variants=lambda row: VARIANTS,
    tiny=lambda variant: TINY,
    reference=reference_stochastic_consistency,
    eager=eager,
    fused=stochastic_consistency,
    make=make,
    cost=cost,
    check=harness.as_close_as_eager("loss", "grad_vectors"),
    kept_bytes=kept_bytes,
)


def test_stochastic_consistency(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
