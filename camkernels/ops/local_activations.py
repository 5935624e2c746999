"""``fused_local_activations``: the best of several classifiers for each class and pixel."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from camkernels import _backend, reference
from camkernels._library import define_op, memory_format, readable
from camkernels.ops import _checks
from camkernels.ops._autograd import first_order
from camkernels.reference.cam import accumulate_dtype

BACKENDS = ("reference", "cpu", "triton")


class LocalActivations(NamedTuple):
    """What ``fused_local_activations`` returns."""

    activations: Tensor  # [N, L + 1, H, W]
    attention: Tensor  # [N, H, W]


def fused_local_activations(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> LocalActivations:
    """Several linear classifiers at every pixel, the greatest of them for each class, and the greatest class.

        activations[n, l] = max_k (sum_c weight[k, l, c] * features[n, c] + bias[k, l])
        attention[n]      = max_{l < L} activations[n, l]

        activations, attention = fused_local_activations(features, weight, bias)

    The volume of all classifiers, ``[N, n * (L + 1), H, W]``, is never made: of each class and pixel only the
    winning activation and which classifier won, one byte, leave the kernel.

    Args:
        features: last feature maps, ``[N, C, H, W]``; NCHW or channels_last, read in place.
        weight: n classifiers, ``[n, L + 1, C]``, n from 1 to 256; the last class is the background. May have
            another float dtype. That of a 1 x 1 convolution is ``conv.weight.view(n, L + 1, C)``.
        bias: ``[n, L + 1]``.

    Returns:
        ``LocalActivations(activations, attention)``: ``[N, L + 1, H, W]`` and ``[N, H, W]``, contiguous, in
        the dtype of ``features``. ``attention`` is what ``otsu_mask`` splits into object and background.

    Gradients: ``features``, ``weight`` and ``bias``, of the winning classifier at each pixel and class; equal
        activations give it to the lowest classifier, equal classes of ``attention`` to the lowest class. No
        double backward but with backend ``"reference"``.
    Numerics: float32 inside (float64 for float64); a NaN wins; deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape or device.

    Source: Shen and Liu, "Generating Attention from Classifier Activations for Fine-grained Recognition",
    §4.2-4.3, eq. 1.
    """
    name = "fused_local_activations"
    features = _checks.features(name, features)
    weight = _checks.local_weight(name, weight, features)
    bias = _checks.local_bias(name, bias, weight)
    requested = _backend.setting()
    if _backend.resolve(name, requested, features.device, features.dtype, BACKENDS) == "reference":
        return LocalActivations(*reference.local_activations(features, weight, bias))
    return LocalActivations(
        *_LocalActivations.apply(features, weight, bias, torch.is_grad_enabled(), requested)
    )


class _LocalActivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, grad_enabled: bool, requested: str
    ) -> tuple[Tensor, Tensor]:
        keep = grad_enabled and any(ctx.needs_input_grad[:3])
        activations, attention, winner, attention_class = torch.ops.camkernels.local_activations_fwd(
            features, weight, bias, keep, requested
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, weight, winner, attention_class)
        ctx.requested = requested
        ctx.bias_dtype = None if bias is None else bias.dtype
        return activations, attention

    @staticmethod
    @first_order("fused_local_activations")
    def backward(
        ctx: Any, grad_activations: Tensor | None, grad_attention: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        features, weight, winner, attention_class = ctx.saved_tensors
        need_features, need_weight, need_bias, *_ = ctx.needs_input_grad
        if grad_activations is None and grad_attention is None:
            return (None,) * 5
        grad_features, grad_weight, grad_bias = torch.ops.camkernels.local_activations_bwd(
            features,
            weight,
            grad_activations,
            grad_attention,
            winner,
            attention_class,
            need_features,
            need_weight,
            need_bias,
            ctx.requested,
        )
        return (
            grad_features if need_features else None,
            grad_weight if need_weight else None,
            grad_bias.to(ctx.bias_dtype) if need_bias else None,
            None,
            None,
        )


def _allocate_fwd(features: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    """``winner`` [N, L + 1, H, W] is the classifier of each activation, ``attention_class`` [N, H, W] the
    class of each attention."""
    images, _, height, width = features.shape
    activations = (images, weight.shape[1], height, width)
    attention = (images, height, width)
    nothing = (0,)
    return (
        features.new_empty(activations),
        features.new_empty(attention),
        features.new_empty(activations if keep else nothing, dtype=torch.uint8),
        features.new_empty(attention if keep else nothing, dtype=torch.int32),
    )


def _prepare_bwd(
    features: Tensor,
    weight: Tensor,
    grad_activations: Tensor | None,
    grad_attention: Tensor | None,
    *rest: Any,
) -> tuple[Any, ...]:
    """Activations are contiguous, so their gradient is read only so."""
    return (
        readable(features),
        weight.contiguous(),
        None if grad_activations is None else grad_activations.contiguous(),
        None if grad_attention is None else grad_attention.contiguous(),
        *rest,
    )


def _allocate_bwd(
    features: Tensor,
    weight: Tensor,
    grad_activations: Tensor | None,
    grad_attention: Tensor | None,
    winner: Tensor,
    attention_class: Tensor,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    nothing = (0,)
    return (
        torch.empty_like(features, memory_format=memory_format(features))
        if need_features
        else features.new_empty(nothing),
        torch.empty_like(weight) if need_weight else weight.new_empty(nothing),
        weight.new_empty(weight.shape[:2] if need_bias else nothing, dtype=accumulate_dtype(features.dtype)),
    )


define_op(
    "local_activations_fwd",
    "Tensor features, Tensor weight, Tensor? bias, bool keep",
    ("activations", "attention", "winner", "attention_class"),
    allocate=_allocate_fwd,
    backends=BACKENDS,
)
define_op(
    "local_activations_bwd",
    "Tensor features, Tensor weight, Tensor? grad_activations, Tensor? grad_attention, Tensor winner, "
    "Tensor attention_class, bool need_features, bool need_weight, bool need_bias",
    ("grad_features", "grad_weight", "grad_bias"),
    allocate=_allocate_bwd,
    prepare=_prepare_bwd,
    backends=BACKENDS,
)
