"""assert_as_close_as lets pass what another order of summation gives, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from cases import Case, as_double, as_plain, run
from closeness import assert_as_close_as, rounding_noise

from camkernels import reference

EPS = torch.finfo(torch.float32).eps


def uniform_loss(features, weight, bias):
    """Of all classes: no bias and no constant over the pixels changes it, so that gradients cancel."""
    target = torch.zeros(len(features), len(weight), dtype=torch.int64)
    return reference.negative_cam_loss(features, weight, target, bias=bias, kind="uniform")


def normalised(features, weight, bias):
    return reference.cam(features, weight)


def inputs_of(**options):
    case = Case(**options)
    return [case.features(), case.weight(), case.bias()]


def without_error(truth, dtype=torch.float32):
    """What PyTorch gives on the luckiest processor."""
    return truth.detach().to(dtype).clone(memory_format=torch.contiguous_format)


def in_another_order(function, seed):
    """The function with pixels and channels in another order, which changes neither value nor gradient."""
    draw = torch.Generator().manual_seed(seed)

    def shuffled(features, weight, bias):
        channels = torch.randperm(features.shape[1], generator=draw)
        pixels = torch.randperm(features[0, 0].numel(), generator=draw)
        features = features[:, channels].flatten(2)[..., pixels].view(features.shape)
        return function(features, weight[:, channels], bias)

    return shuffled


@pytest.mark.parametrize("maps", ["signed", "ties", "constant"])
@pytest.mark.parametrize("shape", [(7, 7), (33, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_order_of_summation_is_close_enough(dtype, shape, maps):
    inputs = inputs_of(dtype=dtype, maps=maps, shape=shape)
    truth = run("reference", uniform_loss, as_double(inputs))
    truth.grads[2].zero_()
    for seed in range(5):
        ours = run("reference", in_another_order(uniform_loss, seed), inputs)
        for index in (1, 2):
            exact = truth.grads[index]
            assert_as_close_as(ours.grads[index], without_error(exact), exact, what=f"order {seed}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maps", ["signed", "ties"])
def test_an_error_of_1e_5_shows_where_nothing_cancels(maps, dtype):
    inputs = inputs_of(dtype=dtype, maps=maps)
    plain = run("reference", normalised, as_plain(inputs))
    truth = run("reference", normalised, as_double(inputs))
    wrong = 1e-5 * torch.finfo(dtype).eps / EPS
    for theirs, exact in zip(plain.results()[:3], truth.results()[:3], strict=True):
        ours = without_error(exact, dtype)
        assert_as_close_as(ours, theirs, exact)
        ours.view(-1)[exact.abs().argmax()] *= 1 + wrong
        with pytest.raises(AssertionError, match="off by"):
            assert_as_close_as(ours, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_shows_where_the_truth_cancels(dtype):
    """The terms of a bias's gradient are softmax - 1/P, over T and the images: together at most 2 per map."""
    inputs = inputs_of(dtype=dtype)
    plain = run("reference", uniform_loss, as_plain(inputs))
    truth = run("reference", uniform_loss, as_double(inputs))
    theirs, exact = plain.grads[2], truth.grads[2].zero_()
    roundings = 16 if dtype == torch.float64 else 8  # closeness allows float64 twice as much
    for constant in (roundings * torch.finfo(dtype).eps, -roundings * torch.finfo(dtype).eps):
        ours = torch.full_like(exact, constant, dtype=dtype)
        with pytest.raises(AssertionError, match="off by"):
            assert_as_close_as(ours, theirs, exact)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("index", [0, 2])
def test_one_nan_or_infinity_shows(index, bad):
    inputs = inputs_of()
    truth = run("reference", uniform_loss, as_double(inputs))
    exact = truth.grads[index]
    ours = without_error(exact)
    ours.view(-1)[-1] = bad
    with pytest.raises(AssertionError, match=r"1 NaN|1 infinities"):
        assert_as_close_as(ours, without_error(exact), exact)
    with pytest.raises(AssertionError, match=r"0 NaN|0 infinities"):
        assert_as_close_as(without_error(exact), without_error(exact), torch.full_like(exact, bad))


