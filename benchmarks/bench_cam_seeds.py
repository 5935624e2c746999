"""fused_cam_seeds by each sampling: ``python -m pytest benchmarks/bench_cam_seeds.py --rows all``."""

from collections.abc import Callable, Mapping
from typing import Any

import harness
import maps
import measure
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import fused_cam_seeds
from camkernels.reference import cam_seeds

THRESHOLD = 0.7
# "random" and "first" are the sampling; their gradient goes into the vectors only, as in I2C's training.
# "cam": at random, the map trained as well.
VARIANTS = ("random", "first", "cam")
TINY = {"id": "tiny", "N": 2, "C": 8, "D": 8, "HW": [2, 2], "L": 4, "K": 2}
OBJECT = 0.35  # an object's standard deviation, in sides of the map: one pixel in six is a candidate
CONTRAST = 10.0  # of the object's features over those elsewhere
RELEASED_LIMIT = 1 << 30  # bytes of the released code's gradients, one per seed; rows above it do without


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    images, channels, classes = row["N"], row["C"], row["L"]
    height, width = row["HW"]
    weight = normal(classes, channels) * channels**-0.5
    target = torch.randint(classes, (images,), generator=generator, device=device)
    features = normal(images, channels, height, width).relu_()  # as they come out of a backbone
    centres = 0.3 + 0.4 * torch.rand(images, 2, generator=generator, device=device)
    spots = CONTRAST * _spots(centres, height, width)  # [N, H, W]
    for image, own, spot in zip(features, weight[target].relu_(), spots, strict=True):
        image.addcmul_(own[:, None, None], spot)
    maps.set_extrema_apart(features, weight, target)
    features = features.to(dtype)
    maps.keep_off_threshold(features, weight, target, THRESHOLD)

    args = [features.requires_grad_(), weight.requires_grad_(), target]
    differentiable = [0, 1] if variant == "cam" else []
    if _has_seed_features(row):
        args.append(normal(images, row["D"], height, width).relu_().to(dtype).requires_grad_())
        differentiable.append(3)
    elif variant != "cam":
        differentiable = [0]
    # A permutation: with equal keys topk may choose either, and both would be right.
    noise = torch.rand(images, height * width, generator=generator, device=device).argsort(1)
    grad_cam = normal(images, height, width).to(dtype) if variant == "cam" else None
    return harness.Inputs(
        args=tuple(args),
        options={
            "num_seeds": row["K"],
            "noise": None if variant == "first" else noise / (height * width),
            "train_cam": variant == "cam",
        },
        differentiable=tuple(differentiable),
        grads=(normal(images, row["K"], row["D"]).to(dtype), None, None, grad_cam),
    )


def as_provider(function: Callable[..., tuple[Tensor, ...]]) -> harness.Function:
    """A function of ``fused_cam_seeds``'s signature, for the arguments that ``make`` gives."""

    def provider(
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        seed_features: Tensor | None = None,
        *,
        num_seeds: int,
        noise: Tensor | None,
        train_cam: bool,
    ) -> tuple[Tensor, ...]:
        return function(
            features,
            weight,
            target,
            num_seeds,
            seed_features=seed_features,
            threshold=THRESHOLD,
            sampling="first" if noise is None else "random",
            noise=noise,
        )

    return provider


def eager(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    seed_features: Tensor | None = None,
    *,
    num_seeds: int,
    noise: Tensor | None,
    train_cam: bool,
) -> tuple[Tensor, ...]:
    """As a user would write it: the largest keys among the candidates, one indexing for all vectors."""
    seed_features = features if seed_features is None else seed_features
    cam = _normalised_map(features, weight, target, train_cam)  # [N, H, W]
    heat = cam.detach().flatten(1)  # [N, H * W]
    images, pixels = heat.shape
    if noise is None:
        noise = torch.arange(pixels, 0, -1, device=heat.device, dtype=torch.float32)
    candidate = heat > THRESHOLD
    count = candidate.sum(1)
    order = torch.where(candidate, noise, -1.0).topk(num_seeds).indices  # [N, K]
    turn = torch.arange(num_seeds, device=heat.device) % count.clamp(min=1)[:, None]
    indices = torch.where(count[:, None] > 0, order.gather(1, turn), heat.argmax(1, keepdim=True))
    image = torch.arange(images, device=heat.device)[:, None]
    vectors = seed_features.flatten(2).mT[image, indices]  # [N, K, D]
    return vectors, indices, count, cam.to(features.dtype)


