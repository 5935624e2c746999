"""otsu_mask: the threshold of scikit-image, to the last bit."""

import numpy as np
import pytest
import torch
from cases import BACKENDS, KERNEL_BACKENDS, lay_out, may_hold_infinities, without_cuda
from skimage.filters import threshold_otsu

import camkernels
from camkernels import _C, otsu_mask

everywhere = pytest.mark.parametrize(("backend", "device"), without_cuda(BACKENDS))
on_kernels = pytest.mark.parametrize(("backend", "device"), without_cuda(KERNEL_BACKENDS))

KINDS = ("normal", "relu", "levels", "clusters", "mirrored", "shifted", "skewed")


def maps_of(kind, shape=(6, 14, 14), seed=0):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=draw)
    if kind == "relu":  # many ties at 0
        return values.relu()
    if kind == "levels":  # values on the edges of bins
        return torch.randint(0, 5, shape, generator=draw).float()
    if kind == "clusters":  # every threshold in the gap is as good: the first counts
        return values * 0.1 + 3 * (torch.rand(shape, generator=draw) < 0.3)
    if kind == "mirrored":  # two thresholds are as good but for rounding
        return torch.cat([values, -values], -1)
    if kind == "shifted":  # bins of a few roundings' width
        return 1000 + values
    if kind == "skewed":
        return values.exp() ** 3
    return values


def by_scikit_image(maps, bins=256):
    """Of maps [M, H, W], each in the type that the op computes in."""
    wide = maps.cpu() if maps.dtype == torch.float64 else maps.cpu().float()
    thresholds = np.array([threshold_otsu(each.numpy(), nbins=bins) for each in wide])
    return torch.from_numpy(thresholds).to(maps.dtype)


def assert_as_scikit_image(backend, maps, bins=256):
    with camkernels.use_backend(backend):
        mask, threshold = otsu_mask(maps, bins=bins)
    assert threshold.dtype == maps.dtype
    assert torch.equal(threshold.cpu(), by_scikit_image(maps, bins))
    assert mask.dtype == torch.bool
    assert torch.equal(mask, maps > threshold[:, None, None])
    return mask, threshold


@everywhere
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_is_that_of_scikit_image(backend, device, kind):
    mask, _ = assert_as_scikit_image(backend, maps_of(kind).to(device))
    assert mask.any(dim=2).any(dim=1).all()
    assert not mask.all(dim=2).all(dim=1).any()


def test_many_maps_on_the_cpu():
    for seed, kind in enumerate(KINDS):
        assert_as_scikit_image("cpu", maps_of(kind, (300, 9, 11), seed + 1))


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_as_float32(backend, device, dtype):
    assert_as_scikit_image(backend, maps_of("normal", (4, 7, 9)).to(device, dtype))


@everywhere
def test_the_mask_is_of_the_rounded_threshold(backend, device):
    maps = torch.tensor([[[0.0, 1.0, 3.0625]]], dtype=torch.bfloat16, device=device)
    with camkernels.use_backend(backend):
        mask, threshold = otsu_mask(maps)
    assert threshold.item() == 1.0  # 0.999 in float32
    assert mask.flatten().tolist() == [False, False, True]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_float64(backend, kind):
    assert_as_scikit_image(backend, maps_of(kind, (20, 7, 9)).double())


@everywhere
@pytest.mark.parametrize("bins", [2, 3, 100, 4096])
def test_other_numbers_of_bins(backend, device, bins):
    assert_as_scikit_image(backend, maps_of("normal", (2, 6, 7)).to(device), bins)


@everywhere
@pytest.mark.parametrize("shape", [(3, 1, 2), (2, 5, 9), (1, 70, 90)])
def test_sizes(backend, device, shape):
    assert_as_scikit_image(backend, maps_of("normal", shape).to(device))


@everywhere
def test_constant_maps_have_an_empty_mask(backend, device):
    maps = torch.tensor([0.0, -2.5, 1e30], device=device)[:, None, None].expand(3, 4, 5)
    with camkernels.use_backend(backend):
        mask, threshold = otsu_mask(maps)
    assert threshold.tolist() == maps[:, 0, 0].tolist()
    assert not mask.any()


@may_hold_infinities
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@everywhere
def test_nan_and_infinite_maps_have_no_threshold(backend, device):
    maps = torch.arange(120.0, device=device).view(6, 4, 5)
    maps[0, 0, 0] = torch.nan
    maps[1, 3, 4] = torch.nan
    maps[2, 1, 1] = torch.inf
    maps[3, 1, 2] = -torch.inf
    maps[4, 0, 0], maps[4, 3, 3] = -3e38, 3e38  # a range that float32 cannot hold
    with camkernels.use_backend(backend):
        mask, threshold = otsu_mask(maps)
        alone = otsu_mask(maps[5:])
    assert threshold.isnan().tolist() == [True] * 5 + [False]
    assert not mask[:5].any()
    assert torch.equal(mask[5:], alone.mask)
    assert torch.equal(threshold[5:], alone.threshold)


@may_hold_infinities
@everywhere
def test_ranges_that_bins_hardly_divide(backend, device):
    """scikit-image refuses them; all backends must agree, and the mask must split the map."""
    above = torch.nextafter(torch.ones(()), torch.tensor(2.0)).item()
    maps = torch.tensor([[1.0, above], [0.0, 1e-44], [1.0, 1.0 + 5 * (above - 1)]])[:, None, :].repeat(
        1, 3, 2
    )
    with camkernels.use_backend("reference"):
        wanted = otsu_mask(maps)
    with camkernels.use_backend(backend):
        found = otsu_mask(maps.to(device))
    assert torch.equal(found.threshold.cpu(), wanted.threshold)
    assert torch.equal(found.mask.cpu(), wanted.mask)


@everywhere
def test_leading_dimensions_and_strides(backend, device):
    maps = maps_of("clusters", (6, 5, 7)).to(device)
    with camkernels.use_backend(backend):
        flat = otsu_mask(maps)
        many = otsu_mask(lay_out(maps, "strided").view(2, 3, 5, 7))
        one = otsu_mask(maps[4])
        none = otsu_mask(maps[:0])
    assert torch.equal(many.mask, flat.mask.view(2, 3, 5, 7))
    assert torch.equal(many.threshold, flat.threshold.view(2, 3))
    assert torch.equal(one.mask, flat.mask[4])
    assert torch.equal(one.threshold, flat.threshold[4])
    assert none.mask.shape == (0, 5, 7)
    assert none.threshold.shape == (0,)


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_each_instruction_set(capability):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        for kind in KINDS:
            assert_as_scikit_image("cpu", maps_of(kind, (30, 8, 8), 99))
    finally:
        _C.use_cpu_capability(chosen)


@on_kernels
def test_no_gradient(backend, device):
    maps = maps_of("normal", (2, 3, 4)).to(device).requires_grad_()
    with camkernels.use_backend(backend):
        mask, threshold = otsu_mask(maps)
    assert not mask.requires_grad
    assert not threshold.requires_grad
