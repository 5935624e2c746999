"""``fused_cam_seeds``: pixels of the peak of a class activation map, and the feature vectors there."""

from typing import NamedTuple

import torch
from torch import Tensor

from camkernels import _checks, reference
from camkernels._op import Op
from camkernels._pass import Arguments, Launch, define_kernel, empty_maps, like, memory_format
from camkernels.ops.cam import allocate_maps, for_map, kept_map


class CamSeeds(NamedTuple):
    """What ``fused_cam_seeds`` returns: vectors ``[N, K, D]``, indices of their pixels ``[N, K]``, the count
    of candidates ``[N]`` and the map ``[N, H, W]``."""

    vectors: Tensor  # [N, K, D]
    indices: Tensor  # [N, K] int64, h * W + w
    count: Tensor  # type: ignore[assignment]  # [N] int64; hides tuple.count
    cam: Tensor  # [N, H, W]


def fused_cam_seeds(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    num_seeds: int,
    *,
    seed_features: Tensor | None = None,
    threshold: float = 0.7,
    sampling: str = "random",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: float = 1e-8,
) -> CamSeeds:
    """Min-max normalised CAM of one class per image, ``num_seeds`` pixels of its peak, and the feature
    vectors there.

        candidates: pixels where cam > threshold; seeds: num_seeds of them, drawn without replacement
        vectors[n, k] = seed_features[n, :, indices[n, k]]

    Args:
        features: last feature maps, ``[N, C, H, W]``; contiguous or channels_last, read in place.
        weight: classifier weights, ``[L, C]`` or ``[L, C, 1, 1]``; may have another float dtype.
        target: class of each image, ``[N]``, int64 or int32.
        num_seeds: K, at least 1; the paper does best with 3.
        seed_features: where vectors are taken, ``[N, D, H, W]``, any float dtype; None means ``features``.
            Another layer of another size has to be resized first, as by ``F.adaptive_avg_pool2d``.
        threshold: in units of the normalised map, (0, 1); the paper uses 0.7.
        sampling: ``"random"``: every candidate has its pixel's noise as its key, and the seeds are the
            candidates of largest key, in falling order, ties to the lower index: uniform without
            replacement. ``"first"``: the first candidates in raster order, as the released code has it.
        noise: the keys, ``[N, H * W]``, float32 in [0, 1); None draws them by ``torch.rand``. The same noise
            gives the same seeds on every backend.
        generator: what draws the noise, on the device of ``features``; None is PyTorch's own.
            ``torch.compile`` traces no generator: draw ``noise`` outside instead.
        eps: a map whose range is at most this is 0 everywhere: it has no candidate, and its gradient is 0.

    Returns:
        ``CamSeeds(vectors, indices, count, cam)``: ``[N, K, D]`` in the dtype of ``seed_features``;
        ``[N, K]`` int64, ``h * W + w``; ``[N]`` int64, how many candidates there were; ``[N, H, W]`` in the
        dtype of ``features``. With fewer candidates than K their list repeats cyclically; with none all
        seeds are the map's first maximum (its first NaN, if it holds one).

    Gradients: ``seed_features`` through ``vectors``, seeds of one pixel added up; ``features`` and
        ``weight`` through ``cam``. The choice of seeds has none. No double backward but with backend
        ``"reference"``.
    Numerics: float32 inside (float64 for float64), the map is never rounded before the threshold;
        deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or value, or noise that would be ignored.
        IndexError: a class index outside [0, L) on the CPU; on a GPU that image's map is NaN instead.

    Source: Zhang et al., ECCV 2020, §3.1.
    """
    name = "fused_cam_seeds"
    features = _checks.features(name, features)
    weight = _checks.weight(name, weight, features)
    target = _checks.target(name, target, features, "[N]", (1,))
    num_seeds = _checks.positive_int(name, "num_seeds", num_seeds)
    if seed_features is features:
        seed_features = None
    if seed_features is not None:
        seed_features = _checks.seed_features(name, seed_features, features)
    threshold = _checks.in_open_interval(name, "threshold", threshold, 0, 1, "in (0, 1)")
    noise = _keys(name, features, sampling, noise, generator)
    eps = _checks.eps(name, eps)

    vectors, indices, count, cam = CAM_SEEDS(
        name, features, weight, target[:, None], seed_features, noise, num_seeds, threshold, eps
    )
    return CamSeeds(vectors, indices, count, cam.squeeze(1))


