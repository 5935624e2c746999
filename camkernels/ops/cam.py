"""``fused_cam``: class activation maps, min-max normalised, differentiable."""

from collections.abc import Callable

import torch
from torch import Tensor

from camkernels import _checks, reference
from camkernels._op import Op
from camkernels._pass import Arguments, Launch, accumulate_dtype, define_kernel, like, per_class


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
        tied extrema share it evenly. No double backward but with backend ``"reference"``.
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
    normalize = _checks.flag(name, "normalize", normalize)
    eps = _checks.eps(name, eps)

    one = target is not None and target.dim() == 1
    wanted = target[:, None] if target is not None and one else target
    cam: Tensor = CAM(name, features, weight, wanted, bias, normalize, eps)
    return cam.squeeze(1) if one else cam


MOST_PIXELS = 16384  # of a map that fits into shared memory on every GPU that the CUDA kernels are built for


def allocate_maps(a: Arguments, maps: int, normalize: bool = True) -> None:
    """``cam`` [N, K, H, W]; ``cam32``, the same in float32 where backward needs it and ``cam`` is of a half
    type, else empty; ``extent`` [N, K, 2], minimum and maximum of each raw map."""
    features = a.features
    images, _, height, width = features.shape
    accumulate = accumulate_dtype(features.dtype)
    a.cam = features.new_empty(images, maps, height, width)
    half = normalize and features.dtype != accumulate
    a.cam32 = torch.empty_like(a.cam, dtype=accumulate) if half else features.new_empty(0)
    a.extent = features.new_empty(images, maps, 2, dtype=accumulate) if normalize else features.new_empty(0)


def kept_map(a: Arguments) -> Tensor:
    """The map that backward and threshold work on: never rounded to a half type."""
    kept: Tensor = a.cam if a.cam.dtype == accumulate_dtype(a.cam.dtype) else a.cam32
    return kept


def _suits_cuda(a: Arguments) -> bool:
    """Maps that fit, and fewer of them than Triton would make with matrix units."""
    maps = _maps(a)
    return a.features.shape[2] * a.features.shape[3] <= MOST_PIXELS and maps < 16


def _maps(a: Arguments) -> int:
    count: int = a.weight.shape[0] if a.target is None else a.target.shape[1]
    return count


def for_map(name: str) -> Callable[[Arguments], Tensor | None]:
    """Saved only if the map's gradient goes on to features or weight."""
    return lambda a: None if a.needed.isdisjoint(("features", "weight")) else getattr(a, name)


def _launch(launch: Launch, a: Arguments) -> None:
    launch("cam_fwd", a, bias=None if a.normalize else a.bias)


def _reference(
    features: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None, normalize: bool, eps: float
) -> Tensor:
    _checks.classes_in_range("fused_cam", target, weight.shape[0])
    return reference.cam(features, weight, target, bias=bias, normalize=normalize, eps=eps)


_INPUTS = "Tensor features, Tensor weight, Tensor? target, Tensor? bias, bool normalize, float eps"
CAM = Op(
    "cam",
    _INPUTS,
    function="fused_cam",
    outputs="cam",
    kept="cam32 extent",
    allocate=lambda a: allocate_maps(a, _maps(a), a.normalize),
    reference=_reference,
    backward="Tensor grad_cam, Tensor features, Tensor weight, Tensor? target, Tensor cam, Tensor extent, "
    "bool normalize, float eps",
    gradients={"features": like("features"), "weight": like("weight"), "bias": per_class},
    # A raw map is linear in everything: its backward needs no map, and users may change it in place.
    save={"cam": lambda a: kept_map(a) if a.normalize else a.extent},
    launch_fwd=_launch,
    suits_cuda=_suits_cuda,
)
define_kernel("cam_fwd", _INPUTS, "cam cam32 extent")
