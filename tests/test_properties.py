"""Ops on shapes, layouts and options that nobody thought of."""

import numpy as np
import pytest
import torch
from calls import passes
from cases import LAYOUTS, Case, as_double, as_plain
from closeness import assert_as_close_as
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import camkernels
from camkernels import (
    attention_boxes,
    crop_and_zoom,
    focus_area,
    fused_cam_erase,
    fused_local_activations,
    fused_negative_cam_loss,
    local_level_loss,
    masked_max_pool,
    otsu_mask,
    reference,
)

side = st.integers(1, 40)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    size=st.tuples(side, st.integers(1, 70)),
    channels=st.integers(2, 40),  # of one alone see below
    depth=st.integers(1, 5),
    images=st.integers(0, 5),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    mode=st.sampled_from(["bilinear", "nearest"]),
    threshold=st.floats(0.05, 0.95),
    sharpness=st.none() | st.floats(0.1, 30.0),
    threads=st.sampled_from([1, 2, 5]),
)
def test_any_shape(shape, size, channels, depth, images, layout, dtype, mode, threshold, sharpness, threads):
    case = Case(
        dtype=dtype,
        layout=layout,
        shape=shape,
        channels=channels,
        images=images,
        image_size=size,
        depth=depth,
    )
    inputs = [x.requires_grad_() for x in (case.features(), case.weight(), case.pictures())]
    options = {"threshold": threshold, "sharpness": sharpness, "mode": mode, "fill": list(range(depth))}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with camkernels.use_backend("cpu"):
            erased, cam = fused_cam_erase(inputs[0], inputs[1], case.target(), inputs[2], **options)
            grads = torch.autograd.grad([erased, cam], inputs, [torch.ones_like(erased), cam.detach()])
    finally:
        torch.set_num_threads(before)
    found = [erased, cam, *grads]

    def plainly(tensors):
        leaves = [x.requires_grad_() for x in tensors]
        exact, exact_cam = reference.cam_erase(leaves[0], leaves[1], case.target(), leaves[2], **options)
        outputs = [exact, exact_cam]
        return outputs + list(
            torch.autograd.grad(outputs, leaves, [torch.ones_like(exact), exact_cam.detach()])
        )

    plain, truth = plainly(as_plain(inputs)), plainly(as_double(inputs))
    if sharpness is None and images:
        corners = {"align_corners": False} if mode == "bilinear" else {}
        heat = torch.nn.functional.interpolate(truth[1][:, None], size, mode=mode, **corners)
        sure = ((heat - threshold).abs() > 1e-4).expand_as(erased)
        for index in (0, 4):  # erased and the gradient of the images: a decision, not a sum
            assert torch.equal(found[index].double()[sure], truth[index][sure])
    for index, what in enumerate(("erased", "cam", "grad_features", "grad_weight", "grad_images")):
        if sharpness is not None or index in (1, 2, 3):
            # Tiny maps make single lucky roundings of PyTorch the yardstick, hence the wide margin.
            assert_as_close_as(found[index], plain[index], truth[index], margin=32.0, what=what)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_weight_of_a_single_channel_cancels(shape, layout, dtype):
    """The normalised map does not depend on it: its gradient is 0 but for the rounding of its terms."""
    case = Case(dtype=dtype, layout=layout, shape=shape, channels=1)
    inputs = [x.requires_grad_() for x in (case.features(), case.weight())]
    target = case.target()
    with camkernels.use_backend("cpu"):
        cam = camkernels.fused_cam(*inputs, target)
        grad_features, grad_weight = torch.autograd.grad(cam, inputs, cam.detach())
    terms = (grad_features * inputs[0]).flatten(1).abs().sum(1) / inputs[1][target, 0].abs()  # [N]
    allowed = terms.new_zeros(case.classes).index_add(0, target, terms) * 32 * torch.finfo(dtype).eps
    assert (grad_weight[:, 0].abs() <= allowed).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    channels=st.integers(1, 40),
    classes=st.integers(1, 40),
    images=st.integers(0, 5),
    num_negatives=st.integers(1, 45),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    kind=st.sampled_from(["mse", "uniform"]),
    level=st.floats(-2, 2),
    temperature=st.floats(0.5, 20),
    shown=st.none() | st.floats(0, 1),
    own_logits=st.booleans(),
    with_bias=st.booleans(),
    threads=st.sampled_from([1, 2, 5]),
)
def test_negatives_of_any_shape(
    shape,
    channels,
    classes,
    images,
    num_negatives,
    layout,
    dtype,
    kind,
    level,
    temperature,
    shown,
    own_logits,
    with_bias,
    threads,
):
    case = Case(dtype=dtype, layout=layout, shape=shape, channels=channels, classes=classes, images=images)
    inputs = [case.features(), case.weight(), *([case.bias()] if with_bias else [])]
    inputs = [x.requires_grad_() for x in inputs]
    target = case.target()
    if shown is not None:  # the share of the classes that an image shows
        target = torch.rand((images, classes), generator=case.generator()) < shown
    # With ties; small numbers, which every dtype has.
    logits = None
    if own_logits:
        logits = torch.randint(-3, 4, (images, classes), generator=case.generator()).to(dtype)
    options = {"num_negatives": num_negatives, "kind": kind, "level": level, "temperature": temperature}

    def results(function, leaves):
        bias = leaves[2] if with_bias else None
        loss = function(leaves[0], leaves[1], target, bias=bias, logits=logits, **options)
        return [loss, *torch.autograd.grad(loss, leaves)]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with camkernels.use_backend("cpu"):
            found = results(fused_negative_cam_loss, inputs)
    finally:
        torch.set_num_threads(before)
    plain, truth = (
        results(reference.negative_cam_loss, [x.requires_grad_() for x in tensors])
        for tensors in (as_plain(inputs), as_double(inputs))
    )
    for index, what in enumerate(("loss", "grad_features", "grad_weight", "grad_bias")[: len(found)]):
        # Tiny maps make single lucky roundings of PyTorch the yardstick, hence the wider margin.
        assert_as_close_as(found[index], plain[index], truth[index], margin=8.0, what=what)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.integers(1, 70),
    images=st.integers(0, 5),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    maps=st.sampled_from(["signed", "ties", "constant"]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_focus_area_of_any_shape(shape, channels, images, layout, dtype, maps, threads):
    case = Case(dtype=dtype, layout=layout, shape=shape, channels=channels, images=images, maps=maps)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with camkernels.use_backend("cpu"):
            mask, coverage = focus_area(case.features())
    finally:
        torch.set_num_threads(before)
    heat = case.features().double().sum(1)
    above = heat - heat.mean((-2, -1), keepdim=True)
    sure = above.abs() > 1e-5 * channels
    assert torch.equal(mask[sure], above[sure] > 0)
    assert maps != "constant" or not mask.any()
    assert torch.equal(coverage, mask.to(coverage.dtype).mean((-2, -1)))


def with_threads(threads, function):
    """Its result on that many threads, with the CPU kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with camkernels.use_backend("cpu"):
            return function()
    finally:
        torch.set_num_threads(before)


def values_and_grads(function, leaves, seed=1):
    """Of random output gradients, the same whatever the dtype."""
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    draw = torch.Generator().manual_seed(seed)
    given = [torch.randn(x.shape, generator=draw).to(x.dtype) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, given)]


def assert_as_the_reference(function, reference_function, leaves, threads, margin):
    """Values and gradients."""
    found = with_threads(threads, lambda: values_and_grads(function, leaves))
    plain, truth = (
        values_and_grads(reference_function, [x.requires_grad_() for x in tensors])
        for tensors in (as_plain(leaves), as_double(leaves))
    )
    for index, results in enumerate(zip(found, plain, truth, strict=True)):
        # Tiny maps make single lucky roundings of PyTorch the yardstick, hence the wider margin.
        assert_as_close_as(*results, margin=margin, what=str(index))
    return found


KINDS_OF_MAPS = {
    "normal": lambda x: x,
    "steps": lambda x: (3 * x).round(),
    "clusters": lambda x: x / 50 + 2 * (x > 0.5),
    "outlier": lambda x: torch.where(x == x.max(), 1e6, x),
    "wide": lambda x: (20 * x).exp(),
    "tiny": lambda x: x * 1e-40,
    "offset": lambda x: 1e4 + x / 100,
}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)),
    kind=st.sampled_from(list(KINDS_OF_MAPS)),
    bins=st.sampled_from([256]) | st.integers(2, 300),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**20),
    threads=st.sampled_from([1, 2, 5]),
)
def test_otsu_is_scikit_image_on_any_map(shape, kind, bins, dtype, seed, threads):
    """To the last bit; of a map that is constant, its value."""
    filters = pytest.importorskip(
        "skimage.filters", reason="compares with scikit-image (pip install scikit-image)"
    )
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    maps = KINDS_OF_MAPS[kind](drawn).to(dtype)
    mask, threshold = with_threads(threads, lambda: otsu_mask(maps, bins=bins))
    for own, found in zip(maps, threshold, strict=True):
        try:
            with np.errstate(all="ignore"):  # of 0 / 0 where a step between tiny numbers is 0
                expected = filters.threshold_otsu(own.numpy(), nbins=bins).item()
        except ValueError as error:  # it refuses bins that rounding makes empty; we do not
            if "Too many bins for data range" not in str(error):
                raise
            assert own.min() <= found <= own.max()
        else:
            assert found.item() == torch.tensor(expected, dtype=dtype).item()
    assert torch.equal(mask, maps > threshold[:, None, None])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 20)),
    channels=st.integers(1, 70),
    classes=st.integers(2, 12),
    classifiers=st.integers(1, 9) | st.just(256),
    images=st.integers(0, 4),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    with_bias=st.booleans(),
    threads=st.sampled_from([1, 2, 5]),
)
def test_local_activations_of_any_shape(
    shape, channels, classes, classifiers, images, layout, dtype, with_bias, threads
):
    """Of small integers, so that sums are exact and there are many ties between classifiers."""
    classes = classes if classifiers < 10 else 2  # for the time it takes
    case = Case(dtype=dtype, layout=layout, shape=shape, channels=channels, images=images, maps="ties")
    draw = case.generator()
    weight = torch.randint(-1, 2, (classifiers, classes, channels), generator=draw).to(dtype)
    bias = torch.randint(-1, 2, (classifiers, classes), generator=draw).to(dtype)
    leaves = [case.features(), weight, *([bias] if with_bias else [])]
    leaves = [x.requires_grad_() for x in leaves]
    found = assert_as_the_reference(
        fused_local_activations, reference.local_activations, leaves, threads, 8.0
    )
    activations, attention = (x.detach() for x in found[:2])
    features, weight, *bias = (x.detach() for x in leaves)
    exact = reference.local_activations(features, weight, *bias)
    assert torch.equal(activations, exact[0])
    assert torch.equal(attention, exact[1])
    if classifiers == 1 and images:
        plainly = F.conv2d(
            features.float(), weight[0].float()[..., None, None], *(b[0].float() for b in bias)
        )
        assert torch.equal(activations.float(), plainly)

    # In another order the classifiers give the same. Where one alone is the largest, it wins in both.
    order = torch.randperm(classifiers, generator=draw)
    shuffled = [features, weight[order], *(b[order] for b in bias)]
    winners = []
    for arguments in ([features, weight, *bias], shuffled):
        with camkernels.use_backend("cpu"), passes() as seen:
            results = fused_local_activations(arguments[0].requires_grad_(), *arguments[1:])
        assert torch.equal(results.activations, activations)
        assert torch.equal(results.attention, attention)
        winners.append(seen[0].values.winner.long())
    volume = torch.einsum("nchw,klc->nklhw", features.float(), weight.float())
    volume = volume + (bias[0].float()[..., None, None] if bias else 0)
    alone = (volume == volume.amax(1, keepdim=True)).sum(1) == 1
    assert torch.equal(order[winners[1]][alone], winners[0][alone])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    classes=st.integers(2, 70),
    images=st.integers(0, 5),
    share=st.floats(0, 1),
    size=st.sampled_from([1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_local_level_loss_of_any_shape(shape, classes, images, share, size, dtype, threads):
    case = Case(dtype=dtype, shape=shape, channels=classes, images=images, classes=classes - 1)
    activations = (case.features() * size).requires_grad_()
    mask = torch.rand((images, *shape), generator=case.generator()) < share
    target = case.target()
    assert_as_the_reference(
        lambda x: local_level_loss(x, mask, target),
        lambda x: reference.local_level_loss(x, mask, target),
        [activations],
        threads,
        8.0,
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    channels=st.integers(1, 70),
    images=st.integers(0, 5),
    share=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    maps=st.sampled_from(["signed", "ties", "constant"]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_masked_max_pool_of_any_shape(shape, channels, images, share, layout, dtype, maps, threads):
    """It chooses, and so it is exact."""
    case = Case(dtype=dtype, layout=layout, shape=shape, channels=channels, images=images, maps=maps)
    features = case.features().requires_grad_()
    mask = torch.rand((images, *shape), generator=case.generator()) < share
    found = with_threads(threads, lambda: values_and_grads(lambda x: masked_max_pool(x, mask), [features]))
    plain = values_and_grads(lambda x: reference.masked_max_pool(x, mask), [features])
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    if mask.all() and images:
        assert torch.equal(found[0], features.amax((2, 3)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(1, 70)),
    share=st.sampled_from([0.0, 0.002, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**20),
    threads=st.sampled_from([1, 2, 5]),
)
def test_boxes_are_tight(shape, share, seed, threads):
    """Nothing lies outside, and a pixel lies in the first and the last row and column inside."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    boxes = with_threads(threads, lambda: attention_boxes(mask))
    assert boxes.shape == (len(mask), 4)
    height, width = shape[1:]
    for own, box in zip(mask, boxes, strict=True):
        x0, y0, x1, y1 = (
            round(side * size) for side, size in zip(box.tolist(), 2 * (width, height), strict=True)
        )
        inside = own[y0:y1, x0:x1]
        assert inside.sum() == own.sum()
        if own.any():
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        else:
            assert (x0, y0, x1, y1) == (0, 0, width, height)
        assert torch.equal(box, torch.tensor([x0 / width, y0 / height, x1 / width, y1 / height]))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(side, side),
    size=st.tuples(side, st.integers(1, 70)),
    depth=st.integers(1, 5),
    images=st.integers(0, 4),
    corner=st.tuples(st.floats(-0.5, 0.99), st.floats(-0.5, 0.99)),
    extent=st.tuples(st.floats(0.01, 1.5), st.floats(0.01, 1.5)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_crops_of_any_box(shape, size, depth, images, corner, extent, layout, dtype, threads):
    """Every second box is that of the whole image, which is plainly resized."""
    case = Case(dtype=dtype, layout=layout, shape=shape, channels=depth, images=images)
    pictures = case.features().requires_grad_()
    assume(corner[0] + extent[0] > 0.01 and corner[1] + extent[1] > 0.01)  # some of the image lies in the box
    boxes = torch.tensor([*corner, corner[0] + extent[0], corner[1] + extent[1]]).repeat(images, 1)
    boxes[1::2] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    found = assert_as_the_reference(
        lambda x: crop_and_zoom(x, boxes, size),
        lambda x: reference.crop_and_zoom(x, boxes, size),
        [pictures],
        threads,
        8.0,
    )
    whole = pictures.detach()[1::2].double()
    if len(whole):
        resized = F.interpolate(whole, size, mode="bilinear", align_corners=False)
        error = (found[0].detach()[1::2].double() - resized).abs().max()
        assert error <= 64 * torch.finfo(dtype).eps * whole.abs().max()
