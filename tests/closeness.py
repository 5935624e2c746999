"""How close is close enough: as close as PyTorch itself, times a stated margin."""

from collections.abc import Callable, Sequence

import torch
from rounding import Rounding
from torch import Tensor


def worst_error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).abs().max().item() if value.numel() else 0.0


def remember(results: Sequence[Tensor | None], compute: Callable[[], Sequence[Tensor | None]]) -> None:
    """Of float64 results: how they are computed, should ``assert_as_close_as`` ask how well they can be."""
    rounding = Rounding(compute)
    for index, result in enumerate(results):
        if result is not None:
            result.rounding = rounding, index  # type: ignore[attr-defined]


def rounding_noise(truth: Tensor, dtype: torch.dtype) -> float:
    """How far rounding alone moves ``truth`` where the arithmetic is that of ``dtype``: half types are summed
    in float32. 0 if it is not known how ``truth`` came about."""
    if not hasattr(truth, "rounding"):
        return 0.0
    rounding, index = truth.rounding
    return rounding.worst(torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps)[index]


def assert_as_close_as(
    ours: Tensor, theirs: Tensor, truth: Tensor, margin: float = 4.0, what: str = ""
) -> None:
    """|ours - truth| <= margin * max(|theirs - truth|, one rounding of the largest value, rounding noise).

    ``theirs`` is plain PyTorch at the dtype of ``ours``; ``truth`` is the same in float64. The second term is
    there because PyTorch may happen to be exact. Worst errors of two summation orders differ by chance,
    which the margin covers. NaN must stand where the truth has it.

    The third is for sums that cancel, whose rounding is that of their terms and not of their value: PyTorch's
    error is then one draw of noise, and another processor draws another. The noise is the worst change of
    ``truth`` when it is computed again, in float64, with every intermediate result and every term of a sum
    changed at random by up to one rounding, while all decisions stay (see rounding.py). It is known for what
    ``cases.run`` has made, costs several times the computation, and is therefore asked for only where the
    first two terms do not suffice. Where nothing cancels it is a few roundings of the largest value.

    For float64, which has no wider truth, ``theirs`` is in float32 and its error is scaled to float64's
    rounding; twice as much is allowed, since the truth is then as inexact as what is tested.
    """
    assert theirs.dtype == (torch.float32 if ours.dtype == torch.float64 else ours.dtype), what
    assert ours.shape == truth.shape, what
    rounding = torch.finfo(ours.dtype).eps
    margin *= 2 if ours.dtype == torch.float64 else 1
    scaling = rounding / torch.finfo(theirs.dtype).eps
    hole = ~truth.isfinite()
    assert torch.equal(ours.isnan(), truth.isnan()), f"{what}: {int(ours.isnan().sum())} NaN"
    assert torch.equal(ours.isinf(), truth.isinf()), f"{what}: {int(ours.isinf().sum())} infinities"
    found, plain, exact = (x.detach().double().masked_fill(hole, 0.0) for x in (ours, theirs, truth))
    scale = exact.abs().max().item() if exact.numel() else 0.0
    allowed = margin * max(scaling * worst_error(plain, exact), rounding * scale)
    error = worst_error(found, exact)
    if error > allowed:
        allowed = max(allowed, margin * rounding_noise(truth, ours.dtype))
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"
