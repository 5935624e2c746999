"""``fused_negative_cam_loss``: heatmaps of classes that an image does not show should be flat."""

from typing import Any

import torch
from torch import Tensor

from camkernels import _backend
from camkernels._library import define_op, memory_format
from camkernels.ops import _checks
from camkernels.ops._autograd import first_order
from camkernels.reference.cam import accumulate_dtype
from camkernels.reference.negative_cam_loss import image_losses as reference_image_losses

KINDS = ("mse", "uniform")
BACKENDS = ("reference", "cpu", "triton")


def fused_negative_cam_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    num_negatives: int = 100,
    kind: str = "mse",
    level: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """How far the heatmaps of an image's most likely wrong classes are from flat.

        M[n, l] = sum_c weight[l, c] * features[n, c] + bias[l], for the negatives l of image n only
        mse:     mean over images of the mean over negatives and pixels of (M - level)**2
        uniform: mean over images of the sum over negatives of KL(uniform || softmax(M / temperature)),
                 the softmax over pixels

        loss = fused_negative_cam_loss(
            features, classifier.weight, target, bias=classifier.bias, logits=logits
        )

    The negatives of an image are the ``num_negatives`` classes of largest logit among those that it does not
    show; equal logits in the order of classes. The choice itself has no gradient.

    Args:
        features: last feature maps, ``[N, C, H, W]``; NCHW or channels_last, read in place.
        weight: classifier weights, ``[L, C]`` or ``[L, C, 1, 1]``; may have another float dtype.
        target: class of each image, ``[N]``, int64 or int32; or ``[N, L]``, bool, integer or float, where a
            class whose entry is not 0 is no negative: 1 present, and -1 unknown. Soft labels, as of mixup or
            label smoothing, leave none: pass ``soft > 0.5``.
        bias: classifier bias, ``[L]``; give it where the classifier has one. The uniform kind depends on it
            in the choice only.
        logits: ``[N, L]``, whatever ranks the classes; None takes the mean of each map, which is the logit of
            a classifier on average-pooled features.
        num_negatives: at most so many per image; fewer where fewer are left, and an image with none adds 0.
        kind: ``"mse"`` or ``"uniform"``.
        level: what a map should be everywhere, for the mse kind only. The mean of a map is its logit on
            average-pooled features, so this is where the logits of negatives are drawn, too.
        temperature: of the softmax, for the uniform kind only; above 0.

    Returns:
        A scalar in the dtype of ``features``; in float16 what exceeds 65504 is infinite, where
        ``losses.HomogeneousNegativeCAMLoss`` returns float32. 0 for an empty batch.

    Gradients: ``features``, ``weight`` and ``bias`` (0 for the uniform kind). The chosen maps are kept once
        for backward; none is made for other classes. No double backward but with backend ``"reference"``.
    Numerics: float32 inside (float64 for float64); deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        IndexError: a class index outside [0, L) on the CPU; on a GPU the loss is NaN instead.

    Source: Sun et al., ECCV 2020. The uniform kind is the released code's less its constant, log(H * W) for
    each negative.
    """
    loss, *_ = loss_and_counts(
        "fused_negative_cam_loss",
        features,
        weight,
        target,
        bias,
        logits,
        num_negatives,
        kind,
        level,
        temperature,
    )
    return loss.to(features.dtype)


