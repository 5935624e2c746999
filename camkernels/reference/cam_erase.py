"""The image with the peak of its class activation map erased: PCL eq. 2."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from camkernels.reference.cam import accumulate_dtype, normalised_maps


def erase(
    cam: Tensor,
    images: Tensor,
    *,
    threshold: float = 0.7,
    sharpness: float | None = None,
    fill: float | Sequence[float] = 0.0,
    mode: str = "bilinear",
) -> Tensor:
    corners = {"align_corners": False} if mode == "bilinear" else {}
    heat = F.interpolate(cam[:, None], images.shape[-2:], mode=mode, **corners)  # [N, 1, H0, W0]
    fill = [fill] if isinstance(fill, (int, float)) else fill
    with torch.autocast(images.device.type, enabled=False):
        colour = torch.stack([images.new_full((1, 1), value) for value in fill])  # [1 or D, 1, 1]
        if sharpness is None:
            return torch.where(heat > threshold, colour, images)
        gate = torch.sigmoid(sharpness * (heat - threshold)).to(accumulate_dtype(images.dtype))
        return (images * (1 - gate) + colour * gate).to(images.dtype)


def cam_erase(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    images: Tensor,
    *,
    threshold: float = 0.7,
    sharpness: float | None = None,
    fill: float | Sequence[float] = 0.0,
    mode: str = "bilinear",
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    cam = normalised_maps(features, weight, target, eps)  # [N, H, W]
    erased = erase(cam, images, threshold=threshold, sharpness=sharpness, fill=fill, mode=mode)
    return erased, cam.to(features.dtype)
