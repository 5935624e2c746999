"""``fused_cam_erase``: the image with the peak of its class activation map erased."""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from camkernels import _checks, reference
from camkernels._op import Op
from camkernels._pass import Arguments, Launch, define_kernel, empty_like, like, memory_format
from camkernels.ops.cam import MOST_PIXELS, allocate_maps, for_map, kept_map


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
        ``images`` itself, and that only for soft erasing. No double backward but with backend
        ``"reference"``.
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

    nearest = mode == "nearest"
    erased, cam = CAM_ERASE(
        name, features, weight, target[:, None], images, threshold, sharpness or 0.0, colour, nearest, eps
    )
    return CamErase(erased, cam.squeeze(1))


def _reference(
    features: Tensor,
    weight: Tensor,
    target: Tensor,  # [N, 1]
    images: Tensor,
    threshold: float,
    sharpness: float,  # 0 erases hard
    fill: list[float],
    nearest: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _checks.classes_in_range("fused_cam_erase", target, weight.shape[0])
    mode = "nearest" if nearest else "bilinear"
    erased, cam = reference.cam_erase(
        features,
        weight,
        target[:, 0],
        images,
        threshold=threshold,
        sharpness=sharpness or None,
        fill=fill,
        mode=mode,
        eps=eps,
    )
    return erased, cam[:, None]


def _allocate(a: Arguments) -> None:
    a.erased = empty_like(a.images)
    allocate_maps(a, 1)


def _arrange_bwd(a: Arguments) -> None:
    """The gradient takes the layout of the images."""
    if a.grad_erased is not None:
        layout = torch.channels_last if a.channels_last else torch.contiguous_format
        a.grad_erased = a.grad_erased.contiguous(memory_format=layout)


def _launch_bwd(launch: Launch, a: Arguments) -> None:
    need_map = bool(a.sharpness) and (a.need_features or a.need_weight) and a.grad_erased is not None
    if a.need_images or need_map:
        grad_map = torch.empty_like(a.cam) if need_map else a.cam.new_empty(0)
        launch("cam_erase_bwd", a, need_map=need_map, grad_map=grad_map)
        a.grad_cam = grad_map if need_map else a.grad_cam
    if a.need_features or a.need_weight:
        nothing = a.cam.new_empty(0)
        launch("cam_bwd", a, normalize=True, need_bias=False, grad_bias=nothing)


def _suits_cuda(a: Arguments) -> bool:
    """The CUDA kernels take 16 fills, and 32-bit offsets in an image."""
    images = vars(a).get("grad_erased") if a.images is None else a.images
    height, width = a.cam.shape[-2:]
    return (
        height * width <= MOST_PIXELS and len(a.fill) <= 16 and (images is None or images[0].numel() < 2**31)
    )


CAM_ERASE = Op(
    "cam_erase",
    "Tensor features, Tensor weight, Tensor target, Tensor images, float threshold, float sharpness, "
    "float[] fill, bool nearest, float eps",
    function="fused_cam_erase",
    outputs="erased cam",
    kept="cam32 extent",
    allocate=_allocate,
    reference=_reference,
    backward="Tensor? grad_erased, Tensor? grad_cam, Tensor? features, Tensor? weight, Tensor? target, "
    "Tensor? images, Tensor cam, Tensor? extent, float threshold, float sharpness, float[] fill, "
    "bool nearest, float eps, bool channels_last",
    gradients={
        "features": like("features"),
        "weight": like("weight"),
        "images": lambda a: torch.empty_like(a.grad_erased),
    },
    flow=lambda a: {
        "erased": ("images", "features", "weight") if a.sharpness else ("images",),
        "cam": ("features", "weight"),
    },
    save={
        **{name: for_map(name) for name in ("features", "weight", "target", "extent")},
        "cam": kept_map,
        "channels_last": lambda a: memory_format(a.images) == torch.channels_last,
        # Hard erasing needs no pixel again, so it does not hold on to the images.
        "images": lambda a: a.images if a.sharpness else None,
    },
    arrange=_arrange_bwd,
    launch_bwd=_launch_bwd,
    channels_last="features images grad_erased",
    decides="features images",
    suits_cuda=_suits_cuda,
)
define_kernel(
    "cam_erase_bwd",
    "Tensor grad_erased, Tensor? grad_cam, Tensor? images, Tensor cam, float threshold, float sharpness, "
    "float[] fill, bool nearest, bool need_images, bool need_map",
    "grad_images grad_map",
)
