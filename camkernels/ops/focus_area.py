"""``focus_area``: the region of an image that a network draws its features from."""

from typing import NamedTuple

import torch
from torch import Tensor

from camkernels import _backend, reference
from camkernels._library import define_op
from camkernels.ops import _checks
from camkernels.reference.cam import accumulate_dtype

BACKENDS = ("reference", "cpu", "triton")


class FocusArea(NamedTuple):
    """What ``focus_area`` returns."""

    mask: Tensor  # [N, H, W] bool
    coverage: Tensor  # [N]


def focus_area(features: Tensor) -> FocusArea:
    """Pixels whose channel mean exceeds the mean of the whole map, and how much of the image they are.

        mask, coverage = focus_area(features)

    Args:
        features: last feature maps, ``[N, C, H, W]``; NCHW or channels_last, read in place.

    Returns:
        ``FocusArea(mask, coverage)``: bool ``[N, H, W]``; the mean of the mask, ``[N]``, in float32
        (float64 for float64). A map that is constant, or holds a NaN, has an empty mask.

    Gradients: none.
    Numerics: float32 inside (float64 for float64); deterministic.

    Raises:
        TypeError: ``features`` is not a float tensor.
        ValueError: ``features`` is not ``[N, C, H, W]`` with at least one channel and pixel.

    Source: Chen et al., NeurIPS 2021, §3.
    """
    name = "focus_area"
    features = _checks.features(name, features).detach()
    requested = _backend.setting()
    if _backend.resolve(name, requested, features.device, features.dtype, BACKENDS) == "reference":
        return FocusArea(*reference.focus_area(features))
    return FocusArea(*torch.ops.camkernels.focus_area_fwd(features, requested))


def _allocate(features: Tensor) -> tuple[Tensor, ...]:
    images, _, height, width = features.shape
    return (
        features.new_empty((images, height, width), dtype=torch.bool),
        features.new_empty(images, dtype=accumulate_dtype(features.dtype)),
    )


define_op("focus_area_fwd", "Tensor features", ("mask", "coverage"), allocate=_allocate, backends=BACKENDS)
