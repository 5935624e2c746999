"""The CUDA kernels' own sources, run without a GPU (see cuda_emulator/cuda_emulator.h).

The emulator stands in for a backend's launchers, so these tests go through the public functions: shapes,
autograd and the tensors that reach a kernel are those of a real call.
"""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import Case, as_double, as_plain, run
from closeness import assert_as_close_as
from cuda_emulator import emulation
from cuda_emulator.emulation import Emulator, sampled

from camkernels import _backend, fused_cam, fused_cam_erase, fused_cam_transform_mse, reference
from camkernels.transforms import (
    Affine,
    HorizontalFlip,
    Rotate90,
    Scale,
    Transform,
    Translate,
    VerticalFlip,
)

pytest_plugins = ["cuda_emulator.fixtures"]

CLUSTERS = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
THRESHOLD = 0.7
# Against 2 for PyTorch's own order of operations: the map is rounded once more, when it is normalised, before
# the gradient is made from it.
MARGIN = 3.0


def assert_matches(ours, theirs, inputs, names, margin=MARGIN):
    """Values and gradients as close to the float64 reference as PyTorch's own at this dtype."""
    found = run("triton", ours, inputs)
    plain = run("reference", theirs, as_plain(inputs))
    truth = run("reference", theirs, as_double(inputs))
    sides = (side.values + side.grads for side in (found, plain, truth))
    for name, mine, other, exact in zip(names, *sides, strict=True):
        if exact is None:
            assert mine is None or not mine.any(), name
        else:
            assert_as_close_as(mine, other, exact, margin, name)
    return found


def cam_matches(inputs, target, **options):
    def ours(features, weight, *bias):
        return fused_cam(features, weight, target, bias=bias[0] if bias else None, **options)

    def theirs(features, weight, *bias):
        return reference.cam(features, weight, target, bias=bias[0] if bias else None, **options)

    names = ("cam", "grad_features", "grad_weight", "grad_bias")
    return assert_matches(ours, theirs, inputs, names[: 1 + len(inputs)])


def rotated(cases):
    """Each case with a number of its own, which draws the cluster size and the seed."""
    numbered = sampled(enumerate(cases), 11)  # a step that meets each value of each factor
    return [pytest.param(number, case, id=f"{number}-{case}-C{case.channels}") for number, case in numbered]


ONE_MAP = [
    Case(dtype=dtype, layout=layout, shape=shape, maps=maps, channels=channels)
    for dtype, layout, shape, (maps, channels) in itertools.product(
        DTYPES,
        ("contiguous", "channels_last", "offset"),
        ((7, 7), (14, 14), (1, 1), (5, 9), (1, 23), (17, 40)),
        (("signed", 64), ("ties", 72), ("constant", 33), ("nan", 40)),
    )
]


