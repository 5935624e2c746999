"""attention_boxes: ``python -m pytest benchmarks/bench_attention_boxes.py --rows all``."""

from collections.abc import Mapping
from typing import Any

import harness
import maps
import measure
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import attention_boxes
from camkernels.reference import attention_boxes as reference_attention_boxes

VARIANTS = ("boxes",)
TINY = {"id": "tiny", "N": 2, "HW": [2, 2]}


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    mask = maps.regions(row["N"], *row["HW"], generator)
    return harness.Inputs(args=(mask,), options={}, differentiable=(), grads=())


def eager(mask: Tensor) -> Tensor:
    """As a user would write it: where the first True is, from either side, of rows and of columns."""

    def ends(any_in: Tensor) -> tuple[Tensor, Tensor]:
        size = any_in.shape[1]
        inside = any_in.byte()
        first, last = inside.argmax(1) / size, 1 - inside.flip(1).argmax(1) / size
        return first, last  # 0 and 1 where there is none

    (x0, x1), (y0, y1) = ends(mask.any(1)), ends(mask.any(2))
    return torch.stack([x0, y0, x1, y1], 1)


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    pixels = row["N"] * row["HW"][0] * row["HW"][1]
    return measure.Cost(bytes=pixels + row["N"] * 16, flops=2 * pixels)


def check(
    inputs: harness.Inputs,
    results: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
) -> None:
    harness.assert_as_close_as("boxes", results[0], eager[0], truth[0].double())


OP = harness.Op(
    name="attention_boxes",
    variants=lambda row: VARIANTS,
    tiny=lambda variant: TINY,
    reference=reference_attention_boxes,
    eager=eager,
    fused=attention_boxes,
    make=make,
    cost=cost,
    check=check,
    directions=("forward",),
)


def test_attention_boxes(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
