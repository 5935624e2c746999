"""fused_cam_erase, hard and soft: ``python -m pytest benchmarks/bench_cam_erase.py --rows all``."""

from collections.abc import Mapping
from typing import Any

import harness
import maps
import measure
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import fused_cam_erase
from camkernels.reference import cam_erase
from camkernels.reference.cam import min_max, raw_maps
from camkernels.reference.cam_erase import erase

TINY = {"id": "tiny", "N": 2, "C": 8, "HW": [2, 2], "L": 4, "image": [8, 8], "threshold": 0.7}
SHARPNESS = 20.0  # of the soft gate


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    images, channels, classes = row["N"], row["C"], row["L"]
    height, width = row["HW"]
    features = normal(images, channels, height, width).relu_()  # as they come out of a backbone
    weight = normal(classes, channels) * channels**-0.5
    target = torch.randint(classes, (images,), generator=generator, device=generator.device)
    maps.set_extrema_apart(features, weight, target)
    pixels = normal(images, 3, *row["image"])
    options = {"threshold": row["threshold"], "sharpness": SHARPNESS if variant == "soft" else None}
    return harness.Inputs(
        args=(
            features.to(dtype).requires_grad_(),
            weight.requires_grad_(),
            target,
            pixels.requires_grad_(),
        ),
        options=options,
        differentiable=(0, 1, 3),
        grads=(normal(*pixels.shape), normal(images, height, width).to(dtype)),
    )


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    map_pixels = row["N"] * row["HW"][0] * row["HW"][1]
    features = map_pixels * row["C"] * dtype.itemsize
    cam = map_pixels * dtype.itemsize
    weight_rows = min(row["N"], row["L"]) * row["C"] * 4 + row["N"] * 8  # and the targets
    images = row["N"] * 3 * row["image"][0] * row["image"][1] * 4
    if direction == "forward":
        return measure.Cost(
            bytes=features + weight_rows + images + images + cam,
            flops=2 * map_pixels * row["C"],
        )
    grad_weight = row["L"] * row["C"] * 4
    saved = map_pixels * 4  # the float32 map
    if variant == "soft":
        saved += images
    return measure.Cost(
        bytes=2 * features + weight_rows + grad_weight + 2 * images + cam + saved,
        flops=3 * map_pixels * row["C"],  # a product for grad_features, product and sum for grad_weight
    )


def check(
    inputs: harness.Inputs,
    results: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
) -> None:
    names = ("erased", "cam", "grad_features", "grad_weight", "grad_images")
    hard = inputs.options["sharpness"] is None
    for name, ours, theirs, true in zip(names, results, eager, truth, strict=True):
        if hard and name in ("erased", "grad_images"):
            continue
        harness.assert_as_close_as(name, ours, theirs, true)
    if hard:
        images, grad_erased = inputs.args[3], inputs.grads[0]
        heat = F.interpolate(truth[1][:, None], images.shape[-2:], mode="bilinear")
        distance = heat - inputs.options["threshold"]  # [N, 1, H0, W0]
        _assert_masked("erased", results[0], images, distance)
        _assert_masked("grad_images", results[4], grad_erased, distance)


def _assert_masked(name: str, ours: Tensor, source: Tensor, distance: Tensor) -> None:
    """The source's own bits where clearly below the threshold, 0 where clearly above, one of them between."""
    kept, erased = ours == source, ours == 0
    assert (kept | (distance > -maps.BAND)).all(), (
        f"{name}: a pixel below the threshold is not the source's own"
    )
    assert (erased | (distance < maps.BAND)).all(), f"{name}: a pixel above the threshold is not erased"
    assert (kept | erased).all(), f"{name}: a pixel near the threshold is neither kept nor erased"


def eager(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    images: Tensor,
    *,
    threshold: float,
    sharpness: float | None,
) -> tuple[Tensor, Tensor]:
    """As a user would write it: the reference without its care for channels that are equal at all pixels."""
    cam = min_max(raw_maps(features, weight, target, None), eps=1e-8)
    return erase(cam, images, threshold=threshold, sharpness=sharpness), cam.to(features.dtype)


OP = harness.Op(
    name="fused_cam_erase",
    variants=lambda row: ("hard", "soft"),
    tiny=lambda variant: TINY,
    reference=cam_erase,
    eager=eager,
    fused=fused_cam_erase,
    make=make,
    cost=cost,
    check=check,
)


def test_cam_erase(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
