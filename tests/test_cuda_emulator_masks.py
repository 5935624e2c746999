"""otsu_mask and masked_max_pool as CUDA kernels, run without a GPU (see test_cuda_emulator.py)."""

import itertools

import pytest
import test_masked_max_pool as pooling
import test_otsu_mask as otsu
import torch
from cases import Case, lay_out
from cuda_emulator.emulation import sampled

from camkernels import otsu_mask
from camkernels._backend import use_backend

pytest_plugins = ["cuda_emulator.fixtures"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("bins", [256, 100])
@pytest.mark.parametrize("kind", otsu.KINDS)
def test_threshold_is_that_of_scikit_image(emulator, kind, bins):
    number = otsu.KINDS.index(kind)
    shape, threads = ((3, 14, 14), 64) if bins == 256 else ((3, 5, 9), 256)
    with emulator.on(seed=number, threads=threads):
        otsu.assert_as_scikit_image("triton", otsu.maps_of(kind, shape).to(DTYPES[number % 3]), bins)
    assert emulator.launches["otsu_mask_fwd"] == 1


@pytest.mark.parametrize("shape, bins", [((2, 1, 2), 2), ((1, 70, 90), 4096)], ids=["least", "most"])
def test_fewest_and_most_bins(emulator, shape, bins):
    otsu.assert_as_scikit_image("triton", otsu.maps_of("normal", shape), bins)


def test_the_mask_is_of_the_rounded_threshold(emulator):
    """It lies a little below 1, which bfloat16 rounds it to."""
    with use_backend("triton"):
        mask, threshold = otsu_mask(torch.tensor([[0.0, 1.0, 3.0625]], dtype=torch.bfloat16))
    assert threshold.item() == 1.0
    assert mask.tolist() == [[False, False, True]]


POOL = [
    Case(dtype=dtype, layout=layout, shape=shape, maps=maps, channels=channels)
    for (shape, channels), layout, dtype, maps in itertools.product(
        (
            ((7, 7), 64),  # rows that are not of whole vectors, gradients that are
            ((4, 8), 40),
            ((14, 14), 9),
            ((1, 1), 16),
            ((5, 9), 33),
        ),
        ("contiguous", "channels_last", "offset"),
        DTYPES,
        ("signed", "ties", "nan"),
    )
] + [
    # More channels than a block takes, and more pixels than one that writes gradients.
    Case(layout="channels_last", shape=(23, 40), channels=72, images=2),
    Case(layout="channels_last", shape=(3, 5), channels=35, images=2),
    Case(layout="channels_last", shape=(3, 5), channels=136, dtype=torch.float16, images=2),
    Case(shape=(23, 40), channels=3, images=2),
]


@pytest.mark.parametrize(
    "number, case",
    [
        pytest.param(number, case, id=f"{number}-{case}-C{case.channels}")
        for number, case in sampled(enumerate(POOL), 4)  # a step that meets each value of each factor
    ],
)
def test_masked_pool(emulator, number, case):
    with emulator.on(seed=number, threads=(64, 256)[number // 3 % 2]):
        pooling.assert_right("triton", case)
    assert emulator.launches["masked_max_pool_fwd"] == emulator.launches["masked_max_pool_bwd"] == 1


def test_a_mask_and_a_gradient_that_begin_anywhere(emulator):
    """A word of the mask, or a vector of the gradient, would be read or written at an odd address."""
    case = Case(shape=(4, 8))
    mask = lay_out(pooling.mask_of(case), "offset")
    pooling.assert_right("triton", case, mask=mask)
    grad_features = lay_out(torch.zeros(case.features().shape), "offset")
    grad, index = torch.ones(3, 33), torch.zeros(3, 33, dtype=torch.int32)
    emulator.masked_max_pool_bwd(grad, torch.ones_like(mask), index, False, grad_features)
    assert grad_features[..., 0, 0].eq(1).all()
    assert grad_features.sum() == grad.sum()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_first_of_many_equal_pixels(emulator, layout):
    """Of those that the threads of a channel have found, too: of -inf, of NaN, of a plateau."""
    case = Case(layout=layout, shape=(14, 14), channels=8)
    spread = torch.rand((8, 14, 14), generator=case.generator()) < 0.1
    features = torch.full((3, 8, 14, 14), -torch.inf)
    features[1, spread] = torch.nan
    features[2, spread] = 1.0
    pooling.assert_right("triton", case, lay_out(features, layout), torch.ones(3, 14, 14).bool())


@pytest.mark.parametrize(
    "check",
    [
        otsu.test_constant_maps_have_an_empty_mask,
        otsu.test_nan_and_infinite_maps_have_no_threshold,
        otsu.test_ranges_that_bins_hardly_divide,
        pooling.test_pixels_outside_the_mask_count_as_zero,
        pooling.test_the_first_of_equal_pixels_has_the_gradient,
        pooling.test_an_infinite_gradient_outside_the_mask_is_multiplied_by_zero,
    ],
    ids=lambda check: check.__name__,
)
def test_what_holds_on_every_backend(emulator, check):
    check("triton", "cpu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [3, 20])
def test_nan_and_infinity(emulator, layout, width):
    pooling.test_nan_and_infinity("triton", "cpu", layout, width)


def test_pools_whose_pixels_no_int_counts(emulator):
    """65536 x 65536 is 0 in 32 bits; nothing of it may be launched."""
    huge = torch.empty((1, 1, 65536, 65536), device="meta")
    mask, one = torch.empty((1, 65536, 65536), device="meta", dtype=torch.bool), torch.empty(1, 1)
    index = one.int()
    message = "a map of 65536 x 65536 has more pixels than the CUDA kernels take"
    with pytest.raises(RuntimeError, match=f"masked_max_pool_fwd: {message}"):
        emulator.masked_max_pool_fwd(huge, mask, one, index)
    with pytest.raises(RuntimeError, match=f"masked_max_pool_bwd: {message}"):
        emulator.masked_max_pool_bwd(one, mask, index, False, huge)
