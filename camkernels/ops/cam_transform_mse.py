"""``fused_cam_transform_mse``: do heatmaps follow the transform of their image?"""

from typing import Any

import torch
from torch import Tensor

from camkernels import _backend
from camkernels._library import define_op, memory_format
from camkernels.ops import _checks
from camkernels.ops._autograd import first_order
from camkernels.reference.cam import accumulate_dtype
from camkernels.reference.cam_transform_mse import mean_squares as reference_mean_squares
from camkernels.reference.cam_transform_mse import reduce
from camkernels.transforms import Affine, Scale, Transform

# How the two maps meet, as the kernels are told.
ONE_GRID, COMMON_NEAREST, COMMON_BILINEAR = range(3)


def fused_cam_transform_mse(
    features: Tensor,
    features_t: Tensor,
    weight: Tensor,
    transform: Transform,
    *,
    detach_weight: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """How far the heatmaps of transformed images are from the transformed heatmaps: their mean squared
    difference, for all classes at once.

        loss[n, l] = mean over valid cells of (T(M) - M')**2
        M = sum_c weight[l, c] * features[n, c],  M' the same of features_t

        flip = camkernels.transforms.HorizontalFlip()
        loss = fused_cam_transform_mse(backbone(images), backbone(flip(images)), classifier.weight, flip)

    Args:
        features: last feature maps of the images, ``[N, C, H, W]``; NCHW or channels_last, read in place.
        features_t: those of ``transform(images)``, ``[N, C, H', W']``, in the dtype of ``features``. H' and
            W' are H and W, changed over for a quarter turn; for ``Scale`` any.
        weight: classifier weights, ``[L, C]`` or ``[L, C, 1, 1]``; may have another float dtype.
        transform: one of ``camkernels.transforms``, the one that the images went through.
        detach_weight: leave the classifier out of the gradient, as the released VAC code does.
        reduction: ``"mean"`` and ``"sum"`` over images and classes; ``"none"`` gives each map's mean.

    Returns:
        A scalar, or ``[N, L]`` for ``"none"``, in the dtype of ``features``; in float16 what exceeds 65504 is
        infinite, where ``losses.AttentionConsistencyLoss`` returns float32. 0 for an empty batch, and for a
        map of which no cell is valid.

    Gradients: ``features``, ``features_t`` and, unless detached, ``weight``. At most one map per image and
        class is kept for backward. No double backward.
    Numerics: float32 inside (float64 for float64); deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or value.

    Source: Guo et al., CVPR 2019, eq. 5; for ``Scale`` §3.3.
    """
    name = "fused_cam_transform_mse"
    _checks.choice(name, "reduction", reduction, ("none", "mean", "sum"))
    means = mean_squares(name, features, features_t, weight, transform, detach_weight)
    return reduce(means, reduction).to(features.dtype)


def mean_squares(
    function: str,
    features: Tensor,
    features_t: Tensor,
    weight: Tensor,
    transform: Transform,
    detach_weight: bool,
) -> Tensor:
    """One mean per map, ``[N, L]``, float32 for half types; ``function`` is whom errors name."""
    features = _checks.features(function, features)
    features_t = _checks.features(function, features_t, "features_t")
    weight = _checks.weight(function, weight, features)
    given: object = transform
    if not isinstance(given, Transform):
        what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise TypeError(f"{function}: transform is {what}; it must be one of camkernels.transforms")
    _checks.flag(function, "detach_weight", detach_weight)
    _check_pair(function, features, features_t, transform)

    requested = _backend.setting()
    if _backend.resolve(function, requested, features.device, features.dtype) == "reference":
        return reference_mean_squares(features, features_t, weight, transform, detach_weight)
    matrix = None
    whole: list[int] = []
    fractions: list[float] = []
    comparison = ONE_GRID
    if isinstance(transform, Affine):
        matrix = transform.matrix.view(-1, 2, 3)
    elif isinstance(transform, Scale):
        comparison = COMMON_NEAREST if transform.mode == "nearest" else COMMON_BILINEAR
    else:
        found = transform.resampling(*features.shape[-2:])
        if found is None:
            raise TypeError(
                f"{function}: transform is a {type(transform).__name__}, of which the kernels know nothing; "
                "camkernels.use_backend('reference') takes any Transform"
            )
        whole, fractions = found.flat()
    weight = weight.detach() if detach_weight else weight
    means: Tensor = _CamTransformMse.apply(
        features, features_t, weight, matrix, whole, fractions, comparison, requested
    )
    return means


def _check_pair(function: str, features: Tensor, features_t: Tensor, transform: Transform) -> None:
    if features_t.dtype != features.dtype:
        theirs, ours = (str(x.dtype).removeprefix("torch.") for x in (features, features_t))
        raise TypeError(f"{function}: features_t has dtype {ours} and features {theirs}; they must be equal")
    for dim, what in ((0, "images"), (1, "channels")):
        if features_t.shape[dim] != features.shape[dim]:
            raise ValueError(
                f"{function}: features_t has {features_t.shape[dim]} {what} and features "
                f"{features.shape[dim]}; they must be equal"
            )
    _checks.same_device(function, "features_t", features_t, features)
    if isinstance(transform, Scale):
        return
    found = transform.resampling(*features.shape[-2:])
    size = tuple(features.shape[-2:]) if found is None else found.size
    if tuple(features_t.shape[-2:]) != size:
        height, width = features.shape[-2:]
        raise ValueError(
            f"{function}: features_t has maps of {features_t.shape[-2]} x {features_t.shape[-1]}; "
            f"{type(transform).__name__} makes {size[0]} x {size[1]} of the {height} x {width} of features"
        )
    if isinstance(transform, Affine):
        _checks.same_device(function, "the matrix of transform", transform.matrix, features)
        if transform.matrix.dim() == 3 and transform.matrix.shape[0] != features.shape[0]:
            raise ValueError(
                f"{function}: the matrix of transform has {transform.matrix.shape[0]} images and features "
                f"{features.shape[0]}; they must be equal"
            )


class _CamTransformMse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        features_t: Tensor,
        weight: Tensor,
        matrix: Tensor | None,  # [1 or N, 2, 3]
        whole: list[int],
        fractions: list[float],
        comparison: int,
        requested: str,
    ) -> Tensor:
        keep = any(ctx.needs_input_grad[:3])
        means, kept = torch.ops.camkernels.cam_transform_mse_fwd(
            features, features_t, weight.flatten(1), matrix, whole, fractions, comparison, keep, requested
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, features_t, weight, matrix, kept)
        ctx.options = whole, fractions, comparison, requested
        result: Tensor = means
        return result

    @staticmethod
    @first_order("fused_cam_transform_mse")
    def backward(ctx: Any, grad_means: Tensor | None) -> tuple[Tensor | None, ...]:
        features, features_t, weight, matrix, kept = ctx.saved_tensors
        whole, fractions, comparison, requested = ctx.options
        needed = ctx.needs_input_grad[:3]
        if grad_means is None or not any(needed):
            return (None,) * 8
        grads = torch.ops.camkernels.cam_transform_mse_bwd(
            grad_means,
            features,
            features_t,
            weight.flatten(1),
            matrix,
            kept,
            whole,
            fractions,
            comparison,
            *needed,
            requested,
        )
        grad_features, grad_features_t, grad_weight = (
            grad if need else None for grad, need in zip(grads, needed, strict=True)
        )
        if grad_weight is not None:
            grad_weight = grad_weight.view(weight.shape)
        return grad_features, grad_features_t, grad_weight, *(None,) * 5


