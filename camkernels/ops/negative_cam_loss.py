"""``fused_negative_cam_loss``: heatmaps of classes that an image does not show should be flat."""

import torch
from torch import Tensor

from camkernels import _checks
from camkernels._op import Op
from camkernels._pass import Arguments, Launch, accumulate_dtype, define_kernel, like, per_class
from camkernels.reference.negative_cam_loss import image_losses

KINDS = ("mse", "uniform")


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

    # Not min(): of sizes that torch.compile keeps open it makes a question.
    num_negatives = torch.sym_min(num_negatives, weight.shape[0])
    if logits is not None:
        logits = logits.detach()
        if logits.dtype == torch.float64:  # as the kernels compare them
            logits = logits.to(accumulate_dtype(features.dtype))
    uniform = kind == "uniform"
    found: tuple[Tensor, Tensor, Tensor] = NEGATIVE_CAM_LOSS(
        function, features, weight, target, bias, logits, num_negatives, uniform, level, temperature
    )
    return found


def positive_share(features: Tensor, positive: Tensor, counts: Tensor) -> Tensor:
    """How many of the chosen maps' pixels are above 0, from 0 to 1: a scalar in the accumulation type."""
    pixels = features.shape[2] * features.shape[3] * counts.sum()
    return positive.sum() / pixels.clamp_min(1).to(accumulate_dtype(features.dtype))


def _reference(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    num_negatives: int,
    uniform: bool,
    level: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if target.dim() == 1:
        _checks.classes_in_range("fused_negative_cam_loss", target, weight.shape[0])
    kind = "uniform" if uniform else "mse"
    losses, positive, counts = image_losses(
        features, weight, target, bias, logits, num_negatives, kind, level, temperature
    )
    return losses.sum() / max(features.shape[0], 1), positive, counts


def _allocate(a: Arguments) -> None:
    """``losses`` [N, K], what each chosen map adds to the loss; ``positive`` [N, K], pixels above 0 of each
    map; ``counts`` [N] of the chosen maps; ``chosen`` [N, K], the classes in order, then -1; ``kept``
    [N, K, H * W], the maps' gradient but for a factor per image."""
    features = a.features
    images, _, height, width = features.shape
    accumulate = accumulate_dtype(features.dtype)
    most = a.weight.shape[0] if a.target.dim() == 2 else max(a.weight.shape[0] - 1, 1)
    slots = torch.sym_min(a.num_negatives, most)
    a.losses = features.new_empty(images, slots, dtype=accumulate)
    a.positive = features.new_empty(images, slots, dtype=torch.int32)
    a.counts = features.new_empty(images, dtype=torch.int32)
    a.chosen = features.new_empty(images, slots, dtype=torch.int32)
    kept = (images, slots, height * width) if a.keep else (0,)
    a.kept = features.new_empty(kept, dtype=accumulate)


def _finish(a: Arguments) -> None:
    a.loss = a.losses.sum()


def _launch_fwd(launch: Launch, a: Arguments) -> None:
    present = a.target.dim() == 2 and a.target.dtype != torch.bool
    launch("negative_cam_loss_fwd", a, target=a.target != 0 if present else a.target)


def _launch_bwd(launch: Launch, a: Arguments) -> None:
    need_bias = a.need_bias
    if need_bias and a.uniform:  # a constant cancels in the softmax
        a.grad_bias.zero_()
        need_bias = False
    if a.need_features or a.need_weight or need_bias:
        launch("negative_cam_loss_bwd", a, need_bias=need_bias)


_BACKWARD = (
    "Tensor features, Tensor weight, Tensor grad_loss, Tensor chosen, Tensor counts, Tensor kept, "
    "bool uniform, float temperature"
)
_INPUTS = (
    "Tensor features, Tensor weight, Tensor target, Tensor? bias, Tensor? logits, SymInt num_negatives, "
    "bool uniform, float level, float temperature, bool keep"
)
NEGATIVE_CAM_LOSS = Op(
    "negative_cam_loss",
    _INPUTS,
    function="fused_negative_cam_loss",
    outputs="loss positive counts",
    kept="chosen kept",
    scratch="losses positive counts",
    allocate=_allocate,
    finish=_finish,
    reference=_reference,
    backward=_BACKWARD,
    gradients={"features": like("features"), "weight": like("weight"), "bias": per_class},
    flow=lambda a: {"loss": ("features", "weight", "bias")},
    launch_fwd=_launch_fwd,
    launch_bwd=_launch_bwd,
    backends=("reference", "cpu", "triton"),
)
define_kernel("negative_cam_loss_fwd", _INPUTS, "losses positive counts chosen kept")
define_kernel(
    "negative_cam_loss_bwd",
    f"{_BACKWARD}, bool need_features, bool need_weight, bool need_bias",
    "grad_features grad_weight grad_bias",
)
