"""Mean distance of the seed vectors of two images of one class: I2C eq. 1."""

import torch
from torch import Tensor

from camkernels.reference.cam import accumulate_dtype


def mean_distance(vectors: Tensor, target: Tensor, pairs: str, squared: bool) -> Tensor:
    """A scalar in the accumulation type."""
    images, seeds, _ = vectors.shape
    first, second = torch.triu_indices(images, images, 1, device=vectors.device)
    same = target[first] == target[second]  # [pairs]
    if pairs == "adjacent":
        same = same & (first % 2 == 0) & (second == first + 1)
    wide = vectors.to(accumulate_dtype(vectors.dtype))
    # What is no pair is left out before it is squared: it may hold inf or NaN.
    difference = torch.where(same[:, None, None], wide[first] - wide[second], 0)  # [pairs, K, D]
    # A norm has the subgradient 0 at 0.
    distance = difference.square().sum(-1) if squared else torch.linalg.vector_norm(difference, dim=-1)
    return distance.sum() / (seeds * same.sum()).clamp_min(1)


def stochastic_consistency(
    vectors: Tensor, target: Tensor, *, pairs: str = "all", squared: bool = True
) -> Tensor:
    return mean_distance(vectors, target, pairs, squared).to(vectors.dtype)
