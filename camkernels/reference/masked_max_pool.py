"""The strongest response of each channel inside a mask: DLA §4.4.2."""

from torch import Tensor


def masked_max_pool(features: Tensor, mask: Tensor) -> Tensor:
    masked = features * mask[:, None]  # [N, C, H, W]
    # max and not amax: of equal values the lowest pixel has the whole gradient.
    return masked.flatten(2).max(2).values