def test_noise_is_a_few_roundings_where_nothing_cancels():
    for maps in ("signed", "ties"):
        for exact in run("reference", normalised, as_double(inputs_of(maps=maps))).results()[:3]:
            noise = rounding_noise(exact, torch.float32) / exact.abs().max().item()
            assert EPS / 4 < noise < 20 * EPS
            assert rounding_noise(exact, torch.float16) == rounding_noise(exact, torch.float32)
            fine = rounding_noise(exact, torch.float64) / exact.abs().max().item()
            assert EPS**2 / 64 < fine < EPS**2 * 10


SUMS = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "product": lambda x: x.T @ torch.ones_like(x[:, 0]),
    "einsum": lambda x: torch.einsum("pc,p->c", x, torch.ones_like(x[:, 0])),
    "convolution": lambda x: F.conv2d(x.T[None, :, :, None], torch.ones(1, 2, 64, 1).to(x)),
    "index_add": lambda x: torch.zeros_like(x[:1]).index_add(0, torch.zeros(64, dtype=torch.int64), x),
    "scatter_add": lambda x: torch.zeros_like(x[:1]).scatter_add(0, torch.zeros(64, 2, dtype=torch.int64), x),
}


@pytest.mark.parametrize("function", SUMS)
def test_the_noise_of_a_sum_that_cancels_is_that_of_its_terms(function):
    half = torch.linspace(1, 2, 64, dtype=torch.float64).view(32, 2)
    truth = run("reference", SUMS[function], [torch.cat([half, -half])])
    assert truth.values[0].abs().max() < 1e-12
    terms = 1 / 64 if function == "mean" else 1
    assert terms * EPS / 4 < rounding_noise(truth.values[0], torch.float32) < terms * EPS * 64


EXACT = {
    "indexing": lambda x: x[[2, 1]],
    "gather": lambda x: x.gather(0, torch.tensor([2, 1])),
    "sort": lambda x: x.sort().values,
    "topk": lambda x: x.topk(2).values,
    "extrema": lambda x: torch.stack([x.amin(), x.amax(), x.max(0).values]),
    "where": lambda x: torch.where(x > 1, x, -x.abs()),
    "copies": lambda x: torch.cat([x.clone(), x.float().double().expand(2, 3).flatten()]),
}


@pytest.mark.parametrize("function", EXACT)
def test_what_is_handed_on_is_not_rounded(function):
    truth = run("reference", EXACT[function], [torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)])
    assert rounding_noise(truth.values[0], torch.float32) == 0


def test_rounding_decides_nothing():
    """Tied extrema stay tied, a value at a threshold stays there, an order of sorting stays."""

    def choices(x):
        share = x.amin() + x.amax()  # both tied: each pixel has an even share
        passed = torch.where(x * 3 > 3, x, 0).sum()  # 1 does not pass
        scores, order = (x * 1).sort(stable=True)
        return share, passed, scores * order, x[x * 5 == 5]

    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    for exact in run("reference", choices, [x]).results():
        assert rounding_noise(exact, torch.float32) < 50 * EPS


def test_noise_is_asked_for_only_where_the_plain_comparison_fails():
    calls = []

    def counted(features, weight, bias):
        calls.append(1)
        return uniform_loss(features, weight, bias)

    inputs = inputs_of()
    truth = run("reference", counted, as_double(inputs))
    exact = truth.grads[0]
    assert_as_close_as(without_error(exact), without_error(exact), exact)
    assert len(calls) == 1
    for _ in range(2):  # and then once for all results
        with pytest.raises(AssertionError):
            assert_as_close_as(without_error(exact) + 1, without_error(exact), exact)
    assert 2 < len(calls) < 8
