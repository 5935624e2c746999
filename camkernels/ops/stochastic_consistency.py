"""``stochastic_consistency``: do the objects of one class look alike from image to image?"""

from typing import Any

import torch
from torch import Tensor

from camkernels import _backend
from camkernels._library import define_op
from camkernels.ops import _checks
from camkernels.ops._autograd import first_order
from camkernels.reference.cam import accumulate_dtype
from camkernels.reference.stochastic_consistency import mean_distance as reference_mean_distance

PAIRS = ("all", "adjacent")


def stochastic_consistency(
    vectors: Tensor, target: Tensor, *, pairs: str = "all", squared: bool = True
) -> Tensor:
    """How far the seed vectors of two images of one class are apart: the mean over their pairs.

        loss = mean over pairs (i, j) of one class, and over seeds k, of ||v[i, k] - v[j, k]||**2

        seeds = fused_cam_seeds(features, classifier.weight, target, num_seeds=3)
        loss = stochastic_consistency(seeds.vectors, target)

    The sum over all squared pairs of a class is its size times the sum of squared deviations from its mean,
    which is how it is computed: the time grows with N, not with the number of pairs.

    Args:
        vectors: seed vectors, ``[N, K, D]``; seed k of one image meets seed k of the other.
        target: class of each image, ``[N]``, int64 or int32; any numbers, only equality counts.
        pairs: ``"all"`` unordered pairs of one class, or ``"adjacent"``: only (0, 1), (2, 3), ..., as the
            released code forms its batches, those of one class.
        squared: False gives the plain distance, as the released code has it. It has no closed form: the
            time grows with the number of pairs.

    Returns:
        A scalar in the dtype of ``vectors``; in float16 what exceeds 65504 is infinite, where
        ``losses.StochasticConsistencyLoss`` returns float32. 0 where the batch holds no pair.

    Gradients: ``vectors``; that of the plain distance is 0 where two vectors are equal. Nothing but
        ``vectors`` is kept for backward. No double backward.
    Numerics: float32 inside (float64 for float64); deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or value.

    Source: Zhang et al., ECCV 2020, eq. 1.
    """
    return mean_distance("stochastic_consistency", vectors, target, pairs, squared).to(vectors.dtype)


def mean_distance(function: str, vectors: Tensor, target: Tensor, pairs: str, squared: bool) -> Tensor:
    """The loss in the accumulation type; ``function`` is whom errors name."""
    vectors = _checks.vectors(function, vectors)
    target = _checks.target(function, target, vectors, "[N]", (1,), "vectors")
    _checks.choice(function, "pairs", pairs, PAIRS)
    _checks.flag(function, "squared", squared)
    requested = _backend.setting()
    if _backend.resolve(function, requested, vectors.device, vectors.dtype) == "reference":
        return reference_mean_distance(vectors, target, pairs, squared)
    loss: Tensor = _StochasticConsistency.apply(vectors, *_groups(target, pairs), squared, requested)
    return loss


def _groups(target: Tensor, pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    """``order`` [N], the images with those of one group together, and for each place in it where its group
    ``begin`` s and ``end`` s. All pairs of one group count."""
    key = target.long()
    if pairs == "adjacent":
        place = torch.arange(key.shape[0], device=key.device)
        # An image joins the one before it, if that has the same class; else each is by itself.
        joins = (place % 2 == 1) & (key == key.roll(1))
        key = place - joins.long()
    ordered, order = key.sort(stable=True)
    return order, torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)


class _StochasticConsistency(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        order: Tensor,
        begin: Tensor,
        end: Tensor,
        squared: bool,
        requested: str,
    ) -> Tensor:
        sums = torch.ops.camkernels.stochastic_consistency_fwd(vectors, order, begin, end, squared, requested)
        # Every image counts half of each of its pairs.
        distances = vectors.shape[1] * ((end - begin - 1).sum() // 2)
        divisor = distances.to(sums.dtype).clamp_min(1)  # []
        ctx.save_for_backward(vectors, order, begin, end, divisor)
        ctx.options = squared, requested
        return sums.sum() / divisor

    @staticmethod
    @first_order("stochastic_consistency")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        vectors, order, begin, end, divisor = ctx.saved_tensors
        squared, requested = ctx.options
        grad_vectors = torch.ops.camkernels.stochastic_consistency_bwd(
            vectors, grad / divisor, order, begin, end, squared, requested
        )
        return grad_vectors, *(None,) * 5


def _allocate_fwd(
    vectors: Tensor, order: Tensor, begin: Tensor, end: Tensor, squared: bool
) -> tuple[Tensor, ...]:
    return (vectors.new_empty(vectors.shape[:2], dtype=accumulate_dtype(vectors.dtype)),)


def _allocate_bwd(vectors: Tensor, scale: Tensor, *groups: Any) -> tuple[Tensor, ...]:
    return (torch.empty_like(vectors, memory_format=torch.contiguous_format),)


define_op(
    "stochastic_consistency_fwd",
    "Tensor vectors, Tensor order, Tensor begin, Tensor end, bool squared",
    ("sums",),
    allocate=_allocate_fwd,
)
define_op(
    "stochastic_consistency_bwd",
    "Tensor vectors, Tensor scale, Tensor order, Tensor begin, Tensor end, bool squared",
    ("grad_vectors",),
    allocate=_allocate_bwd,
)
