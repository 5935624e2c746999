"""Mean squared difference of transformed heatmaps and those of transformed images: VAC eq. 5."""

from typing import Any

import torch
from torch import Tensor

from camkernels.reference.cam import raw_maps


def mean_squares(
    features: Tensor, features_t: Tensor, weight: Tensor, transform: Any, detach_weight: bool = False
) -> Tensor:
    """One mean per map, [N, L], in the accumulation type."""
    weight = weight.detach() if detach_weight else weight
    maps = raw_maps(features, weight, None, None)  # [N, L, H, W]
    maps_t = raw_maps(features_t, weight, None, None)  # [N, L, H', W']
    with torch.autocast(features.device.type, enabled=False):
        moved, still, valid = transform.compared(maps, maps_t)
        difference = moved - still
        if valid is None:
            return (difference**2).sum((-2, -1)) / (still.shape[-2] * still.shape[-1])
        # Not a product with the mask: a cell that does not count may hold a NaN.
        squares = torch.where(valid, difference, 0) ** 2
        return squares.sum((-2, -1)) / valid.sum((-2, -1)).clamp_min(1)


def cam_transform_mse(
    features: Tensor,
    features_t: Tensor,
    weight: Tensor,
    transform: Any,
    *,
    detach_weight: bool = False,
    reduction: str = "mean",
) -> Tensor:
    means = mean_squares(features, features_t, weight, transform, detach_weight)
    return reduce(means, reduction).to(features.dtype)


def reduce(means: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return means
    return means.sum() / max(means.numel(), 1) if reduction == "mean" else means.sum()
