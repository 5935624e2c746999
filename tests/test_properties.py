"""Ops on shapes, layouts and options that nobody thought of."""

import torch
from cases import LAYOUTS, Case, as_double, as_plain
from closeness import assert_as_close_as
from hypothesis import given, settings
from hypothesis import strategies as st

import camkernels
from camkernels import focus_area, fused_cam_erase, fused_negative_cam_loss, reference

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
