"""``fused_cam_erase``: the image with the peak of its class activation map erased."""

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camkernels import _backend, reference
from camkernels._library import define_op, memory_format, prepare_inputs
from camkernels.ops import _checks
from camkernels.ops._autograd import first_order
from camkernels.ops.cam import allocate_maps, cam_backward, kept_map, suits_cuda


class CamErase(NamedTuple):
    """What ``fused_cam_erase`` returns."""

    erased: Tensor  # [N, D, H0, W0]
    cam: Tensor  # [N, H, W]


def fused_cam_erase(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    images: Tensor,
    *,
    threshold: float = 0.7,
    sharpness: float | None = None,
    fill: float | Sequence[float] = 0.0,
    mode: str = "bilinear",
    eps: float = 1e-8,
) -> CamErase:
    """Min-max normalised CAM of one class per image, and the image with the map's peak erased.

        hard: erased = fill where upsample(cam) > threshold, else images (their own bits)
        soft: erased = images * (1 - g) + fill * g,  g = sigmoid(sharpness * (upsample(cam) - threshold))

    Args:
        features: last feature maps, ``[N, C, H, W]``; contiguous or channels_last, read in place.
        weight: classifier weights, ``[L, C]`` or ``[L, C, 1, 1]``; may have another float dtype.
        target: class of each image, ``[N]``, int64 or int32; PCL takes the network's own prediction.
        images: what is erased, ``[N, D, H0, W0]``, any float dtype; contiguous or channels_last.
        threshold: in units of the normalised map, (0, 1); the paper uses 0.7.
        sharpness: None erases hard; a positive number is the slope of the soft gate.
        fill: the erased pixels' value, a number or one for each of the D channels.
        mode: how the map is brought to the image's size, ``"bilinear"`` or ``"nearest"``, as
            ``F.interpolate(..., align_corners=False)``.
        eps: a map whose range is at most this is 0 everywhere: nothing is erased, its gradient is 0.

    Returns:
        ``CamErase(erased, cam)``: ``[N, D, H0, W0]`` in dtype and memory format of ``images``; ``[N, H, W]``
        in the dtype of ``features``.

    Gradients: hard: ``images`` where kept; ``features`` and ``weight`` through ``cam`` only. Soft: all three
        through ``erased`` as well (attention mining). Nothing of the image's size is kept for backward but
        ``images`` itself, and that only for soft erasing. No double backward.
    Numerics: float32 inside (float64 for float64); deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        IndexError: a class index outside [0, L) on the CPU; on a GPU that image's map is NaN instead.

    Source: Chen et al., NeurIPS 2021, eq. 1-2 and table 6.
    """
    name = "fused_cam_erase"
    features = _checks.features(name, features)
    weight = _checks.weight(name, weight, features)
    target = _checks.target(name, target, features, "[N]", (1,))
    images = _checks.images(name, images, features)
    threshold = _checks.in_open_interval(name, "threshold", threshold, 0, 1, "in (0, 1)")
    if sharpness is not None:
        sharpness = _checks.in_open_interval(
            name, "sharpness", sharpness, 0, inf, "above 0 and finite, or None"
        )
    colour = _checks.fill(name, fill, images.shape[1])
    _checks.choice(name, "mode", mode, ("bilinear", "nearest"))
    eps = _checks.eps(name, eps)

    requested = _backend.setting()
    widest = torch.float64 if images.dtype == torch.float64 else features.dtype
    if _backend.resolve(name, requested, features.device, widest) == "reference":
        _checks.classes_in_range(name, target, weight.shape[0])
        return CamErase(
            *reference.cam_erase(
                features,
                weight,
                target,
                images,
                threshold=threshold,
                sharpness=sharpness,
                fill=colour,
                mode=mode,
                eps=eps,
            )
        )
    erased, cam = _CamErase.apply(
        features,
        weight,
        target[:, None],
        images,
        threshold,
        sharpness or 0.0,
        colour,
        mode == "nearest",
        eps,
        requested,
    )
    return CamErase(erased, cam.squeeze(1))


