"""fused_cam_seeds: seeds against a definition in plain Python, values and gradients against float64."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import (
    BACKENDS,
    GPU,
    KERNEL_BACKENDS,
    LAYOUTS,
    Case,
    as_double,
    as_plain,
    lay_out,
    may_hold_infinities,
    peak_bytes,
    placed_matrix,
    run,
)
from closeness import assert_as_close_as

import camkernels
from camkernels import _C, _pass, fused_cam, fused_cam_seeds, reference
from camkernels.reference.cam import accumulate_dtype

THRESHOLD = 0.7
NUM_SEEDS = 9
# A pixel this close to the threshold may fall on either side: the map is rounded to float32 (or float64).
BAND = {torch.float64: 1e-12}


def in_order(heat, noise, threshold=THRESHOLD):
    """The candidates of one image, first to last."""
    threshold = torch.tensor(threshold, dtype=heat.dtype).item()
    candidates = [p for p, value in enumerate(heat.tolist()) if value > threshold]
    if noise is not None:
        keys = [(0, 0.0) if math.isnan(key) else (1, -key) for key in noise.tolist()]
        candidates.sort(key=lambda p: (keys[p], p))
    return candidates


def peak_of(heat):
    values = heat.tolist()
    nans = [p for p, value in enumerate(values) if math.isnan(value)]
    return nans[0] if nans else values.index(max(values))


def expected_seeds(heat, noise, num_seeds, threshold=THRESHOLD):
    """``indices`` [N, K] and ``count`` [N] of maps [N, H, W]."""
    heat = heat.detach().cpu().flatten(1)
    lists = [
        in_order(heat[n], None if noise is None else noise[n].cpu(), threshold) for n in range(heat.shape[0])
    ]
    chosen = [found or [peak_of(heat[n])] for n, found in enumerate(lists)]
    indices = [[found[k % len(found)] for k in range(num_seeds)] for found in chosen]
    shape = heat.shape[0], num_seeds
    return torch.tensor(indices, dtype=torch.int64).view(shape), torch.tensor([len(x) for x in lists])


def noise_for(case, steps=None):
    pixels = case.shape[0] * case.shape[1]
    noise = torch.rand((case.images, pixels), generator=case.generator())
    noise = noise if steps is None else (noise * steps).floor() / steps
    return noise.to(case.device)


def vectors_at(seed_features, indices):
    pixels = seed_features.flatten(2).mT  # [N, H * W, D]
    return pixels.take_along_dim(indices.to(pixels.device)[..., None], 1)


def given_seeds(indices, target):
    """Vectors and map as functions of features, weight and seed_features, for seeds that are settled."""

    def function(features, weight, seed_features=None):
        seed_features = features if seed_features is None else seed_features
        return vectors_at(seed_features, indices), reference.cam(features, weight, target.cpu())

    return function


def settled(case, heat, threshold=THRESHOLD):
    """Images whose candidates no rounding changes; small integers are exact in every order of summation."""
    if case.maps in ("ties", "constant"):
        return torch.ones(case.images, dtype=torch.bool)
    near = (heat.double() - threshold).abs() <= BAND.get(case.dtype, 1e-6)
    return ~near.flatten(1).any(1)


def assert_right(backend, case, *, num_seeds=NUM_SEEDS, seed_features=None, sampling="random"):
    noise = noise_for(case) if sampling == "random" else None
    target = case.target()
    inputs = [case.features(), case.weight(), *([] if seed_features is None else [seed_features])]

    def ours(features, weight, seed_features=None):
        return fused_cam_seeds(
            features, weight, target, num_seeds, seed_features=seed_features, sampling=sampling, noise=noise
        )

    found = run(backend, ours, inputs)
    vectors, indices, count, cam = (x.cpu() for x in found.values)
    heat = reference.cam(
        *(x.cpu().to(accumulate_dtype(case.dtype)) for x in (case.features(), case.weight())), target.cpu()
    )
    wanted_indices, wanted_count = expected_seeds(heat, noise, num_seeds)
    sure = settled(case, heat)
    assert sure.any()
    assert torch.equal(indices[sure], wanted_indices[sure])
    assert torch.equal(count[sure], wanted_count[sure])
    assert indices.dtype == count.dtype == torch.int64

    source = inputs[-1] if seed_features is not None else inputs[0]
    assert vectors.dtype == source.dtype
    assert cam.dtype == case.dtype
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[vectors.element_size()]
    copied = vectors_at(source.cpu(), indices)
    assert torch.equal(vectors.contiguous().view(as_bits), copied.contiguous().view(as_bits))

    # The same output gradients for the two outputs that have one; indices and count draw theirs in between.
    draw = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=draw) for x in found.values]
    function = given_seeds(indices, target)
    exact_and_plain = []
    for tensors in (as_double(inputs), as_plain(inputs)):
        leaves = [x.requires_grad_() for x in tensors]
        results = function(*leaves)
        given = [
            g.to(v.dtype).to(r.dtype)
            for g, v, r in zip((grads[0], grads[3]), (vectors, cam), results, strict=True)
        ]
        exact_and_plain.append([results[1].detach(), *torch.autograd.grad(results, leaves, given)])
    truth, plain = exact_and_plain
    names = ("cam", "grad_features", "grad_weight", "grad_seed_features")
    for name, mine, other, exact in zip(names, [cam, *found.grads], plain, truth, strict=False):
        assert_as_close_as(mine.cpu(), other, exact, what=name)
    return found


def placed_cases():
    """A few blocks of pixels do for the interpreter, which takes a minute over many."""
    return [
        (
            backend,
            replace(case, shape=(9, 15))
            if not GPU and backend == "triton" and case.shape == (33, 40)
            else case,
        )
        for backend, case in placed_matrix()
        if GPU or backend != "triton" or case.shape != (14, 14)
    ]


@pytest.mark.parametrize("backend, case", placed_cases(), ids=str)
def test_seeds_vectors_and_gradients(backend, case):
    assert_right(backend, case)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout, seeds_layout", [*zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)])
def test_seed_features_of_their_own(backend, device, dtype, layout, seeds_layout):
    """Of another width, and of another dtype and layout than features."""
    case = Case(device=device, layout=layout, maps="ties", channels=9, images=2)
    depth = {"contiguous": 1, "channels_last": 70, "strided": 13, "offset": 5}[seeds_layout]
    values = torch.randn((2, depth, 7, 7), generator=case.generator())
    seed_features = lay_out(values.to(device, dtype), seeds_layout)
    found = assert_right(backend, case, seed_features=seed_features)
    if seeds_layout == "channels_last":
        assert found.grads[2].is_contiguous(memory_format=torch.channels_last)


def test_float64_seed_features_with_half_features():
    case = Case(dtype=torch.bfloat16, maps="ties")
    seed_features = torch.randn((3, 4, 7, 7), generator=case.generator(), dtype=torch.float64)
    found = assert_right("cpu", case, seed_features=seed_features)
    assert found.values[0].dtype == found.grads[2].dtype == torch.float64


@pytest.mark.parametrize("backend, device", [x for x in KERNEL_BACKENDS if x[0] != "cpu"])
def test_float64_seed_features_are_refused_where_kernels_have_no_float64(backend, device):
    case = Case(device=device)
    seed_features = torch.zeros((3, 4, 7, 7), device=device, dtype=torch.float64)
    with camkernels.use_backend(backend), pytest.raises(RuntimeError, match="not float64"):
        fused_cam_seeds(case.features(), case.weight(), case.target(), 2, seed_features=seed_features)


KEYS = {
    "fine": lambda shape, draw: torch.rand(shape, generator=draw),
    "coarse": lambda shape, draw: torch.randint(0, 4, shape, generator=draw) / 4,
    "equal": lambda shape, draw: torch.full(shape, 0.5),
    "first": lambda shape, draw: None,
}


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("shape", [(7, 7), (1, 1), (5, 15)], ids=str)
def test_every_backend_chooses_the_same_seeds(backend, device, shape, keys):
    """Small integers have exact maps, so that all backends meet one list, bit for bit."""
    case = Case(device=device, shape=shape, maps="ties", channels=6)
    noise = KEYS[keys]((case.images, shape[0] * shape[1]), case.generator())
    heat = reference.cam(Case.features(replace(case, device="cpu")), case.weight().cpu(), case.target().cpu())
    for num_seeds in (1, 4, shape[0] * shape[1] + 3):
        with camkernels.use_backend(backend):
            found = fused_cam_seeds(
                case.features(),
                case.weight(),
                case.target(),
                num_seeds,
                sampling="first" if noise is None else "random",
                noise=None if noise is None else noise.to(device),
            )
        assert torch.equal(found.cam.cpu(), heat)
        indices, count = expected_seeds(heat, noise, num_seeds)
        assert torch.equal(found.indices.cpu(), indices)
        assert torch.equal(found.count.cpu(), count)


def map_of(values, device, dtype=torch.float32):
    """Features and weight of one channel whose raw map is ``values`` [H, W], for one image."""
    features = torch.as_tensor(values, dtype=dtype, device=device)[None, None]
    return (
        features,
        torch.ones((1, 1), dtype=dtype, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("candidates", [1, 2, 5, 6, 30])
def test_numbers_of_candidates(backend, device, candidates):
    """Fewer than five seeds, five, more: what lacks repeats the list from its start."""
    values = torch.zeros(5, 6)
    values.view(-1)[torch.randperm(30, generator=torch.Generator().manual_seed(candidates))[:candidates]] = 1
    values[0, 0] = 0  # a map of ones alone is constant
    noise = torch.rand((1, 30), generator=torch.Generator().manual_seed(1))
    with camkernels.use_backend(backend):
        found = fused_cam_seeds(*map_of(values, device), 5, noise=noise.to(device))
    chosen = sorted(values.flatten().nonzero().flatten().tolist(), key=lambda p: -noise[0, p].item())
    assert found.count.tolist() == [len(chosen)]
    assert found.indices[0].tolist() == [chosen[k % len(chosen)] for k in range(5)]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_value_at_the_threshold_is_no_candidate(backend, device):
    """7 / 10 is the float32 nearest to 0.7, which is the threshold."""
    values = torch.arange(11.0)[None]
    for threshold, count in ((0.7, 3), (0.69999, 4), (0.70001, 3)):
        with camkernels.use_backend(backend):
            found = fused_cam_seeds(*map_of(values, device), 2, threshold=threshold, sampling="first")
        assert found.count.tolist() == [count]
        assert found.indices.tolist() == [[11 - count, 12 - count]]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_the_map_is_not_rounded_before_the_threshold(backend, device):
    """713 / 1024 is 0.6963, and 0.6953 in bfloat16."""
    values = torch.tensor([[0.0, 713.0, 716.0, 1024.0]])
    features = torch.stack([values // 256 * 256, values % 256])[None].to(device, torch.bfloat16)
    weight = torch.ones((1, 2), device=device, dtype=torch.bfloat16)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    for threshold, count in ((0.696, 3), (0.697, 2), (0.6993, 1)):
        with camkernels.use_backend(backend):
            found = fused_cam_seeds(features, weight, target, 1, threshold=threshold, sampling="first")
        assert found.count.tolist() == [count]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_threshold_of_one_but_for_rounding_leaves_the_peak(backend, device):
    values = torch.tensor([[0.0, 3.0, 5.0], [5.0, 1.0, 5.0]])
    with camkernels.use_backend(backend):
        found = fused_cam_seeds(*map_of(values, device), 4, threshold=1 - 1e-12)
        low = fused_cam_seeds(*map_of(values, device), 4, threshold=1e-300, sampling="first")
    assert found.count.tolist() == [0]
    assert found.indices.tolist() == [[2] * 4]
    assert low.indices.tolist() == [[1, 2, 3, 4]]
    wide = torch.zeros(5, 40)  # of several blocks, in which the maximum comes twice
    wide.view(-1)[[70, 150]] = 5
    with camkernels.use_backend(backend):
        found = fused_cam_seeds(*map_of(wide, device), 2, threshold=1 - 1e-12)
    assert found.indices.tolist() == [[70, 70]]


@pytest.mark.parametrize("backend, device", BACKENDS)
@may_hold_infinities
@pytest.mark.parametrize(
    "place, value, seed", [(None, 0.0, 0), (7, math.nan, 0), (7, math.inf, 7), (7, -math.inf, 0)], ids=str
)
def test_without_a_candidate_all_seeds_are_the_peak(backend, device, place, value, seed):
    """A constant map has it at pixel 0, and so has one of NaN; an infinity leaves 0 / inf and inf / inf."""
    values = torch.ones(4, 5)
    if place is not None:
        values.view(-1)[place] = value
        values[1, 3] = 2.0
    features, weight, target = map_of(values, device)
    with camkernels.use_backend(backend):
        found = fused_cam_seeds(features, weight, target, 3)
    assert found.count.tolist() == [0]
    assert found.indices.tolist() == [[seed] * 3]
    assert torch.equal(found.vectors, features[0, 0, seed // 5, seed % 5].expand(1, 3, 1))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_noise_may_hold_anything(backend, device):
    """Zeros of either sign are equal, all NaN are the greatest; nothing is read or written out of bounds."""
    keys = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -1e-40, -1.0, 2.0, 3.4e38, -3.4e38]
    draw = torch.Generator().manual_seed(0)
    noise = torch.tensor(keys)[torch.randint(0, len(keys), (2, 45), generator=draw)]
    noise.view(torch.int32)[1, ::7] = -1  # a NaN with its sign set
    values = torch.ones(5, 9)  # all are candidates but the first
    values[0, 0] = 0
    features, weight, target = map_of(values, device)
    with camkernels.use_backend(backend):
        found = fused_cam_seeds(
            features.expand(2, 1, 5, 9), weight, target.expand(2), 60, noise=noise.to(device)
        )
    indices, count = expected_seeds(found.cam, noise, 60)
    assert torch.equal(found.indices.cpu(), indices)
    assert torch.equal(found.count.cpu(), count)


def chi_square(backend, device, draw_noise, repeats=400, candidates=12, num_seeds=3):
    """Of how often each candidate is a seed at each place, against equal shares; 11 degrees a place."""
    values = torch.zeros(6, 8)
    pixels = torch.randperm(48, generator=torch.Generator().manual_seed(5))[:candidates].sort().values
    values.view(-1)[pixels] = 1
    features, weight, target = map_of(values, device)
    images = features.expand(repeats, 1, 6, 8).contiguous(), weight, target.expand(repeats).contiguous()
    with camkernels.use_backend(backend):
        found = fused_cam_seeds(*images, num_seeds, noise=draw_noise((repeats, 48)).to(device))
    assert (found.indices.sort(1).values.diff(dim=1) > 0).all()  # without replacement
    places = torch.searchsorted(pixels, found.indices.cpu())
    seen = torch.stack([torch.bincount(places[:, k], minlength=candidates) for k in range(num_seeds)])
    expected = repeats / candidates
    return ((seen - expected) ** 2 / expected).sum(1)  # [num_seeds]


# Of the chi-square distribution with 11 degrees of freedom: exceeded once in a thousand.
CRITICAL = 31.26


@pytest.mark.parametrize("backend, device", [b for b in BACKENDS if GPU or b[0] != "triton"])
def test_seeds_are_uniform(backend, device):
    draw = torch.Generator().manual_seed(3)
    assert (chi_square(backend, device, lambda shape: torch.rand(shape, generator=draw)) < CRITICAL).all()


def test_a_biased_draw_would_be_seen():
    """Keys that favour late pixels a little: what the test above has to be able to tell."""
    draw = torch.Generator().manual_seed(3)

    def biased(shape):
        return torch.rand(shape, generator=draw) * torch.linspace(0.85, 1, shape[1])

    assert (chi_square(*BACKENDS[0], biased) > CRITICAL).any()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_generators_make_draws_reproducible(backend, device):
    case = Case(device=device, maps="ties", channels=5)
    arguments = case.features(), case.weight(), case.target(), 6

    def seeds(**options):
        with camkernels.use_backend(backend):
            return fused_cam_seeds(*arguments, **options).indices

    def generator(seed):
        return torch.Generator(device).manual_seed(seed)

    assert torch.equal(seeds(generator=generator(1)), seeds(generator=generator(1)))
    assert not torch.equal(seeds(generator=generator(1)), seeds(generator=generator(2)))
    one = generator(1)
    first, second = seeds(generator=one), seeds(generator=one)
    assert not torch.equal(first, second)
    noise = torch.rand((3, 49), generator=generator(1), device=device)
    assert torch.equal(first, seeds(noise=noise))
    torch.manual_seed(7)
    ours = seeds()
    torch.manual_seed(7)
    assert torch.equal(ours, seeds(noise=torch.rand((3, 49), device=device)))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_features_may_be_their_own_seed_features(backend, device):
    """Given as such, given as a view, or left out: one result and one gradient."""
    case = Case(device=device, channels=5)
    noise, target = noise_for(case), case.target()
    results = [
        run(
            backend,
            lambda f, w, of=of: fused_cam_seeds(f, w, target, 4, seed_features=of(f), noise=noise),
            [case.features(), case.weight()],
        )
        for of in (lambda f: None, lambda f: f, lambda f: f.view_as(f))
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0].values, other.values, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[0].grads, results[1].grads, strict=True))
    assert torch.allclose(results[0].grads[0], results[2].grads[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_repeated_seeds_add_up(backend, device, layout):
    """Three candidates for eight seeds; pixels without a seed have exactly 0."""
    values = torch.zeros(3, 7)
    values.view(-1)[torch.tensor([4, 11, 20])] = 1
    _, weight, target = map_of(values, device)
    features = torch.cat([values.expand(1, 1, 3, 7), torch.randn(1, 5, 3, 7)], 1).to(device)
    features = lay_out(features, layout).requires_grad_()
    weight = torch.nn.functional.pad(weight, (0, 5))
    grad = torch.randint(-8, 8, (1, 8, 6), generator=torch.Generator().manual_seed(0)).float().to(device)
    with camkernels.use_backend(backend):
        found = fused_cam_seeds(features, weight, target, 8, sampling="first")
        (grad_features,) = torch.autograd.grad(found.vectors, features, grad)
    expected = torch.zeros(6, 21, device=device)
    for k in range(8):
        expected[:, [4, 11, 20][k % 3]] += grad[0, k]
    assert torch.equal(grad_features[0].flatten(1), expected)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("add", [False, True], ids=["written", "added"])
def test_the_gradient_is_rounded_once(backend, device, dtype, layout, add):
    """Every element is written, even over NaN; what is added to is read in its own type and rounded after."""
    draw = torch.Generator().manual_seed(0)
    grad_vectors = torch.randn((2, 11, 5), generator=draw).to(device, dtype)
    indices = torch.randint(0, 11, (2, 11), generator=draw).to(device)  # the last pixel has no seed
    before = torch.randn((2, 5, 3, 4), generator=draw) if add else torch.full((2, 5, 3, 4), math.nan)
    before[..., -1, -1] = -0.0
    found = lay_out(before.to(device, dtype), layout)
    sums = torch.zeros(2, 12, 5)
    for n in range(2):
        for k in range(11):
            sums[n, indices[n, k]] += grad_vectors[n, k].cpu().float()
    sums = sums.mT.reshape(2, 5, 3, 4)
    expected = (found.cpu().float() + sums if add else sums).to(dtype)
    given = {"grad_vectors": grad_vectors, "indices": indices, "add": add, "grad_seed_features": found}
    _pass.Launch(backend)("cam_seeds_bwd", SimpleNamespace(**given))
    assert torch.equal(found.cpu(), expected)
    assert (found[..., -1, -1].signbit() == add).all()  # left alone, or written


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("own", [False, True], ids=["features", "seed_features"])
def test_gradients_keep_the_memory_format(backend, device, layout, own):
    case = Case(device=device, layout=layout, channels=5)
    target = case.target()
    seed_features = [lay_out(torch.randn(3, 4, 7, 7, device=device), layout)] if own else []
    found = run(
        backend,
        lambda f, w, s=None: fused_cam_seeds(f, w, target, 4, seed_features=s),
        [case.features(), case.weight(), *seed_features],
    )
    last = layout == "channels_last"
    for grad in (found.grads[0], found.grads[-1] if own else found.grads[0]):
        assert grad.is_contiguous(memory_format=torch.channels_last) == last
        assert grad.is_contiguous() != last


@pytest.mark.parametrize("output", ["vectors", "cam"])
@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_loss_on_one_output_only(backend, device, output):
    """Through the vectors the weight has no gradient; the two parts add up to that of a loss on both."""
    case = Case(device=device, channels=5)
    noise, target = noise_for(case), case.target()
    inputs = [case.features(), case.weight()]

    def seeds(features, weight):
        return fused_cam_seeds(features, weight, target, 4, noise=noise)

    found = run(backend, lambda f, w: getattr(seeds(f, w), output), inputs)
    with camkernels.use_backend(backend):
        indices = seeds(*inputs).indices.cpu()
    function = given_seeds(indices, target)
    place = ("vectors", "cam").index(output)
    truth = run("reference", lambda f, w: function(f, w)[place], as_double(inputs))
    plain = run("reference", lambda f, w: function(f, w)[place], as_plain(inputs))
    for mine, other, exact in zip(found.grads, plain.grads, truth.grads, strict=True):
        assert (mine is None) == (exact is None)
        if mine is not None:
            assert_as_close_as(mine.cpu(), other, exact)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_only_where_asked_for(backend, device, needed):
    case = Case(device=device, channels=5)
    noise, target = noise_for(case), case.target()
    inputs = [case.features(), case.weight(), torch.randn(3, 4, 7, 7, device=device)]

    def op(features, weight, seed_features):
        return fused_cam_seeds(features, weight, target, 4, seed_features=seed_features, noise=noise)

    alone, together = run(backend, op, inputs, needed=needed), run(backend, op, inputs)
    for place, (need, one, all_of_them) in enumerate(zip(needed, alone.grads, together.grads, strict=True)):
        assert torch.equal(one, all_of_them) if need else one is None, place


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_outputs_require_grad_only_where_a_gradient_exists(backend, device):
    case = Case(device=device, channels=5)
    seed_features = torch.randn(3, 4, 7, 7, device=device)

    def flags(of_features, of_weight, of_seeds):
        arguments = case.features().requires_grad_(of_features), case.weight().requires_grad_(of_weight)
        other = None if of_seeds is None else seed_features.requires_grad_(of_seeds)
        with camkernels.use_backend(backend):
            found = fused_cam_seeds(*arguments, case.target(), 4, seed_features=other)
        assert not found.indices.requires_grad
        assert not found.count.requires_grad
        return found.vectors.requires_grad, found.cam.requires_grad

    assert flags(True, False, None) == (True, True)
    assert flags(False, True, None) == (False, True)
    assert flags(True, False, False) == (False, True)
    assert flags(False, False, True) == (True, False)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_gradient_of_any_stride(backend, device, layout):
    case = Case(device=device, channels=5, layout=layout)
    noise, target = noise_for(case), case.target()
    inputs = [x.requires_grad_() for x in (case.features(), case.weight())]
    of_vectors = torch.randn(3, 5, 4, generator=case.generator()).to(device).mT
    of_cam = torch.randn(3, 7, 7, generator=case.generator()).to(device).mT
    for strided in (
        (of_vectors, of_cam),
        (of_vectors[:1, :1, :1].expand(3, 4, 5), of_cam[:1, :1, :1].expand(3, 7, 7)),
    ):
        found = []
        for grads in (strided, [x.contiguous() for x in strided]):
            with camkernels.use_backend(backend):
                seeds = fused_cam_seeds(*inputs, target, 4, noise=noise)
                found.append(torch.autograd.grad([seeds.vectors, seeds.cam], inputs, grads))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_inputs_are_left_alone(backend, device):
    case = Case(device=device, channels=5, maps="ties")
    inputs = [case.features(), case.weight(), torch.randn(3, 4, 7, 7, device=device)]
    noise, target = noise_for(case), case.target()
    before = [x.clone() for x in (*inputs, noise, target)]
    run(backend, lambda f, w, s: fused_cam_seeds(f, w, target, 60, seed_features=s, noise=noise), inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, noise, target), strict=True))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_deterministic_and_everything_is_written(backend, device):
    """Under this setting PyTorch fills what is allocated with NaN."""
    case = Case(device=device, maps="ties", channels=5, images=2)
    noise, target = noise_for(case, steps=4), case.target()
    inputs = [case.features(), case.weight()]

    def op(features, weight):
        return fused_cam_seeds(features, weight, target, 20, noise=noise)

    plainly = run(backend, op, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        again = run(backend, op, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = zip(plainly.values + plainly.grads, again.values + again.grads, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_empty_batch(backend, device):
    case = Case(device=device, images=0)
    target = case.target()
    found = run(backend, lambda f, w: fused_cam_seeds(f, w, target, 4), [case.features(), case.weight()])
    assert [v.shape for v in found.values] == [(0, 4, 33), (0, 4), (0,), (0, 7, 7)]
    assert torch.equal(found.grads[1], torch.zeros_like(case.weight()))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_the_cam_is_that_of_fused_cam(backend, device):
    case = Case(device=device)
    with camkernels.use_backend(backend):
        found = fused_cam_seeds(case.features(), case.weight(), case.target(), 4)
        assert torch.equal(found.cam, fused_cam(case.features(), case.weight(), case.target()))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_seed_features_are_not_kept_for_backward(backend, device):
    case = Case(device=device, channels=5)
    seed_features = torch.randn(3, 4000, 7, 7, device=device, requires_grad=True)
    saved = []
    with (
        camkernels.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        fused_cam_seeds(
            case.features().requires_grad_(), case.weight(), case.target(), 4, seed_features=seed_features
        )
    assert max(x.numel() for x in saved) <= case.features().numel()


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_only_indices_are_kept_where_the_map_is_not_trained(backend, device):
    case = Case(device=device)
    seed_features = torch.randn(3, 4, 7, 7, device=device, requires_grad=True)
    saved = []
    with (
        camkernels.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        found = fused_cam_seeds(case.features(), case.weight(), case.target(), 4, seed_features=seed_features)
    assert [x.tolist() for x in saved] == [found.indices.tolist()]


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("outputs", ["vectors", "both"])
def test_backward_holds_no_second_gradient(backend, device, layout, outputs):
    case = Case(device=device, channels=256, images=2, layout=layout, maps="ties")
    features = case.features().requires_grad_()
    with camkernels.use_backend(backend):
        found = fused_cam_seeds(features, case.weight(), case.target(), 4)
    results = [found.vectors, found.cam] if outputs == "both" else [found.vectors]
    grads = [torch.rand_like(x) for x in results]
    size = features.numel() * 4
    most, (grad,) = peak_bytes(lambda: torch.autograd.grad(results, features, grads), device)
    assert grad.shape == features.shape
    assert size <= most <= 1.1 * size


@pytest.mark.parametrize("own", [True, False])
def test_gradcheck(own):
    case = Case(dtype=torch.float64, shape=(3, 4), channels=4, images=2)
    noise, target = noise_for(case), case.target()
    seed_features = torch.randn((2, 3, 3, 4), generator=case.generator(), dtype=torch.float64)
    inputs = [case.features(), case.weight(), *([] if own else [seed_features])]

    def function(features, weight, seed_features=None):
        found = fused_cam_seeds(features, weight, target, 7, seed_features=seed_features, noise=noise)
        return found.vectors, found.cam

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs], atol=1e-6)


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_instruction_set(capability, dtype):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        for layout in ("contiguous", "channels_last"):
            assert_right("cpu", Case(dtype=dtype, layout=layout, maps="ties", channels=37))
    finally:
        _C.use_cpu_capability(chosen)


def test_one_thread_and_several_give_the_same_bits():
    case = Case(images=5, channels=70, shape=(14, 14))
    noise, target = noise_for(case), case.target()
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (4, 1):
            torch.set_num_threads(number)
            results.append(
                run(
                    "cpu",
                    lambda f, w: fused_cam_seeds(f, w, target, 20, noise=noise),
                    [case.features(), case.weight()],
                )
            )
    finally:
        torch.set_num_threads(threads)
    several, one = results
    assert all(
        torch.equal(a, b) for a, b in zip(several.values + several.grads, one.values + one.grads, strict=True)
    )


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_the_weight_may_be_a_convolution_and_targets_int32(backend, device):
    case = Case(device=device, channels=5, maps="ties", weight_dtype=torch.bfloat16)
    noise = noise_for(case)
    with camkernels.use_backend(backend):
        plain = fused_cam_seeds(case.features(), case.weight(), case.target(), 4, noise=noise)
        other = fused_cam_seeds(
            case.features(), case.weight()[:, :, None, None], case.target(dtype=torch.int32), 4, noise=noise
        )
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
