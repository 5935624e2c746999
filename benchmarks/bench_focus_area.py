"""focus_area in both layouts: ``python -m pytest benchmarks/bench_focus_area.py --rows all``."""

from collections.abc import Mapping
from typing import Any

import harness
import maps
import measure
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import focus_area
from camkernels.reference import focus_area as reference_focus_area

TINY = {"id": "tiny", "N": 2, "C": 8, "HW": [2, 2]}


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    shape = row["N"], row["C"], *row["HW"]
    features = torch.randn(shape, generator=generator, device=generator.device)
    features = features.relu_().to(dtype=dtype, memory_format=maps.LAYOUTS[variant])
    return harness.Inputs(args=(features,), options={}, differentiable=(), grads=())


def eager(features: Tensor) -> tuple[Tensor, Tensor]:
    """As a user would write it: three means and a comparison."""
    wide = torch.promote_types(features.dtype, torch.float32)
    heat = features.mean(1, dtype=wide)  # [N, H, W]
    mask = heat > heat.mean((1, 2), keepdim=True)
    return mask, mask.to(wide).mean((1, 2))


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    pixels = row["N"] * row["HW"][0] * row["HW"][1]
    read = pixels * row["C"] * dtype.itemsize
    return measure.Cost(bytes=read + pixels + row["N"] * 4, flops=pixels * row["C"])


def check(
    inputs: harness.Inputs,
    results: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
) -> None:
    mask, coverage = results
    heat = inputs.args[0].double().mean(1)  # [N, H, W]
    distance = (heat - heat.mean((1, 2), keepdim=True)).abs()
    clear = distance > maps.BAND * heat.amax((1, 2), keepdim=True)
    assert ((mask == truth[0]) | ~clear).all(), "mask: differs where no rounding can decide"
    shares = mask.double().mean((1, 2))
    harness.assert_as_close_as("coverage", coverage, shares.to(coverage.dtype), shares)


OP = harness.Op(
    name="focus_area",
    variants=lambda row: tuple(maps.LAYOUTS),
    tiny=lambda variant: TINY,
    reference=reference_focus_area,
    eager=eager,
    fused=focus_area,
    make=make,
    cost=cost,
    check=check,
    directions=("forward",),
)


def test_focus_area(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
