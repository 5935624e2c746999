"""The tight box of an attended region: DLA §4.4."""

import torch
from torch import Tensor


def extent(any_in: Tensor) -> tuple[Tensor, Tensor]:
    """First of the places, [N, S], that hold True, and one past the last, as fractions of S; 0 and 1 where
    none does."""
    size = any_in.shape[1]
    place = torch.arange(size, device=any_in.device)
    first = torch.where(any_in, place, size).amin(1)
    end = torch.where(any_in, place + 1, 0).amax(1)
    empty = end == 0
    return torch.where(empty, 0, first) / size, torch.where(empty, size, end) / size


def attention_boxes(mask: Tensor) -> Tensor:
    x0, x1 = extent(mask.any(1))
    y0, y1 = extent(mask.any(2))
    return torch.stack([x0, y0, x1, y1], 1)
