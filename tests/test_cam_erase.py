"""fused_cam_erase: values and gradients against the reference in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BACKENDS, GPU, KERNEL_BACKENDS, Case, as_double, as_plain, placed_matrix, run
from closeness import assert_as_close_as

import camkernels
from camkernels import _C, fused_cam, fused_cam_erase, reference

THRESHOLD = 0.7
# A pixel this close to the threshold may fall on either side: the map is rounded to float32 (or float64).
BAND = {torch.float64: 1e-12}


def heat_of(cam, images, mode="bilinear"):
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(cam[:, None], images.shape[-2:], mode=mode, **corners)


def outcomes(backend, case, *, fill=0.0, **options):
    inputs = [case.features(), case.weight(), case.pictures()]
    target = case.target()

    def ours(features, weight, images):
        return fused_cam_erase(features, weight, target, images, fill=fill, **options)

    def theirs(features, weight, images):
        return reference.cam_erase(features, weight, target.cpu(), images, fill=fill, **options)

    found = run(backend, ours, inputs)
    plain = run("reference", theirs, as_plain(inputs))
    truth = run("reference", theirs, as_double(inputs))
    return inputs, found, plain, truth


def assert_hard_erasing_is_right(backend, case, *, fill=0.0, mode="bilinear", threshold=THRESHOLD):
    inputs, found, plain, truth = outcomes(backend, case, fill=fill, mode=mode, threshold=threshold)
    images = inputs[2]
    erased, cam = found.values
    assert erased.dtype == images.dtype
    assert cam.dtype == inputs[0].dtype
    assert_as_close_as(cam.cpu(), plain.values[1], truth.values[1], what="cam")
    for name, index in (("grad_features", 0), ("grad_weight", 1)):
        assert_as_close_as(found.grads[index].cpu(), plain.grads[index], truth.grads[index], what=name)

    # Whatever the map's rounding, every pixel is either its own bits or the fill, ...
    colour = (
        torch.as_tensor(fill, dtype=images.dtype, device=images.device)
        .view(-1, 1, 1)
        .expand(images.shape[1:])
    )
    kept = erased == images
    assert torch.equal(torch.where(kept, images, colour), erased)
    # ... and outside a narrow band around the threshold it is the right one of the two.
    heat = heat_of(truth.values[1], images, mode).to(images.device)
    sure = (heat - threshold).abs() > BAND.get(case.dtype, 1e-6)
    sure |= heat.isnan()
    wanted = torch.where(heat > threshold, colour, images)
    assert torch.equal(torch.where(sure, erased, wanted), wanted)
    # The gradient of the images is that of the same mask, exactly.
    draw = torch.Generator().manual_seed(1)
    grad = torch.randn(erased.shape, generator=draw).to(erased.device, erased.dtype)
    settled = sure.expand_as(grad)
    wanted_grad = torch.where(heat > threshold, 0, grad)
    assert torch.equal(found.grads[2][settled], wanted_grad[settled])


@pytest.mark.parametrize("backend, case", placed_matrix(), ids=str)
def test_hard_erasing(backend, case):
    assert_hard_erasing_is_right(backend, case, fill=(0.25, -1.5, 7.0))


@pytest.mark.parametrize("backend, case", placed_matrix(), ids=str)
def test_soft_erasing(backend, case):
    if backend == "triton" and not GPU:  # the interpreter takes a while for every pixel
        case = replace(case, image_size=(19, 13))
    _, found, plain, truth = outcomes(backend, case, fill=(0.25, -1.5, 7.0), sharpness=9.0)
    names = ("erased", "cam", "grad_features", "grad_weight", "grad_images")
    everything = zip(
        names, found.values + found.grads, plain.values + plain.grads, truth.values + truth.grads, strict=True
    )
    for name, mine, other, exact in everything:
        assert_as_close_as(mine.cpu(), other, exact, what=name)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(7, 9), (3, 2), (1, 1), (20, 5), (8, 64)], ids=str)
def test_sizes_of_images(backend, device, mode, layout, size):
    """The size of the map, smaller, larger; narrower than a vector and exactly a few of them."""
    case = Case(device=device, shape=(7, 9), channels=5, layout=layout, image_size=size, depth=2)
    assert_hard_erasing_is_right(backend, case, mode=mode)
    _, found, plain, truth = outcomes(backend, case, mode=mode, sharpness=4.0)
    for mine, other, exact in zip(found.grads, plain.grads, truth.grads, strict=True):
        assert_as_close_as(mine.cpu(), other, exact)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("depth", [1, 3, 4, 7])
@pytest.mark.parametrize("one_fill", [True, False], ids=["one fill", "a fill per channel"])
def test_fill(backend, device, depth, one_fill):
    fill = -2.0 if one_fill else [0.5 * d for d in range(depth)]
    for layout in ("contiguous", "channels_last"):
        case = Case(device=device, depth=depth, layout=layout, channels=5)
        assert_hard_erasing_is_right(backend, case, fill=fill)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("image_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_images_of_another_dtype(backend, device, dtype, image_dtype):
    case = Case(device=device, dtype=dtype, image_dtype=image_dtype, maps="ties", channels=9)
    assert_hard_erasing_is_right(backend, case, fill=0.5)
    _, found, plain, truth = outcomes(backend, case, sharpness=5.0)
    assert_as_close_as(found.values[0].cpu(), plain.values[0], truth.values[0])
    assert [g.dtype for g in found.grads] == [dtype, dtype, image_dtype]


def test_float64_images_with_float32_features():
    case = Case(image_dtype=torch.float64)
    assert_hard_erasing_is_right("cpu", case, fill=0.1)
    inputs = [case.features(), case.weight(), case.pictures()]
    soft = fused_cam_erase(inputs[0], inputs[1], case.target(), inputs[2], sharpness=5.0)
    plain = reference.cam_erase(inputs[0], inputs[1], case.target(), inputs[2], sharpness=5.0)
    assert soft.erased.dtype == torch.float64
    assert torch.allclose(soft.erased, plain[0], atol=1e-5)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_a_value_at_the_threshold_is_kept(backend, device, mode):
    """Strictly above: cells of exactly 0.5 stay, alone and as a plateau that is upsampled."""
    cells = torch.tensor([[0.0, 0.5, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 0.5, 1.0]], device=device)
    features = cells[None, None]  # [1, 1, 2, 5]
    weight = torch.ones(1, 1, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    with camkernels.use_backend(backend):
        same = torch.ones(1, 1, 2, 5, device=device)
        erased = fused_cam_erase(features, weight, target, same, threshold=0.5, mode=mode).erased
        assert erased[0, 0].tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0]] * 2
        large = torch.ones(1, 1, 6, 15, device=device)
        erased = fused_cam_erase(features, weight, target, large, threshold=0.5, mode=mode).erased
        plateau = erased[0, 0, :, 4:11]  # between the centres of the first and the last cell of 0.5
        assert torch.equal(plateau, torch.ones_like(plateau))
        assert not erased[0, 0, :, 13:].any()


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("maps", ["constant", "nan"])
def test_nothing_is_erased_where_the_map_says_nothing(backend, device, maps):
    case = Case(device=device, maps=maps)
    images = case.pictures()
    with camkernels.use_backend(backend):
        erased, cam = fused_cam_erase(case.features(), case.weight(), case.target(), images)
    nowhere = slice(None) if maps == "constant" else slice(-1, None)
    assert torch.equal(erased[nowhere], images[nowhere])
    assert cam[nowhere].isnan().all() if maps == "nan" else not cam.any()


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_kept_pixels_are_their_own_bits(backend, device):
    """NaN payloads, infinities and negative zero survive."""
    case = Case(device=device, maps="constant", image_size=(4, 4), depth=1)
    for dtype, integers in ((torch.float32, torch.int32), (torch.float16, torch.int16)):
        info = torch.iinfo(integers)
        bits = torch.randint(info.min, info.max, (3, 1, 4, 4), generator=case.generator(), dtype=integers).to(
            device
        )
        bits[0, 0, 0] = torch.tensor(
            [info.min, -1, 0x7C01, 1]
        )  # -0, a NaN, a signalling half NaN, a subnormal
        images = bits.view(dtype)
        with camkernels.use_backend(backend):
            erased = fused_cam_erase(case.features(), case.weight(), case.target(), images).erased
        assert torch.equal(erased.view(integers), bits)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_the_cam_is_that_of_fused_cam(backend, device):
    case = Case(device=device)
    with camkernels.use_backend(backend):
        cam = fused_cam_erase(case.features(), case.weight(), case.target(), case.pictures()).cam
        assert torch.equal(cam, fused_cam(case.features(), case.weight(), case.target()))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("sharpness", [None, 5.0])
def test_empty_batch(backend, device, sharpness):
    case = Case(device=device, images=0)
    target = case.target()
    found = run(
        backend,
        lambda f, w, i: fused_cam_erase(f, w, target, i, sharpness=sharpness),
        [case.features(), case.weight(), case.pictures()],
    )
    assert [v.shape for v in found.values] == [(0, 3, 37, 29), (0, 7, 7)]
    assert torch.equal(found.grads[1], torch.zeros_like(case.weight()))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("sharpness", [None, 5.0])
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_only_where_asked_for(backend, device, sharpness, needed):
    case = Case(device=device, channels=5)
    target = case.target()

    def op(features, weight, images):
        return fused_cam_erase(features, weight, target, images, sharpness=sharpness)

    inputs = [case.features(), case.weight(), case.pictures()]
    alone, together = run(backend, op, inputs, needed=needed), run(backend, op, inputs)
    for need, one, all_of_them in zip(needed, alone.grads, together.grads, strict=True):
        assert torch.equal(one, all_of_them) if need else one is None


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("output", ["erased", "cam"])
@pytest.mark.parametrize("sharpness", [None, 5.0])
def test_loss_on_one_output_only(backend, device, output, sharpness):
    """Hard erasing is a dead end for features and weight, which then get no gradient."""
    case = Case(device=device, channels=5)
    target = case.target()
    inputs = [case.features(), case.weight(), case.pictures()]
    found = run(
        backend,
        lambda f, w, i: getattr(fused_cam_erase(f, w, target, i, sharpness=sharpness), output),
        inputs,
    )
    truth = run(
        "reference",
        lambda f, w, i: reference.cam_erase(f, w, target, i, sharpness=sharpness)[output == "cam"],
        inputs,
    )
    for mine, exact in zip(found.grads, truth.grads, strict=True):
        assert (mine is None) == (exact is None)
        if mine is not None:
            assert torch.allclose(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("sharpness", [None, 5.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_gradient_of_any_stride(backend, device, sharpness, layout):
    case = Case(device=device, channels=5, layout=layout)
    target = case.target()
    inputs = [x.requires_grad_() for x in (case.features(), case.weight(), case.pictures())]
    grad = torch.randn(3, 3, 29, 37, generator=case.generator()).to(device).transpose(2, 3)
    for strided in (grad, grad[:1, :1, :1, :1].expand_as(grad)):
        with camkernels.use_backend(backend):
            found = []
            for g in (strided, strided.contiguous()):
                erased, cam = fused_cam_erase(inputs[0], inputs[1], target, inputs[2], sharpness=sharpness)
                found.append(torch.autograd.grad([erased, cam], inputs, [g, cam.detach()]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_memory_formats_are_kept(backend, device):
    case = Case(device=device, layout="channels_last", channels=5)
    target = case.target()
    found = run(
        backend,
        lambda f, w, i: fused_cam_erase(f, w, target, i, sharpness=3.0),
        [case.features(), case.weight(), case.pictures()],
    )
    for tensor in (found.values[0], found.grads[0], found.grads[2]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_hard_erasing_keeps_no_image_for_backward(backend, device):
    case = Case(device=device)
    saved = []
    inputs = [x.requires_grad_() for x in (case.features(), case.weight(), case.pictures())]
    with (
        camkernels.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        fused_cam_erase(inputs[0], inputs[1], case.target(), inputs[2])
    assert max(x.numel() for x in saved if x.shape != inputs[0].shape) <= inputs[1].numel()


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_changing_the_cam_in_place_before_backward_raises(backend, device):
    case = Case(device=device)
    features = case.features().requires_grad_()
    with camkernels.use_backend(backend):
        _, cam = fused_cam_erase(features, case.weight(), case.target(), case.pictures())
    loss = cam.sum()
    with torch.no_grad():
        cam.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("sharpness", [None, 3.0])
def test_gradcheck(mode, sharpness):
    case = Case(dtype=torch.float64, shape=(3, 4), channels=4, images=2, image_size=(7, 6), depth=2)
    target = case.target()
    inputs = [x.requires_grad_() for x in (case.features(), case.weight(), case.pictures())]
    assert torch.autograd.gradcheck(
        lambda f, w, i: fused_cam_erase(f, w, target, i, mode=mode, sharpness=sharpness, fill=(0.3, -1.0)),
        inputs,
        atol=1e-6,
    )


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_instruction_set(capability, dtype):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        for layout in ("contiguous", "channels_last"):
            case = Case(dtype=dtype, layout=layout, channels=9, image_size=(21, 50))
            assert_hard_erasing_is_right("cpu", case, fill=(0.25, -1.5, 7.0))
            _, found, plain, truth = outcomes("cpu", case, sharpness=9.0)
            for mine, other, exact in zip(found.grads, plain.grads, truth.grads, strict=True):
                assert_as_close_as(mine, other, exact)
    finally:
        _C.use_cpu_capability(chosen)


@pytest.mark.parametrize("sharpness", [1e-3, 40.0, 1e4, 1e30])
def test_soft_gate_is_finite_at_any_sharpness(sharpness):
    case = Case(maps="ties")
    images = case.pictures().requires_grad_()
    features = case.features().requires_grad_()
    erased, _ = fused_cam_erase(features, case.weight(), case.target(), images, sharpness=sharpness)
    plain, _ = reference.cam_erase(features, case.weight(), case.target(), images, sharpness=sharpness)
    assert torch.allclose(erased, plain, rtol=1e-4, atol=1e-4 * min(sharpness, 1e3))
    grads = torch.autograd.grad(erased.sum(), [features, images])
    assert all(g.isfinite().all() for g in grads)


def test_small_batches_are_cut_into_bands_of_rows():
    """One image on several threads gives the bits of one image on one thread."""
    case = Case(images=1, image_size=(301, 280))
    threads = torch.get_num_threads()
    arguments = (case.features(), case.weight(), case.target(), case.pictures())
    try:
        torch.set_num_threads(4)
        several = fused_cam_erase(*arguments).erased
        torch.set_num_threads(1)
        one = fused_cam_erase(*arguments).erased
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(several, one)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("sharpness", [None, 5.0])
@pytest.mark.parametrize("with_images", [False, True])
def test_erased_requires_grad_only_where_a_gradient_exists(backend, device, sharpness, with_images):
    case = Case(device=device, channels=5)
    images = case.pictures().requires_grad_(with_images)
    with camkernels.use_backend(backend):
        result = fused_cam_erase(
            case.features().requires_grad_(), case.weight(), case.target(), images, sharpness=sharpness
        )
    assert result.cam.requires_grad
    assert result.erased.requires_grad == (with_images or sharpness is not None)


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, 0x7FC00001, -1])
def test_every_nan_in_the_map_stays_nan_through_the_soft_gate(payload):
    case = Case(channels=3)
    features = case.features()
    features[0, 0, 0, 0] = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
    for capability in _C.cpu_capabilities():
        chosen = _C.cpu_capability()
        _C.use_cpu_capability(capability)
        try:
            erased = fused_cam_erase(features, case.weight(), case.target(), case.pictures(), sharpness=3.0)[
                0
            ]
        finally:
            _C.use_cpu_capability(chosen)
        assert erased[0].isnan().all()
        assert not erased[1:].isnan().any()
