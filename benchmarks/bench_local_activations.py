"""fused_local_activations: ``python -m pytest benchmarks/bench_local_activations.py --rows all``."""

from collections.abc import Mapping
from typing import Any

import harness
import maps
import measure
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import fused_local_activations
from camkernels.reference import local_activations

TINY = {"id": "tiny", "N": 2, "C": 8, "HW": [2, 2], "L": 3, "n": 4}


def variants(row: Mapping[str, Any]) -> tuple[str, ...]:
    # A pass of eager over a large row takes seconds on two cores: one layout is enough there.
    return tuple(maps.LAYOUTS) if row["id"].startswith("smoke") else ("contiguous",)


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    images, channels, outputs = row["N"], row["C"], row["L"] + 1
    features = normal(images, channels, *row["HW"]).relu_()  # as they come out of a backbone
    features = features.to(dtype=dtype, memory_format=maps.LAYOUTS[variant])
    weight = normal(row["n"], outputs, channels) * channels**-0.5
    bias = normal(row["n"], outputs)
    grads = normal(images, outputs, *row["HW"]), normal(images, *row["HW"])
    has_winner = clear(features, weight, bias)
    return harness.Inputs(
        args=(features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()),
        options={},
        differentiable=(0, 1, 2),
        grads=tuple((grad * where).to(dtype) for grad, where in zip(grads, has_winner, strict=True)),
    )


def clear(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Where activations and attention have a winner that no rounding can change, as masks of their shapes.

    Where two classifiers tie but for rounding, float32 and float64 would send the gradient to different ones,
    and both would be right: such places have none.
    """
    volume = torch.einsum("nchw,klc->nklhw", features.float(), weight) + bias[..., None, None]
    width = 2 * maps.BAND * volume.abs().max()  # twice, for the volume itself is rounded

    def has_winner(values: Tensor) -> Tensor:
        """Along dimension 1."""
        if values.shape[1] == 1:
            return torch.ones_like(values[:, 0], dtype=torch.bool)
        first, second = values.topk(2, 1).values.unbind(1)
        return first - second > width

    activations = volume.amax(1)[:, :-1]  # of the classes
    clear_activations = has_winner(volume)
    of_greatest = clear_activations.take_along_dim(activations.argmax(1, keepdim=True), 1)[:, 0]
    return clear_activations, of_greatest & has_winner(activations)


def eager(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As a user would write it: one convolution for all classifiers, then the maxima.

    Half types as with autocast on a GPU; CPUs are much slower at products of half types.
    """
    narrow = features.dtype if features.is_cuda else torch.promote_types(features.dtype, torch.float32)
    kernels = weight.flatten(0, 1)[..., None, None]  # [n * (L + 1), C, 1, 1]
    volume = F.conv2d(features.to(narrow), kernels.to(narrow), bias.flatten().to(narrow))
    activations = volume.unflatten(1, weight.shape[:2]).amax(1).to(features.dtype)  # [N, L + 1, H, W]
    return activations, activations[:, :-1].amax(1)


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    places = row["N"] * row["HW"][0] * row["HW"][1]
    outputs = row["L"] + 1
    features, weight = places * row["C"] * dtype.itemsize, row["n"] * outputs * row["C"] * 4
    bias = row["n"] * outputs * 4
    results = places * (outputs + 1) * dtype.itemsize  # activations and attention, or their gradients
    product = 2 * places * outputs * row["C"]  # of one classifier
    if direction == "forward":
        return measure.Cost(bytes=features + weight + bias + results, flops=row["n"] * product)
    return measure.Cost(
        bytes=2 * (features + weight) + bias + results + kept_bytes(row),
        flops=2 * product,  # of the winners, for the gradient of features and for that of weight
    )


def kept_bytes(row: Mapping[str, Any]) -> int:
    """The classifier that won at each activation, a byte, and the class of each attention."""
    return int(row["N"] * row["HW"][0] * row["HW"][1] * (row["L"] + 1 + 4))


OP = harness.Op(
    name="fused_local_activations",
    variants=variants,
    tiny=lambda variant: TINY,
    reference=local_activations,
    eager=eager,
    fused=fused_local_activations,
    make=make,
    cost=cost,
    check=harness.as_close_as_eager("activations", "attention", "grad_features", "grad_weight", "grad_bias"),
    kept_bytes=kept_bytes,
)


def test_local_activations(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
