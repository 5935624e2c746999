"""``masked_max_pool``: the strongest response of each channel inside a mask."""

import torch
from torch import Tensor

from camkernels import _checks, reference
from camkernels._op import Op
from camkernels._pass import Arguments, empty_maps, memory_format


def masked_max_pool(features: Tensor, mask: Tensor) -> Tensor:
    """The spatial maximum of ``mask * features``: features of the attended object.

        pooled[n, c] = max over pixels of mask[n] * features[n, c]

        logits = object_classifier(masked_max_pool(features, otsu_mask(attention).mask))

    Pixels outside the mask count as 0, as the paper has it: only where the mask is full can a maximum be
    negative.

    Args:
        features: ``[N, C, H, W]``; NCHW or channels_last, read in place.
        mask: ``[N, H, W]``, bool.

    Returns:
        ``[N, C]`` in the dtype of ``features``. A NaN, or infinity outside the mask, gives NaN.

    Gradients: ``features``, at the pixel of the maximum, of equal ones the first; 0 where that lies outside
        the mask. No double backward but with backend ``"reference"``.
    Numerics: exact; deterministic.

    Raises:
        TypeError: ``features`` is not a float tensor, or ``mask`` not a bool one.
        ValueError: a wrong shape or device.

    Source: Shen and Liu, "Generating Attention from Classifier Activations for Fine-grained Recognition",
    §4.4.2.
    """
    name = "masked_max_pool"
    features = _checks.features(name, features)
    mask = _checks.mask(name, mask, features)
    pooled: Tensor = MASKED_MAX_POOL(name, features, mask)
    return pooled


def _allocate(a: Arguments) -> None:
    """``index`` [N, C] is the pixel of the maximum."""
    images, channels, *_ = a.features.shape
    a.pooled = a.features.new_empty(images, channels)
    a.index = a.features.new_empty(images, channels, dtype=torch.int32)


def _grad_features(a: Arguments) -> Tensor:
    """Of ``features`` backward needs no value, only how they lay."""
    return empty_maps(a.grad_pooled, a.channels_last, *a.grad_pooled.shape, *a.mask.shape[1:])


MASKED_MAX_POOL = Op(
    "masked_max_pool",
    "Tensor features, Tensor mask",
    outputs="pooled",
    kept="index",
    allocate=_allocate,
    reference=reference.masked_max_pool,
    backward="Tensor grad_pooled, Tensor mask, Tensor index, bool channels_last",
    gradients={"features": _grad_features},
    save={"channels_last": lambda a: memory_format(a.features) == torch.channels_last},
    backends=("reference", "cpu", "triton"),
)
