"""How close is close enough: as close as PyTorch itself, times a stated margin."""

import torch
from torch import Tensor


def worst_error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).abs().max().item() if value.numel() else 0.0


def assert_as_close_as(
    ours: Tensor, theirs: Tensor, truth: Tensor, margin: float = 4.0, what: str = ""
) -> None:
    """|ours - truth| <= margin * max(|theirs - truth|, one rounding of the largest value).

    ``theirs`` is plain PyTorch at the dtype of ``ours``; ``truth`` is the same in float64. The second term is
    there because PyTorch may happen to be exact. Worst errors of two summation orders differ by chance,
    which the margin covers. NaN must stand where the truth has it.

    For float64, which has no wider truth, ``theirs`` is in float32 and its error is scaled to float64's
    rounding; twice as much is allowed, since the truth is then as inexact as what is tested.
    """
    assert theirs.dtype == (torch.float32 if ours.dtype == torch.float64 else ours.dtype), what
    assert ours.shape == truth.shape, what
    rounding = torch.finfo(ours.dtype).eps
    finest = ours.dtype == torch.float64
    scaling = rounding / torch.finfo(theirs.dtype).eps
    hole = ~truth.isfinite()
    assert torch.equal(ours.isnan(), truth.isnan()), f"{what}: {int(ours.isnan().sum())} NaN"
    assert torch.equal(ours.isinf(), truth.isinf()), f"{what}: {int(ours.isinf().sum())} infinities"
    ours, theirs, truth = (x.detach().double().masked_fill(hole, 0.0) for x in (ours, theirs, truth))
    scale = truth.abs().max().item() if truth.numel() else 0.0
    allowed = margin * max(scaling * worst_error(theirs, truth), rounding * scale) * (2 if finest else 1)
    error = worst_error(ours, truth)
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"
