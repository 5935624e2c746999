"""``focus_area``: the region of an image that a network draws its features from."""

from typing import NamedTuple

import torch
from torch import Tensor

from camkernels import _checks, reference
from camkernels._op import Op
from camkernels._pass import Arguments, accumulate_dtype


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
    return FocusArea(*FOCUS_AREA(name, features))


def _allocate(a: Arguments) -> None:
    images, _, height, width = a.features.shape
    a.mask = a.features.new_empty(images, height, width, dtype=torch.bool)
    a.coverage = a.features.new_empty(images, dtype=accumulate_dtype(a.features.dtype))


FOCUS_AREA = Op(
    "focus_area",
    "Tensor features",
    outputs="mask coverage",
    allocate=_allocate,
    reference=reference.focus_area,
    backends=("reference", "cpu", "triton"),
)
