"""A map whose pixels are equal is 0 with gradient 0, whatever the rounding of its sums."""

import itertools

import pytest
import torch
from cases import BACKENDS, GPU, LAYOUTS, SHAPES, lay_out, without_cuda

import camkernels
from camkernels import _C, focus_area, fused_cam, fused_cam_erase, fused_cam_seeds

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Odd and even, around the widths of vectors and of the blocks in which sums are made.
CHANNELS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 47, 64, 65, 100, 127, 129, 255, 257, 384, 512, 513, 600)
# Triton makes 16 maps and more with matrix units. All pixels are alike to these, but not to NumPy's product,
# which stands for them in the interpreter.
CLASSES = 21 if GPU else 5
TARGETS = ([1, 4], [[0, 2, 3], [4, 1, 1]], None)  # of the 2 images, or all classes


def tenths(shape, draw):
    return torch.full(shape, 0.1)


def thirds(shape, draw):
    return torch.full(shape, 1 / 3)


def one_value_per_channel(shape, draw):
    return torch.randn(shape[:2], generator=draw)[..., None, None].expand(shape)


def large(shape, draw):
    return 1e4 + one_value_per_channel(shape, draw)


def cancelling(shape, draw):
    """With the weights of ``weight_of`` the terms of a map cancel in pairs: the sum is 0 but for rounding."""
    half = one_value_per_channel((shape[0], (shape[1] + 1) // 2, *shape[2:]), draw)
    return torch.cat([half, half], 1)[:, : shape[1]]


VALUES = (tenths, thirds, one_value_per_channel, large, cancelling)


def weight_of(values, channels, draw):
    if values is tenths:
        return torch.full((CLASSES, channels), 0.3)
    weight = torch.randn((CLASSES, channels), generator=draw)
    if values is cancelling:
        half = (channels + 1) // 2
        weight[:, half:] = -weight[:, : channels - half]
    return weight


def placed(backends):
    """Backend, device and dtype; the GPUs' backends have no float64."""
    return [
        (backend, device, dtype)
        for backend, device in backends
        for dtype in DTYPES
        if dtype != torch.float64 or backend in ("cpu", "reference")
    ]


def sweep(backend, device, dtype):
    """Features, weight and classes of constant maps: every number of channels with every kind of value, while
    shape and layout take turns. Triton's interpreter, being slow, takes four."""
    draw = torch.Generator().manual_seed(0)
    combinations = list(itertools.product(CHANNELS, VALUES))
    shapes = SHAPES
    if backend == "triton" and not GPU:
        combinations, shapes = combinations[12:108:24], SHAPES[1:5]
    for index, (channels, values) in enumerate(combinations):
        shape = shapes[index % len(shapes)]
        layout = LAYOUTS[index // 2 % len(LAYOUTS)]
        features = values((2, channels, *shape), draw).to(device, dtype)
        weight = weight_of(values, channels, draw).to(device, dtype)
        target = TARGETS[index % len(TARGETS)]
        case = f"{values.__name__}: {channels} channels, {shape[0]}x{shape[1]}, {layout}, classes {target}"
        target = None if target is None else torch.tensor(target, device=device)
        leaves = lay_out(features, layout).requires_grad_(), weight.requires_grad_()
        with camkernels.use_backend(backend):
            yield case, leaves, target


def assert_no_gradient(outputs, leaves, case):
    """For output gradients of which any share that came through would show."""
    given = [torch.linspace(-1, 2, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in outputs]
    for grad in torch.autograd.grad(outputs, leaves, given):
        assert not grad.any(), case


@pytest.mark.parametrize(("backend", "device", "dtype"), placed(BACKENDS), ids=str)
def test_fused_cam(backend, device, dtype):
    for case, leaves, target in sweep(backend, device, dtype):
        cam = fused_cam(*leaves, target, eps=0.0)  # the sums themselves are equal
        assert not cam.any(), f"{case}: {cam.abs().max()}"
        assert_no_gradient([cam], leaves, case)


@pytest.mark.parametrize(("backend", "device", "dtype"), placed(BACKENDS), ids=str)
def test_nothing_is_erased(backend, device, dtype):
    target = torch.tensor([1, 4], device=device)
    images = torch.linspace(1, 2, 2 * 3 * 9 * 8, device=device).view(2, 3, 9, 8).to(dtype)
    for case, leaves, _ in sweep(backend, device, dtype):
        erased, cam = fused_cam_erase(*leaves, target, images, threshold=0.01)
        assert torch.equal(erased, images), case
        assert not cam.any(), case
        assert_no_gradient(fused_cam_erase(*leaves, target, images, sharpness=3.0), leaves, case)


@pytest.mark.parametrize(("backend", "device", "dtype"), placed(BACKENDS), ids=str)
def test_no_pixel_is_a_candidate(backend, device, dtype):
    target = torch.tensor([1, 4], device=device)
    for case, leaves, _ in sweep(backend, device, dtype):
        seeds = fused_cam_seeds(*leaves, target, 2, threshold=0.01)
        assert not seeds.cam.any(), case
        assert not seeds.count.any(), case
        assert not seeds.indices.any(), case  # of equal pixels the first is the peak
        assert_no_gradient([seeds.cam], leaves, case)


@pytest.mark.parametrize(("backend", "device", "dtype"), placed(without_cuda(BACKENDS)), ids=str)
def test_focus_area(backend, device, dtype):
    for case, (features, _), _ in sweep(backend, device, dtype):
        mask, coverage = focus_area(features)
        assert not mask.any(), case
        assert not coverage.any(), case


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_channel_without_weight_may_vary(backend, device, layout):
    features = torch.full((2, 57, 7, 7), 0.1, device=device)
    features[:, ::8] = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.full((CLASSES, 57), 0.3, device=device)
    weight[:, ::8] = 0
    leaves = [lay_out(features, layout).requires_grad_(), weight.requires_grad_()]
    with camkernels.use_backend(backend):
        for target in (torch.tensor([1, 4], device=device), None):
            cam = fused_cam(*leaves, target)
            assert not cam.any()
            assert_no_gradient([cam], leaves, "")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_constant_map_among_others(backend, device):
    """Constant is each map by itself, and a channel that is constant has a gradient where others vary."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(3, 33, 7, 7, generator=draw)
    features[1] = 0.1
    features[2, 5] = 0.7
    weight = torch.rand(CLASSES, 33, generator=draw) + 0.1
    leaves = [x.to(device).requires_grad_() for x in (features, weight)]
    with camkernels.use_backend(backend):
        cam = fused_cam(*leaves, torch.tensor([0, 0, 1], device=device))
        grad = torch.autograd.grad(cam[..., 2:].square().sum(), leaves[0])[0]
    assert not cam[1].any()
    assert not grad[1].any()
    assert cam[0].max() == cam[2].max() == 1
    assert grad[0].abs().amax((1, 2)).min() > 0
    per_weight = grad[2] / leaves[1][1, :, None, None]  # the gradient of the map, the same for every channel
    torch.testing.assert_close(per_weight[5], per_weight[4], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_and_number_of_threads(capability, threads):
    chosen, before = _C.cpu_capability(), torch.get_num_threads()
    _C.use_cpu_capability(capability)
    torch.set_num_threads(threads)
    try:
        for backend in ("cpu", "reference"):
            for case, leaves, target in sweep(backend, "cpu", torch.float32):
                assert not fused_cam(*leaves, target).any(), (backend, case)
                assert not focus_area(leaves[0]).mask.any(), (backend, case)
    finally:
        _C.use_cpu_capability(chosen)
        torch.set_num_threads(before)
