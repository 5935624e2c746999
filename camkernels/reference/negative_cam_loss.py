"""Negative CAMs made flat: the homogeneous negative CAM (HNC) loss."""

import torch
from torch import Tensor

from camkernels.reference.cam import raw_maps


def candidates(target: Tensor, classes: int) -> Tensor:
    """[N, L]: whether a class is a negative of an image. A class index that does not exist has none."""
    if target.dim() == 2:
        return target == 0
    label = torch.arange(classes, device=target.device)
    exists = (target >= 0) & (target < classes)
    return (label != target[:, None]) & exists[:, None]


def negative_maps(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    num_negatives: int,
) -> tuple[Tensor, Tensor]:
    """Raw maps of the classes that are no target, [N, K, H, W], and which of them count, [N, K]."""
    maps = raw_maps(features, weight, None, bias)  # [N, L, H, W]
    key = maps.sum((-2, -1)) if logits is None else logits.to(maps.dtype)  # [N, L]
    negative = candidates(target, weight.shape[0])
    # Stable: equal logits in the order of classes. Then the negatives before the others.
    order = key.detach().sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, negative.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    chosen = order[:, :num_negatives]
    image = torch.arange(len(chosen), device=chosen.device)[:, None]
    return maps[image, chosen], negative.gather(1, chosen)


def image_losses(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    num_negatives: int,
    kind: str,
    level: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each image, [N] in the accumulation type; how many pixels of each map are positive, [N, K];
    how many maps of each image count, [N]."""
    maps, counted = negative_maps(features, weight, target, bias, logits, num_negatives)
    # A map that does not count is left out before it is squared: it may hold inf or NaN.
    maps = torch.where(counted[..., None, None], maps, 0)
    positive, counts = (maps > 0).sum((-2, -1)), counted.sum(1)
    if kind == "mse":
        loss = (maps - level).square().mean((-2, -1))  # [N, K]
        divisor = counts.clamp_min(1)  # [N]
    else:
        z = (maps / temperature).flatten(2)
        # KL(uniform || softmax), less cancellation: of a constant map exactly 0.
        fall = z - z.amax(2, keepdim=True).detach()
        loss = fall.exp().mean(2).log() - fall.mean(2)
        divisor = torch.ones_like(loss[:, 0])
    losses = torch.where(counted, loss, 0).sum(1) / divisor
    if target.dim() == 1:  # NaN shows where a class does not exist, on a device that cannot raise
        exists = (target >= 0) & (target < weight.shape[0])
        losses = torch.where(exists, losses, torch.nan)
    return losses, positive, counts


def negative_cam_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    num_negatives: int = 100,
    kind: str = "mse",
    level: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    losses, *_ = image_losses(features, weight, target, bias, logits, num_negatives, kind, level, temperature)
    return (losses.sum() / max(len(losses), 1)).to(features.dtype)
