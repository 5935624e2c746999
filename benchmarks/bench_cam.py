"""fused_cam, normalised and raw: ``python -m pytest benchmarks/bench_cam.py --rows all``."""

from collections.abc import Mapping
from typing import Any

import harness
import maps
import measure
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import fused_cam
from camkernels.reference import cam
from camkernels.reference.cam import min_max, raw_maps

VARIANTS = ("normalized", "raw")
TINY = {"id": "tiny", "N": 2, "C": 8, "HW": [2, 2], "L": 4}


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    images, channels, classes = row["N"], row["C"], row["L"]
    features = normal(images, channels, *row["HW"]).relu_()  # as they come out of a backbone
    weight = normal(classes, channels) * channels**-0.5
    target = torch.randint(classes, (images,), generator=generator, device=generator.device)
    maps.set_extrema_apart(features, weight, target)
    return harness.Inputs(
        args=(features.to(dtype).requires_grad_(), weight.requires_grad_(), target),
        options={"normalize": variant == "normalized"},
        differentiable=(0, 1),
        grads=(normal(images, *row["HW"]).to(dtype),),
    )


def eager(features: Tensor, weight: Tensor, target: Tensor, *, normalize: bool) -> Tensor:
    """As a user would write it: the reference without its care for channels that are equal at all pixels."""
    raw = raw_maps(features, weight, target, None)
    return (min_max(raw, eps=1e-8) if normalize else raw).to(features.dtype)


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    map_pixels = row["N"] * row["HW"][0] * row["HW"][1]
    features, cam = map_pixels * row["C"] * dtype.itemsize, map_pixels * dtype.itemsize
    weight_rows = min(row["N"], row["L"]) * row["C"] * 4 + row["N"] * 8  # and the targets
    if direction == "forward":
        return measure.Cost(bytes=features + weight_rows + cam, flops=2 * map_pixels * row["C"])
    saved = map_pixels * 4 if variant == "normalized" else 0  # the float32 map
    return measure.Cost(
        bytes=2 * features + weight_rows + row["L"] * row["C"] * 4 + cam + saved,
        flops=3 * map_pixels * row["C"],  # a product for grad_features, product and sum for grad_weight
    )


OP = harness.Op(
    name="fused_cam",
    variants=lambda row: VARIANTS,
    tiny=lambda variant: TINY,
    reference=cam,
    eager=eager,
    fused=fused_cam,
    make=make,
    cost=cost,
    check=harness.as_close_as_eager("cam", "grad_features", "grad_weight"),
)


def test_cam(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