def _keys(
    function: str, features: Tensor, sampling: str, noise: Tensor | None, generator: torch.Generator | None
) -> Tensor | None:
    """The noise that decides among candidates, or None for raster order."""
    _checks.choice(function, "sampling", sampling, ("random", "first"))
    if noise is not None:
        noise = _checks.noise(function, noise, features)
    if generator is not None:
        generator = _checks.generator(function, generator, features)
    if sampling == "first":
        for argument, value in (("noise", noise), ("generator", generator)):
            if value is not None:
                raise ValueError(
                    f"{function}: {argument} is given and sampling is 'first', which draws nothing; "
                    f"leave {argument} out or sample 'random'"
                )
        return None
    if noise is not None:
        if generator is not None:
            raise ValueError(
                f"{function}: noise and generator are both given; the generator would draw nothing: "
                "leave one out"
            )
        return noise
    shape = (features.shape[0], features.shape[2] * features.shape[3])
    if generator is None:  # the overload that torch.compile traces with dynamic shapes
        return torch.rand(shape, device=features.device, dtype=torch.float32)
    return torch.rand(shape, generator=generator, device=features.device, dtype=torch.float32)


def _reference(
    features: Tensor,
    weight: Tensor,
    target: Tensor,  # [N, 1]
    seed_features: Tensor | None,
    noise: Tensor | None,  # [N, H * W]; None samples in raster order
    num_seeds: int,
    threshold: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _checks.classes_in_range("fused_cam_seeds", target, weight.shape[0])
    vectors, indices, count, cam = reference.cam_seeds(
        features,
        weight,
        target[:, 0],
        num_seeds,
        seed_features=seed_features,
        threshold=threshold,
        sampling="first" if noise is None else "random",
        noise=noise,
        eps=eps,
    )
    return vectors, indices, count, cam[:, None]


def _seeds_of(a: Arguments) -> Tensor:
    found: Tensor = a.features if a.seed_features is None else a.seed_features
    return found


def _allocate(a: Arguments) -> None:
    images, seeds_of = a.features.shape[0], _seeds_of(a)
    a.vectors = seeds_of.new_empty(images, a.num_seeds, seeds_of.shape[1])
    a.indices = a.features.new_empty(images, a.num_seeds, dtype=torch.int64)
    a.count = a.features.new_empty(images, dtype=torch.int64)
    allocate_maps(a, 1)


def _of_seeds(a: Arguments) -> Tensor:
    """The gradient of what the vectors were taken from, of which backward needs no value."""
    return empty_maps(a.grad_vectors, a.channels_last, *a.size)


def _launch_bwd(launch: Launch, a: Arguments) -> None:
    through_map = a.grad_cam is not None and a.features is not None and (a.need_features or a.need_weight)
    if through_map:
        nothing = a.cam.new_empty(0)
        launch("cam_bwd", a, normalize=True, need_bias=False, grad_bias=nothing)
    if a.grad_vectors is not None and (a.need_features if a.own else a.need_seed_features):
        into = a.grad_features if a.own else a.grad_seed_features
        add = a.own and through_map  # to what came through the map, in place
        launch("cam_seeds_bwd", a, grad_seed_features=into, add=add)


def _suits_cuda(a: Arguments) -> bool:
    """Maps that one block of any GPU has room for in its 99 KB of shared memory: besides 34 KB of weights and
    sums it keeps 8 bytes for each pixel and for each place of a power of two that holds the seeds."""
    pixels = a.size[2] * a.size[3] if "size" in vars(a) else a.features.shape[2] * a.features.shape[3]
    return 8 * (pixels + 2 * min(a.indices.shape[1], pixels)) <= 65 << 10


CAM_SEEDS = Op(
    "cam_seeds",
    "Tensor features, Tensor weight, Tensor target, Tensor? seed_features, Tensor? noise, SymInt num_seeds, "
    "float threshold, float eps",
    function="fused_cam_seeds",
    outputs="vectors indices count cam",
    kept="cam32 extent",
    allocate=_allocate,
    reference=_reference,
    backward="Tensor? grad_vectors, Tensor? grad_cam, Tensor? features, Tensor? weight, Tensor? target, "
    "Tensor? cam, Tensor? extent, Tensor indices, SymInt[] size, bool channels_last, bool own, float eps",
    gradients={
        "features": like("features"),
        "weight": like("weight"),
        "seed_features": _of_seeds,
    },
    flow=lambda a: {
        "vectors": ("features" if a.seed_features is None else "seed_features",),
        "cam": ("features", "weight"),
    },
    save={
        **{name: for_map(name) for name in ("features", "weight", "target", "extent")},
        "cam": lambda a: None if a.needed.isdisjoint(("features", "weight")) else kept_map(a),
        "size": lambda a: _seeds_of(a).shape,
        "channels_last": lambda a: memory_format(_seeds_of(a)) == torch.channels_last,
        "own": lambda a: a.seed_features is None,
    },
    launch_bwd=_launch_bwd,
    channels_last="features seed_features",
    decides="features seed_features",
    suits_cuda=_suits_cuda,
)
define_kernel("cam_seeds_bwd", "Tensor grad_vectors, Tensor indices, bool add", "grad_seed_features")
