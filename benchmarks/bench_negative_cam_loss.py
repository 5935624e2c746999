"""fused_negative_cam_loss: ``python -m pytest benchmarks/bench_negative_cam_loss.py --rows all``."""

from collections.abc import Callable, Mapping
from math import log, sqrt
from typing import Any

import harness
import measure
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import fused_negative_cam_loss
from camkernels.reference import negative_cam_loss

# The two kinds with logits given; "pooled": mse, the negatives chosen by the pooled features.
VARIANTS = ("mse", "uniform", "pooled")
TINY = {"id": "tiny", "N": 2, "C": 8, "HW": [2, 2], "L": 6, "k": 2}
APART = 0.01  # of the rows' difference, added to features: moves the two keys about the cut apart
INDEX_LIMIT = 1 << 30  # bytes of the released code's index tensor; rows above it do without


def variants(row: Mapping[str, Any]) -> tuple[str, ...]:
    return ("mse",) if "positives" in row else VARIANTS


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def orders() -> Tensor:
        """A permutation of the classes for each image: no two are equal. ``[N, L]``."""
        return torch.rand(images, classes, generator=generator, device=device).argsort(1)

    images, channels, classes = row["N"], row["C"], row["L"]
    features = normal(images, channels, *row["HW"]).relu_()  # as they come out of a backbone
    weight = normal(classes, channels) * channels**-0.5
    bias = normal(classes)
    if "positives" in row:
        target = orders() < row["positives"]  # [N, L]
    else:
        target = torch.randint(classes, (images,), generator=generator, device=device)
    if variant == "pooled":
        _set_cut_apart(features, weight, bias, target, _slots(row))
    args = [
        features.to(dtype).requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
        target,
    ]
    if variant != "pooled":
        args.append(orders() / classes)  # equal logits, topk could order as it likes
    # Scaled, as a GradScaler does: a mean over all maps leaves gradients that float16 would lose.
    grad = (torch.rand((), generator=generator, device=device) + 0.5) * images * _slots(row)
    return harness.Inputs(
        args=tuple(args),
        options={"num_negatives": row["k"], "kind": "uniform" if variant == "uniform" else "mse"},
        # The uniform kind does not depend on the bias: its gradient would be rounding alone.
        differentiable=(0, 1) if variant == "uniform" else (0, 1, 2),
        grads=(grad.to(dtype),),
    )


def as_provider(function: Callable[..., Tensor]) -> harness.Function:
    """A function of ``fused_negative_cam_loss``'s signature, for the arguments that ``make`` gives."""

    def provider(
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        target: Tensor,
        logits: Tensor | None = None,
        *,
        num_negatives: int,
        kind: str,
    ) -> Tensor:
        return function(
            features, weight, target, bias=bias, logits=logits, num_negatives=num_negatives, kind=kind
        )

    return provider


def eager(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    logits: Tensor | None = None,
    *,
    num_negatives: int,
    kind: str,
) -> Tensor:
    """As a user would write it: all maps by one product, of which the negatives' are taken."""
    chosen = _negatives(features, weight, bias, target, logits, num_negatives)  # [N, k]
    maps = _all_maps(features, weight, bias)  # [N, L, P]
    maps = maps.gather(1, chosen[..., None].expand(-1, -1, maps.shape[2]))
    return _loss_of_maps(maps, kind).to(features.dtype)


def gathered(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    logits: Tensor | None = None,
    *,
    num_negatives: int,
    kind: str,
) -> Tensor:
    """As a careful user would: the negatives' rows of the weight first, then the product of those alone."""
    chosen = _negatives(features, weight, bias, target, logits, num_negatives)  # [N, k]
    narrow = _product_dtype(features)
    rows = F.embedding(chosen, weight)  # [N, k, C]; weight[chosen] takes longer, most of all backward
    maps = torch.bmm(rows.to(narrow), features.to(narrow).flatten(2))  # [N, k, P]
    return _loss_of_maps(maps.to(weight.dtype) + bias[chosen][..., None], kind).to(features.dtype)


def released(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    logits: Tensor | None = None,
    *,
    num_negatives: int,
    kind: str,
) -> Tensor:
    """As the released code goes about it: an index for each pixel of all maps, made on the host."""
    maps = _all_maps(features, weight, bias)  # [N, L, P]
    ranking = _without_targets(features, weight, bias, target, logits)
    order = ranking.sort(descending=True).indices.cpu()  # [N, L]
    index = order[..., None].repeat(1, 1, maps.shape[2]).to(maps.device)
    maps = maps.gather(1, index[:, : _most(target, order.shape[1], num_negatives)])
    return _loss_of_maps(maps, kind).to(features.dtype)


