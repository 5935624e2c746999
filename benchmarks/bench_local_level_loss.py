"""local_level_loss: ``python -m pytest benchmarks/bench_local_level_loss.py --rows all``."""

from collections.abc import Mapping
from typing import Any

import harness
import maps
import measure
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import local_level_loss
from camkernels.ops.local_level_loss import TILE
from camkernels.reference import local_level_loss as reference_local_level_loss

VARIANTS = ("loss",)
TINY = {"id": "tiny", "N": 2, "HW": [2, 2], "L": 3}


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    images, classes, device = row["N"], row["L"], generator.device
    activations = torch.randn(images, classes + 1, *row["HW"], generator=generator, device=device)
    mask = maps.regions(images, *row["HW"], generator)
    target = torch.randint(classes, (images,), generator=generator, device=device)
    # Scaled, as a GradScaler does: a mean over all pixels leaves gradients that float16 would lose.
    grad = (torch.rand((), generator=generator, device=device) + 0.5) * mask.numel()
    return harness.Inputs(
        args=(activations.to(dtype).requires_grad_(), mask, target),
        options={},
        differentiable=(0,),
        grads=(grad.to(dtype),),
    )


def eager(activations: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """As a user would write it: a label and a weight for each pixel, and PyTorch's cross entropy."""
    wide = torch.promote_types(activations.dtype, torch.float32)
    label = torch.where(mask, target[:, None, None], activations.shape[1] - 1)  # [N, H, W]
    losses = F.cross_entropy(activations.to(wide), label, reduction="none")
    share = mask.to(wide).mean((1, 2), keepdim=True)
    return (losses * torch.where(mask, 1 - share, share)).mean().to(activations.dtype)


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    pixels = row["N"] * row["HW"][0] * row["HW"][1]
    activations = pixels * (row["L"] + 1) * dtype.itemsize
    read = activations + pixels + row["N"] * 8 + dtype.itemsize  # the loss is as large as its gradient
    written = 0 if direction == "forward" else activations
    # A maximum, a difference, an exponential and a sum for each; in backward also what it is times what.
    operations = pixels * (row["L"] + 1) * (4 if direction == "forward" else 6)
    return measure.Cost(bytes=read + written, flops=operations)


def kept_bytes(row: Mapping[str, Any]) -> int:
    """Nothing is kept; but the losses of each run of pixels, whose sum is the loss, are made one by one."""
    return int(row["N"] * -(-row["HW"][0] * row["HW"][1] // TILE) * 4)


OP = harness.Op(
    name="local_level_loss",
    variants=lambda row: VARIANTS,
    tiny=lambda variant: TINY,
    reference=reference_local_level_loss,
    eager=eager,
    fused=local_level_loss,
    make=make,
    cost=cost,
    check=harness.as_close_as_eager("loss", "grad_activations"),
    kept_bytes=kept_bytes,
)


def test_local_level_loss(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
