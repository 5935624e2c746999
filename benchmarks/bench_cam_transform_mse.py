"""fused_cam_transform_mse: ``python -m pytest benchmarks/bench_cam_transform_mse.py --rows all``."""

from collections.abc import Mapping, Sequence
from math import lcm, sqrt
from typing import Any

import harness
import measure
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import fused_cam_transform_mse
from camkernels.reference import cam_transform_mse
from camkernels.transforms import Affine, HorizontalFlip, Scale, Transform

VARIANTS = {"HorizontalFlip": ("flip",), "Affine": ("affine",), "Scale": ("nearest", "bilinear")}
STRIDE = 32  # of a ResNet: pixels per cell
RELEASED_LIMIT = 1 << 30  # bytes of one product of the released code; rows above it do without


def variants(row: Mapping[str, Any]) -> tuple[str, ...]:
    return VARIANTS[row["transform"]]


def tiny(variant: str) -> dict[str, Any]:
    (transform,) = (name for name, known in VARIANTS.items() if variant in known)
    return {"id": "tiny", "N": 2, "C": 8, "HW": [2, 2], "HW_t": [3, 3], "L": 4, "transform": transform}


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    images, channels, classes = row["N"], row["C"], row["L"]
    size, size_t = _sizes(row)
    features, features_t = (
        normal(images, channels, *hw).relu_().to(dtype).requires_grad_() for hw in (size, size_t)
    )  # as they come out of a backbone
    weight = (normal(classes, channels) * channels**-0.5).requires_grad_()
    # Scaled, as a GradScaler does: a mean over all maps leaves gradients that float16 would lose.
    grad = (uniform() + 0.5) * images * classes
    transform: Transform = HorizontalFlip()
    if variant == "affine":
        transform = Affine(_small_turns_and_zooms(uniform(images, 2)))
    elif variant in ("nearest", "bilinear"):
        transform = Scale((STRIDE * size_t[0], STRIDE * size_t[1]), mode=variant)
    return harness.Inputs(
        args=(features, features_t, weight),
        options={"transform": transform},
        differentiable=(0, 1, 2),
        grads=(grad.to(dtype),),
    )


def eager(features: Tensor, features_t: Tensor, weight: Tensor, transform: Transform) -> Tensor:
    """As a user would write it: two products, the transform of the maps, a mean squared error."""
    wide = torch.promote_types(features.dtype, torch.float32)
    # As autocast does: products in half types, the rest in float32. CPUs are much slower at such products.
    narrow = features.dtype if features.is_cuda else wide
    weight = weight.to(narrow)
    maps = torch.einsum("lc,nchw->nlhw", weight, features.to(narrow)).to(wide)
    maps_t = torch.einsum("lc,nchw->nlhw", weight, features_t.to(narrow)).to(wide)
    return _loss_of_maps(maps, maps_t, transform).to(features.dtype)


def released(features: Tensor, features_t: Tensor, weight: Tensor, transform: Transform) -> Tensor:
    """As the released code and the paper's §3.2 write it: every weight times every feature, then the sum."""
    maps = (features[:, None] * weight[None, :, :, None, None]).sum(2)  # of [N, L, C, H, W]
    maps_t = (features_t[:, None] * weight[None, :, :, None, None]).sum(2)
    return _loss_of_maps(maps, maps_t, transform).to(features.dtype)


def others(row: Mapping[str, Any], variant: str) -> dict[str, harness.Function]:
    product = row["N"] * row["L"] * row["C"] * row["HW"][0] * row["HW"][1] * 4
    fits = product <= RELEASED_LIMIT and variant in ("flip", "nearest")
    return {"released": released} if fits else {}


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    images, channels, classes = row["N"], row["C"], row["L"]
    (height, width), (height_t, width_t) = _sizes(row)
    cells = height * width + height_t * width_t
    features = images * channels * cells * dtype.itemsize
    weight = classes * channels * 4
    matrix = images * 6 * 4 if variant == "affine" else 0
    # The product W (T(F) - F') on one grid, W F and W F' on two.
    columns = height * width if row["transform"] != "Scale" else cells
    product = 2 * images * classes * channels * columns
    scalar = dtype.itemsize  # the loss, or its gradient
    if direction == "forward":
        return measure.Cost(bytes=features + weight + matrix + scalar, flops=product)
    return measure.Cost(
        bytes=2 * (features + weight) + matrix + scalar,  # inputs read, their gradients written
        flops=2 * product,  # for the gradients of both features, for that of weight
    )


def kept_bytes(row: Mapping[str, Any]) -> int:
    """One float32 map per image and class, of the larger size."""
    return 4 * row["N"] * row["L"] * max(height * width for height, width in _sizes(row))


def check(
    inputs: harness.Inputs,
    results: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
) -> None:
    names = ("loss", "grad_features", "grad_features_t", "grad_weight")
    # Rounding errors of a long sum, one term after the other, grow as the root of its length; eager's own
    # error in a single number may be small by chance.
    features, features_t, weight = inputs.args
    maps = features.shape[0] * weight.shape[0]
    common = _common_size(features.shape[-2:], features_t.shape[-2:])
    ulps = (sqrt(maps * common[0] * common[1]), 4.0, 4.0, 4.0)
    for name, ours, theirs, true, units in zip(names, results, eager, truth, ulps, strict=True):
        harness.assert_as_close_as(name, ours, theirs, true, ulps=units)


def _sizes(row: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    size = row["HW"]
    return tuple(size), tuple(row["HW_t"] if row["transform"] == "Scale" else size)


def _common_size(size: Sequence[int], size_t: Sequence[int]) -> tuple[int, int]:
    return lcm(size[0], size_t[0]), lcm(size[1], size_t[1])


def _small_turns_and_zooms(share: Tensor) -> Tensor:
    """Matrices ``[N, 2, 3]``: up to 15 degrees either way, 0.9 to 1.1 in size. ``share`` [N, 2] in [0, 1)."""
    angle = (share[:, 0] - 0.5) * (torch.pi / 6)
    zoom = 0.9 + 0.2 * share[:, 1]
    cosine, sine, none = zoom * angle.cos(), zoom * angle.sin(), torch.zeros_like(zoom)
    return torch.stack((cosine, -sine, none, sine, cosine, none), 1).view(-1, 2, 3)


def _loss_of_maps(maps: Tensor, maps_t: Tensor, transform: Transform) -> Tensor:
    """Of ``[N, L, H, W]`` and ``[N, L, H', W']``."""
    if isinstance(transform, HorizontalFlip):
        return F.mse_loss(maps.flip(-1), maps_t)
    if isinstance(transform, Scale):
        common = _common_size(maps.shape[-2:], maps_t.shape[-2:])
        return F.mse_loss(
            F.interpolate(maps, common, mode=transform.mode),
            F.interpolate(maps_t, common, mode=transform.mode),
        )
    grid = F.affine_grid(transform.matrix.to(maps.dtype), list(maps.shape), align_corners=False)
    moved = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    valid = (grid.abs() <= 1).all(-1)[:, None]  # [N, 1, H, W]
    squares = ((moved - maps_t) ** 2 * valid).sum((-2, -1))  # [N, L]
    return (squares / valid.sum((-2, -1)).clamp(min=1)).mean()


OP = harness.Op(
    name="fused_cam_transform_mse",
    variants=variants,
    tiny=tiny,
    reference=cam_transform_mse,
    eager=eager,
    fused=fused_cam_transform_mse,
    make=make,
    cost=cost,
    check=check,
    kept_bytes=kept_bytes,
    others=others,
)


def test_cam_transform_mse(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