def others(row: Mapping[str, Any], variant: str) -> dict[str, harness.Function]:
    index = 8 * row["N"] * row["L"] * row["HW"][0] * row["HW"][1]
    fits = index <= INDEX_LIMIT and variant != "pooled" and "positives" not in row
    return {"gathered": gathered, **({"released": released} if fits else {})}


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    images, channels, classes = row["N"], row["C"], row["L"]
    pixels, slots = row["HW"][0] * row["HW"][1], _slots(row)
    features = images * channels * pixels * dtype.itemsize
    rows = min(images * slots, classes) * (channels + 1) * 4  # and each row's bias
    scalar = dtype.itemsize  # the loss, or its gradient
    product = 2 * images * slots * channels * pixels
    if direction == "forward":
        target = images * (classes if "positives" in row else 8)
        if variant == "pooled":  # sums over pixels, and their product with all rows
            rows = classes * (channels + 1) * 4
            product += images * channels * pixels + 2 * images * classes * channels
        logits = 0 if variant == "pooled" else images * classes * 4
        return measure.Cost(bytes=features + rows + target + logits + scalar, flops=product)
    written = features + classes * channels * 4
    rows = min(images * slots, classes) * channels * 4
    if variant != "uniform":
        written += classes * 4  # the bias's gradient
    return measure.Cost(
        bytes=features + rows + kept_bytes(row) + scalar + written,
        flops=2 * product,  # for the gradient of features, for that of weight
    )


def kept_bytes(row: Mapping[str, Any]) -> int:
    """A float32 map for each image and negative, which classes these are, and how many."""
    pixels, slots = row["HW"][0] * row["HW"][1], _slots(row)
    return int(4 * row["N"] * (slots * (pixels + 1) + 1))


def check(
    inputs: harness.Inputs,
    results: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
) -> None:
    names = ("loss", "grad_features", "grad_weight", "grad_bias")
    # Rounding errors of a long sum, one term after the other, grow as the root of its length; eager's own
    # error in a single number may be small by chance.
    features, weight, _, target, *_ = inputs.args
    slots = _most(target, len(weight), inputs.options["num_negatives"])
    values = len(features) * slots * features[0, 0].numel()  # of all chosen maps
    ulps = tuple(4 + sqrt(length) for length in (values, slots, values / len(weight), values / len(weight)))
    for name, ours, theirs, true, units in zip(names, results, eager, truth, ulps, strict=False):
        harness.assert_as_close_as(name, ours, theirs, true, ulps=units)


def _slots(row: Mapping[str, Any]) -> int:
    """Negatives of each image; the rows have as many as they ask for, or all classes but the target."""
    return int(min(row["k"], row["L"] - row.get("positives", 1)))


def _most(target: Tensor, classes: int, num_negatives: int) -> int:
    """Negatives of each image, as ``_slots``; rows of several targets ask for no more than there are."""
    return min(num_negatives, classes - 1) if target.dim() == 1 else num_negatives


def _product_dtype(features: Tensor) -> torch.dtype:
    """Half on a GPU, as with autocast; CPUs are much slower at products of half types."""
    return features.dtype if features.is_cuda else torch.promote_types(features.dtype, torch.float32)


def _all_maps(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``[N, L, P]``"""
    narrow = _product_dtype(features)
    maps = torch.einsum("lc,ncp->nlp", weight.to(narrow), features.to(narrow).flatten(2))
    return maps.to(weight.dtype) + bias[:, None]


def _without_targets(
    features: Tensor, weight: Tensor, bias: Tensor, target: Tensor, logits: Tensor | None
) -> Tensor:
    """What ranks the classes, -inf for an image's own: ``[N, L]``."""
    if logits is None:  # in float32 for half types, where the choice would change with the rounding
        logits = F.linear(features.detach().to(weight.dtype).mean((2, 3)), weight.detach(), bias.detach())
    if target.dim() == 2:
        return logits.masked_fill(target, -torch.inf)
    return logits.scatter(1, target[:, None], -torch.inf)


def _negatives(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    logits: Tensor | None,
    num_negatives: int,
) -> Tensor:
    """``[N, k]``"""
    ranking = _without_targets(features, weight, bias, target, logits)
    return ranking.topk(_most(target, ranking.shape[1], num_negatives)).indices


def _loss_of_maps(maps: Tensor, kind: str) -> Tensor:
    """Of the negatives' maps, ``[N, k, P]``, at the default level and temperature."""
    if kind == "mse":
        return maps.square().mean()
    divergence = -F.log_softmax(maps, 2).mean(2) - log(maps.shape[2])  # KL(uniform || softmax), [N, k]
    return divergence.sum(1).mean()


def _set_cut_apart(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor, slots: int) -> None:
    """Lift each image's last negative to be chosen and lower the first that is not, in place.

    Where their keys tie but for rounding, float32 and float64 would choose differently, and both would be
    right.
    """
    ranking = _without_targets(features, weight, bias, target, None)
    if slots + 1 >= ranking.shape[1]:  # every negative is chosen
        return
    last, first = ranking.topk(slots + 1).indices[:, -2:].T  # [N] each
    difference = (weight[last] - weight[first]).relu_()  # [N, C]; features stay as they come out of a ReLU
    features += APART * difference[..., None, None]


OP = harness.Op(
    name="fused_negative_cam_loss",
    variants=variants,
    tiny=lambda variant: TINY,
    reference=as_provider(negative_cam_loss),
    eager=eager,
    fused=as_provider(fused_negative_cam_loss),
    make=make,
    cost=cost,
    check=check,
    kept_bytes=kept_bytes,
    others=others,
)


def test_negative_cam_loss(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
