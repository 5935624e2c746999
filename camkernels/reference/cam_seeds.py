"""Seed pixels of the peak of a class activation map: I2C §3.1."""

import torch
from torch import Tensor

from camkernels.reference.cam import normalised_maps


def cam_seeds(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    num_seeds: int,
    *,
    seed_features: Tensor | None = None,
    threshold: float = 0.7,
    sampling: str = "random",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seed_features = features if seed_features is None else seed_features
    cam = normalised_maps(features, weight, target, eps)  # [N, H, W]
    heat = cam.detach().flatten(1)  # [N, H * W]
    if sampling == "first":
        noise = torch.zeros_like(heat)
    elif noise is None:
        noise = torch.rand(heat.shape, generator=generator, device=heat.device, dtype=torch.float32)

    candidate = heat > threshold
    count = candidate.sum(1)
    # Stable: of equal keys the lower index comes first, with equal keys everywhere the raster order.
    by_key = noise.sort(dim=1, descending=True, stable=True).indices
    candidates_first = candidate.gather(1, by_key).sort(dim=1, descending=True, stable=True).indices
    order = by_key.gather(1, candidates_first)
    turn = torch.arange(num_seeds, device=heat.device) % count.clamp_min(1)[:, None]  # [N, num_seeds]
    peak = heat.argmax(1, keepdim=True)
    indices = torch.where(count[:, None] > 0, order.gather(1, turn), peak)

    pixels = seed_features.flatten(2).mT  # [N, H * W, D]
    vectors = pixels.take_along_dim(indices[..., None], 1)  # [N, num_seeds, D]
    return vectors, indices, count, cam.to(features.dtype)
