"""masked_max_pool: exact, so equal to the definition to the bit."""

from dataclasses import replace

import pytest
import torch
from cases import (
    BACKENDS,
    DEVICE,
    GPU,
    KERNEL_BACKENDS,
    Case,
    lay_out,
    peak_bytes,
    placed_matrix,
    run,
    without_cuda,
)

import camkernels
from camkernels import _C, masked_max_pool

everywhere = pytest.mark.parametrize(("backend", "device"), without_cuda(BACKENDS))
on_kernels = pytest.mark.parametrize(("backend", "device"), without_cuda(KERNEL_BACKENDS))


def mask_of(case):
    """Of images in turn: half of the pixels, all, none."""
    draw = torch.Generator().manual_seed(case.seed + 4)
    share = torch.tensor([0.5, 1.0, 0.0]).repeat(case.images)[: case.images]
    return (torch.rand((case.images, *case.shape), generator=draw) < share[:, None, None]).to(case.device)


def by_definition(features, mask, grad):
    """Values, and the gradient at the first pixel that holds them."""
    masked = (features * mask[:, None]).flatten(2)  # [N, C, P]
    pooled, index = masked.max(2)
    expected = torch.zeros_like(masked).scatter_(2, index[..., None], grad[..., None])
    return pooled, expected.view_as(features) * mask[:, None]


def assert_right(backend, case, features=None, mask=None):
    features = case.features() if features is None else features
    mask = mask_of(case) if mask is None else mask
    found = run(backend, masked_max_pool, [features], mask)
    draw = torch.Generator().manual_seed(1)
    grad = torch.randn(features.shape[:2], generator=draw).to(features.dtype)
    pooled, grad_features = by_definition(features.cpu(), mask.cpu(), grad)
    assert found.values[0].dtype == features.dtype
    assert torch.equal(found.values[0].cpu().nan_to_num(nan=7e4), pooled.nan_to_num(nan=7e4))
    assert torch.equal(found.grads[0].cpu(), grad_features)
    return found


@pytest.mark.parametrize(
    ("backend", "case"),
    [item for item in placed_matrix(without_cuda(KERNEL_BACKENDS)) if item[1].maps != "constant"],
    ids=str,
)
def test_values_and_gradients(backend, case):
    assert_right(backend, case)


@everywhere
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("channels", "shape"), [(130, (3, 5)), (5, (37, 41)), (1, (1, 1)), (257, (1, 2))])
def test_sizes(backend, device, layout, channels, shape):
    assert_right(backend, Case(device=device, layout=layout, channels=channels, shape=shape))


@everywhere
def test_pixels_outside_the_mask_count_as_zero(backend, device):
    features = torch.tensor([[[-3.0, -2.0, 5.0]], [[-3.0, 4.0, 5.0]]], device=device)[None]  # [1, 2, 1, 3]
    mask = torch.tensor([[[True, True, False]]], device=device)
    found = run(backend, masked_max_pool, [features], mask)
    assert found.values[0].tolist() == [[0.0, 4.0]]
    grad = found.grads[0][0, :, 0]
    assert not grad[0].any()  # the maximum lies outside
    assert grad[1].ne(0).tolist() == [False, True, False]


@everywhere
def test_the_first_of_equal_pixels_has_the_gradient(backend, device):
    features = torch.tensor([[-0.0, 0.0, 0.0, -1.0], [2.0, 2.0, 2.0, 2.0]], device=device).view(1, 2, 2, 2)
    mask = torch.tensor([[[False, True], [True, True]]], device=device)
    grad = run(backend, masked_max_pool, [features], mask).grads[0].flatten(2)[0]
    assert not grad[0].any()  # 0 outside the mask comes first
    assert grad[1].ne(0).tolist() == [False, True, False, False]


@everywhere
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [3, 20])  # less and more than a vector
def test_nan_and_infinity(backend, device, layout, width):
    features = torch.zeros(5, 2, 2, width)
    features[0, :, 0, 1:3] = torch.nan  # the first counts
    features[1, :, 0, 0] = torch.nan  # outside the mask: 0 * NaN
    features[2, :, 0, 0] = torch.inf  # outside: 0 * inf
    features[3, :, 1, 2] = torch.inf
    features[4] = -torch.inf
    mask = torch.ones(5, 2, width, dtype=torch.bool, device=device)
    mask[1:4, 0, 0] = False
    found = run(backend, masked_max_pool, [lay_out(features, layout).to(device)], mask)
    value, grad = found.values[0], found.grads[0].flatten(2).transpose(0, 1)
    assert value.isnan().tolist() == [[True] * 2] * 3 + [[False] * 2] * 2
    assert value[3:].tolist() == [[torch.inf] * 2, [-torch.inf] * 2]
    for channel in grad:
        assert channel.ne(0).nonzero().tolist() == [[0, 1], [3, width + 2], [4, 0]]


@everywhere
def test_an_infinite_gradient_outside_the_mask_is_multiplied_by_zero(backend, device):
    features = torch.tensor([[[[-1.0, 0.0]]]], device=device, requires_grad=True)
    mask = torch.tensor([[[True, False]]], device=device)
    with camkernels.use_backend(backend):
        pooled = masked_max_pool(features, mask)
        (grad,) = torch.autograd.grad(pooled, features, torch.full_like(pooled, torch.inf))
    assert grad.isnan().flatten().tolist() == [False, True]


@on_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layout_of_the_gradient_and_an_expanded_output_gradient(backend, device, layout):
    features = lay_out(torch.randn(2, 4, 3, 5), layout).to(device).requires_grad_()
    mask = torch.ones(2, 3, 5, dtype=torch.bool, device=device)
    with camkernels.use_backend(backend):
        (grad,) = torch.autograd.grad(masked_max_pool(features, mask).sum(), features)
    assert grad.stride() == features.stride()
    assert grad.sum().item() == 8


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_each_instruction_set(capability):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        for dtype in (torch.float32, torch.float16, torch.float64):
            for layout in ("contiguous", "channels_last"):
                for maps in ("ties", "nan"):
                    assert_right(
                        "cpu", Case(dtype=dtype, layout=layout, maps=maps, shape=(9, 21), channels=67)
                    )
    finally:
        _C.use_cpu_capability(chosen)


@pytest.mark.parametrize(("backend", "device"), [("cpu", "cpu"), *([("triton", DEVICE)] if GPU else [])])
def test_only_one_index_for_each_channel_is_kept(backend, device):
    case = Case(device=device, channels=256, shape=(14, 14))
    features, mask = case.features().requires_grad_(), mask_of(case)
    with camkernels.use_backend(backend):
        forward, pooled = peak_bytes(lambda: masked_max_pool(features, mask), device)
        assert forward <= 1.05 * (4 + 4) * pooled.numel()
        backward, _ = peak_bytes(lambda: torch.autograd.grad(pooled, features, pooled.detach()), device)
        assert backward <= 1.05 * features.nbytes


@on_kernels
def test_no_images(backend, device):
    case = replace(Case(device=device), images=0)
    found = run(backend, masked_max_pool, [case.features()], torch.ones(0, 7, 7, device=device).bool())
    assert found.values[0].shape == (0, 33)
    assert found.grads[0].shape == (0, 33, 7, 7)
