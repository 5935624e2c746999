"""``otsu_mask``: maps split in two where their values fall apart best."""

from typing import NamedTuple

import torch
from torch import Tensor

from camkernels import _checks, reference
from camkernels._op import Op
from camkernels._pass import Arguments


class OtsuMask(NamedTuple):
    """What ``otsu_mask`` returns."""

    mask: Tensor  # [..., H, W] bool
    threshold: Tensor  # [...]


def otsu_mask(maps: Tensor, *, bins: int = 256) -> OtsuMask:
    """Otsu's threshold of each map, and the pixels above it.

        mask, threshold = otsu_mask(attention)

    Args:
        maps: ``[..., H, W]``, each with a histogram of its own, from its least to its greatest value.
        bins: of the histogram, 2 to 4096.

    Returns:
        ``OtsuMask(mask, threshold)``: bool ``[..., H, W]``, and ``[...]`` in the dtype of ``maps``.
        ``threshold`` is, to the last bit, what ``skimage.filters.threshold_otsu(map, nbins=bins)`` gives for
        the map in float32 (float64 for float64), rounded to the dtype of ``maps``; ``mask`` is
        ``maps > threshold`` as returned. A constant map has its value as threshold and an empty mask. A map
        that holds a NaN, or whose range is infinite, has a NaN and an empty mask; scikit-image refuses these,
        and maps whose range is too small for so many bins, which have a threshold here. Pictures of integers
        it bins by their values.

    Gradients: none.
    Numerics: float32 inside (float64 for float64); deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: ``maps`` is not ``[..., H, W]`` with at least one pixel, or ``bins`` is out of range.

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979; Shen and Liu, "Generating
    Attention from Classifier Activations for Fine-grained Recognition", §4.3.
    """
    name = "otsu_mask"
    maps = _checks.maps(name, maps).detach()
    bins = _checks.bins(name, bins)
    mask, threshold = OTSU_MASK(name, maps.reshape(-1, maps.shape[-2] * maps.shape[-1]), bins)
    return OtsuMask(mask.view(maps.shape), threshold.view(maps.shape[:-2]))


def _reference(maps: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    mask, threshold = reference.otsu_mask(maps[:, None], bins=bins)
    return mask[:, 0], threshold


def _allocate(a: Arguments) -> None:
    """For ``maps`` [M, P]."""
    a.mask = torch.empty_like(a.maps, dtype=torch.bool)
    a.threshold = a.maps.new_empty(a.maps.shape[0])


OTSU_MASK = Op(
    "otsu_mask",
    "Tensor maps, int bins",
    outputs="mask threshold",
    allocate=_allocate,
    reference=_reference,
    backends=("reference", "cpu", "triton"),
)