@pytest.mark.parametrize("number, case", rotated(ONE_MAP))
def test_one_map_per_image(emulator, number, case):
    normalize = number % 3 != 0
    inputs = [case.features(), case.weight(), *([] if normalize else [case.bias()])]
    with emulator.on(cluster=CLUSTERS[number % 4], seed=number, threads=(64, 128)[number // 4 % 2]):
        found = cam_matches(
            inputs, case.target(dtype=(torch.int64, torch.int32)[number % 2]), normalize=normalize
        )
    assert emulator.launches["cam_fwd"] == 1
    if normalize and case.maps in ("signed", "ties") and case.shape != (1, 1):
        cam = found.values[0].flatten(1)
        assert torch.equal(cam.amin(1), torch.zeros_like(cam[:, 0]))
        assert torch.equal(cam.amax(1), torch.ones_like(cam[:, 0]))


@pytest.mark.parametrize("maps", [2, 11, None], ids=["2 maps", "11 maps", "all classes"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_maps_per_image(emulator, dtype, layout, normalize, maps):
    case = Case(dtype=dtype, layout=layout, shape=(6, 8), classes=19, channels=40, images=2)
    inputs = [case.features(), case.weight(), *([] if normalize else [case.bias()])]
    with emulator.on(cluster=2, seed=7):
        cam_matches(inputs, None if maps is None else case.target(maps), normalize=normalize)
    assert emulator.launches["cam_fwd"] == 1


def erase_outcomes(case, *, fill, **options):
    inputs = [case.features(), case.weight(), case.pictures()]
    target = case.target()

    def ours(features, weight, images):
        return fused_cam_erase(features, weight, target, images, fill=fill, **options)

    def theirs(features, weight, images):
        return reference.cam_erase(features, weight, target, images, fill=fill, **options)

    found = run("triton", ours, inputs)
    plain = run("reference", theirs, as_plain(inputs))
    truth = run("reference", theirs, as_double(inputs))
    return inputs, found, plain, truth


ERASE = [
    Case(
        dtype=dtype,
        layout=layout,
        shape=shape,
        maps=maps,
        channels=channels,
        image_dtype=DTYPES[(DTYPES.index(dtype) + shift) % 3],
        image_size=size,
        depth=depth,
        images=2,
    )
    for (shift, dtype), layout, (shape, maps, channels), (size, depth) in itertools.product(
        enumerate(DTYPES),
        ("contiguous", "channels_last", "offset"),
        (((7, 7), "ties", 64), ((5, 9), "signed", 40), ((1, 1), "constant", 16), ((14, 14), "nan", 33)),
        (((37, 29), 3), ((40, 48), 3), ((3, 16), 5)),
    )
]


@pytest.mark.parametrize("number, case", rotated(ERASE))
def test_hard_erasing(emulator, number, case):
    fill = 0.25 if number % 2 else [0.5 * d - 1 for d in range(case.depth)]
    mode = ("bilinear", "nearest")[number // 2 % 2]
    with emulator.on(cluster=CLUSTERS[number % 4], seed=number):
        inputs, found, plain, truth = erase_outcomes(case, fill=fill, mode=mode, threshold=THRESHOLD)
    assert emulator.launches["cam_erase_fwd"] == 1
    images = inputs[2]
    erased, cam = found.values
    assert_as_close_as(cam, plain.values[1], truth.values[1], MARGIN, "cam")
    for name, index in (("grad_features", 0), ("grad_weight", 1)):
        assert_as_close_as(found.grads[index], plain.grads[index], truth.grads[index], MARGIN, name)

    colour = torch.as_tensor(fill, dtype=images.dtype).view(-1, 1, 1).expand(images.shape[1:])
    kept = erased == images
    assert torch.equal(torch.where(kept, images, colour), erased)  # its own bits or the fill, nothing else
    # A mask may differ only where float32 cannot tell the heat from the threshold.
    corners = {"align_corners": False} if mode == "bilinear" else {}
    heat = F.interpolate(truth.values[1][:, None], images.shape[-2:], mode=mode, **corners)
    sure = ((heat - THRESHOLD).abs() > 1e-6) | heat.isnan()
    wanted = torch.where(heat > THRESHOLD, colour, images)
    assert torch.equal(torch.where(sure, erased, wanted), wanted)
    # erased_j = image_j exactly where grad_j passes: the gradient is the random one of cases.run, or 0.
    grad = torch.randn(erased.shape, generator=torch.Generator().manual_seed(1)).to(erased.dtype)
    wanted_grad = torch.where(heat > THRESHOLD, 0, grad)
    assert torch.equal(torch.where(sure, found.grads[2], wanted_grad), wanted_grad)


@pytest.mark.parametrize("number, case", rotated(ERASE))
def test_soft_erasing(emulator, number, case):
    fill = 0.25 if number % 2 else [0.5 * d - 1 for d in range(case.depth)]
    mode = ("bilinear", "nearest")[number // 2 % 2]
    with emulator.on(cluster=CLUSTERS[(number + 1) % 4], seed=number):
        _, found, plain, truth = erase_outcomes(
            case, fill=fill, mode=mode, threshold=THRESHOLD, sharpness=9.0
        )
    assert emulator.launches["cam_erase_fwd"] == emulator.launches["cam_erase_bwd"] == 1
    names = ("erased", "cam", "grad_features", "grad_weight", "grad_images")
    sides = (side.values + side.grads for side in (found, plain, truth))
    for name, mine, other, exact in zip(names, *sides, strict=True):
        assert_as_close_as(mine, other, exact, MARGIN, name)


TURNED = [[0.955, -0.296, 0.1], [0.296, 0.955, -0.2]]
# Image by image: turned and partly outside; all of it inside; nothing of it inside.
MATRICES = [TURNED, [[0.5, 0.0, 0.1], [0.0, 0.4, 0.0]], [[1.0, 0.0, 3.0], [0.0, 1.0, 0.0]]]
TRANSFORMS: list[tuple[str, Transform, tuple[int, int], tuple[int, int]]] = [
    ("flip", HorizontalFlip(), (7, 7), (7, 7)),
    ("flip wide", HorizontalFlip(), (3, 45), (3, 45)),
    ("upside down", VerticalFlip(), (14, 14), (14, 14)),
    ("quarter turn", Rotate90(1), (5, 9), (9, 5)),
    ("half turn", Rotate90(2), (5, 9), (5, 9)),
    ("back a quarter", Rotate90(-1), (4, 23), (23, 4)),
    ("moved", Translate(0.21, -0.13), (7, 7), (7, 7)),
    ("moved far", Translate(0.4, 0.31), (9, 17), (9, 17)),
    ("moved by cells", Translate(1 / 7, -2 / 7), (7, 7), (7, 7)),
    ("moved one way", Translate(0.0, 0.1), (6, 1), (6, 1)),
    ("affine", Affine(TURNED), (7, 7), (7, 7)),
    ("affine each", Affine(MATRICES), (6, 9), (6, 9)),
    ("affine large", Affine(MATRICES), (11, 17), (11, 17)),
    ("nearest 7 6", Scale(6), (7, 7), (6, 6)),
    ("nearest 5 12", Scale(6), (5, 3), (12, 4)),
    ("nearest 1", Scale(6), (1, 1), (3, 5)),
    ("bilinear 7 6", Scale(6, "bilinear"), (7, 7), (6, 6)),
    ("bilinear 3 14", Scale(6, "bilinear"), (3, 40), (14, 37)),
    ("bilinear 1", Scale(6, "bilinear"), (4, 3), (1, 1)),
    ("bilinear same", Scale(6, "bilinear"), (5, 8), (5, 8)),
]
LAYOUT_PAIRS = (
    ("contiguous", "contiguous"),
    ("channels_last", "channels_last"),
    ("offset", "channels_last"),
    ("channels_last", "offset"),
)


def pair(case, shape_t, layout_t=None):
    """Features of an image, of the transformed image, and weights."""
    other = replace(case, shape=shape_t, layout=layout_t or case.layout, seed=case.seed + 1)
    return [case.features(), other.features(), case.weight()]


def transform_matches(inputs, transform):
    def ours(features, features_t, weight):
        return fused_cam_transform_mse(features, features_t, weight, transform, reduction="none")

    def theirs(features, features_t, weight):
        return reference.cam_transform_mse(features, features_t, weight, transform, reduction="none")

    # PyTorch adds up thousands of cells in blocks, a thread in a row.
    names = "means", "grad_features", "grad_features_t", "grad_weight"
    return assert_matches(ours, theirs, inputs, names, margin=4.0)


@pytest.mark.parametrize(
    "index, dtype",
    [
        pytest.param(index, dtype, id=f"{TRANSFORMS[index][0]}-{str(dtype)[6:]}")
        for index, dtype in sampled(itertools.product(range(len(TRANSFORMS)), DTYPES), 2)
    ],
)
def test_transforms(emulator, index, dtype):
    number = index * 5 + DTYPES.index(dtype) * 3  # no two factors in step
    _, transform, shape, shape_t = TRANSFORMS[index]
    layout, layout_t = LAYOUT_PAIRS[number % 4]
    case = Case(
        dtype=dtype,
        layout=layout,
        shape=shape,
        maps=("signed", "ties", "constant")[number // 2 % 3],
        channels=(40, 33, 100)[number % 3],
        classes=(6, 1, 21)[number // 3 % 3],
        weight_dtype=torch.float32 if number % 2 else None,
    )
    inputs = pair(case, shape_t, layout_t)
    if (index + DTYPES.index(dtype)) % 3 == 0:
        inputs[0][0, 0, shape[0] // 2, shape[1] // 2] = torch.nan  # a cell that all these transforms read
        if transform.resampling(*shape) and transform.valid(inputs[0]) is None:
            inputs[1][1, -1, -1, -1] = torch.inf  # which nothing else must read, as inf - inf is NaN
    with emulator.on(cluster=CLUSTERS[number // 2 % 4], seed=number, threads=(64, 128)[number // 4 % 2]):
        transform_matches(inputs, transform)
    launched = 2 if isinstance(transform, (HorizontalFlip, VerticalFlip, Rotate90)) else 3
    assert emulator.launches["cam_transform_mse_fwd"] == 1
    assert emulator.launches["cam_transform_mse_bwd"] == launched


@pytest.mark.parametrize("name", ["flip wide", "affine large", "nearest 7 6", "bilinear 7 6"])
@pytest.mark.parametrize("cluster", [1, 4])
def test_transforms_of_many_labels(emulator, name, cluster):
    """Tiles of several warps' rows, and more of them than one; more labels than channels."""
    _, transform, shape, shape_t = next(entry for entry in TRANSFORMS if entry[0] == name)
    case = Case(shape=shape, classes=150, channels=70, images=3)
    with emulator.on(cluster=cluster, threads=512, seed=cluster):
        transform_matches(pair(case, shape_t), transform)


@pytest.mark.parametrize(
    "transform, shape_t",
    [
        (Rotate90(1), (53, 56)),
        (Affine(TURNED), (56, 53)),
        (Scale(6), (48, 47)),
        (Scale(6, "bilinear"), (28, 53)),
    ],
    ids=["permuted", "affine", "nearest", "bilinear"],
)
def test_transforms_of_large_maps(emulator, transform, shape_t):
    """Not all labels of a tile fit into shared memory."""
    case = Case(shape=(56, 53), channels=5, classes=20, images=1)
    with emulator.on(cluster=2):
        transform_matches(pair(case, shape_t), transform)


@pytest.mark.parametrize(
    "transform", [HorizontalFlip(), Affine(TURNED), Scale(6), Scale(6, "bilinear")], ids=type
)
def test_transforms_do_not_depend_on_the_order_of_threads(emulator, transform):
    shape_t = (6, 7) if isinstance(transform, Scale) else (5, 9)
    inputs = pair(Case(shape=(5, 9), channels=70, images=2), shape_t)
    results = []
    for seed in range(4):
        with emulator.on(seed=seed, cluster=4, threads=128):
            found = run("triton", fused_cam_transform_mse, inputs, transform)
        results.append(found.values + found.grads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("need", sampled(itertools.product((True, False), repeat=3), 3), ids=str)
@pytest.mark.parametrize("name", ["flip", "affine each", "affine large", "nearest 7 6"])
def test_only_wanted_gradients_of_transforms(emulator, name, need):
    _, transform, shape, shape_t = next(entry for entry in TRANSFORMS if entry[0] == name)
    inputs = pair(Case(shape=shape, channels=36), shape_t)
    full = run("triton", fused_cam_transform_mse, inputs, transform)
    some = run("triton", fused_cam_transform_mse, inputs, transform, needed=need)
    assert torch.equal(full.values[0], some.values[0])
    for wanted, everything, one in zip(need, full.grads, some.grads, strict=True):
        assert torch.equal(everything, one) if wanted else one is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cells_that_do_not_count(emulator, layout):
    """A NaN in what no valid cell reads, or in a weight, reaches no cell that is not valid."""
    case = Case(shape=(5, 5), layout=layout, channels=8)
    features, features_t, weight = pair(case, (5, 5))
    right = Translate(0.4, 0.0)  # two cells: the last two columns are read by none, the first two not valid
    features[..., 3:] = torch.nan
    features_t[..., :2] = torch.nan
    inputs = features, features_t, weight
    found = run("triton", fused_cam_transform_mse, inputs, right)
    clean = run("triton", fused_cam_transform_mse, [x.nan_to_num(0.0) for x in inputs], right)
    for ours, other in zip(found.values + found.grads, clean.values + clean.grads, strict=True):
        assert torch.equal(ours, other)
    weight[1, 3] = torch.nan
    arguments = right.resampling(5, 5).flat()
    with emulator.on(cluster=2):
        means, kept = torch.ops.camkernels.cam_transform_mse_fwd(
            features, features_t, weight, None, *arguments, 0, True, "triton"
        )
    kept = kept.view(3, case.classes, 5, 5)
    assert not kept[..., :2].any()
    assert torch.equal(means.isnan(), torch.arange(case.classes).eq(1).expand(3, -1))
    assert kept[:, 1, :, 2:].isnan().all()


@pytest.mark.parametrize(
    "transform",
    [Rotate90(0), Translate(0.0, 0.0), Affine([[1, 0, 0], [0, 1, 0]]), Scale(7), Scale(7, "bilinear")],
    ids=str,
)
def test_nothing_changed(emulator, transform):
    inputs = pair(Case(channels=40, classes=20), (7, 7))
    inputs[1] = inputs[0].clone()
    found = run("triton", fused_cam_transform_mse, inputs, transform)
    assert all(not tensor.any() for tensor in found.values + found.grads)


@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "scalars"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels, maps", [(4800, 1), (800, 9)], ids=["1 map", "9 maps"])
def test_more_channels_than_weights_fit_in_shared_memory(emulator, channels, maps, layout, vectors):
    case = Case(layout=layout, shape=(2, 4), channels=channels, images=2, classes=10)
    with emulator.on(vectors=vectors, seed=channels):
        cam_matches([case.features(), case.weight()], case.target(None if maps == 1 else maps))


@pytest.mark.parametrize("maps", [1, 2])
def test_more_images_than_threads(emulator, maps):
    case = Case(shape=(2, 4), channels=128, images=150, classes=3)
    cam_matches([case.features(), case.weight()], case.target(None if maps == 1 else maps))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_map_too_large_for_a_cluster(emulator, layout):
    """Two copies of it do not fit in shared memory, one does: a block must do without the others."""
    case = Case(layout=layout, shape=(180, 180), channels=4, images=1)
    with emulator.on(cluster=8):
        cam_matches([case.features(), case.weight()], case.target())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_changes_nothing(emulator, dtype):
    """Bit for bit: no result depends on which thread comes first, so a run can be repeated."""
    case = Case(dtype=dtype, shape=(5, 8), channels=48, images=2, image_size=(19, 16))
    target = case.target()
    results = []
    for seed in range(4):
        with emulator.on(seed=seed, cluster=4):
            inputs = [case.features(), case.weight(), case.pictures()]
            found = run("triton", lambda f, w, x: fused_cam_erase(f, w, target, x, sharpness=5.0), inputs)
        results.append(found.values + found.grads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("maps", [1, 3])
def test_class_index_out_of_range_gives_nan(emulator, maps, layout):
    case = Case(layout=layout, channels=32, shape=(4, 8))
    features, weight = case.features().requires_grad_(), case.weight().requires_grad_()
    target = torch.tensor([[1, 2, 3], [0, 0, 0], [5, 4, 5]])[:, :maps]
    broken = target.clone()
    broken[1, 0] = case.classes
    broken[2, 0] = -1
    with emulator.on(cluster=2):
        fixed = features.detach(), weight.detach(), broken
        cam, _, extent = torch.ops.camkernels.cam_fwd(*fixed, None, True, 1e-8, "triton")
        right = reference.cam(features, weight, target)
        hit = torch.zeros(3, maps, dtype=torch.bool)
        hit[1:, 0] = True
        assert cam[hit].isnan().all()
        assert not cam[~hit].isnan().any()
        assert torch.allclose(cam[~hit], right[~hit], atol=1e-6)
        grad = torch.randn(cam.shape, generator=torch.Generator().manual_seed(0))
        flags = True, 1e-8, True, True, True, "triton"
        grads = torch.ops.camkernels.cam_bwd(grad, *fixed, cam, extent, *flags)
    truth = torch.autograd.grad(right, weight, grad * ~hit[..., None, None])[0]
    assert torch.allclose(grads[1], truth, atol=1e-5)
    assert torch.equal(grads[0].isnan().flatten(1).all(1), hit.any(1))


def test_a_value_at_the_threshold_is_kept(emulator):
    cells = torch.tensor([[[[0.0, 0.5, 0.5, 1.0]]]])
    target = torch.zeros(1, dtype=torch.int64)
    for mode in ("bilinear", "nearest"):
        with _backend.use_backend("triton"):
            images = torch.ones(1, 1, 1, 4)
            result = fused_cam_erase(cells, torch.ones(1, 1), target, images, threshold=0.5, mode=mode)
        assert result.erased.flatten().tolist() == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=["images only", "map only"])
def test_only_wanted_gradients_are_written(emulator, need):
    case = Case(shape=(4, 4), channels=8, images=2, image_size=(9, 12))
    target = case.target()
    needed = [need[1], need[1], need[0]]
    inputs = [case.features(), case.weight(), case.pictures()]
    full = run("triton", lambda f, w, x: fused_cam_erase(f, w, target, x, sharpness=5.0), inputs)
    some = run(
        "triton", lambda f, w, x: fused_cam_erase(f, w, target, x, sharpness=5.0), inputs, needed=needed
    )
    for wanted, everything, one in zip(needed, full.grads, some.grads, strict=True):
        assert torch.equal(everything, one) if wanted else one is None


def test_limits_are_named(emulator):
    with _backend.use_backend("triton"):
        wide = torch.zeros(1, 1, 400, 400)
        weight, target = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
        with pytest.raises(RuntimeError, match=r"a map of 400 x 400 needs .* bytes of shared memory"):
            fused_cam(wide, weight, target)
        with pytest.raises(RuntimeError, match="up to 16 different fill values, not 17"):
            fused_cam_erase(wide[..., :2, :2], weight, target, torch.zeros(1, 17, 4, 4), fill=list(range(17)))
        message = r"cam_transform_mse_fwd: a map of 400 x 400 needs .* bytes of shared memory"
        with pytest.raises(RuntimeError, match=message):
            fused_cam_transform_mse(wide, wide, weight, HorizontalFlip())


def test_maps_whose_pixels_no_int_counts(emulator):
    """65536 x 65536 is 0 in 32 bits; nothing of it may be launched."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    huge, none, extent = empty(1, 1, 65536, 65536), empty(0), empty(1, 1, 2)
    small, image = empty(1, 1, 2, 2), empty(1, 3, 4, 4)
    weight, target = empty(2, 1), empty(1, 1, dtype=torch.int64)
    message = "a map of 65536 x 65536 has more pixels than the CUDA kernels take"
    with pytest.raises(RuntimeError, match=f"cam_fwd: {message}"):
        emulator.cam_fwd(huge, weight, target, None, True, 1e-8, huge, none, extent)
    flags = True, 1e-8, True, True, False
    with pytest.raises(RuntimeError, match=f"cam_bwd: {message}"):
        emulator.cam_bwd(huge, huge, weight, target, huge, extent, *flags, huge, weight, none)
    erase = 0.7, 0.0, [0.0], False
    with pytest.raises(RuntimeError, match=f"cam_erase_fwd: {message}"):
        emulator.cam_erase_fwd(huge, weight, target, image, *erase, 1e-8, image, huge, none, extent)
    with pytest.raises(RuntimeError, match=f"cam_erase_bwd: {message}"):
        emulator.cam_erase_bwd(image, None, None, huge, *erase, True, False, image, none)
    flip = *HorizontalFlip().resampling(65536, 65536).flat(), 0
    with pytest.raises(RuntimeError, match=f"cam_transform_mse_fwd: {message}"):
        emulator.cam_transform_mse_fwd(huge, huge, weight, None, *flip, True, extent, huge)
    with pytest.raises(RuntimeError, match=f"cam_transform_mse_bwd: {message}"):
        emulator.cam_transform_mse_bwd(
            extent, small, huge, weight, None, huge, *flip, True, True, True, small, huge, weight
        )
    with pytest.raises(RuntimeError, match="an image of 4294967296 elements is larger"):
        emulator.cam_erase_fwd(small, weight, target, huge, *erase, 1e-8, huge, small, none, extent)


@pytest.mark.parametrize(
    "mistake, cluster, message",
    [
        ("no_barrier", 1, "a wrong result"),
        ("no_cluster_barrier", 2, "a wrong result|has not started|has not taken"),
        ("diverging_barriers", 1, "threads diverge"),
        ("thread_leaves_early", 1, "has already left the kernel"),
        ("part_of_a_warp_shuffles", 1, "deadlock"),
        ("waits_without_arriving", 2, "waits at a cluster barrier at which it has not arrived"),
        ("arrives_twice", 2, "arrives at a cluster barrier again"),
        ("never_waits", 2, "leaves the kernel without a wait at the cluster barrier"),
        ("reads_between_arrive_and_wait", 2, "after it has arrived at the cluster barrier"),
    ],
)
@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "static"])
def test_the_emulator_notices(library, mistake, cluster, message, fixed):
    """Reversing an array through shared memory, with one mistake: some order of threads must give it away."""
    found = set()
    for seed in range(8):
        kernels = replace(Emulator.load(library), seed=seed, cluster=cluster)
        assert kernels.reverse("none", fixed) == ""
        found.add(kernels.reverse(mistake, fixed))
    assert found != {""}
    assert all(re.search(message, text) for text in found - {""}), found


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_static_shared_memory_belongs_to_a_block(library, cluster):
    values = torch.randint(1000, (16, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    truth = values.sum(1, dtype=torch.int32)
    kernels = [replace(Emulator.load(library), seed=seed, cluster=cluster) for seed in range(4)]
    assert all(torch.equal(each.block_sums(values, "none"), truth) for each in kernels)
    assert not any(torch.equal(each.block_sums(values, "no_barrier"), truth) for each in kernels)
    nobody_wrote = torch.full_like(truth, -values.shape[1])  # -1 is what all bits set are
    assert all(torch.equal(each.block_sums(values, "never_writes"), nobody_wrote) for each in kernels)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_atomics(library, cluster):
    values = torch.randint(7, (8, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    truth = values.flatten().bincount(minlength=7).int()
    bits = values * 4 + 1
    for seed in range(4):
        kernels = replace(Emulator.load(library), seed=seed, cluster=cluster)
        assert torch.equal(kernels.histogram(values, 7, "none"), truth)
        assert (kernels.histogram(values, 7, "reads_before_the_atomic") < truth).all()
        total, most, least, any_bits, all_bits, last, replaced = kernels.tally(bits).tolist()
        assert (total, most, least) == (bits.sum(), bits.max(), bits.min())
        assert (any_bits, all_bits) == (0b11101, 0b00001)
        assert last in bits
        assert replaced + last == total


@pytest.mark.parametrize(
    "blocks, threads, cluster, shared, message",
    [
        (8, 1024, 8, 232448, ""),
        (0, 32, 1, 0, "0 blocks; allowed are 1 to 2147483647"),
        (2**31, 32, 1, 0, "2147483648 blocks; allowed are 1 to 2147483647"),
        (1, 0, 1, 0, "0 threads in a block; allowed are 1 to 1024"),
        (1, 1056, 1, 0, "1056 threads in a block; allowed are 1 to 1024"),
        (1, 48, 1, 0, "whole warps and whole clusters"),
        (16, 32, 16, 0, "16 blocks in a cluster; allowed are 1 to 8"),
        (8, 32, 0, 0, "0 blocks in a cluster; allowed are 1 to 8"),
        (3, 32, 2, 0, "whole warps and whole clusters"),
        (1, 32, 1, 232449, "232449 bytes of shared memory; allowed are 0 to 232448"),
    ],
)
def test_launches_that_no_gpu_takes(library, blocks, threads, cluster, shared, message):
    error = replace(Emulator.load(library), threads=threads, cluster=cluster).launch(blocks, shared)
    assert message in error if message else error == ""


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """The environment of a process that loads the emulator with sanitizers in it."""
    if emulation.SANITIZE in os.environ:
        pytest.skip("this is the run under sanitizers")
    runtimes = emulation.sanitizer_runtimes()
    if not runtimes:
        pytest.skip("the C++ compiler has no address sanitizer")
    return os.environ | {
        emulation.SANITIZE: str(emulation.built(tmp_path_factory.getbasetemp(), sanitize=True)),
        "LD_PRELOAD": " ".join(runtimes),
        # Python and torch keep what they allocate until they end; and a CUDA driver, which torch would start,
        # wants addresses that the sanitizer keeps for itself.
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # tensors are small: torch's threads would only wait for each other
    }


@pytest.mark.parametrize("part", ["", "_seeds", "_masks"])
def test_under_sanitizers(sanitized, part):
    """Memory errors and undefined behaviour in the kernels themselves, on a part of the cases."""
    file = str(Path(__file__).with_name(f"test_cuda_emulator{part}.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, env=sanitized, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def test_sanitizers_work(sanitized):
    """An access past the end of a shared array ends the process."""
    folder = str(Path(__file__).parent)
    script = (
        f"import os, sys; sys.path.insert(0, {folder!r})\n"
        "from cuda_emulator.emulation import SANITIZE, Emulator\n"
        "Emulator.load(os.environ[SANITIZE]).reverse('beyond_the_end')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], env=sanitized, capture_output=True, text=True)
    assert "heap-buffer-overflow" in result.stderr
