"""crop_and_zoom in both layouts: ``python -m pytest benchmarks/bench_crop_and_zoom.py --rows all``."""

from collections.abc import Mapping
from math import prod
from typing import Any

import harness
import maps
import measure
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import crop_and_zoom
from camkernels.reference import crop_and_zoom as reference_crop_and_zoom

TINY = {"id": "tiny", "N": 2, "D": 3, "image": [4, 4], "size": [2, 2]}


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    """Boxes half as wide and as high as their images, anywhere inside."""

    def normal(height: int, width: int) -> Tensor:
        shape = row["N"], row["D"], height, width
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        return drawn.to(dtype=dtype, memory_format=maps.LAYOUTS[variant])

    corner = 0.5 * torch.rand(row["N"], 2, generator=generator, device=generator.device)
    return harness.Inputs(
        args=(normal(*row["image"]).requires_grad_(), torch.cat([corner, corner + 0.5], 1)),
        options={"size": tuple(row["size"])},
        differentiable=(0,),
        grads=(normal(*row["size"]),),
    )


def eager(images: Tensor, boxes: Tensor, *, size: tuple[int, int]) -> Tensor:
    """As a user would write it: a grid of sampling points, and PyTorch's sampling."""
    wide = torch.promote_types(images.dtype, torch.float32)
    x0, y0, x1, y1 = boxes.unbind(1)
    zero = torch.zeros_like(x0)
    matrix = torch.stack([x1 - x0, zero, x0 + x1 - 1, zero, y1 - y0, y0 + y1 - 1], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, [*images.shape[:2], *size], align_corners=False)
    zoomed = F.grid_sample(images.to(wide), grid, padding_mode="border", align_corners=False)
    return zoomed.to(images.dtype)


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    planes = row["N"] * row["D"]
    images, zoomed = planes * prod(row["image"]) * dtype.itemsize, planes * prod(row["size"]) * dtype.itemsize
    read = images // 4 if direction == "forward" else images  # what lies in the boxes; the whole gradient
    # Two rows and then a column of taps, each a difference and a product with a sum.
    return measure.Cost(bytes=read + zoomed + row["N"] * 16, flops=9 * planes * prod(row["size"]))


OP = harness.Op(
    name="crop_and_zoom",
    variants=lambda row: tuple(maps.LAYOUTS),
    tiny=lambda variant: TINY,
    reference=reference_crop_and_zoom,
    eager=eager,
    fused=crop_and_zoom,
    make=make,
    cost=cost,
    check=harness.as_close_as_eager("zoomed", "grad_images"),
)


def test_crop_and_zoom(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
