"""A box of each image, resampled to one size: DLA §4.4."""

import torch
from torch import Tensor
from torch.nn import functional as F

from camkernels.reference.cam import accumulate_dtype


def crop_and_zoom(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    accumulate = accumulate_dtype(images.dtype)
    x0, y0, x1, y1 = boxes.detach().to(accumulate).unbind(1)
    zero = torch.zeros_like(x0)
    matrix = torch.stack([x1 - x0, zero, x0 + x1 - 1, zero, y1 - y0, y0 + y1 - 1], 1).view(-1, 2, 3)
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(matrix, [*images.shape[:2], *size], align_corners=False)  # [N, h, w, 2]
        zoomed = F.grid_sample(images.to(accumulate), grid, padding_mode="border", align_corners=False)
    # NaN shows a box that is none, on a device that cannot raise.
    is_box = boxes.isfinite().all(1) & (x1 > x0) & (y1 > y0)
    return torch.where(is_box[:, None, None, None], zoomed, torch.nan).to(images.dtype)
