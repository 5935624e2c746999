"""WeightedBCEWithLogits against VAC eq. 2-3 in Python numbers, and at the edges of its arithmetic."""

import re
from math import exp, inf, log, nan

import pytest
import torch
from torch import Tensor

from camkernels.losses import WeightedBCEWithLogits

RATIO = [0.0, 0.1, 0.5, 0.8, 1.0]
LABELS = len(RATIO)


def written_out(logits: Tensor, target: Tensor, ratio: list[float]) -> float:
    total = 0.0
    for row, labels in zip(logits.tolist(), target.tolist(), strict=True):
        for x, y, p in zip(row, labels, ratio, strict=True):
            weight = exp(1 - p) if y == 1 else exp(p)
            total -= weight * (y * log(1 / (1 + exp(-x))) + (1 - y) * log(exp(-x) / (1 + exp(-x))))
    return total / len(logits)


def batch(images: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, LABELS, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(2, (images, LABELS), generator=generator)


def criterion(dtype: torch.dtype = torch.float64) -> WeightedBCEWithLogits:
    return WeightedBCEWithLogits(torch.tensor(RATIO, dtype=dtype))


@pytest.mark.parametrize(
    "kind", [torch.float64, torch.float32, torch.float16, torch.bool, torch.uint8, torch.int32, torch.int64]
)
def test_equals_the_formula(kind):
    logits, target = batch()
    loss = criterion()(logits, target.to(kind))
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(written_out(logits, target, RATIO), rel=1e-12)


def test_weights_follow_the_ratio():
    # At a logit of 0 both terms are log 2, so the loss is the sum of the weights times log 2.
    present = WeightedBCEWithLogits([0.25])(torch.zeros(3, 1), torch.ones(3, 1))
    absent = WeightedBCEWithLogits([0.25])(torch.zeros(3, 1), torch.zeros(3, 1))
    assert present.item() == pytest.approx(exp(0.75) * log(2))
    assert absent.item() == pytest.approx(exp(0.25) * log(2))


def test_a_target_in_between_mixes_both_terms():
    logits, _ = batch()
    loss = criterion()
    present, absent = loss(logits, torch.ones_like(logits)), loss(logits, torch.zeros_like(logits))
    mixed = loss(logits, torch.full_like(logits, 0.25))
    assert mixed.item() == pytest.approx((0.25 * present + 0.75 * absent).item(), rel=1e-12)


def test_gradcheck():
    logits, target = batch(images=3)
    assert torch.autograd.gradcheck(lambda x: criterion()(x, target), logits.requires_grad_())


def test_gradient_of_the_logits_alone():
    logits, target = batch()
    target = target.double().requires_grad_()
    loss = criterion()(logits, target)
    assert not loss.requires_grad
    criterion()(logits.requires_grad_(), target).backward()
    assert logits.grad.abs().sum() > 0
    assert target.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_computed_in_float32(dtype):
    logits, target = batch(dtype=dtype)
    logits.requires_grad_()
    loss = criterion(torch.float32)(logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, criterion(torch.float32)(logits.detach().float(), target))
    loss.backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("right", [True, False])
def test_large_logits_stay_finite(dtype, right):
    target = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]])
    size = torch.tensor(1e4, dtype=dtype)
    logits = torch.where(target.bool() == right, size, -size).requires_grad_()
    loss = criterion(torch.float32)(logits, target)
    loss.backward()
    ratio = torch.tensor(RATIO).to(torch.promote_types(dtype, torch.float32))
    weights = torch.where(target == 1, 1 - ratio, ratio).exp()
    expected = 0.0 if right else weights.sum().item() * size.item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    slope = torch.where(target == 1, -weights, weights) / 2
    assert torch.equal(logits.grad, torch.zeros_like(logits) if right else slope.to(dtype))


def test_a_small_loss_is_not_lost():
    # x + log(1 + exp(-x)), the usual form, is 0 here: 20 - 20.
    logits = torch.full((1, 1), -20.0)
    loss = WeightedBCEWithLogits([0.0])(logits, torch.zeros(1, 1))
    assert loss.item() == pytest.approx(exp(-20), rel=1e-6)


def test_an_infinite_logit_that_agrees_adds_nothing():
    logits = torch.tensor([[inf, -inf]], requires_grad=True)
    loss = WeightedBCEWithLogits([0.5, 0.5])(logits, torch.tensor([[1, 0]]))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(1, 2))
    assert WeightedBCEWithLogits([0.5, 0.5])(-logits, torch.tensor([[1, 0]])).item() == inf


def test_a_nan_shows():
    logits, target = batch()
    logits[2, 3] = nan
    assert criterion()(logits, target).isnan()


def test_under_autocast():
    logits, target = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = criterion()(logits, target)
    assert torch.equal(inside, criterion()(logits, target))


def test_empty_batch():
    logits = torch.zeros(0, LABELS, requires_grad=True)
    loss = criterion()(logits, torch.zeros(0, LABELS))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, LABELS)


def test_compiles_to_one_graph():
    logits, target = batch(dtype=torch.float32)
    results = []
    loss = criterion(torch.float32)
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, target)
        value.backward()
        results.append([value.detach(), leaf.grad])
    torch.testing.assert_close(*results)


def test_state_dict_holds_the_ratio():
    saved = criterion(torch.float32).state_dict()
    assert list(saved) == ["positive_ratio"]
    other = WeightedBCEWithLogits([0.5] * LABELS)
    other.load_state_dict(saved)
    logits, target = batch(dtype=torch.float32)
    assert torch.equal(other(logits, target), criterion(torch.float32)(logits, target))
    assert list(criterion().parameters()) == []


