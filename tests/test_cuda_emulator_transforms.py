"""fused_cam_transform_mse as CUDA kernels, run without a GPU (see test_cuda_emulator.py)."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import Case, run
from cuda_emulator.comparison import CLUSTERS, DTYPES, assert_matches
from cuda_emulator.emulation import sampled

from camkernels import fused_cam_transform_mse, reference
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
    emulator.set(cluster=CLUSTERS[number // 2 % 4], seed=number, threads=(64, 128)[number // 4 % 2])
    transform_matches(inputs, transform)
    launched = 2 if isinstance(transform, (HorizontalFlip, VerticalFlip, Rotate90)) else 3
    first, *others = emulator.kernels()
    assert first == "cam_transform_mse_fwd"
    assert len(others) == launched


@pytest.mark.parametrize("name", ["flip wide", "affine large", "nearest 7 6", "bilinear 7 6"])
@pytest.mark.parametrize("cluster", [1, 4])
def test_transforms_of_many_labels(emulator, name, cluster):
    """Tiles of several warps' rows, and more of them than one; more labels than channels."""
    _, transform, shape, shape_t = next(entry for entry in TRANSFORMS if entry[0] == name)
    case = Case(shape=shape, classes=150, channels=70, images=3)
    emulator.set(cluster=cluster, threads=512, seed=cluster)
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
    emulator.set(cluster=2)
    transform_matches(pair(case, shape_t), transform)


@pytest.mark.parametrize(
    "transform", [HorizontalFlip(), Affine(TURNED), Scale(6), Scale(6, "bilinear")], ids=type
)
def test_transforms_do_not_depend_on_the_order_of_threads(emulator, transform):
    shape_t = (6, 7) if isinstance(transform, Scale) else (5, 9)
    inputs = pair(Case(shape=(5, 9), channels=70, images=2), shape_t)
    results = []
    for seed in range(4):
        emulator.set(seed=seed, cluster=4, threads=128)
        found = run("cuda", fused_cam_transform_mse, inputs, transform)
        results.append(found.values + found.grads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("need", sampled(itertools.product((True, False), repeat=3), 3), ids=str)
@pytest.mark.parametrize("name", ["flip", "affine each", "affine large", "nearest 7 6"])
def test_only_wanted_gradients_of_transforms(emulator, name, need):
    _, transform, shape, shape_t = next(entry for entry in TRANSFORMS if entry[0] == name)
    inputs = pair(Case(shape=shape, channels=36), shape_t)
    full = run("cuda", fused_cam_transform_mse, inputs, transform)
    some = run("cuda", fused_cam_transform_mse, inputs, transform, needed=need)
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
    found = run("cuda", fused_cam_transform_mse, inputs, right)
    clean = run("cuda", fused_cam_transform_mse, [x.nan_to_num(0.0) for x in inputs], right)
    for ours, other in zip(found.values + found.grads, clean.values + clean.grads, strict=True):
        assert torch.equal(ours, other)
    weight[1, 3] = torch.nan
    arguments = right.resampling(5, 5).flat()
    emulator.set(cluster=2)
    means, kept = torch.empty(3, case.classes), torch.empty(3, case.classes, 5, 5)
    torch.ops.camkernels_emulated.cam_transform_mse_fwd(
        features, features_t, weight, None, *arguments, 0, True, means, kept
    )
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
    found = run("cuda", fused_cam_transform_mse, inputs, transform)
    assert all(not tensor.any() for tensor in found.values + found.grads)
