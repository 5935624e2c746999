"""``focus_area``: the region of an image that a network draws its features from."""

from typing import NamedTuple

from torch import Tensor

from camkernels import reference
from camkernels.ops import _checks


class FocusArea(NamedTuple):
    """What ``focus_area`` returns."""

    mask: Tensor  # [N, H, W] bool
    coverage: Tensor  # [N]


def focus_area(features: Tensor) -> FocusArea:
    """Pixels whose channel mean exceeds the mean of the whole map, and how much of the image they are.

    Args:
        features: last feature maps, ``[N, C, H, W]``.

    Returns:
        ``FocusArea(mask, coverage)``: bool ``[N, H, W]``; the mean of the mask, ``[N]``, in float32
        (float64 for float64).

    Gradients: none.
    Backends: the reference serves every device, whatever ``use_backend`` says.

    Raises:
        TypeError: ``features`` is not a float tensor.
        ValueError: ``features`` is not ``[N, C, H, W]`` with at least one channel and pixel.

    Source: Chen et al., NeurIPS 2021, §3.
    """
    return FocusArea(*reference.focus_area(_checks.features("focus_area", features)))
