"""``stochastic_consistency``: do the objects of one class look alike from image to image?"""

import torch
from torch import Tensor

from camkernels import _checks, reference
from camkernels._op import Op
from camkernels._pass import Arguments, accumulate_dtype

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

    Gradients: ``vectors``; that of the plain distance is 0 where two vectors are equal. Beside
        ``vectors`` backward keeps three numbers for each image. No double backward but with backend
        ``"reference"``.
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
    loss: Tensor = STOCHASTIC_CONSISTENCY(function, vectors, target, pairs == "adjacent", squared)
    return loss


def _reference(vectors: Tensor, target: Tensor, adjacent: bool, squared: bool) -> Tensor:
    return reference.mean_distance(vectors, target, "adjacent" if adjacent else "all", squared)


def _allocate(a: Arguments) -> None:
    """``order`` [N], the images with those of one group together, and for each place in it where its group
    ``begin`` s and ``end`` s: all pairs of one group count. ``divisor`` [], how many distances that are."""
    accumulate, images = accumulate_dtype(a.vectors.dtype), a.vectors.shape[0]
    a.loss, a.divisor = (a.vectors.new_empty((), dtype=accumulate) for _ in range(2))
    a.order, a.begin, a.end = (a.vectors.new_empty(images, dtype=torch.int64) for _ in range(3))


STOCHASTIC_CONSISTENCY = Op(
    "stochastic_consistency",
    "Tensor vectors, Tensor target, bool adjacent, bool squared",
    outputs="loss",
    kept="order begin end divisor",
    allocate=_allocate,
    reference=_reference,
    backward="Tensor vectors, Tensor grad_loss, Tensor order, Tensor begin, Tensor end, Tensor divisor, "
    "bool squared",
    gradients={"vectors": lambda a: torch.empty_like(a.vectors, memory_format=torch.contiguous_format)},
    backends=("reference", "cpu", "triton"),
)
