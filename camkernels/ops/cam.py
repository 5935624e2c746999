"""``fused_cam``: class activation maps, min-max normalised, differentiable."""

from typing import Any

import torch
from torch import Tensor

from camkernels import _backend, reference
from camkernels._library import define_op, memory_format, prepare_inputs
from camkernels.ops import _checks
from camkernels.ops._autograd import first_order
from camkernels.reference.cam import accumulate_dtype


def fused_cam(
    features: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Class activation maps of chosen classes, or of all, in one read of ``features``.

        M[n, h, w] = sum_c weight[t_n, c] * features[n, c, h, w] (+ bias[t_n])
        normalised: (M - min M) / (max M - min M), each map by itself

    Args:
        features: last feature maps, ``[N, C, H, W]``; contiguous or channels_last, read in place.
        weight: classifier weights, ``[L, C]`` or ``[L, C, 1, 1]``; may have another float dtype.
        target: class index of each wanted map, ``[N]`` or ``[N, K]``, int64 or int32; None means all L.
        bias: classifier bias, ``[L]``. A normalised map does not depend on it.
        normalize: min-max normalise each map to [0, 1].
        eps: a map whose range is at most this is 0 everywhere, and so is its gradient.

    Returns:
        ``[N, H, W]``, ``[N, K, H, W]`` or ``[N, L, H, W]``, in the dtype of ``features``. A map that holds
        a NaN is NaN everywhere.

    Gradients: ``features``, ``weight`` and ``bias`` (0 where normalised), through minimum and maximum too;
        tied extrema share it evenly. No double backward.
    Numerics: float32 inside (float64 for float64); deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        IndexError: a class index outside [0, L) on the CPU; on a GPU that image's map is NaN instead.

    Source: Zhou et al., CVPR 2016; Chen et al., NeurIPS 2021, eq. 1; Guo et al., CVPR 2019, eq. 1.
    """
    name = "fused_cam"
    features = _checks.features(name, features)
    weight = _checks.weight(name, weight, features)
    if target is not None:
        target = _checks.target(name, target, features, "[N] or [N, K], or None", (1, 2))
    bias = _checks.bias(name, bias, weight)
    _checks.flag(name, "normalize", normalize)
    eps = _checks.eps(name, eps)

    requested = _backend.setting()
    if _backend.resolve(name, requested, features.device, features.dtype) == "reference":
        _checks.classes_in_range(name, target, weight.shape[0])
        return reference.cam(features, weight, target, bias=bias, normalize=normalize, eps=eps)
    if target is None or target.dim() == 2:
        return _Cam.apply(features, weight, target, bias, normalize, eps, requested)
    return _Cam.apply(features, weight, target[:, None], bias, normalize, eps, requested).squeeze(1)


class _Cam(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        target: Tensor | None,  # [N, K]
        bias: Tensor | None,
        normalize: bool,
        eps: float,
        requested: str,
    ) -> Tensor:
        added = None if normalize else bias
        cam, cam32, extent = torch.ops.camkernels.cam_fwd(
            features, weight.flatten(1), target, added, normalize, eps, requested
        )
        ctx.set_materialize_grads(False)
        # A raw map is linear in everything: its backward needs no map, and users may change it in place.
        ctx.save_for_backward(features, weight, target, kept_map(cam, cam32) if normalize else extent, extent)
        ctx.options = normalize, eps, requested
        ctx.bias_dtype = None if bias is None else bias.dtype
        return cam

    @staticmethod
    @first_order("fused_cam")
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        features, weight, target, cam, extent = ctx.saved_tensors
        if grad is None:
            return (None,) * 7
        normalize, eps, requested = ctx.options
        grad_features, grad_weight, grad_bias = cam_backward(
            grad,
            features,
            weight,
            target,
            cam,
            extent,
            normalize,
            eps,
            (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]),
            requested,
        )
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_features, grad_weight, None, grad_bias, None, None, None


def kept_map(cam: Tensor, cam32: Tensor) -> Tensor:
    """The map that backward and threshold work on: never rounded to a half type."""
    return cam if cam.dtype == accumulate_dtype(cam.dtype) else cam32


def cam_backward(
    grad_cam: Tensor,
    features: Tensor,
    weight: Tensor,
    target: Tensor | None,
    cam: Tensor,
    extent: Tensor,
    normalize: bool,
    eps: float,
    needed: tuple[bool, bool, bool],
    requested: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``features``, ``weight`` (in its own shape) and ``bias``, where needed."""
    if not any(needed):
        return None, None, None
    grads = torch.ops.camkernels.cam_bwd(
        grad_cam, features, weight.flatten(1), target, cam, extent, normalize, eps, *needed, requested
    )
    grad_features, grad_weight, grad_bias = (
        g if need else None for g, need in zip(grads, needed, strict=True)
    )
    return grad_features, None if grad_weight is None else grad_weight.view(weight.shape), grad_bias


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def allocate_maps(features: Tensor, maps: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``cam`` [N, K, H, W]; ``cam32``, the same in float32 where backward needs it and ``cam`` is of a half
    type, else empty; ``extent`` [N, K, 2], minimum and maximum of each raw map."""
    images, _, height, width = features.shape
    accumulate = accumulate_dtype(features.dtype)
    cam = features.new_empty((images, maps, height, width))
    if not normalize:
        return cam, _nothing(features), _nothing(features)
    cam32 = _nothing(features) if cam.dtype == accumulate else torch.empty_like(cam, dtype=accumulate)
    return cam, cam32, features.new_empty((images, maps, 2), dtype=accumulate)


def _allocate_fwd(
    features: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    return allocate_maps(features, weight.shape[0] if target is None else target.shape[1], normalize)


def _prepare_bwd(grad_cam: Tensor, features: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Kernels read maps as ``[N, K, H * W]``: a gradient that came channels_last is put in order."""
    return (grad_cam.contiguous(), *prepare_inputs(features, *rest))


def _allocate_bwd(
    grad_cam: Tensor,
    features: Tensor,
    weight: Tensor,
    target: Tensor | None,
    cam: Tensor,
    extent: Tensor,
    normalize: bool,
    eps: float,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(features, memory_format=memory_format(features))
        if need_features
        else _nothing(features),
        torch.empty_like(weight) if need_weight else _nothing(weight),
        weight.new_empty(weight.shape[0], dtype=accumulate_dtype(features.dtype))
        if need_bias
        else _nothing(weight),
    )


def suits_cuda(features: Tensor, maps: int) -> bool:
    """What ``auto`` leaves to the CUDA kernels: maps that fit into shared memory on every GPU that they are
    built for, and fewer of them than Triton would make with matrix units."""
    return features.shape[2] * features.shape[3] <= 16384 and maps < 16


define_op(
    "cam_fwd",
    "Tensor features, Tensor weight, Tensor? target, Tensor? bias, bool normalize, float eps",
    ("cam", "cam32", "extent"),
    allocate=_allocate_fwd,
    suits_cuda=lambda features, weight, target, *rest: suits_cuda(
        features, weight.shape[0] if target is None else target.shape[1]
    ),
)
define_op(
    "cam_bwd",
    "Tensor grad_cam, Tensor features, Tensor weight, Tensor? target, Tensor cam, Tensor extent, "
    "bool normalize, float eps, bool need_features, bool need_weight, bool need_bias",
    ("grad_features", "grad_weight", "grad_bias"),
    allocate=_allocate_bwd,
    prepare=_prepare_bwd,
    suits_cuda=lambda grad_cam, features, *rest: suits_cuda(features, grad_cam.shape[1]),
)