def loss_and_counts(
    function: str,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    num_negatives: int,
    kind: str,
    level: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, a scalar in the accumulation type; for ``positive_share``, without gradient, how many pixels
    of each map are above 0, [N, K], and how many maps each image has, [N]. Errors name ``function``."""
    features = _checks.features(function, features)
    weight = _checks.weight(function, weight, features)
    target = _checks.classes_or_multi_hot(function, target, features, weight)
    bias = _checks.bias(function, bias, weight)
    logits = _checks.class_scores(function, "logits", logits, features, weight)
    num_negatives = _checks.positive_int(function, "num_negatives", num_negatives)
    _checks.choice(function, "kind", kind, KINDS)
    level = _checks.finite(function, "level", level)
    temperature = _checks.in_open_interval(
        function, "temperature", temperature, 0, torch.inf, "above 0 and finite"
    )

    images, classes = features.shape[0], weight.shape[0]
    num_negatives = min(num_negatives, classes)
    accumulate = accumulate_dtype(features.dtype)
    if logits is not None:
        logits = logits.detach()
        if logits.dtype == torch.float64:  # as the kernels compare them
            logits = logits.to(accumulate)
    requested = _backend.setting()
    if _backend.resolve(function, requested, features.device, features.dtype, BACKENDS) == "reference":
        if target.dim() == 1:
            _checks.classes_in_range(function, target, classes)
        losses, positive, counts = reference_image_losses(
            features, weight, target, bias, logits, num_negatives, kind, level, temperature
        )
        return losses.sum() / max(images, 1), positive, counts
    if target.dim() == 2 and target.dtype != torch.bool:
        target = target != 0
    uniform = kind == "uniform"
    found: tuple[Tensor, Tensor, Tensor] = _NegativeCamLoss.apply(
        features,
        weight,
        target,
        bias,
        logits,
        num_negatives,
        uniform,
        level,
        temperature,
        torch.is_grad_enabled(),
        requested,
    )
    return found


def positive_share(features: Tensor, positive: Tensor, counts: Tensor) -> Tensor:
    """How many of the chosen maps' pixels are above 0, from 0 to 1: a scalar in the accumulation type."""
    pixels = features.shape[2] * features.shape[3] * counts.sum()
    return positive.sum() / pixels.clamp_min(1).to(accumulate_dtype(features.dtype))


class _NegativeCamLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        target: Tensor,  # [N], or [N, L] bool
        bias: Tensor | None,
        logits: Tensor | None,
        num_negatives: int,
        uniform: bool,
        level: float,
        temperature: float,
        grad_enabled: bool,
        requested: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_features, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        losses, chosen, counts, kept, positive = torch.ops.camkernels.negative_cam_loss_fwd(
            features,
            weight.flatten(1),
            target,
            bias,
            logits,
            num_negatives,
            uniform,
            level,
            temperature,
            grad_enabled and (need_features or need_weight or (need_bias and not uniform)),
            requested,
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(positive, counts)
        ctx.save_for_backward(features, weight, chosen, counts, kept)
        ctx.options = uniform, temperature, requested
        ctx.bias_dtype = None if bias is None else bias.dtype
        return losses.sum(), positive, counts

    @staticmethod
    @first_order("fused_negative_cam_loss")
    def backward(ctx: Any, grad: Tensor | None, *rest: None) -> tuple[Tensor | None, ...]:
        features, weight, chosen, counts, kept = ctx.saved_tensors
        uniform, temperature, requested = ctx.options
        need_features, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        if grad is None or not (need_features or need_weight or need_bias):
            return (None,) * 11
        grad_features = grad_weight = grad_bias = None
        summed = need_bias and not uniform
        if need_features or need_weight or summed:
            grad_features, grad_weight, grad_bias = torch.ops.camkernels.negative_cam_loss_bwd(
                features,
                weight.flatten(1),
                grad,
                chosen,
                counts,
                kept,
                uniform,
                temperature,
                need_features,
                need_weight,
                summed,
                requested,
            )
        if need_bias and uniform:  # a constant cancels in the softmax
            grad_bias = weight.new_zeros(weight.shape[0])
        return (
            grad_features if need_features else None,
            grad_weight.view(weight.shape) if grad_weight is not None and need_weight else None,
            None,
            grad_bias.to(ctx.bias_dtype) if grad_bias is not None and need_bias else None,
            *(None,) * 7,
        )


def _allocate_fwd(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    num_negatives: int,
    uniform: bool,
    level: float,
    temperature: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    """``losses`` [N, K], what each chosen map adds to the loss; ``chosen`` [N, K], the classes in order, then
    -1; ``counts`` [N] of them; ``kept`` [N, K, H * W], the maps' gradient but for a factor per image;
    ``positive`` [N, K], pixels above 0 of each map."""
    images, _, height, width = features.shape
    accumulate = accumulate_dtype(features.dtype)
    most = weight.shape[0] if target.dim() == 2 else max(weight.shape[0] - 1, 1)
    slots = (images, min(num_negatives, most))
    return (
        features.new_empty(slots, dtype=accumulate),
        features.new_empty(slots, dtype=torch.int32),
        features.new_empty(images, dtype=torch.int32),
        features.new_empty((*slots, height * width) if keep else (0,), dtype=accumulate),
        features.new_empty(slots, dtype=torch.int32),
    )


def _allocate_bwd(
    features: Tensor,
    weight: Tensor,
    grad: Tensor,
    chosen: Tensor,
    counts: Tensor,
    kept: Tensor,
    uniform: bool,
    temperature: float,
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
        weight.new_empty(weight.shape[0] if need_bias else nothing, dtype=accumulate_dtype(features.dtype)),
    )


define_op(
    "negative_cam_loss_fwd",
    "Tensor features, Tensor weight, Tensor target, Tensor? bias, Tensor? logits, int num_negatives, "
    "bool uniform, float level, float temperature, bool keep",
    ("losses", "chosen", "counts", "kept", "positive"),
    allocate=_allocate_fwd,
    backends=BACKENDS,
)
define_op(
    "negative_cam_loss_bwd",
    "Tensor features, Tensor weight, Tensor grad, Tensor chosen, Tensor counts, Tensor kept, bool uniform, "
    "float temperature, bool need_features, bool need_weight, bool need_bias",
    ("grad_features", "grad_weight", "grad_bias"),
    allocate=_allocate_bwd,
    backends=BACKENDS,
)
