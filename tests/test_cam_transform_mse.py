"""fused_cam_transform_mse: values and gradients against the reference in float64."""

from dataclasses import replace
from math import cos, lcm, pi, sin

import pytest
import torch
import torch.nn.functional as F
from cases import BACKENDS, GPU, KERNEL_BACKENDS, LAYOUTS, Case, as_double, as_plain, lay_out, matrix, run
from closeness import assert_as_close_as

import camkernels
from camkernels import _C, fused_cam_transform_mse, reference
from camkernels.transforms import (
    Affine,
    HorizontalFlip,
    Rotate90,
    Scale,
    Transform,
    Translate,
    VerticalFlip,
)

TURN = [[cos(0.4), sin(0.4), 0.1], [-sin(0.4), cos(0.4), 0.25]]
ZOOM_IN = [[0.3, 0.0, 0.2], [0.0, 0.35, -0.1]]
ZOOM_OUT = [[2.2, 0.3, 0.0], [-0.2, 1.9, 0.1]]
FAR = [[1.0, 0.0, 5.0], [0.0, 1.0, 0.0]]
EACH = [TURN, ZOOM_IN, ZOOM_OUT]

KINDS = ("flip", "quarter turn", "shift", "whole cells", "affine", "nearest", "bilinear")
# Maps that a resized image may have, besides those of the image.
RESIZED = {
    (7, 7): (6, 6),
    (14, 14): (7, 12),
    (1, 1): (2, 3),
    (5, 9): (4, 6),
    (1, 23): (1, 20),
    (23, 1): (20, 1),
    (33, 40): (30, 32),
    (17, 16): (4, 16),
    (4, 6): (3, 4),
}


