"""Otsu's threshold of many maps at once, as scikit-image computes it for one: DLA §4.3."""

from itertools import accumulate

import torch
from torch import Tensor

from camkernels.reference.cam import accumulate_dtype


def running_sum(values: Tensor) -> Tensor:
    """One addition after another along the last dimension. ``torch.cumsum`` may add in another order or type,
    and then thresholds that are equally good no longer tie."""
    return torch.stack(list(accumulate(values.unbind(-1))), -1)


def histogram(values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """How many of each row's ``values``, [M, P], lie in each of ``bins`` equal bins from its least to its
    greatest value, and the bins' edges, [M, bins + 1]."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    span, index = high - low, torch.arange(bins, device=values.device, dtype=values.dtype)
    step = span / bins
    edges = torch.where(step == 0, index / bins * span, index * step) + low
    edges = torch.cat([edges, high], 1)
    bin_of = ((values - low) / span * bins).nan_to_num(0).long().clamp(0, bins - 1)
    # Rounding may have moved a value that lies close to an edge across it.
    bin_of = (bin_of - (values < edges.gather(1, bin_of)).long()).clamp_min(0)
    bin_of = bin_of + ((bin_of < bins - 1) & (values >= edges.gather(1, bin_of + 1))).long()
    counts = torch.zeros_like(edges[:, 1:], dtype=torch.int64)
    return counts.scatter_add_(1, bin_of, torch.ones_like(bin_of)), edges


def otsu_mask(maps: Tensor, *, bins: int = 256) -> tuple[Tensor, Tensor]:
    values = maps.detach().flatten(-2).to(accumulate_dtype(maps.dtype))
    shape, values = values.shape[:-1], values.flatten(0, -2) if values.dim() > 1 else values[None]  # [M, P]
    low, high = values.amin(1), values.amax(1)

    counts, edges = histogram(values, bins)
    centers = (edges[:, :-1] + edges[:, 1:]) / 2
    count = counts.float()  # in float32 for every dtype, as there
    pixels, values_sum = running_sum(count), running_sum(count * centers)  # of the bins up to each
    pixels_above = running_sum(count.flip(1)).flip(1)  # of the bins from each on
    values_sum_above = running_sum((count * centers).flip(1)).flip(1)
    difference = (values_sum / pixels)[:, :-1] - (values_sum_above / pixels_above)[:, 1:]  # of the means
    between = pixels[:, :-1] * pixels_above[:, 1:] * (difference * difference)  # variance between the classes
    threshold = centers.gather(1, between.argmax(1, keepdim=True))[:, 0]

    threshold = torch.where(low == high, low, threshold)
    threshold = torch.where((high - low).isfinite(), threshold, torch.nan)
    threshold = threshold.view(shape).to(maps.dtype)
    return maps > threshold[..., None, None], threshold
