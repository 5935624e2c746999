"""``fused_cam_transform_mse``: do heatmaps follow the transform of their image?"""

from typing import Any

import torch
from torch import Tensor

from camkernels import _checks
from camkernels._op import Op
from camkernels._pass import Arguments, accumulate_dtype, define_kernel, like
from camkernels.reference.cam_transform_mse import mean_squares as reference_mean_squares
from camkernels.reference.cam_transform_mse import reduce
from camkernels.transforms import (
    Affine,
    HorizontalFlip,
    Rotate90,
    Scale,
    Transform,
    Translate,
    VerticalFlip,
)

# How the two maps meet, as the kernels are told.
ONE_GRID = 0
COMMON_GRIDS = {"nearest": 1, "bilinear": 2}


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
        class is kept for backward. No double backward but with backend ``"reference"``.
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

    weight = weight.detach() if detach_weight else weight
    if (
        CAM_TRANSFORM_MSE.backend(function, features) == "reference"
    ):  # which takes a transform of the user's own
        return reference_mean_squares(features, features_t, weight, transform)
    matrix = transform.matrix.view(-1, 2, 3) if isinstance(transform, Affine) else None
    means: Tensor = CAM_TRANSFORM_MSE(
        function, features, features_t, weight, matrix, *_told(function, transform)
    )
    return means


def _told(function: str, transform: Transform) -> tuple[str, float, float]:
    """The transform in words that an op takes: a name and two numbers."""
    if isinstance(transform, Scale):
        return transform.mode, 0.0, 0.0
    if isinstance(transform, Translate):
        return "Translate", _checks.as_float(transform.dx), _checks.as_float(transform.dy)
    if isinstance(transform, Rotate90):
        return "Rotate90", float(transform.k), 0.0
    for kind in (HorizontalFlip, VerticalFlip, Affine):
        if isinstance(transform, kind):
            return kind.__name__, 0.0, 0.0
    raise TypeError(
        f"{function}: transform is a {type(transform).__name__}, of which the kernels know nothing; "
        "camkernels.use_backend('reference') takes any Transform"
    )


def _understood(transform: str, dx: float, dy: float, matrix: Tensor | None) -> Transform:
    """The transform that was told."""
    if transform in COMMON_GRIDS:
        return Scale(1, transform)  # of its size nothing depends
    if transform == "Translate":
        return Translate(dx, dy)
    if transform == "Rotate90":
        return Rotate90(int(dx))
    if matrix is not None:
        return Affine(matrix if matrix.shape[0] > 1 else matrix[0])
    return {"HorizontalFlip": HorizontalFlip, "VerticalFlip": VerticalFlip}[transform]()


def _reference(
    features: Tensor,
    features_t: Tensor,
    weight: Tensor,
    matrix: Tensor | None,
    transform: str,
    dx: float,
    dy: float,
) -> Tensor:
    return reference_mean_squares(features, features_t, weight, _understood(transform, dx, dy, matrix))


def _geometry(a: Arguments) -> dict[str, Any]:
    """What launchers are told: where each cell comes from, in numbers, and how the two maps meet."""
    found = _understood(a.transform, a.dx, a.dy, a.matrix).resampling(*a.features.shape[-2:])
    whole, fractions = ([0] * 9, [0.0] * 2) if found is None else found.flat()
    return {
        "whole": whole,
        "fractions": fractions,
        "comparison": COMMON_GRIDS.get(a.transform, ONE_GRID),
    }


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
    height, width = features.shape[-2:]
    size = transform.mapped_size(height, width)
    if features_t.shape[2] != size[0] or features_t.shape[3] != size[1]:
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


def _allocate(a: Arguments) -> None:
    """``means`` [N, L]; ``kept`` [N, L, cells]: on one grid the differences T(M) - M', 0 where a cell is not
    valid; for a common grid the larger one of the two maps (M if they are equal), raw."""
    accumulate = accumulate_dtype(a.features.dtype)
    images, classes = a.features.shape[0], a.weight.shape[0]
    cells = a.features_t.shape[2] * a.features_t.shape[3]
    if a.transform in COMMON_GRIDS:
        cells = torch.sym_max(cells, a.features.shape[2] * a.features.shape[3])
    kept = (images, classes, cells) if a.keep else (0,)
    a.means = a.features.new_empty(images, classes, dtype=accumulate)
    a.kept = a.features.new_empty(kept, dtype=accumulate)


def _suits_cuda(a: Arguments) -> bool:
    """Maps that fit into shared memory on every GPU that the kernels are built for; and of half types no more
    classes than Triton would need matrix units for."""
    cells = a.features_t.shape[2] * a.features_t.shape[3]
    if a.transform in COMMON_GRIDS:
        cells += a.features.shape[2] * a.features.shape[3]
    return cells <= 8192 and (a.features.dtype == torch.float32 or a.weight.shape[0] < 64)


CAM_TRANSFORM_MSE = Op(
    "cam_transform_mse",
    "Tensor features, Tensor features_t, Tensor weight, Tensor? matrix, str transform, float dx, float dy, "
    "bool keep",
    function="fused_cam_transform_mse",
    outputs="means",
    kept="kept",
    allocate=_allocate,
    reference=_reference,
    backward="Tensor grad_means, Tensor features, Tensor features_t, Tensor weight, Tensor? matrix, "
    "Tensor kept, str transform, float dx, float dy",
    gradients={name: like(name) for name in ("features", "features_t", "weight")},
    launch_fwd=lambda launch, a: launch("cam_transform_mse_fwd", a, **_geometry(a)),
    launch_bwd=lambda launch, a: launch("cam_transform_mse_bwd", a, **_geometry(a)),
    channels_last="features features_t",
    suits_cuda=_suits_cuda,
)
_TOLD = "int[] whole, float[] fractions, int comparison"
define_kernel(
    "cam_transform_mse_fwd",
    f"Tensor features, Tensor features_t, Tensor weight, Tensor? matrix, {_TOLD}, bool keep",
    "means kept",
)
define_kernel(
    "cam_transform_mse_bwd",
    "Tensor grad_means, Tensor features, Tensor features_t, Tensor weight, Tensor? matrix, Tensor kept, "
    f"{_TOLD}, bool need_features, bool need_features_t, bool need_weight",
    "grad_features grad_features_t grad_weight",
)
