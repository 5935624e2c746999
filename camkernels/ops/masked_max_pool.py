"""``masked_max_pool``: the strongest response of each channel inside a mask."""

from typing import Any

import torch
from torch import Tensor

from camkernels import _backend, reference
from camkernels._library import define_op, memory_format
from camkernels.ops import _checks
from camkernels.ops._autograd import first_order


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
    requested = _backend.setting()
    if _backend.resolve(name, requested, features.device, features.dtype) == "reference":
        return reference.masked_max_pool(features, mask)
    pooled: Tensor = _MaskedMaxPool.apply(features, mask, requested)
    return pooled


class _MaskedMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, mask: Tensor, requested: str) -> Tensor:
        pooled, index = torch.ops.camkernels.masked_max_pool_fwd(features, mask, requested)
        ctx.save_for_backward(mask, index)
        ctx.options = memory_format(features) == torch.channels_last, requested
        return pooled

    @staticmethod
    @first_order("masked_max_pool")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, index = ctx.saved_tensors
        grad_features = torch.ops.camkernels.masked_max_pool_bwd(grad, mask, index, *ctx.options)
        return grad_features, None, None


def _allocate_fwd(features: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """``index`` [N, C] is the pixel of the maximum."""
    images, channels, *_ = features.shape
    return features.new_empty((images, channels)), features.new_empty((images, channels), dtype=torch.int32)


def _allocate_bwd(grad: Tensor, mask: Tensor, index: Tensor, channels_last: bool) -> tuple[Tensor, ...]:
    return (
        torch.empty(
            (*grad.shape, *mask.shape[1:]),
            dtype=grad.dtype,
            device=grad.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        ),
    )


define_op("masked_max_pool_fwd", "Tensor features, Tensor mask", ("pooled", "index"), allocate=_allocate_fwd)
define_op(
    "masked_max_pool_bwd",
    "Tensor grad, Tensor mask, Tensor index, bool channels_last",
    ("grad_features",),
    allocate=_allocate_bwd,
)
