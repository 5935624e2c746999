"""The classes of an object inside its mask, background outside: DLA eq. 2-4."""

import torch
from torch import Tensor

from camkernels.reference.cam import accumulate_dtype


def image_losses(activations: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Eq. 2 for each image, [N] in the accumulation type."""
    log_p = activations.to(accumulate_dtype(activations.dtype)).log_softmax(1)  # [N, L + 1, H, W]
    exists = (target >= 0) & (target < log_p.shape[1] - 1)
    label = torch.where(exists, target, 0).long()[:, None, None, None]
    attended = torch.where(mask, -log_p.take_along_dim(label, 1)[:, 0], 0).sum((1, 2))  # eq. 4
    background = torch.where(mask, 0, -log_p[:, -1]).sum((1, 2))  # eq. 3
    w = mask.to(log_p.dtype).mean((1, 2))
    losses = ((1 - w) * attended + w * background) / mask.shape[1:].numel()  # eq. 2
    # NaN shows where a class does not exist, on a device that cannot raise.
    return losses * torch.where(exists, 1.0, torch.nan)


def local_level_loss(activations: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    return (image_losses(activations, mask, target).sum() / max(len(target), 1)).to(activations.dtype)
