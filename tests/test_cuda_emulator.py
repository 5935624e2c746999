"""The CUDA kernels' own sources, run without a GPU (see cuda_emulator/cuda_emulator.h).

The emulator stands in for a backend's launchers, so these tests go through the public functions: shapes,
autograd and the tensors that reach a kernel are those of a real call.
"""

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from camkernels import _backend, fused_cam, fused_cam_erase, reference
from cases import Case, as_double, as_plain, run
from closeness import assert_as_close_as
from cuda_emulator import emulation
from cuda_emulator.emulation import Emulator

CLUSTERS = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
THRESHOLD = 0.7


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler is installed")
    given = os.environ.get(emulation.SANITIZE)
    return Path(given) if given else emulation.build(tmp_path_factory.mktemp("emulator"), sanitize=False)


@pytest.fixture
def emulator(library, monkeypatch):
    """The emulated CUDA kernels, in the place of the Triton backend's launchers."""
    kernels = Emulator.load(library)
    monkeypatch.setitem(sys.modules, "camkernels.triton", kernels)
    monkeypatch.setattr(_backend, "why_not", lambda *_: None)
    assert importlib.import_module("camkernels.triton") is kernels
    return kernels


def assert_matches(ours, theirs, inputs, names):
    """Values and gradients as close to the float64 reference as PyTorch's own at this dtype."""
    found = run("triton", ours, inputs)
    plain = run("reference", theirs, as_plain(inputs))
    truth = run("reference", theirs, as_double(inputs))
    results = zip(names, found.values + found.grads, plain.values + plain.grads, truth.values + truth.grads, strict=True)
    for name, mine, other, exact in results:
        if exact is None:
            assert mine is None or not mine.any(), name
        else:
            assert_as_close_as(mine, other, exact, what=name)
    return found


def cam_matches(inputs, target, **options):
    def ours(features, weight, *bias):
        return fused_cam(features, weight, target, bias=bias[0] if bias else None, **options)

    def theirs(features, weight, *bias):
        return reference.cam(features, weight, target, bias=bias[0] if bias else None, **options)

    return assert_matches(ours, theirs, inputs, ("cam", "grad_features", "grad_weight", "grad_bias")[: 1 + len(inputs)])


def rotated(cases):
    """Each case with a number of its own, which draws the cluster size and the seed."""
    return [pytest.param(number, case, id=f"{number}-{case}-C{case.channels}") for number, case in enumerate(cases)]


ONE_MAP = [
    Case(dtype=dtype, layout=layout, shape=shape, maps=maps, channels=channels)
    for dtype, layout, shape, (maps, channels) in itertools.product(
        DTYPES,
        ("contiguous", "channels_last", "offset"),
        ((7, 7), (14, 14), (1, 1), (5, 9), (1, 23), (17, 40)),
        (("signed", 64), ("ties", 72), ("constant", 33), ("nan", 40)),
    )
]


