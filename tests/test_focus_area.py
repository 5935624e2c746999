"""focus_area against the words of PCL §3."""

from dataclasses import replace

import pytest
import torch
from cases import BACKENDS, KERNEL_BACKENDS, Case, may_hold_infinities, placed_matrix, without_cuda

import camkernels
from camkernels import _C, focus_area
from camkernels.reference.cam import accumulate_dtype

everywhere = pytest.mark.parametrize(("backend", "device"), without_cuda(BACKENDS))


def by_definition(features):
    """In float64: the mask, and which pixels no rounding could move across the mean."""
    heat = features.cpu().double().mean(1)  # [N, H, W]
    mean = heat.mean((1, 2), keepdim=True)
    rounding = torch.finfo(accumulate_dtype(features.dtype)).eps * features.cpu().double().abs().amax()
    return heat > mean, ~((heat - mean).abs() <= 64 * rounding)


def assert_right(backend, features):
    with camkernels.use_backend(backend):
        found = focus_area(features)
    mask, coverage = (x.cpu() for x in found)
    wanted, sure = by_definition(features)
    assert mask.dtype == torch.bool
    assert mask.shape == wanted.shape
    assert torch.equal(mask[sure], wanted[sure])
    assert coverage.dtype == accumulate_dtype(features.dtype)
    share = mask.double().mean((1, 2))
    assert torch.allclose(coverage.double(), share, rtol=torch.finfo(coverage.dtype).eps, atol=0)
    return found


@may_hold_infinities
@pytest.mark.parametrize(("backend", "case"), placed_matrix(without_cuda(KERNEL_BACKENDS)), ids=str)
def test_mask_and_coverage(backend, case):
    mask, coverage = assert_right(backend, case.features())
    if case.maps == "constant":
        assert not mask.any()
    if case.maps == "nan":
        assert not mask[-1].any()
        assert coverage[-1] == 0


@everywhere
def test_mask_is_where_the_channel_mean_exceeds_its_own_mean(backend, device):
    features = torch.zeros(2, 4, 2, 3, device=device)
    features[0, :, 0, 0] = 1.0  # one pixel of six
    features[1, 2, 1] = torch.tensor([4.0, 4.0, -100.0])  # a channel mean of 1, 1, -25
    with camkernels.use_backend(backend):
        mask, coverage = focus_area(features)
    assert mask.dtype == torch.bool
    assert mask[0].tolist() == [[True, False, False], [False, False, False]]
    assert mask[1].tolist() == [[True, True, True], [True, True, False]]
    assert coverage.tolist() == pytest.approx([1 / 6, 5 / 6])


@everywhere
@pytest.mark.parametrize("size", [(7, 7), (30, 41)])
@pytest.mark.parametrize("value", [0.1, -0.3, 1e-30, 1e30])
def test_a_constant_map_has_no_focus_however_its_mean_is_rounded(backend, device, value, size):
    with camkernels.use_backend(backend):
        mask, coverage = focus_area(torch.full((2, 7, *size), value, device=device))
    assert not mask.any()
    assert coverage.tolist() == [0.0, 0.0]


@everywhere
def test_a_map_of_several_blocks(backend, device):
    assert_right(backend, Case(device=device, images=2, channels=3, shape=(46, 47)).features())


@everywhere
def test_empty(backend, device):
    with camkernels.use_backend(backend):
        mask, coverage = focus_area(torch.ones(0, 2, 3, 3, device=device))
    assert mask.shape == (0, 3, 3)
    assert coverage.shape == (0,)


@everywhere
def test_half_types_are_summed_in_float32(backend, device):
    features = torch.full((1, 4096, 2, 2), 1.0, dtype=torch.float16, device=device)
    features[0, :, 0, 0] = 1.001
    with camkernels.use_backend(backend):
        mask, coverage = focus_area(features)
    assert mask[0].tolist() == [[True, False], [False, False]]
    assert coverage.dtype == torch.float32


@everywhere
def test_no_gradient(backend, device):
    with camkernels.use_backend(backend):
        _, coverage = focus_area(torch.rand(1, 2, 3, 3, device=device, requires_grad=True))
    assert not coverage.requires_grad


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_instruction_set(capability, layout):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        assert_right("cpu", replace(Case(), layout=layout, shape=(13, 17)).features())
    finally:
        _C.use_cpu_capability(chosen)
