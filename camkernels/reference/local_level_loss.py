"""The classes of an object inside its mask, background outside: DLA eq. 2-4."""

import torch
from torch import Tensor

from camkernels.reference.cam import accumulate_dtype


def mean_loss(activations: Tensor, mask: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """A scalar in the accumulation type."""
    target = target.long()
    counts = target != ignore_index  # [N]
    # An ignored image is left out before its softmax: it may hold inf or NaN.
    activations = torch.where(counts[:, None, None, None], activations, 0)
    log_p = activations.to(accumulate_dtype(activations.dtype)).log_softmax(1)  # [N, L + 1, H, W]
    exists = (target >= 0) & (target < log_p.shape[1] - 1)
    label = torch.where(exists, target, 0)[:, None, None, None]
    attended = torch.where(mask, -log_p.take_along_dim(label, 1)[:, 0], 0).sum((1, 2))  # eq. 4
    background = torch.where(mask, 0, -log_p[:, -1]).sum((1, 2))  # eq. 3
    w = mask.to(log_p.dtype).mean((1, 2))
    losses = ((1 - w) * attended + w * background) / mask.shape[1:].numel()  # eq. 2
    # NaN shows where a class does not exist, on a device that cannot raise.
    losses = torch.where(counts, losses * torch.where(exists, 1.0, torch.nan), 0)
    return losses.sum() / counts.sum().clamp_min(1)


def local_level_loss(
    activations: Tensor, mask: Tensor, target: Tensor, *, ignore_index: int = -100
) -> Tensor:
    return mean_loss(activations, mask, target, ignore_index).to(activations.dtype)
