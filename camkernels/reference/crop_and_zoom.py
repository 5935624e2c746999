"""A box of each image, resampled to one size: DLA §4.4."""

import torch
from torch import Tensor
from torch.nn import functional as F

from camkernels.reference.cam import accumulate_dtype


def positions(low: Tensor, high: Tensor, count: int) -> Tensor:
    """[N, count]: the centres of ``count`` cells between fractions of a side, in the units of grid_sample."""
    center = (torch.arange(count, device=low.device, dtype=low.dtype) + 0.5) / count
    return 2 * (low[:, None] + center * (high - low)[:, None]) - 1


def crop_and_zoom(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    accumulate = accumulate_dtype(images.dtype)
    boxes = boxes.detach().to(accumulate)
    x0, y0, x1, y1 = boxes.unbind(1)
    y, x = positions(y0, y1, size[0])[:, :, None], positions(x0, x1, size[1])[:, None, :]
    grid = torch.stack(torch.broadcast_tensors(x, y), -1)  # [N, h, w, 2]
    with torch.autocast(images.device.type, enabled=False):
        zoomed = F.grid_sample(images.to(accumulate), grid, padding_mode="border", align_corners=False)
    # NaN shows a box that is none, on a device that cannot raise.
    is_box = boxes.isfinite().all(1) & (x0 < x1) & (y0 < y1)
    zoomed = zoomed * torch.where(is_box, 1.0, torch.nan)[:, None, None, None]
    return zoomed.to(images.dtype)