def _allocate_fwd(
    features: Tensor,
    features_t: Tensor,
    weight: Tensor,
    matrix: Tensor | None,
    whole: list[int],
    fractions: list[float],
    comparison: int,
    keep: bool,
) -> tuple[Tensor, ...]:
    """``means`` [N, L]; ``kept`` [N, L, cells]: on one grid the differences T(M) - M', 0 where a cell is not
    valid; for a common grid the larger one of the two maps (M if they are equal), raw."""
    accumulate = accumulate_dtype(features.dtype)
    images, classes = features.shape[0], weight.shape[0]
    cells = features_t.shape[2] * features_t.shape[3]
    if comparison != ONE_GRID:
        cells = max(cells, features.shape[2] * features.shape[3])
    kept = (images, classes, cells) if keep else (0,)
    return (
        features.new_empty((images, classes), dtype=accumulate),
        features.new_empty(kept, dtype=accumulate),
    )


def _allocate_bwd(
    grad_means: Tensor,
    features: Tensor,
    features_t: Tensor,
    weight: Tensor,
    matrix: Tensor | None,
    kept: Tensor,
    whole: list[int],
    fractions: list[float],
    comparison: int,
    need_features: bool,
    need_features_t: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor, needed: bool) -> Tensor:
        if not needed:
            return tensor.new_empty(0)
        return torch.empty_like(tensor, memory_format=memory_format(tensor))

    return like(features, need_features), like(features_t, need_features_t), like(weight, need_weight)


def _suits_cuda(features: Tensor, features_t: Tensor, weight: Tensor, comparison: int) -> bool:
    """Maps that fit into shared memory on every GPU that the kernels are built for; and of half types no more
    classes than Triton would need matrix units for."""
    cells = features_t.shape[2] * features_t.shape[3]
    if comparison != ONE_GRID:
        cells += features.shape[2] * features.shape[3]
    return cells <= 8192 and (features.dtype == torch.float32 or weight.shape[0] < 64)


define_op(
    "cam_transform_mse_fwd",
    "Tensor features, Tensor features_t, Tensor weight, Tensor? matrix, int[] whole, float[] fractions, "
    "int comparison, bool keep",
    ("means", "kept"),
    allocate=_allocate_fwd,
    suits_cuda=lambda features, features_t, weight, matrix, whole, fractions, comparison, keep: _suits_cuda(
        features, features_t, weight, comparison
    ),
)
define_op(
    "cam_transform_mse_bwd",
    "Tensor grad_means, Tensor features, Tensor features_t, Tensor weight, Tensor? matrix, Tensor kept, "
    "int[] whole, float[] fractions, int comparison, bool need_features, bool need_features_t, "
    "bool need_weight",
    ("grad_features", "grad_features_t", "grad_weight"),
    allocate=_allocate_bwd,
    suits_cuda=lambda grad, features, features_t, weight, matrix, kept, whole, fractions, comparison, *rest: (
        _suits_cuda(features, features_t, weight, comparison)
    ),
)
