"""Where a network looks: PCL §3."""

from torch import Tensor

from camkernels.reference.cam import accumulate_dtype, varying


def focus_area(features: Tensor) -> tuple[Tensor, Tensor]:
    accumulate = accumulate_dtype(features.dtype)
    # The channel sum, less what is equal at all pixels, exceeds its mean where the channel mean does.
    heat = varying(features.detach()).to(accumulate).sum(1)  # [N, H, W]
    # From the first pixel on: a constant map is then 0, and equal to its mean whatever the rounding.
    heat = heat - heat[:, :1, :1]
    mask = heat > heat.mean((-2, -1), keepdim=True)
    return mask, mask.to(accumulate).mean((-2, -1))
