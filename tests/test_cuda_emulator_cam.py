"""fused_cam and fused_cam_erase as CUDA kernels, run without a GPU (see test_cuda_emulator.py)."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import Case, run
from closeness import assert_as_close_as
from cuda_emulator.comparison import CLUSTERS, DTYPES, MARGIN, assert_matches, outcomes
from cuda_emulator.emulation import sampled

from camkernels import fused_cam, fused_cam_erase, fused_cam_transform_mse, reference
from camkernels.transforms import HorizontalFlip

pytest_plugins = ["cuda_emulator.fixtures"]

THRESHOLD = 0.7
# The bindings themselves, behind the functions that check their arguments.
OPS = torch.ops.camkernels_emulated


def cam_matches(inputs, target, **options):
    def ours(features, weight, *bias):
        return fused_cam(features, weight, target, bias=bias[0] if bias else None, **options)

    def theirs(features, weight, *bias):
        return reference.cam(features, weight, target, bias=bias[0] if bias else None, **options)

    names = ("cam", "grad_features", "grad_weight", "grad_bias")
    return assert_matches(ours, theirs, inputs, names[: 1 + len(inputs)])


def rotated(cases):
    """Each case with a number of its own, which draws the cluster size and the seed."""
    numbered = sampled(enumerate(cases), 11)  # a step that meets each value of each factor
    return [pytest.param(number, case, id=f"{number}-{case}-C{case.channels}") for number, case in numbered]


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
    emulator.set(cluster=CLUSTERS[number % 4], seed=number, threads=(64, 128)[number // 4 % 2])
    found = cam_matches(
        inputs, case.target(dtype=(torch.int64, torch.int32)[number % 2]), normalize=normalize
    )
    assert [kernel for kernel in emulator.kernels() if "fwd" in kernel] == ["cam_fwd"]
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
    emulator.set(cluster=2, seed=7)
    cam_matches(inputs, None if maps is None else case.target(maps), normalize=normalize)
    assert [kernel for kernel in emulator.kernels() if "fwd" in kernel] == ["cam_fwd"]


def erasing(case, **options):
    """What the kernels and the reference do, and their inputs."""
    target = case.target()
    functions = fused_cam_erase, reference.cam_erase
    calls = [lambda f, w, x, erase=erase: erase(f, w, target, x, **options) for erase in functions]
    return *calls, [case.features(), case.weight(), case.pictures()]


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
    emulator.set(cluster=CLUSTERS[number % 4], seed=number)
    *calls, inputs = erasing(case, fill=fill, mode=mode, threshold=THRESHOLD)
    found, plain, truth = outcomes(*calls, inputs)
    assert emulator.kernels()[:2] == ["cam_erase_fwd", "cam_erase_bwd_hard"]
    images = inputs[2]
    erased, cam = found.values
    assert_as_close_as(cam, plain.values[1], truth.values[1], MARGIN, "cam")
    for name, index in (("grad_features", 0), ("grad_weight", 1)):
        assert_as_close_as(found.grads[index], plain.grads[index], truth.grads[index], MARGIN, name)

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
    emulator.set(cluster=CLUSTERS[(number + 1) % 4], seed=number)
    names = "erased", "cam", "grad_features", "grad_weight", "grad_images"
    assert_matches(*erasing(case, fill=fill, mode=mode, threshold=THRESHOLD, sharpness=9.0), names)
    assert emulator.kernels()[:2] == ["cam_erase_fwd", "cam_erase_bwd_soft"]


@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "scalars"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels, maps", [(4800, 1), (800, 9)], ids=["1 map", "9 maps"])
def test_more_channels_than_weights_fit_in_shared_memory(emulator, channels, maps, layout, vectors):
    case = Case(layout=layout, shape=(2, 4), channels=channels, images=2, classes=10)
    emulator.set(vectors=vectors, seed=channels)
    cam_matches([case.features(), case.weight()], case.target(None if maps == 1 else maps))


@pytest.mark.parametrize("maps", [1, 2])
def test_more_images_than_threads(emulator, maps):
    case = Case(shape=(2, 4), channels=128, images=150, classes=3)
    cam_matches([case.features(), case.weight()], case.target(None if maps == 1 else maps))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_map_too_large_for_a_cluster(emulator, layout):
    """Two copies of it do not fit in shared memory, one does: a block must do without the others."""
    case = Case(layout=layout, shape=(180, 180), channels=4, images=1)
    emulator.set(cluster=8)
    cam_matches([case.features(), case.weight()], case.target())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_changes_nothing(emulator, dtype):
    """Bit for bit: no result depends on which thread comes first, so a run can be repeated."""
    case = Case(dtype=dtype, shape=(5, 8), channels=48, images=2, image_size=(19, 16))
    target = case.target()
    results = []
    for seed in range(4):
        emulator.set(seed=seed, cluster=4)
        inputs = [case.features(), case.weight(), case.pictures()]
        found = run("cuda", lambda f, w, x: fused_cam_erase(f, w, target, x, sharpness=5.0), inputs)
        results.append(found.values + found.grads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("maps", [1, 3])
def test_class_index_out_of_range_gives_nan(emulator, maps, layout):
    case = Case(layout=layout, channels=32, shape=(4, 8))
    features, weight = case.features().requires_grad_(), case.weight().requires_grad_()
    target = torch.tensor([[1, 2, 3], [0, 0, 0], [5, 4, 5]])[:, :maps]
    broken = target.clone()
    broken[1, 0] = case.classes
    broken[2, 0] = -1
    emulator.set(cluster=2)
    cam = fused_cam(features, weight, broken)
    right = reference.cam(features, weight, target)
    hit = torch.zeros(3, maps, dtype=torch.bool)
    hit[1:, 0] = True
    assert cam[hit].isnan().all()
    assert not cam[~hit].isnan().any()
    assert torch.allclose(cam[~hit], right[~hit], atol=1e-6)
    grad = torch.randn(cam.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(cam, [features, weight], grad)
    truth = torch.autograd.grad(right, weight, grad * ~hit[..., None, None])[0]
    assert torch.allclose(grads[1], truth, atol=1e-5)
    assert torch.equal(grads[0].isnan().flatten(1).all(1), hit.any(1))


def test_a_value_at_the_threshold_is_kept(emulator):
    cells = torch.tensor([[[[0.0, 0.5, 0.5, 1.0]]]])
    target = torch.zeros(1, dtype=torch.int64)
    for mode in ("bilinear", "nearest"):
        images = torch.ones(1, 1, 1, 4)
        result = fused_cam_erase(cells, torch.ones(1, 1), target, images, threshold=0.5, mode=mode)
        assert result.erased.flatten().tolist() == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=["images only", "map only"])
def test_only_wanted_gradients_are_written(emulator, need):
    case = Case(shape=(4, 4), channels=8, images=2, image_size=(9, 12))
    target = case.target()
    needed = [need[1], need[1], need[0]]
    inputs = [case.features(), case.weight(), case.pictures()]
    full = run("cuda", lambda f, w, x: fused_cam_erase(f, w, target, x, sharpness=5.0), inputs)
    some = run("cuda", lambda f, w, x: fused_cam_erase(f, w, target, x, sharpness=5.0), inputs, needed=needed)
    for wanted, everything, one in zip(needed, full.grads, some.grads, strict=True):
        assert torch.equal(everything, one) if wanted else one is None


def test_limits_are_named(emulator):
    wide = torch.zeros(1, 1, 300, 400)
    weight, target = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"a map of 300 x 400 needs .* bytes of shared memory"):
        fused_cam(wide, weight, target)
    with pytest.raises(RuntimeError, match="up to 16 different fill values, not 17"):
        fused_cam_erase(wide[..., :2, :2], weight, target, torch.zeros(1, 17, 4, 4), fill=list(range(17)))
    message = r"cam_transform_mse_fwd: a map of 300 x 400 needs .* bytes of shared memory"
    with pytest.raises(RuntimeError, match=message):
        fused_cam_transform_mse(wide, wide, weight, HorizontalFlip())


def test_maps_whose_pixels_no_int_counts(emulator):
    """65536 x 131072 is 0 in 32 bits; nothing of it may be launched."""
    huge = torch.zeros(1).expand(1, 1, 65536, 131072)  # one element in memory
    none, extent, small, image = torch.empty(0), *map(torch.zeros, ((1, 1, 2), (1, 1, 2, 2), (1, 3, 4, 4)))
    weight, target = torch.zeros(2, 1), torch.zeros(1, 1, dtype=torch.int64)
    message = "a map of 65536 x 131072 has more pixels than the CUDA kernels take"
    with pytest.raises(RuntimeError, match=f"cam_fwd: {message}"):
        OPS.cam_fwd(huge, weight, target, None, True, 1e-8, huge, none, extent)
    flags = True, 1e-8, True, True, False
    with pytest.raises(RuntimeError, match=f"cam_bwd: {message}"):
        OPS.cam_bwd(huge, huge, weight, target, huge, extent, *flags, huge, weight, none)
    erase = 0.7, 0.0, [0.0], False
    with pytest.raises(RuntimeError, match=f"cam_erase_fwd: {message}"):
        OPS.cam_erase_fwd(huge, weight, target, image, *erase, 1e-8, image, huge, none, extent)
    with pytest.raises(RuntimeError, match=f"cam_erase_bwd: {message}"):
        OPS.cam_erase_bwd(image, None, None, huge, *erase, True, False, image, none)
    flip = *HorizontalFlip().resampling(65536, 131072).flat(), 0
    with pytest.raises(RuntimeError, match=f"cam_transform_mse_fwd: {message}"):
        OPS.cam_transform_mse_fwd(huge, huge, weight, None, *flip, True, extent, huge)
    with pytest.raises(RuntimeError, match=f"cam_transform_mse_bwd: {message}"):
        OPS.cam_transform_mse_bwd(
            extent, small, huge, weight, None, huge, *flip, True, True, True, small, huge, weight
        )
    with pytest.raises(RuntimeError, match=f"cam_seeds_bwd: {message}"):
        OPS.cam_seeds_bwd(torch.zeros(1, 1, 1), target, False, huge)
    with pytest.raises(RuntimeError, match="an image of 8589934592 elements is larger"):
        OPS.cam_erase_fwd(small, weight, target, huge, *erase, 1e-8, huge, small, none, extent)
    assert not emulator.kernels()
