"""fused_cam_seeds as CUDA kernels, run without a GPU (see test_cuda_emulator.py)."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import Case, lay_out, run
from closeness import assert_as_close_as
from cuda_emulator.comparison import CLUSTERS, DTYPES, MARGIN, outcomes
from cuda_emulator.emulation import sampled

from camkernels import fused_cam, fused_cam_seeds, reference
from camkernels.ops.cam_seeds import _suits_cuda

pytest_plugins = ["cuda_emulator.fixtures"]

OPS = torch.ops.camkernels_emulated  # the bindings themselves
LAYOUTS = ("contiguous", "channels_last", "offset")


def keys(images, pixels, seed=0, levels=None):
    """Noise; of few levels, so that there are ties."""
    noise = torch.rand(images, pixels, generator=torch.Generator().manual_seed(seed))
    return noise if levels is None else (noise * levels).floor() / levels


def sampling_of(noise):
    return {"sampling": "first"} if noise is None else {"noise": noise}


def planted(candidates, pixels, images=2, channels=3, dtype=torch.float32):
    """Features whose maps have so many candidates, at places of their own in each image, and weights."""
    draw = torch.Generator().manual_seed(candidates)
    features = torch.randint(-8, 9, (images, channels, pixels), generator=draw).to(dtype)
    features[:, 0] = 0
    for image in range(images):
        features[image, 0, torch.randperm(pixels, generator=draw)[:candidates]] = 1
    weight = torch.zeros(2, channels, dtype=dtype)
    weight[:, 0] = 1
    return features, weight


SEEDS = [
    Case(dtype=dtype, layout=layout, shape=shape, maps="ties", channels=channels, images=2)
    for dtype, layout, (shape, channels) in itertools.product(
        DTYPES, LAYOUTS, (((7, 7), 64), ((14, 14), 40), ((5, 9), 33), ((1, 1), 16), ((1, 23), 8))
    )
]


@pytest.mark.parametrize(
    "number, case",
    [
        pytest.param(number, case, id=f"{number}-{case}")
        for number, case in sampled(enumerate(SEEDS), 4)  # a step that meets each value of each factor
    ],
)
def test_seeds(emulator, number, case):
    """Integers in the features: maps are the same to the bit, and so must be the seeds."""
    depth = (None, 33, 64, 70)[number % 4]
    pixels = math.prod(case.shape)
    num_seeds = (1, 3, 20, 150)[number // 2 % 4]
    noise = None if number % 5 == 4 else keys(2, pixels, number, levels=(None, 8)[number % 2])
    threshold = (0.35, 0.7)[number // 3 % 2]
    target = case.target(dtype=(torch.int64, torch.int32)[number % 2])
    inputs = [case.features(), case.weight()]
    if depth is not None:
        other = replace(
            case,
            channels=depth,
            maps="signed",
            dtype=DTYPES[(number // 4 + DTYPES.index(case.dtype)) % 3],
            layout=LAYOUTS[number // 3 % 3],
        )
        inputs.append(other.features())

    def seeds(function):
        options = {"threshold": threshold, **sampling_of(noise)}
        return lambda f, w, seed_features=None: function(
            f, w, target, num_seeds, seed_features=seed_features, **options
        )

    emulator.set(cluster=CLUSTERS[number % 4], seed=number, threads=(64, 128)[number // 4 % 2])
    sides = outcomes(seeds(fused_cam_seeds), seeds(reference.cam_seeds), inputs)
    assert [kernel for kernel in emulator.kernels() if "fwd" in kernel] == ["cam_seeds_fwd"]
    assert emulator.kernels().count("cam_seeds_bwd") == 1
    found, plain, _ = sides
    for name, ours, theirs in zip(("vectors", "indices", "count"), found.values, plain.values, strict=False):
        assert torch.equal(ours, theirs), name
    names = ("cam", "grad_features", "grad_weight", "grad_seed_features")
    columns = (side.values[3:] + side.grads for side in sides)
    for name, mine, other, exact in zip(names, *columns, strict=False):
        assert_as_close_as(mine, other, exact, MARGIN, name)


@pytest.mark.parametrize("noisy", [True, False], ids=["random", "first"])
@pytest.mark.parametrize("candidates", [1, 2, 6, 7, 8, 40, 62])
def test_fewer_and_more_candidates_than_seeds(emulator, candidates, noisy):
    features, weight = planted(candidates, 63)
    noise = keys(2, 63, candidates, levels=16) if noisy else None
    arguments = features.view(2, 3, 7, 9), weight, torch.tensor([0, 1]), 7
    truth = reference.cam_seeds(*arguments, **sampling_of(noise))
    assert truth[2].tolist() == [candidates] * 2
    emulator.set(cluster=CLUSTERS[candidates % 4], seed=candidates)
    found = fused_cam_seeds(*arguments, **sampling_of(noise))
    for ours, theirs in zip(found, truth, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shared_limit", [227 << 10, 20 << 10], ids=["shared", "scratch"])
@pytest.mark.parametrize("num_seeds", [2, 19, 45])
def test_noise_of_any_value(emulator, num_seeds, shared_limit):
    """Keys order as torch.sort does, and whatever they are, nothing is read or written elsewhere."""
    features, weight = planted(40, 1200, images=1)
    nasty = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, -3.0, 0.5, 1e30]
    # With this seed a zero of one sign stands between two of the other.
    draw = torch.Generator().manual_seed(2)
    noise = torch.tensor(nasty)[torch.randint(len(nasty), (1, 1200), generator=draw)]
    candidates = features[0, 0].nonzero().flatten().tolist()
    order = sorted(
        candidates, key=lambda p: (0, 0, p) if noise[0, p].isnan() else (1, -noise[0, p].item(), p)
    )
    emulator.set(cluster=2, seed=num_seeds, shared_limit=shared_limit)
    found = fused_cam_seeds(features.view(1, 3, 30, 40), weight, torch.tensor([0]), num_seeds, noise=noise)
    assert found.indices[0].tolist() == (order + order)[:num_seeds]
    assert found.count.tolist() == [40]


def test_a_pixel_at_the_threshold_is_no_candidate(emulator):
    cells = torch.tensor([[[[0.0, 0.5, 1.0, 0.5]]]])
    found = fused_cam_seeds(cells, torch.ones(1, 1), torch.tensor([0]), 2, threshold=0.5, sampling="first")
    assert found.indices.tolist() == [[2, 2]]
    assert found.count.tolist() == [1]


@pytest.mark.parametrize("candidates, num_seeds", [(300, 7), (339, 200)])
def test_ties_among_pixels_that_nine_bits_count(emulator, candidates, num_seeds):
    """Noise alone decides little: the lower of equal pixels comes first, by both digits of its index."""
    features, weight = planted(candidates, 340)
    noise = keys(2, 340, candidates, levels=2)
    arguments = features.view(2, 3, 17, 20), weight, torch.tensor([0, 1]), num_seeds
    truth = reference.cam_seeds(*arguments, noise=noise)
    emulator.set(seed=num_seeds)
    found = fused_cam_seeds(*arguments, noise=noise)
    for ours, theirs in zip(found, truth, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("noisy", [True, False], ids=["random", "first"])
def test_without_a_candidate_the_peak_is_taken(emulator, noisy):
    """The threshold rounds to 1, which no map exceeds; and where the largest is infinite the peak is NaN."""
    cells = torch.tensor([[0.0, 1.0, 5.0, 2.0, 5.0, 3.0], [4.0, 1.0, 0.0, 7.0, torch.inf, 7.0]])
    arguments = cells.view(2, 1, 2, 3), torch.ones(1, 1), torch.tensor([0, 0]), 3
    noise = keys(2, 6) if noisy else None
    truth = reference.cam_seeds(*arguments, threshold=1 - 1e-9, **sampling_of(noise))
    found = fused_cam_seeds(*arguments, threshold=1 - 1e-9, **sampling_of(noise))
    assert found.indices.tolist() == truth[1].tolist() == [[2] * 3, [4] * 3]
    assert found.count.tolist() == truth[2].tolist() == [0, 0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("noisy", [True, False], ids=["random", "first"])
def test_maps_without_a_candidate(emulator, layout, noisy):
    """A constant map, one that holds a NaN and ones of classes that do not exist: the first pixel."""
    features = torch.randn(5, 16, 6, 7, generator=torch.Generator().manual_seed(0))
    features[1] = 2.0
    features[2, 3, 4, 5] = torch.nan
    features = lay_out(features, layout)
    weight = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 1, 2, 3, -1])
    noise = keys(5, 42) if noisy else None
    emulator.set(cluster=4)
    vectors, indices, count, cam = fused_cam_seeds(features, weight, target, 5, **sampling_of(noise))
    assert count.ne(0).tolist() == [True, False, False, False, False]
    assert not indices[1:].any()
    assert torch.equal(vectors[1:], features[1:, :, 0, 0][:, None].expand(-1, 5, -1))
    assert torch.equal(cam.isnan().flatten(1).all(1), torch.tensor([False, False, True, True, True]))
    assert not cam[1].any()
    noise = None if noise is None else noise[:3]
    truth = reference.cam_seeds(features[:3], weight, target[:3], 5, **sampling_of(noise))
    assert torch.equal(indices[:3], truth[1])


@pytest.mark.parametrize("noisy", [True, False], ids=["random", "first"])
@pytest.mark.parametrize("dtype, cluster", [(torch.float32, 8), (torch.float16, 1)], ids=str)
def test_large_maps_and_many_seeds_in_one_launch(emulator, dtype, cluster, noisy):
    """What sm_80 must take at once: it gives a block the least shared memory."""
    case = Case(dtype=dtype, shape=(64, 64), channels=8, maps="ties", images=1)
    noise = keys(1, 4096, levels=1000) if noisy else None
    arguments = case.features(), case.weight(), case.target(), 1024
    truth = reference.cam_seeds(*arguments, threshold=0.25, **sampling_of(noise))
    assert truth[2].item() > 1024
    emulator.set(cluster=cluster, threads=512, shared_limit=163 << 10)
    found = fused_cam_seeds(*arguments, threshold=0.25, **sampling_of(noise))
    (launch,) = emulator.launches()
    assert launch.shared > 8 * 4096  # map and keys are there
    for ours, theirs in zip(found[:3], truth[:3], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape, num_seeds", [((90, 90), 110), ((66, 95), 1025), ((47, 59), 9999)])
def test_what_auto_leaves_to_cuda_fits_into_shared_memory(emulator, shape, num_seeds):
    """Of the GPUs that give a block the least. float16 wants the most room."""
    pixels = math.prod(shape)
    features, weight = planted(3, pixels, images=1, channels=8, dtype=torch.float16)
    features = features.view(1, 8, *shape)
    indices = torch.empty(1, num_seeds)
    assert _suits_cuda(SimpleNamespace(features=features, indices=indices))
    beyond = torch.empty(1, 8, pixels + 3, 1), torch.empty(1, num_seeds + 3)
    assert not _suits_cuda(SimpleNamespace(features=beyond[0], indices=beyond[1]))
    emulator.set(threads=512, shared_limit=99 << 10)
    fused_cam_seeds(features, weight, torch.tensor([0]), num_seeds, sampling="first")
    (launch,) = emulator.launches()
    assert launch.shared > 8 * pixels


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_shared_memory_of_one_block_but_not_of_a_cluster(emulator, layout):
    """A cluster's blocks have a second map each."""
    case = Case(shape=(30, 40), channels=64, maps="ties", images=2, layout=layout)
    arguments = case.features(), case.weight(), case.target(), 5
    noise = keys(2, 1200)
    found = []
    for shared_limit in (1 << 17, 30 << 10):
        emulator.set(cluster=8, shared_limit=shared_limit)
        found.append(fused_cam_seeds(*arguments, noise=noise))
        (launch,) = emulator.launches()
        assert launch.cluster == (8 if shared_limit == 1 << 17 else 1)
        assert launch.shared > (16 << 10) + 8 * 1200  # weights, map and keys: no scratch memory
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype, num_seeds, noisy",
    [(DTYPES[0], 3, True), (DTYPES[1], 1353, True), (DTYPES[1], 1400, True), (DTYPES[2], 50, False)],
    ids=str,
)
def test_maps_too_large_for_shared_memory(emulator, dtype, num_seeds, noisy, layout):
    case = Case(dtype=dtype, shape=(33, 41), channels=16, maps="ties", images=3, layout=layout)
    noise = keys(3, 1353, levels=100) if noisy else None
    arguments = case.features(), case.weight(), case.target(), num_seeds
    truth = reference.cam_seeds(*arguments, threshold=0.25, **sampling_of(noise))
    emulator.set(cluster=4, shared_limit=20 << 10)
    with pytest.raises(RuntimeError, match="bytes of shared memory"):
        fused_cam(*arguments[:3])
    found = fused_cam_seeds(*arguments, threshold=0.25, **sampling_of(noise))
    for ours, theirs in zip(found, truth, strict=True):
        assert torch.equal(ours, theirs)