def transform_of(kind, shape):
    height, width = shape
    return {
        "flip": HorizontalFlip(),
        "quarter turn": Rotate90(1),
        "shift": Translate(-0.23, -0.31),
        "whole cells": Translate(-(width // 3) / width, -(height // 4) / height),
        "affine": Affine(TURN),
        "nearest": Scale(192),
        "bilinear": Scale(192, "bilinear"),
    }[kind]


def on(device, transform):
    return Affine(transform.matrix.to(device)) if isinstance(transform, Affine) else transform


def size_of(transform, shape):
    if isinstance(transform, Scale):
        return RESIZED[shape]
    return tuple(transform(torch.zeros(1 if not isinstance(transform, Affine) else 3, 1, *shape)).shape[-2:])


def inputs_of(case, transform, shape_t=None, layout_t=None):
    other = replace(
        case,
        seed=case.seed + 1,
        shape=shape_t or size_of(transform, case.shape),
        layout=layout_t or case.layout,
    )
    return [case.features(), other.features(), case.weight()]


def assert_matches_reference(backend, inputs, transform, **options):
    """``inputs`` are features, features_t and weight."""
    device = inputs[0].device
    options = {"reduction": "none", **options}

    def ours(*tensors):
        return fused_cam_transform_mse(*tensors, on(device, transform), **options)

    def theirs(*tensors):
        return reference.cam_transform_mse(*tensors, transform, **options).to(tensors[0].dtype)

    needed = [True, True, not options.get("detach_weight", False)]
    found = run(backend, ours, inputs, needed=needed)
    plain = run("reference", theirs, as_plain(inputs), needed=needed)
    truth = run("reference", theirs, as_double(inputs), needed=needed)
    names = ("loss", "grad_features", "grad_features_t", "grad_weight")
    results = zip(
        names, found.values + found.grads, plain.values + plain.grads, truth.values + truth.grads, strict=True
    )
    for name, mine, other, exact in results:
        if exact is None:
            assert mine is None
            continue
        if inputs[0].dtype != torch.float64 and mine.dtype == torch.float64:
            mine = mine.float()  # the arithmetic is that of the features, whatever the weight's dtype
        assert_as_close_as(mine.cpu(), other, exact, what=name)
    for grad, tensor in zip(found.grads, inputs, strict=True):
        assert grad is None or (grad.dtype == tensor.dtype and grad.shape == tensor.shape)
    return found


def placed_matrix():
    """The cases of every op, one or three transforms to each: seven kinds meet every dtype, layout, shape and
    map, since their number shares no factor with those."""
    placed = []
    for backend, device in KERNEL_BACKENDS:
        for place, case in enumerate(matrix(backend)):
            if backend == "triton" and not GPU:
                case = replace(case, classes=3, images=2)
                if case.shape == (33, 40):
                    case = replace(case, shape=(17, 16))  # past one block all the same
            if case.dtype == torch.float64 and case.shape == (33, 40):
                continue  # sums so long are judged in test_cam_transform_mse_cpu.py, by a wider float
            layout_t = LAYOUTS[(LAYOUTS.index(case.layout) + place) % len(LAYOUTS)]
            for k in range(3 if backend == "cpu" else 1):
                kind = KINDS[(place + 2 * k) % len(KINDS)]
                placed.append(
                    pytest.param(
                        backend,
                        replace(case, device=device),
                        kind,
                        layout_t,
                        id=f"{backend}-{case}-{kind}-{layout_t}",
                    )
                )
    return placed


@pytest.mark.parametrize("backend, case, kind, layout_t", placed_matrix())
def test_matches_reference(backend, case, kind, layout_t):
    transform = transform_of(kind, case.shape)
    assert_matches_reference(backend, inputs_of(case, transform, layout_t=layout_t), transform)


SMALL = Case(shape=(4, 6), images=3, channels=5, classes=2)
ONE_GRID = [
    HorizontalFlip(),
    VerticalFlip(),
    *(Rotate90(k) for k in (0, 1, 2, 3, -1)),
    Translate(0.3, -0.2),
    Translate(-0.21, 0.0),
    Translate(0.0, 0.4),
    Translate(1 / 6, -2 / 4),  # whole cells
    Translate(0.5 / 6, -0.5 / 4),  # the first row and column valid to the hair
    Translate(0.95, -0.85),  # one cell is left
    Translate(0.99, 0.5),  # none
    *(Affine(m) for m in (TURN, ZOOM_IN, ZOOM_OUT, FAR, EACH)),
    Affine(torch.tensor(TURN, dtype=torch.float16)),
    Affine([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
]


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("transform", ONE_GRID, ids=lambda t: repr(t).replace("\n", ""))
def test_every_transform(backend, device, transform):
    case = replace(
        SMALL, device=device, layout=("contiguous", "channels_last")[ONE_GRID.index(transform) % 2]
    )
    inputs = inputs_of(case, transform, shape_t=tuple(transform(torch.zeros(3, 1, 4, 6)).shape[-2:]))
    found = assert_matches_reference(backend, inputs, transform)
    if transform in (ONE_GRID[13], ONE_GRID[17]):  # nothing is left to compare
        assert not any(x.any() for x in found.values + found.grads)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    "shape, shape_t",
    [
        ((7, 7), (6, 6)),
        ((6, 6), (7, 7)),
        ((9, 8), (8, 9)),
        ((5, 5), (5, 5)),
        ((1, 1), (5, 5)),
        ((6, 1), (2, 3)),
        ((3, 5), (7, 2)),
        ((8, 6), (4, 3)),
    ],
    ids=str,
)
def test_sizes_of_scaled_maps(backend, device, mode, shape, shape_t):
    case = Case(device=device, shape=shape, images=2, channels=3, classes=2)
    transform = Scale(192, mode)
    assert_matches_reference(backend, inputs_of(case, transform, shape_t), transform)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize(
    "kind, images, channels, classes, shape",
    [
        ("shift", 2, 7, 1, (7, 7)),  # one class
        ("nearest", 2, 7, 1, (7, 7)),
        ("flip", 1, 3, 37, (5, 9)),  # more classes than channels
        ("affine", 1, 3, 37, (5, 9)),
        ("nearest", 1, 3, 37, (5, 9)),
        ("flip", 2, 1, 5, (7, 7)),  # one channel
        ("bilinear", 1, 1, 5, (7, 7)),
        ("flip", 1, 300, 3, (5, 9)),  # sums in two parts
        ("affine", 1, 300, 3, (5, 9)),
        ("quarter turn", 1, 66, 70, (1, 1)),  # one cell, more than a block of the rest
        ("shift", 1, 4, 17, (23, 1)),  # one column
        ("flip", 1, 4, 17, (23, 1)),
    ],
)
def test_numbers_of_classes_and_channels(backend, device, kind, images, channels, classes, shape):
    case = Case(device=device, images=images, channels=channels, classes=classes, shape=shape)
    transform = transform_of(kind, shape)
    assert_matches_reference(backend, inputs_of(case, transform), transform)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", ["flip", "nearest"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout_t", ["contiguous", "channels_last"])
def test_gradients_keep_each_their_memory_format(backend, device, kind, layout, layout_t):
    case = Case(device=device, dtype=torch.bfloat16, layout=layout, images=2, channels=6)
    transform = transform_of(kind, case.shape)
    found = assert_matches_reference(backend, inputs_of(case, transform, layout_t=layout_t), transform)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    for grad, name in zip(found.grads, (layout, layout_t), strict=False):
        assert grad.is_contiguous(memory_format=formats[name])


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["flip", "nearest"])
@pytest.mark.parametrize(
    "weight_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_weight_of_another_dtype(backend, device, dtype, kind, weight_dtype):
    case = Case(device=device, dtype=dtype, weight_dtype=weight_dtype, images=1, channels=9)
    transform = transform_of(kind, case.shape)
    assert_matches_reference(backend, inputs_of(case, transform), transform)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", ["flip", "nearest"])
def test_weight_as_a_convolution_keeps_its_shape(backend, device, kind):
    case = replace(SMALL, device=device)
    transform = transform_of(kind, case.shape)
    features, features_t, weight = inputs_of(case, transform)
    found = assert_matches_reference(backend, [features, features_t, weight[..., None, None]], transform)
    assert found.grads[2].shape == (2, 5, 1, 1)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(backend, device, reduction):
    case = replace(SMALL, device=device)
    inputs = inputs_of(case, HorizontalFlip())
    assert_matches_reference(backend, inputs, HorizontalFlip(), reduction=reduction)
    with camkernels.use_backend(backend):
        each = fused_cam_transform_mse(*inputs, HorizontalFlip(), reduction="none")
        one = fused_cam_transform_mse(*inputs, HorizontalFlip(), reduction=reduction)
        assert one.shape == ()
        assert torch.allclose(one, getattr(each, reduction)())
        if reduction == "mean":
            assert torch.equal(one, fused_cam_transform_mse(*inputs, HorizontalFlip()))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", ["flip", "nearest"])
def test_output_gradient_of_any_stride(backend, device, kind):
    case = replace(SMALL, device=device)
    transform = on(device, transform_of(kind, case.shape))
    inputs = [x.requires_grad_() for x in inputs_of(case, transform)]
    grad = torch.randn(2, 3, generator=case.generator()).to(device).T
    for strided in (grad, grad[:1, :1].expand_as(grad)):
        found = []
        for g in (strided, strided.contiguous()):
            with camkernels.use_backend(backend):
                means = fused_cam_transform_mse(*inputs, transform, reduction="none")
            found.append(torch.autograd.grad(means, inputs, g))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_only_where_asked_for(backend, device, kind):
    case = replace(SMALL, device=device, images=2)
    transform = on(device, transform_of(kind, case.shape))
    inputs = inputs_of(case, transform)

    def op(*tensors):
        return fused_cam_transform_mse(*tensors, transform, reduction="none")

    together = run(backend, op, inputs)
    for needed in ((True, False, False), (False, True, False), (False, False, True)):
        alone = run(backend, op, inputs, needed=needed)
        for need, one, all_of_them in zip(needed, alone.grads, together.grads, strict=True):
            assert torch.equal(one, all_of_them) if need else one is None


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("kind", ["flip", "shift", "nearest"])
def test_detached_weight_has_no_gradient(backend, device, kind):
    case = replace(SMALL, device=device)
    transform = transform_of(kind, case.shape)
    features, features_t, weight = (x.requires_grad_() for x in inputs_of(case, transform))
    results = []
    for detach_weight in (False, True):
        with camkernels.use_backend(backend):
            loss = fused_cam_transform_mse(
                features, features_t, weight, transform, detach_weight=detach_weight
            )
            results.append(
                torch.autograd.grad(loss, [features, features_t, weight], allow_unused=detach_weight)
            )
    assert results[0][2].any()
    assert results[1][2] is None
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    with camkernels.use_backend(backend):
        plain = features.detach(), features_t.detach(), weight
        assert not fused_cam_transform_mse(*plain, transform, detach_weight=True).requires_grad
        assert fused_cam_transform_mse(*plain, transform).requires_grad


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_most_one_map_is_kept_for_backward(backend, device, kind):
    case = replace(SMALL, device=device)
    transform = on(device, transform_of(kind, case.shape))
    inputs = [x.requires_grad_() for x in inputs_of(case, transform)]
    saved = []
    with (
        camkernels.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        fused_cam_transform_mse(*inputs, transform, reduction="none")
    given = {x.data_ptr() for x in inputs}
    extra = [x for x in saved if x.data_ptr() not in given and x.shape != (1, 2, 3)]
    assert sum(x.numel() for x in extra) <= 3 * 2 * 24


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(backend, device, kind):
    case = Case(device=device, images=0, channels=5)
    transform = on(device, transform_of(kind, case.shape))
    inputs = inputs_of(case, transform)
    for reduction, shape in (("none", (0, 6)), ("mean", ()), ("sum", ())):
        found = run(
            backend,
            lambda *x, reduction=reduction: fused_cam_transform_mse(*x, transform, reduction=reduction),
            inputs,
        )
        assert found.values[0].shape == shape
        assert not found.values[0].any()
        assert [g.shape for g in found.grads] == [x.shape for x in inputs]
        assert not found.grads[2].any()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_flip_is_that_of_torch(backend, device):
    case = replace(SMALL, device=device)
    features, features_t, weight = inputs_of(case, HorizontalFlip())
    maps, maps_t = (torch.einsum("lc,nchw->nlhw", weight, x) for x in (features, features_t))
    with camkernels.use_backend(backend):
        found = fused_cam_transform_mse(features, features_t, weight, HorizontalFlip())
    assert torch.allclose(found, F.mse_loss(torch.flip(maps, (-1,)), maps_t))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("shape, shape_t", [((7, 7), (6, 6)), ((6, 7), (8, 4))], ids=str)
def test_nearest_scaling_is_that_of_the_grid_written_out(backend, device, shape, shape_t):
    """7 against 6 on 42: every cell repeated as often as the grid is finer."""
    case = replace(SMALL, device=device, shape=shape)
    features, features_t, weight = inputs_of(case, Scale(192), shape_t)
    grids = []
    for tensor in (features, features_t):
        maps = torch.einsum("lc,nchw->nlhw", weight, tensor)
        for dim, size, other in zip((-2, -1), shape, shape_t, strict=True):
            maps = maps.repeat_interleave(lcm(size, other) // maps.shape[dim], dim)
        grids.append(maps)
    with camkernels.use_backend(backend):
        found = fused_cam_transform_mse(features, features_t, weight, Scale(192))
    assert grids[0].shape == grids[1].shape
    assert torch.allclose(found, F.mse_loss(*grids))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize(
    "transform",
    [
        HorizontalFlip(),
        VerticalFlip(),
        *(Rotate90(k) for k in range(4)),
        Translate(0.0, 0.0),
        Translate(0.25, -0.5),
        Affine([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        Scale(64),
        Scale(64, "bilinear"),
    ],
    ids=lambda t: repr(t).replace("\n", ""),
)
def test_what_follows_its_image_costs_nothing(backend, device, transform):
    """Exactly: the features of the transformed image are the transformed features."""
    case = replace(SMALL, device=device, shape=(4, 8), dtype=torch.float16, weight_dtype=torch.float32)
    features, transform = case.features(), on(device, transform)
    features_t = features if isinstance(transform, Scale) else transform(features)
    found = run(
        backend,
        lambda *x: fused_cam_transform_mse(*x, transform, reduction="none"),
        [features, features_t, case.weight()],
    )
    assert not any(x.any() for x in found.values + found.grads)


MOVES = [
    HorizontalFlip(),
    VerticalFlip(),
    Rotate90(2),
    Translate(0.23, 0.0),
    Translate(-1 / 7, 1 / 7),
    Translate(-0.13, -0.1),
    Affine([[cos(pi / 3), sin(pi / 3), 0.0], [-sin(pi / 3), cos(pi / 3), 0.0]]),
    Affine([[0.8, 0.0, -0.1], [0.0, 1.3, 0.0]]),
    Rotate90(1),
    Rotate90(3),
    Affine([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
]
CELL = 32  # pixels of a cell, as of a ResNet
# The interpreter is slow; test_every_transform shows that Triton's kernels have the reference's geometry.
GEOMETRY_BACKENDS = [pair for pair in BACKENDS if GPU or pair[0] != "triton"]


def pooled(images):
    return F.avg_pool2d(images, CELL)


@pytest.mark.parametrize("backend, device", GEOMETRY_BACKENDS)
@pytest.mark.parametrize("place", range(len(MOVES)), ids=lambda i: repr(MOVES[i]).replace("\n", ""))
def test_images_move_as_heatmaps_do(backend, device, place):
    """A network that sees one bright cell of the image: no other transform explains as well where it went."""
    image = torch.zeros(1, 1, 7 * CELL, 7 * CELL, device=device)
    image[..., CELL : 2 * CELL, 4 * CELL : 5 * CELL] = 1
    features, features_t = pooled(image), pooled(on(device, MOVES[place])(image))
    weight = torch.ones(1, 1, device=device)
    with camkernels.use_backend(backend):
        losses = [fused_cam_transform_mse(features, features_t, weight, on(device, t)).item() for t in MOVES]
    assert min(range(len(MOVES)), key=losses.__getitem__) == place
    if not isinstance(MOVES[place], Affine):
        assert losses[place] == pytest.approx(0, abs=1e-12)
    else:  # bilinear on cells is coarser than on pixels
        assert losses[place] < 0.5 * sorted(losses)[1]


@pytest.mark.parametrize("backend, device", GEOMETRY_BACKENDS)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("shape, shape_t", [((4, 3), (3, 2)), ((3, 4), (5, 3))], ids=str)
def test_scaled_images_move_as_heatmaps_do(backend, device, mode, shape, shape_t):
    """Of all cells that could have been bright, the loss is smallest for the one that was."""
    cells = shape[0] * shape[1]
    transform = Scale(tuple(CELL * x for x in shape_t), mode)
    maps = torch.eye(cells, device=device).view(cells, 1, *shape)
    images_t = pooled(transform(maps.repeat_interleave(CELL, -2).repeat_interleave(CELL, -1)))
    assert images_t.shape[-2:] == shape_t
    for bright in (0, cells // 2 + 1, cells - 2):
        with camkernels.use_backend(backend):
            losses = fused_cam_transform_mse(
                maps[bright].expand_as(maps),
                images_t,
                torch.ones(1, 1, device=device),
                transform,
                reduction="none",
            )
        assert losses.argmin() == bright


# NumPy, on which Triton's interpreter runs, warns of 0 * inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize(
    "transform",
    [Translate(0.3, 0.0), Translate(2 / 6, 0.0), Affine([[1.0, 0.0, 0.4], [0.0, 1.0, 0.0]]), Affine(FAR)],
    ids=lambda t: repr(t).replace("\n", ""),
)
def test_what_does_not_count_may_hold_anything(backend, device, transform):
    """NaN in cells that no valid one reads, and in those that are not valid."""
    transform = on(device, transform)
    case = replace(SMALL, device=device)
    features, features_t, weight = inputs_of(case, transform)
    valid = transform.valid(features)[:1, 0]
    leaf = features.clone().requires_grad_()
    transform(leaf).masked_fill(~valid, 0.0).sum().backward()
    unread = leaf.grad == 0
    assert unread.any()
    assert not valid.all()

    def op(*tensors):
        return fused_cam_transform_mse(*tensors, transform, reduction="none")

    dirty = [features.masked_fill(unread, torch.nan), features_t.masked_fill(~valid, torch.nan), weight]
    clean = [features.masked_fill(unread, 0.0), features_t.masked_fill(~valid, 0.0), weight]
    found, plain = run(backend, op, dirty), run(backend, op, clean)
    assert torch.equal(found.values[0], plain.values[0])
    assert found.values[0].isfinite().all()
    if backend != "reference":  # there the products of backward meet 0 * NaN
        assert all(torch.equal(a, b) for a, b in zip(found.grads[:2], plain.grads[:2], strict=True))
        assert torch.equal(found.grads[2], plain.grads[2])
    if not valid.any():
        weight[1] = torch.inf
        assert not run(backend, op, [features, features_t, weight]).values[0].any()


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_an_exact_copy_reads_no_neighbour(backend, device):
    """A flip interpolates nothing: a NaN stays in its own mirrored cell."""
    case = replace(SMALL, device=device)
    features, features_t, weight = inputs_of(case, HorizontalFlip())
    features[1, 2, 1, 4] = torch.nan
    found = run(
        backend,
        lambda *x: fused_cam_transform_mse(*x, HorizontalFlip(), reduction="none"),
        [features, features_t, weight],
    )
    assert found.values[0].isnan().any(1).tolist() == [False, True, False]
    for grad, column in zip(found.grads, (4, 1), strict=False):
        expected = torch.zeros_like(grad, dtype=torch.bool)
        expected[1, :, 1, column] = True
        assert torch.equal(grad.isnan(), expected)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", ["shift", "affine", "nearest"])
def test_a_nan_reaches_what_is_read_with_it(backend, device, kind):
    """And nothing else: sums over cells must not multiply it by 0."""
    case = replace(SMALL, device=device)
    transform = transform_of(kind, case.shape)
    features, features_t, weight = inputs_of(case, transform)
    features[1, 2, 1, 2] = torch.nan
    features_t[2, 0, 1, 1] = torch.nan
    found = assert_matches_reference(backend, [features, features_t, weight], transform)
    assert found.values[0].isnan().any(1).tolist() == [False, True, True]
    for grad in found.grads[:2]:
        assert grad[1:].isnan().any()
        assert not grad[1:].isnan().all()


BORDERS = [
    ([[0.9, 0.3, 0.1], [-0.2, 1.05, 0.1]], (7, 7)),
    ([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]], (30, 30)),
    ([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]], (20, 12)),
    ([[1.0, 0.0, 1 / 6], [0.0, 1.0, -1 / 4]], (4, 6)),
]


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("matrix, shape", BORDERS, ids=str)
def test_a_position_on_the_border_counts(backend, device, matrix, shape):
    """Some cells read at -1 or 1, but for the last bit."""
    case = Case(device=device, images=1, channels=3, classes=2, shape=shape)
    assert_matches_reference(backend, inputs_of(case, Affine(matrix)), Affine(matrix))


class Roll(Transform):
    def __call__(self, images):
        return images.roll(1, -1)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_a_transform_that_kernels_do_not_know(backend, device):
    inputs = inputs_of(replace(SMALL, device=device), HorizontalFlip())
    with camkernels.use_backend("reference"):
        assert fused_cam_transform_mse(*inputs, Roll()) > 0
    message = r"^fused_cam_transform_mse: transform is a Roll, of which the kernels know nothing; .*reference"
    with camkernels.use_backend(backend), pytest.raises(TypeError, match=message):
        fused_cam_transform_mse(*inputs, Roll())


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_a_matrix_of_nan_compares_nothing(backend, device):
    case = replace(SMALL, device=device)
    transform = Affine(torch.full((2, 3), torch.nan, device=device))
    found = run(backend, lambda *x: fused_cam_transform_mse(*x, transform), inputs_of(case, HorizontalFlip()))
    assert not any(x.any() for x in found.values + found.grads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "transform",
    [
        HorizontalFlip(),
        Rotate90(1),
        Translate(0.3, -0.4),
        Translate(1 / 4, 0.0),
        Affine(TURN),
        Affine(EACH[:2]),
    ],
    ids=lambda t: repr(t).replace("\n", ""),
)
def test_gradcheck(backend, transform):
    case = Case(dtype=torch.float64, shape=(3, 4), channels=4, images=2, classes=3)
    shape_t = tuple(transform(torch.zeros(2, 1, 3, 4)).shape[-2:])
    inputs = [x.requires_grad_() for x in inputs_of(case, transform, shape_t)]
    with camkernels.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda *x: fused_cam_transform_mse(*x, transform, reduction="none"), inputs, atol=1e-6
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("shape_t", [(2, 3), (4, 5), (3, 4)], ids=str)
def test_gradcheck_of_scaling(backend, mode, shape_t):
    case = Case(dtype=torch.float64, shape=(3, 4), channels=4, images=2, classes=3)
    inputs = [x.requires_grad_() for x in inputs_of(case, Scale(64, mode), shape_t)]
    with camkernels.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda *x: fused_cam_transform_mse(*x, Scale(64, mode), reduction="none"), inputs, atol=1e-6
        )


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set(capability, dtype, kind):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        for layout, layout_t, classes in (
            ("contiguous", "contiguous", 14),
            ("channels_last", "channels_last", 37),
            ("contiguous", "channels_last", 3),
        ):
            case = Case(dtype=dtype, layout=layout, channels=41, classes=classes)
            transform = transform_of(kind, case.shape)
            assert_matches_reference("cpu", inputs_of(case, transform, layout_t=layout_t), transform)
    finally:
        _C.use_cpu_capability(chosen)


def test_strided_inputs_are_read_as_they_are_meant():
    """Every second column of something wider, the rest of it NaN."""
    case = replace(SMALL, layout="strided")
    inputs = inputs_of(case, HorizontalFlip())
    dense = [lay_out(x, "contiguous") if x.dim() == 4 else x for x in inputs]
    found, plain = (fused_cam_transform_mse(*x, HorizontalFlip()) for x in (inputs, dense))
    assert torch.equal(found, plain)
