"""``fused_cam_seeds``: pixels of the peak of a class activation map, and the feature vectors there."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from camkernels import _backend, reference
from camkernels._library import define_op, memory_format, prepare_inputs
from camkernels.ops import _checks
from camkernels.ops._autograd import first_order
from camkernels.ops.cam import allocate_maps, cam_backward, kept_map


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
        ``weight`` through ``cam``. The choice of seeds has none. No double backward.
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

    requested = _backend.setting()
    seeds_of = features if seed_features is None else seed_features
    widest = torch.float64 if seeds_of.dtype == torch.float64 else features.dtype
    if _backend.resolve(name, requested, features.device, widest) == "reference":
        _checks.classes_in_range(name, target, weight.shape[0])
        return CamSeeds(
            *reference.cam_seeds(
                features,
                weight,
                target,
                num_seeds,
                seed_features=seed_features,
                threshold=threshold,
                sampling=sampling,
                noise=noise,
                eps=eps,
            )
        )
    vectors, indices, count, cam = _CamSeeds.apply(
        features, weight, target[:, None], seed_features, noise, num_seeds, threshold, eps, requested
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


class _CamSeeds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        target: Tensor,  # [N, 1]
        seed_features: Tensor | None,
        noise: Tensor | None,  # [N, H * W]; None samples in raster order
        num_seeds: int,
        threshold: float,
        eps: float,
        requested: str,
    ) -> tuple[Tensor, ...]:
        seeds_of = features if seed_features is None else seed_features
        vectors, indices, count, cam, cam32, extent = torch.ops.camkernels.cam_seeds_fwd(
            features, weight.flatten(1), target, seeds_of, noise, num_seeds, threshold, eps, requested
        )
        ctx.set_materialize_grads(False)
        through_map = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        for_map = (features, weight, target, kept_map(cam, cam32), extent) if through_map else (None,) * 5
        ctx.save_for_backward(*for_map, indices)
        ctx.options = eps, requested
        # Of seed_features backward needs no value.
        ctx.own = seed_features is None
        ctx.seeds_shape = seeds_of.shape
        ctx.seeds_layout = memory_format(seeds_of)
        constant = [indices, count]
        if not ctx.needs_input_grad[0 if seed_features is None else 3]:
            constant.append(vectors)
        if not through_map:
            constant.append(cam)
        ctx.mark_non_differentiable(*constant)
        return vectors, indices, count, cam

    @staticmethod
    @first_order("fused_cam_seeds")
    def backward(
        ctx: Any, grad_vectors: Tensor | None, _indices: None, _count: None, grad_cam: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        features, weight, target, cam, extent, indices = ctx.saved_tensors
        eps, requested = ctx.options
        need_features, need_weight, _, need_seeds = ctx.needs_input_grad[:4]
        grad_features = grad_weight = grad_seeds = None
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
        if grad_vectors is not None and (need_features if ctx.own else need_seeds):
            grad_seeds = grad_features if ctx.own else None
            add = grad_seeds is not None  # to what came through the map, in place
            if grad_seeds is None:
                grad_seeds = torch.empty(
                    ctx.seeds_shape,
                    dtype=grad_vectors.dtype,
                    device=grad_vectors.device,
                    memory_format=ctx.seeds_layout,
                )
            torch.ops.camkernels.cam_seeds_bwd(grad_seeds, grad_vectors, indices, add, requested)
            if ctx.own:
                grad_features, grad_seeds = grad_seeds, None
        return grad_features, grad_weight, None, grad_seeds, *(None,) * 5


def _allocate_fwd(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    seed_features: Tensor,
    noise: Tensor | None,
    num_seeds: int,
    threshold: float,
    eps: float,
) -> tuple[Tensor, ...]:
    images = features.shape[0]
    return (
        seed_features.new_empty((images, num_seeds, seed_features.shape[1])),
        features.new_empty((images, num_seeds), dtype=torch.int64),
        features.new_empty((images,), dtype=torch.int64),
        *allocate_maps(features, 1, True),
    )


def _prepare_bwd(grad_seed_features: Tensor, *rest: Any) -> tuple[Any, ...]:
    """What is written in place cannot be copied first."""
    if not grad_seed_features.is_contiguous() and memory_format(grad_seed_features) != torch.channels_last:
        raise ValueError(
            f"cam_seeds_bwd: grad_seed_features has strides {grad_seed_features.stride()}; it must be "
            "contiguous or channels_last"
        )
    return (grad_seed_features, *prepare_inputs(*rest))


def _suits_cuda(features: Tensor, num_seeds: int) -> bool:
    """Maps that one block of any GPU has room for in its 99 KB of shared memory: besides 34 KB of weights and
    sums it keeps 8 bytes for each pixel and for each place of a power of two that holds the seeds."""
    pixels = features.shape[2] * features.shape[3]
    return 8 * (pixels + 2 * min(num_seeds, pixels)) <= 65 << 10


define_op(
    "cam_seeds_fwd",
    "Tensor features, Tensor weight, Tensor target, Tensor seed_features, Tensor? noise, "
    "SymInt num_seeds, float threshold, float eps",
    ("vectors", "indices", "count", "cam", "cam32", "extent"),
    allocate=_allocate_fwd,
    suits_cuda=lambda features, weight, target, seed_features, noise, num_seeds, *rest: _suits_cuda(
        features, num_seeds
    ),
)
define_op(
    "cam_seeds_bwd",
    "Tensor(a!) grad_seed_features, Tensor grad_vectors, Tensor indices, bool add",
    (),
    allocate=lambda *args: (),
    prepare=_prepare_bwd,
)