GATHERED = list(itertools.product(DTYPES, LAYOUTS, (5, 64, 200), (3, 130), (True, False)))


@pytest.mark.parametrize("dtype, layout, depth, num_seeds, vectors", sampled(GATHERED, 5), ids=str)
def test_vectors_are_copied_bit_by_bit(emulator, dtype, layout, depth, num_seeds, vectors):
    """Any pattern of bits, also that of a NaN."""
    features, weight = planted(20, 35)
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(whole)
    draw = torch.Generator().manual_seed(depth)
    bits = torch.randint(limits.min, limits.max, (2, depth, 5, 7), dtype=whole, generator=draw)
    seed_features = lay_out(bits.float(), layout).to(whole) if layout == "channels_last" else bits
    if layout == "offset":
        seed_features = torch.cat([bits.new_zeros(1), bits.flatten()])[1:].view(bits.shape)
    seed_features = seed_features.copy_(bits).view(dtype)
    noise = keys(2, 35, num_seeds)
    for cluster in (1, 4):
        emulator.set(cluster=cluster, vectors=vectors, seed=cluster)
        found = fused_cam_seeds(
            features.view(2, 3, 5, 7),
            weight,
            torch.tensor([0, 1]),
            num_seeds,
            seed_features=seed_features,
            noise=noise,
        )
        wanted = bits.flatten(2).mT.take_along_dim(found.indices[..., None], 1)
        assert torch.equal(found.vectors.view(whole), wanted)