def released(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    seed_features: Tensor | None = None,
    *,
    num_seeds: int,
    noise: None,
    train_cam: bool,
) -> tuple[Tensor, ...]:
    """As the released code goes about it: image by image and seed by seed, each position read by the host."""
    seed_features = features if seed_features is None else seed_features
    cam = _normalised_map(features, weight, target, train_cam)  # [N, H, W]
    vectors, indices, count = [], [], []
    for image, heat in zip(seed_features, cam.detach(), strict=True):
        candidates = torch.nonzero(heat > THRESHOLD)  # [count, 2]
        count.append(len(candidates))
        torch.randperm(len(candidates), device=heat.device)  # drawn and never used, there too
        if not len(candidates):
            candidates = torch.nonzero(heat == heat.amax())[:1]
        for seed in range(num_seeds):
            row, column = candidates[seed % len(candidates)]
            row, column = row.item(), column.item()
            vectors.append(image[:, row, column])
            indices.append(row * heat.shape[1] + column)
    shape = len(features), num_seeds
    return (
        torch.stack(vectors).view(*shape, -1),
        torch.tensor(indices, device=features.device).view(shape),
        torch.tensor(count, device=features.device),
        cam.to(features.dtype),
    )


def others(row: Mapping[str, Any], variant: str) -> dict[str, harness.Function]:
    """The released code, where it fits: backward makes a gradient of the image's size for every seed."""
    gradients = row["N"] * row["K"] * row["D"] * row["HW"][0] * row["HW"][1] * 4
    return {"released": released} if variant == "first" and gradients <= RELEASED_LIMIT else {}


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    images, channels, pixels = row["N"], row["C"], row["HW"][0] * row["HW"][1]
    features = images * channels * pixels * dtype.itemsize
    seed_features = images * row["D"] * pixels * dtype.itemsize
    vectors = images * row["K"] * row["D"] * dtype.itemsize
    indices = images * row["K"] * 8
    cam = images * pixels * dtype.itemsize
    weight_rows = min(images, row["L"]) * channels * 4 + images * 8  # and the targets
    product = 2 * images * pixels * channels
    if direction == "forward":
        taken = vectors if _has_seed_features(row) else 0  # else they are among the features read
        noise = images * pixels * 4 if variant != "first" else 0
        written = vectors + indices + images * 8 + cam
        return measure.Cost(bytes=features + weight_rows + noise + taken + written, flops=product)
    seeds = measure.Cost(bytes=vectors + indices + seed_features, flops=images * row["K"] * row["D"])
    if variant != "cam":
        return seeds
    through_map = features + weight_rows + images * pixels * 4 + cam  # the float32 map and the cam's gradient
    written = row["L"] * channels * 4 + (features if _has_seed_features(row) else 0)
    # A product for grad_features, product and sum for grad_weight.
    return seeds + measure.Cost(bytes=through_map + written, flops=3 * images * pixels * channels)


def check(
    inputs: harness.Inputs,
    results: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
) -> None:
    for name, ours, true in zip(("vectors", "indices", "count"), results, truth, strict=False):
        assert torch.equal(ours.to(true.dtype), true), f"{name}: not those of float64"
    named = {0: "grad_features", 1: "grad_weight", 3: "grad_seed_features"}
    names = ("cam", *(named[argument] for argument in inputs.differentiable))
    for name, ours, theirs, true in zip(names, results[3:], eager[3:], truth[3:], strict=True):
        harness.assert_as_close_as(name, ours, theirs, true)


def _has_seed_features(row: Mapping[str, Any]) -> bool:
    """Vectors come from another layer where its width differs, else from the features themselves."""
    return bool(row["D"] != row["C"])


def _spots(centres: Tensor, height: int, width: int) -> Tensor:
    """A round hill about each centre [N, 2], in shares of height and width: ``[N, H, W]``."""
    down, across = (
        torch.exp(-0.5 * (((torch.arange(size, device=centres.device) + 0.5) / size - centre) / OBJECT) ** 2)
        for size, centre in ((height, centres[:, :1]), (width, centres[:, 1:]))
    )
    return down[:, :, None] * across[:, None, :]


def _normalised_map(features: Tensor, weight: Tensor, target: Tensor, train_cam: bool) -> Tensor:
    """``[N, H, W]``; in float32 for half types, where seeds would change with the rounding of products."""
    if not train_cam:
        features, weight = features.detach(), weight.detach()
    wide = torch.promote_types(features.dtype, torch.float32)
    cam = torch.einsum("nc,nchw->nhw", weight[target].to(wide), features.to(wide))
    low = cam.amin((1, 2), keepdim=True)
    span = cam.amax((1, 2), keepdim=True) - low
    return torch.where(span > 1e-8, (cam - low) / span, 0.0)


OP = harness.Op(
    name="fused_cam_seeds",
    variants=lambda row: VARIANTS,
    tiny=lambda variant: TINY,
    reference=as_provider(cam_seeds),
    eager=eager,
    fused=as_provider(fused_cam_seeds),
    make=make,
    cost=cost,
    check=check,
    others=others,
)


def test_cam_seeds(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