class _CamErase(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        target: Tensor,  # [N, 1]
        images: Tensor,
        threshold: float,
        sharpness: float,  # 0 erases hard
        fill: list[float],
        nearest: bool,
        eps: float,
        requested: str,
    ) -> tuple[Tensor, Tensor]:
        erased, cam, cam32, extent = torch.ops.camkernels.cam_erase_fwd(
            features, weight.flatten(1), target, images, threshold, sharpness, fill, nearest, eps, requested
        )
        ctx.set_materialize_grads(False)
        # Hard erasing needs no pixel again, so it does not hold on to the images.
        pixels = images if sharpness else None
        ctx.save_for_backward(features, weight, target, pixels, kept_map(cam, cam32), extent)
        ctx.options = threshold, sharpness, fill, nearest, eps, requested
        ctx.layout = memory_format(images)
        if not sharpness and not ctx.needs_input_grad[3]:
            ctx.mark_non_differentiable(
                erased
            )  # else the network's first layer would compute a gradient for it
        return erased, cam

    @staticmethod
    @first_order("fused_cam_erase")
    def backward(ctx: Any, grad_erased: Tensor | None, grad_cam: Tensor | None) -> tuple[Tensor | None, ...]:
        features, weight, target, images, cam, extent = ctx.saved_tensors
        threshold, sharpness, fill, nearest, eps, requested = ctx.options
        need_features, need_weight, _, need_images = ctx.needs_input_grad[:4]
        grad_images = grad_features = grad_weight = None
        need_map = bool(sharpness) and (need_features or need_weight)
        if grad_erased is not None and (need_images or need_map):
            grad_images, grad_map = torch.ops.camkernels.cam_erase_bwd(
                grad_erased.contiguous(memory_format=ctx.layout),
                grad_cam,
                images,
                cam,
                threshold,
                sharpness,
                fill,
                nearest,
                need_images,
                need_map,
                requested,
            )
            grad_images = grad_images if need_images else None
            grad_cam = grad_map if need_map else grad_cam
        if grad_cam is not None:
            grad_features, grad_weight, _ = cam_backward(
                grad_cam,
                features,
                weight,
                target,
                cam,
                extent,
                True,
                eps,
                (need_features, need_weight, False),
                requested,
            )
        return grad_features, grad_weight, None, grad_images, *(None,) * 6


def _allocate_fwd(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    images: Tensor,
    threshold: float,
    sharpness: float,
    fill: list[float],
    nearest: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    erased = torch.empty_like(images, memory_format=memory_format(images))
    return erased, *allocate_maps(features, 1, True)


def _prepare_bwd(
    grad_erased: Tensor, grad_cam: Tensor | None, images: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    """The gradient takes the layout of the images, where those are there."""
    prepared = prepare_inputs(images, *rest)
    layout = memory_format(grad_erased if images is None else images)
    grad_cam = None if grad_cam is None else grad_cam.contiguous()
    return (grad_erased.contiguous(memory_format=layout), grad_cam, *prepared)


def _allocate_bwd(
    grad_erased: Tensor,
    grad_cam: Tensor | None,
    images: Tensor | None,
    cam: Tensor,
    threshold: float,
    sharpness: float,
    fill: list[float],
    nearest: bool,
    need_images: bool,
    need_map: bool,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(grad_erased) if need_images else grad_erased.new_empty(0),
        torch.empty_like(cam) if need_map else cam.new_empty(0),
    )


def _suits_cuda(maps_of: Tensor, images: Tensor, fill: list[float]) -> bool:
    """``maps_of`` is ``[N, ..., H, W]``. The CUDA kernels take 16 fills, and 32-bit offsets in an image."""
    return suits_cuda(maps_of, 1) and len(fill) <= 16 and images[0].numel() < 2**31


define_op(
    "cam_erase_fwd",
    "Tensor features, Tensor weight, Tensor target, Tensor images, "
    "float threshold, float sharpness, float[] fill, bool nearest, float eps",
    ("erased", "cam", "cam32", "extent"),
    allocate=_allocate_fwd,
    suits_cuda=lambda features, weight, target, images, threshold, sharpness, fill, *rest: _suits_cuda(
        features, images, fill
    ),
)
define_op(
    "cam_erase_bwd",
    "Tensor grad_erased, Tensor? grad_cam, Tensor? images, Tensor cam, "
    "float threshold, float sharpness, float[] fill, bool nearest, bool need_images, bool need_map",
    ("grad_images", "grad_map"),
    allocate=_allocate_bwd,
    prepare=_prepare_bwd,
    suits_cuda=lambda grad, grad_cam, images, cam, threshold, sharpness, fill, *rest: _suits_cuda(
        cam, grad, fill
    ),
)