@pytest.mark.parametrize("depth", [8, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_last_vectors_at_any_address(emulator, dtype, depth):
    """Whole vectors in number, but not where 16 bytes can be read at once."""
    features, weight = planted(20, 35)
    shape = 2, 5, 7, depth
    values = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(depth)).to(dtype)
    for offset in (0, 1):
        seed_features = torch.cat([values[:offset], values])[offset:].view(shape).permute(0, 3, 1, 2)
        found = fused_cam_seeds(
            features.view(2, 3, 5, 7), weight, torch.tensor([0, 1]), 9, seed_features=seed_features
        )
        wanted = seed_features.flatten(2).mT.take_along_dim(found.indices[..., None], 1)
        assert torch.equal(found.vectors, wanted)


def test_float64_vectors_are_refused(emulator):
    features, weight = planted(2, 6)
    arguments = features.view(2, 3, 2, 3), weight, torch.tensor([[0], [1]])
    outputs = [torch.empty(2, 1, 2, 3, dtype=torch.float64) for _ in range(6)]
    with pytest.raises(RuntimeError, match="compute in float32, not float64"):
        OPS.cam_seeds_fwd(*arguments, arguments[0].double(), None, 2, 0.7, 1e-8, *outputs)


SCATTERED = list(
    itertools.product(
        DTYPES,
        ("contiguous", "channels_last", "offset"),
        ((7, 7), (17, 40), (1, 1), (15, 15)),  # the second and the last are more than a block takes
        ((33, 7), (64, 300), (5, 130)),  # depth and seeds; 128 are staged together
        (False, True),
    )
)


@pytest.mark.parametrize("dtype, layout, shape, sizes, add", sampled(SCATTERED, 7), ids=str)
def test_gradient_of_vectors(emulator, dtype, layout, shape, sizes, add):
    """To the bit: added up in float32 in the order of seeds, rounded once; no other pixel is touched."""
    (depth, num_seeds), pixels = sizes, math.prod(shape)
    draw = torch.Generator().manual_seed(num_seeds)
    indices = torch.randint(pixels, (2, num_seeds), generator=draw)
    indices[1, num_seeds // 2 :] = indices[1, 0]  # many seeds at one pixel
    grads = torch.randn(2, num_seeds, depth, generator=draw).to(dtype)
    sums = torch.zeros(2, pixels, depth)
    for image, k in itertools.product(range(2), range(num_seeds)):
        sums[image, indices[image, k]] += grads[image, k].float()
    before = torch.randn(2, depth, pixels, generator=draw).to(dtype)
    wanted = sums.mT
    if add:
        hit = torch.zeros(2, 1, pixels, dtype=torch.bool).scatter_(2, indices[:, None], True)
        wanted = torch.where(hit, before.float() + wanted, before.float())
    buffer = lay_out(before.view(2, depth, *shape), layout)
    emulator.set(seed=num_seeds, threads=(64, 512)[add])
    OPS.cam_seeds_bwd(grads, indices, add, buffer)
    assert emulator.kernels() == ["cam_seeds_bwd"]
    assert torch.equal(buffer.flatten(2), wanted.to(dtype))


@pytest.mark.parametrize("shape, tiles", [((14, 14), 1), ((28, 28), 4), ((8, 28), 1), ((15, 15), 2)])
def test_blocks_of_the_gradient_are_alike_and_small(emulator, shape, tiles):
    """Tiles of as many pixels as each other, within the shared memory that a block gets without asking."""
    buffer = torch.empty(3, 40, *shape)
    indices = torch.zeros(3, 5, dtype=torch.int64)
    emulator.set(shared_limit=48 << 10, threads=512)
    OPS.cam_seeds_bwd(torch.ones(3, 5, 40), indices, False, buffer)
    (launched,) = emulator.launches()
    assert launched.blocks == 3 * 2 * tiles
    assert launched.shared <= (17 << 10) + 136 * -(-math.prod(shape) // tiles)


@pytest.mark.parametrize("add", [False, True])
def test_adding_touches_pixels_of_seeds_only(emulator, add):
    """Also an index that is no pixel writes nothing."""
    indices = torch.tensor([[4, -1, 9, 2**40, 4, -(2**33) + 5]])
    # To add 0 to -0 makes it 0.
    buffer = torch.full((1, 2, 3, 3), -0.0 if add else torch.nan)
    buffer[..., 1, 1] = 1.0
    OPS.cam_seeds_bwd(torch.ones(1, 6, 2), indices, add, buffer)
    assert torch.equal(buffer[..., 1, 1], torch.full((1, 2), 3.0 if add else 2.0))
    others = buffer.flatten(2)[..., [0, 1, 2, 3, 5, 6, 7, 8]]
    assert not others.any()
    assert (others.signbit() == add).all()


def test_the_order_of_threads_changes_no_seed(emulator):
    case = Case(shape=(9, 11), channels=24, images=2)
    noise, target = keys(2, 99, levels=10), case.target()
    results = []
    for seed in range(6):
        emulator.set(seed=seed, cluster=4, threads=128)
        found = run(
            "cuda",
            lambda f, w: fused_cam_seeds(f, w, target, 30, noise=noise, threshold=0.3),
            [case.features(), case.weight()],
        )
        results.append(found.values + found.grads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