def test_the_ratio_is_a_copy():
    ratio = torch.tensor(RATIO, requires_grad=True)
    loss = WeightedBCEWithLogits(ratio)
    with torch.no_grad():
        ratio.zero_()
    assert loss.positive_ratio.tolist() == torch.tensor(RATIO).tolist()
    assert not loss.positive_ratio.requires_grad


def test_a_sequence_of_numbers():
    assert torch.equal(WeightedBCEWithLogits(RATIO).positive_ratio, torch.tensor(RATIO))
    assert torch.equal(WeightedBCEWithLogits((0, 1)).positive_ratio, torch.tensor([0.0, 1.0]))


def test_built_on_meta():
    loss = WeightedBCEWithLogits(torch.empty(LABELS, device="meta"))
    assert loss.positive_ratio.is_meta
    with pytest.raises(
        RuntimeError, match=r"^WeightedBCEWithLogits: positive_ratio was given without values"
    ):
        loss.to_empty(device="cpu").reset_parameters()


def test_a_wrong_ratio_is_found_on_meta():
    with torch.device("meta"), pytest.raises(ValueError, match=r"positive_ratio holds 1.5"):
        WeightedBCEWithLogits([0.5, 1.5])


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.int64, torch.int8])
def test_an_unknown_label_adds_nothing(kind):
    logits, target = batch()
    expected = (
        criterion()(logits, target).item() - written_out(logits[:1, 1:3], target[:1, 1:3], RATIO[1:3]) / 6
    )
    target[0, 1:3] = -1
    logits[0, 1], logits[0, 2] = inf, nan
    logits.requires_grad_()
    loss = criterion()(logits, target.to(kind))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(logits.grad == 0, target == -1)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2, "2"),
        (-2, "-2"),
        (torch.tensor(255, dtype=torch.uint8), "255"),
        (1.5, "1.5"),
        (-0.5, "-0.5"),
        (nan, "nan"),
    ],
)
def test_a_target_that_is_no_label(value, shown):
    logits, target = batch(dtype=torch.float32)
    value = torch.as_tensor(value)
    target = target.to(value.dtype)
    target[1, 3] = value
    message = f"^WeightedBCEWithLogits: target holds {shown}; it must be in \\[0, 1\\], or -1 for unknown$"
    with pytest.raises(ValueError, match=message):
        criterion(torch.float32)(logits, target)
    # In a compiled graph, as on a GPU, nobody looks.
    compiled = torch.compile(criterion(torch.float32), fullgraph=True, backend="aot_eager")
    assert compiled(logits, target).isnan()


def test_repr_shows_the_number_of_labels():
    assert repr(WeightedBCEWithLogits(RATIO)) == "WeightedBCEWithLogits(labels=5)"


@pytest.mark.parametrize(
    ("ratio", "error", "message"),
    [
        (0.5, TypeError, "positive_ratio is a float; it must be a tensor [L] or a sequence of L numbers"),
        ("half", TypeError, "positive_ratio is a str; it must be a tensor [L] or a sequence of L numbers"),
        (
            [0.5, "1"],
            TypeError,
            "positive_ratio holds a str; it must be a tensor [L] or a sequence of L numbers",
        ),
        (
            [True],
            TypeError,
            "positive_ratio holds a bool; it must be a tensor [L] or a sequence of L numbers",
        ),
        (
            torch.zeros(2, dtype=torch.int64),
            TypeError,
            "positive_ratio has dtype int64; allowed are float32, float16, bfloat16, float64",
        ),
        (torch.zeros(2, 2), ValueError, "positive_ratio has shape [2, 2]; it must be [L]"),
        ([], ValueError, "positive_ratio is empty; L must be at least 1"),
        ([0.5, 1.5], ValueError, "positive_ratio holds 1.5; allowed is [0, 1]"),
        ([-0.5], ValueError, "positive_ratio holds -0.5; allowed is [0, 1]"),
        ([0.5, nan], ValueError, "positive_ratio holds nan; allowed is [0, 1]"),
    ],
)
def test_bad_ratio(ratio, error, message):
    with pytest.raises(error, match=f"^WeightedBCEWithLogits: {re.escape(message)}$"):
        WeightedBCEWithLogits(ratio)


LOGITS = torch.zeros(2, LABELS)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, [1.0], TypeError, "logits is a list; it must be a tensor [N, L]"),
        (
            0,
            LOGITS.int(),
            TypeError,
            "logits has dtype int32; allowed are float32, float16, bfloat16, float64",
        ),
        (0, LOGITS[0], ValueError, "logits has shape [5]; it must be [N, L]"),
        (0, LOGITS[:, :0], ValueError, "logits has shape [2, 0]; L must be at least 1"),
        (0, LOGITS[:, 1:], ValueError, "logits has 4 labels and positive_ratio 5; they must be equal"),
        (
            0,
            LOGITS.to("meta"),
            ValueError,
            "logits is on meta and positive_ratio on cpu; they must be on one device",
        ),
        (1, None, TypeError, "target is a NoneType; it must be a tensor [N, L]"),
        (1, LOGITS.cfloat(), TypeError, "target has dtype complex64; allowed are bool, integers and floats"),
        (1, LOGITS[0], ValueError, "target has shape [5] and logits [2, 5]; they must be equal"),
        (1, LOGITS[:1], ValueError, "target has shape [1, 5] and logits [2, 5]; they must be equal"),
        (1, LOGITS.to("meta"), ValueError, "target is on meta and logits on cpu; they must be on one device"),
    ],
)
def test_bad_input(position, value, error, message):
    inputs = [LOGITS, LOGITS]
    inputs[position] = value
    with pytest.raises(error, match=f"^WeightedBCEWithLogits: {re.escape(message)}$"):
        criterion()(*inputs)