@pytest.mark.parametrize("number, case", rotated(ONE_MAP))
def test_one_map_per_image(emulator, number, case):
    normalize = number % 3 != 0
    inputs = [case.features(), case.weight(), *([] if normalize else [case.bias()])]
    with emulator.on(cluster=CLUSTERS[number % 4], seed=number, threads=(64, 128)[number // 4 % 2]):
        found = cam_matches(inputs, case.target(dtype=(torch.int64, torch.int32)[number % 2]), normalize=normalize)
    assert emulator.launches["cam_fwd"] == 1
    if normalize and case.maps in ("signed", "ties") and case.shape != (1, 1):
        cam = found.values[0].flatten(1)
        assert torch.equal(cam.amin(1), torch.zeros_like(cam[:, 0]))
        assert torch.equal(cam.amax(1), torch.ones_like(cam[:, 0]))


@pytest.mark.parametrize("maps", [2, 11, None], ids=["2 maps", "11 maps", "all classes"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_maps_per_image(emulator, dtype, layout, normalize, maps):
    case = Case(dtype=dtype, layout=layout, shape=(6, 8), classes=19, channels=40, images=2)
    inputs = [case.features(), case.weight(), *([] if normalize else [case.bias()])]
    with emulator.on(cluster=2, seed=7):
        cam_matches(inputs, None if maps is None else case.target(maps), normalize=normalize)
    assert emulator.launches["cam_fwd"] == 1


def erase_outcomes(case, *, fill, **options):
    inputs = [case.features(), case.weight(), case.pictures()]
    target = case.target()

    def ours(features, weight, images):
        return fused_cam_erase(features, weight, target, images, fill=fill, **options)

    def theirs(features, weight, images):
        return reference.cam_erase(features, weight, target, images, fill=fill, **options)

    found = run("triton", ours, inputs)
    plain = run("reference", theirs, as_plain(inputs))
    truth = run("reference", theirs, as_double(inputs))
    return inputs, found, plain, truth


ERASE = [
    Case(
        dtype=dtype,
        layout=layout,
        shape=shape,
        maps=maps,
        channels=channels,
        image_dtype=DTYPES[(DTYPES.index(dtype) + shift) % 3],
        image_size=size,
        depth=depth,
        images=2,
    )
    for (shift, dtype), layout, (shape, maps, channels), (size, depth) in itertools.product(
        enumerate(DTYPES),
        ("contiguous", "channels_last", "offset"),
        (((7, 7), "ties", 64), ((5, 9), "signed", 40), ((1, 1), "constant", 16), ((14, 14), "nan", 33)),
        (((37, 29), 3), ((40, 48), 3), ((3, 16), 5)),
    )
]


@pytest.mark.parametrize("number, case", rotated(ERASE))
def test_hard_erasing(emulator, number, case):
    fill = 0.25 if number % 2 else [0.5 * d - 1 for d in range(case.depth)]
    mode = ("bilinear", "nearest")[number // 2 % 2]
    with emulator.on(cluster=CLUSTERS[number % 4], seed=number):
        inputs, found, plain, truth = erase_outcomes(case, fill=fill, mode=mode, threshold=THRESHOLD)
    assert emulator.launches["cam_erase_fwd"] == 1
    images = inputs[2]
    erased, cam = found.values
    assert_as_close_as(cam, plain.values[1], truth.values[1], what="cam")
    for name, index in (("grad_features", 0), ("grad_weight", 1)):
        assert_as_close_as(found.grads[index], plain.grads[index], truth.grads[index], what=name)

    colour = torch.as_tensor(fill, dtype=images.dtype).view(-1, 1, 1).expand(images.shape[1:])
    kept = erased == images
    assert torch.equal(torch.where(kept, images, colour), erased)  # its own bits or the fill, nothing else
    # A mask may differ only where float32 cannot tell the heat from the threshold.
    corners = {"align_corners": False} if mode == "bilinear" else {}
    heat = F.interpolate(truth.values[1][:, None], images.shape[-2:], mode=mode, **corners)
    sure = ((heat - THRESHOLD).abs() > 1e-6) | heat.isnan()
    wanted = torch.where(heat > THRESHOLD, colour, images)
    assert torch.equal(torch.where(sure, erased, wanted), wanted)
    # erased_j = image_j exactly where grad_j passes: the gradient is the random one of cases.run, or 0.
    grad = torch.randn(erased.shape, generator=torch.Generator().manual_seed(1)).to(erased.dtype)
    wanted_grad = torch.where(heat > THRESHOLD, 0, grad)
    assert torch.equal(torch.where(sure, found.grads[2], wanted_grad), wanted_grad)


@pytest.mark.parametrize("number, case", rotated(ERASE))
def test_soft_erasing(emulator, number, case):
    fill = 0.25 if number % 2 else [0.5 * d - 1 for d in range(case.depth)]
    mode = ("bilinear", "nearest")[number // 2 % 2]
    with emulator.on(cluster=CLUSTERS[(number + 1) % 4], seed=number):
        _, found, plain, truth = erase_outcomes(case, fill=fill, mode=mode, threshold=THRESHOLD, sharpness=9.0)
    assert emulator.launches["cam_erase_fwd"] == emulator.launches["cam_erase_bwd"] == 1
    names = ("erased", "cam", "grad_features", "grad_weight", "grad_images")
    results = zip(names, found.values + found.grads, plain.values + plain.grads, truth.values + truth.grads, strict=True)
    for name, mine, other, exact in results:
        assert_as_close_as(mine, other, exact, margin=3.0, what=name)
