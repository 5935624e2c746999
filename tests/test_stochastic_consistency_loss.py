"""StochasticConsistencyLoss against I2C eq. 1 in loops, and its options; ranks are in test_distributed.py."""

import re
from math import nan

import pytest
import torch
from torch import Tensor

import camkernels
from camkernels import stochastic_consistency
from camkernels.losses import StochasticConsistencyLoss

IMAGES, SEEDS, DIM = 7, 3, 5
CLASSES = [0, 0, 2, 1, 0, 0, 2]  # adjacent are two of class 0, 2 and 1, two of class 0; the last is alone
OPTIONS = [
    ({}, "all", True),
    ({"preset": "official"}, "adjacent", False),
    ({"pairs": "adjacent"}, "adjacent", True),
    ({"squared": False}, "all", False),
    ({"preset": "official", "pairs": "all"}, "all", False),
    ({"preset": "official", "squared": True}, "adjacent", True),
    ({"gather": True}, "all", True),
]


def batch(dtype: torch.dtype = torch.float64, images: int = IMAGES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(images, SEEDS, DIM, generator=generator, dtype=torch.float64)
    return vectors.to(dtype), torch.tensor(CLASSES[:images], dtype=torch.int64)


def written_out(vectors: Tensor, target: Tensor, pairs: str, squared: bool) -> Tensor:
    distances = []
    for i in range(len(vectors)):
        for j in range(i + 1, len(vectors)):
            if target[i] == target[j] and (pairs == "all" or (i % 2 == 0 and j == i + 1)):
                for k in range(SEEDS):
                    square = ((vectors[i, k] - vectors[j, k]) ** 2).sum()
                    distances.append(square if squared else square.sqrt())
    return sum(distances) / len(distances)


@pytest.mark.parametrize(("options", "pairs", "squared"), OPTIONS)
def test_equals_the_equation(options, pairs, squared):
    vectors, target = batch()
    ours, theirs = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    loss = StochasticConsistencyLoss(**options)(ours, target)
    expected = written_out(theirs, target, pairs, squared)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize(("options", "pairs", "squared"), OPTIONS)
def test_options_settle_what_the_preset_leaves(options, pairs, squared):
    criterion = StochasticConsistencyLoss(**options)
    assert (criterion.pairs, criterion.squared) == (pairs, squared)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_is_the_function(preset):
    vectors, target = batch(torch.float32)
    official = preset == "official"
    expected = stochastic_consistency(
        vectors, target, pairs="adjacent" if official else "all", squared=not official
    )
    assert torch.equal(StochasticConsistencyLoss(preset=preset)(vectors, target), expected)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_gradcheck(preset):
    vectors, target = batch()
    criterion = StochasticConsistencyLoss(preset=preset)
    assert torch.autograd.gradcheck(lambda x: criterion(x, target), vectors.requires_grad_())


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_the_gradient_at_distance_0_is_0(preset):
    vectors = torch.ones(4, SEEDS, DIM, requires_grad=True)
    loss = StochasticConsistencyLoss(preset=preset)(vectors, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(vectors.grad, torch.zeros_like(vectors))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("images", [0, 1, 4])
def test_a_batch_without_a_pair_costs_nothing(images, preset, gather):
    vectors, _ = batch(torch.float32, images)
    loss = StochasticConsistencyLoss(gather=gather, preset=preset)(
        vectors.requires_grad_(), torch.arange(images)
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(vectors.grad, torch.zeros_like(vectors))


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_vectors_give_float32(dtype, preset):
    vectors, target = batch(dtype)
    criterion = StochasticConsistencyLoss(preset=preset)
    loss = criterion(vectors.requires_grad_(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, criterion(vectors.detach().float(), target))
    loss.backward()
    assert vectors.grad.dtype == dtype


def test_large_vectors_in_half_stay_finite():
    # A squared distance of 5 * 200**2 is beyond float16, whose largest number is 65504.
    vectors = torch.zeros(2, 1, DIM, dtype=torch.float16)
    vectors[0] = 200
    vectors.requires_grad_()
    loss = StochasticConsistencyLoss()(vectors, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == 200_000
    assert vectors.grad[0, 0].tolist() == [400] * DIM


def test_a_nan_shows():
    vectors, target = batch(torch.float32)
    vectors[4, 1, 2] = nan
    assert StochasticConsistencyLoss()(vectors, target).isnan()


def test_under_autocast():
    vectors, target = batch(torch.float32)
    criterion = StochasticConsistencyLoss()
    with torch.autocast("cpu", torch.bfloat16):
        inside = criterion(vectors, target)
    assert torch.equal(inside, criterion(vectors, target))


@pytest.mark.parametrize("options", [{}, {"preset": "official"}, {"gather": True}])
def test_compiles_to_one_graph(options):
    results = []
    criterion = StochasticConsistencyLoss(**options)
    for function in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        vectors, target = batch(torch.float32)
        loss = function(vectors.requires_grad_(), target)
        loss.backward()
        results.append([loss.detach(), vectors.grad])
    torch.testing.assert_close(*results)


def test_follows_use_backend():
    vectors, target = batch(torch.float32)
    criterion = StochasticConsistencyLoss()
    with camkernels.use_backend("reference"):
        reference = criterion(vectors, target)
    torch.testing.assert_close(criterion(vectors, target), reference)


def test_keeps_no_state():
    criterion = StochasticConsistencyLoss()
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []


def test_repr_shows_the_options():
    assert repr(StochasticConsistencyLoss(gather=True, preset="official")) == (
        "StochasticConsistencyLoss(pairs='adjacent', squared=False, gather=True, preset='official')"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pairs": "some"}, ValueError, "pairs is 'some'; allowed are all, adjacent"),
        ({"pairs": 2}, TypeError, "pairs is a int; allowed are all, adjacent"),
        ({"squared": 1}, TypeError, "squared is a int; it must be True or False"),
        ({"gather": None}, TypeError, "gather is a NoneType; it must be True or False"),
        ({"preset": "released"}, ValueError, "preset is 'released'; allowed are paper, official"),
        ({"preset": None}, TypeError, "preset is a NoneType; allowed are paper, official"),
        (
            {"process_group": 0},
            TypeError,
            "process_group is a int; it must be a ProcessGroup, or None for the default group",
        ),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=f"^StochasticConsistencyLoss: {re.escape(message)}$"):
        StochasticConsistencyLoss(**options)


V, T = torch.zeros(2, SEEDS, DIM), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, None, TypeError, "vectors is a NoneType; it must be a tensor [N, K, D]"),
        (0, V.int(), TypeError, "vectors has dtype int32; allowed are float32, float16, bfloat16, float64"),
        (0, V[0], ValueError, "vectors has shape [3, 5]; it must be [N, K, D]"),
        (
            0,
            V[..., :0],
            ValueError,
            "vectors has shape [2, 3, 0]; K and D must be at least 1 (N may be 0)",
        ),
        (1, [0, 0], TypeError, "target is a list; it must be a tensor [N]"),
        (1, T.float(), TypeError, "target has dtype float32; allowed are int64, int32"),
        (1, T[:, None], ValueError, "target has shape [2, 1]; it must be [N]"),
        (1, T[:1], ValueError, "target has 1 images and vectors 2; they must be equal"),
        (1, T.to("meta"), ValueError, "target is on meta and vectors on cpu; they must be on one device"),
    ],
)
def test_bad_input(position, value, error, message, gather):
    inputs = [V, T]
    inputs[position] = value
    with pytest.raises(error, match=f"^StochasticConsistencyLoss: {re.escape(message)}$"):
        StochasticConsistencyLoss(gather=gather)(*inputs)
