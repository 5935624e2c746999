"""Where a network looks: PCL §3."""

import torch
from torch import Tensor


def focus_area(features: Tensor) -> tuple[Tensor, Tensor]:
    accumulate = torch.float64 if features.dtype == torch.float64 else torch.float32
    heat = features.detach().to(accumulate).mean(1)  # [N, H, W]
    mask = heat > heat.mean((-2, -1), keepdim=True)
    return mask, mask.to(accumulate).mean((-2, -1))
