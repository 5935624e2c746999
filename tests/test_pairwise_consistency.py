"""PairwiseConsistencyLoss against the formula of PCL written out in float64."""

import re
from math import exp, log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from camkernels.losses import PairwiseConsistencyLoss

CLASSES = 5


def softmax(row: list[float]) -> list[float]:
    powers = [exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def written_out(p: Tensor, q: Tensor, r: Tensor, target: Tensor, alpha: float, beta: float) -> float:
    """PCL eq. 3 with the sign of its last term put right, in Python numbers."""
    total = 0.0
    for p_row, q_row, r_row, label in zip(*(x.tolist() for x in (p, q, r, target)), strict=True):
        p_k, q_k, r_k = softmax(p_row), softmax(q_row), softmax(r_row)
        total += -log(p_k[label]) - log(r_k[label]) - alpha * log(q_k[label])
        total += beta * sum(b * log(b / a) for a, b in zip(p_k, q_k, strict=True))
    return total / len(target)


def batch(images: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(3, images, CLASSES, generator=generator, dtype=torch.float64)).to(dtype)
    return *logits, torch.randint(CLASSES, (images,), generator=generator)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 2), (0, 2), (1, 0), (0.25, 0.5), (0, 0)])
def test_equals_the_formula(alpha, beta):
    p, q, r, target = batch()
    loss = PairwiseConsistencyLoss(alpha, beta)(p, q, r, target)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(written_out(p, q, r, target, alpha, beta), rel=1e-12)


def test_defaults_are_those_of_the_paper():
    p, q, r, target = batch(seed=1)
    assert PairwiseConsistencyLoss()(p, q, r, target).item() == pytest.approx(
        written_out(p, q, r, target, 1, 2), rel=1e-12
    )


def test_divergence_is_from_the_erased_prediction_to_the_original():
    # q holds nearly all its mass where p has half: KL(q || p) is near log 2, KL(p || q) near 4.3.
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -10.0]])
    target = torch.tensor([0])
    criterion = PairwiseConsistencyLoss(alpha=0, beta=1)
    divergence = criterion(p, q, p, target) - 2 * F.cross_entropy(p, target)
    assert divergence.item() == pytest.approx(log(2), abs=1e-3)


def test_equal_predictions_do_not_diverge():
    p, _, r, target = batch()
    shifted = p + 3.0  # the same softmax
    criterion = PairwiseConsistencyLoss(alpha=0, beta=100)
    expected = F.cross_entropy(p, target) + F.cross_entropy(r, target)
    assert criterion(p, shifted, r, target).item() == pytest.approx(expected.item(), rel=1e-12)


def test_gradcheck():
    p, q, r, target = batch(images=3)
    inputs = [x.requires_grad_() for x in (p, q, r)]
    assert torch.autograd.gradcheck(lambda *x: PairwiseConsistencyLoss()(*x, target), inputs)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradient_only_where_asked(wanted):
    p, q, r, target = batch()
    inputs = [x.requires_grad_(want) for x, want in zip((p, q, r), wanted, strict=True)]
    PairwiseConsistencyLoss()(*inputs, target).backward()
    for x, want in zip(inputs, wanted, strict=True):
        assert (x.grad is not None) == want
        assert not want or x.grad.abs().sum() > 0


def test_without_any_gradient():
    assert not PairwiseConsistencyLoss()(*batch()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_computed_in_float32(dtype):
    p, q, r, target = batch(dtype=dtype)
    inputs = [x.requires_grad_() for x in (p, q, r)]
    loss = PairwiseConsistencyLoss()(*inputs, target)
    exact = PairwiseConsistencyLoss()(*(x.detach().float() for x in inputs), target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, exact)
    loss.backward()
    assert all(x.grad.dtype == dtype for x in inputs)


def test_under_autocast():
    p, q, r, target = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = PairwiseConsistencyLoss()(p, q, r, target)
    assert torch.equal(inside, PairwiseConsistencyLoss()(p, q, r, target))


def test_logits_of_different_dtypes():
    p, q, r, target = batch(dtype=torch.float32)
    loss = PairwiseConsistencyLoss()(p, q.bfloat16(), r.double(), target)
    expected = written_out(p, q.bfloat16().double(), r, target, 1, 2)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_certain_predictions_stay_finite():
    # softmax underflows to exactly 0 in float32, where q log(q / p) would be 0 * -inf.
    p = torch.tensor([[0.0, 60000.0]], dtype=torch.float16, requires_grad=True)
    q = torch.tensor([[60000.0, 0.0]], dtype=torch.float16, requires_grad=True)
    r = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    loss = PairwiseConsistencyLoss()(p, q, r, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(log(2) + 60000 + 2 * 60000, rel=1e-6)
    assert all(x.grad.isfinite().all() for x in (p, q, r))


def test_int32_target():
    p, q, r, target = batch()
    criterion = PairwiseConsistencyLoss()
    assert torch.equal(criterion(p, q, r, target.int()), criterion(p, q, r, target))


def test_empty_batch():
    inputs = [torch.zeros(0, CLASSES, requires_grad=True) for _ in range(3)]
    loss = PairwiseConsistencyLoss()(*inputs, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert all(x.grad.shape == x.shape for x in inputs)


def test_inputs_are_not_written_to():
    inputs = batch()
    copies = [x.clone() for x in inputs]
    PairwiseConsistencyLoss()(*inputs)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def test_compiles_to_one_graph():
    p, q, r, target = batch(dtype=torch.float32)
    results = []
    criterion = PairwiseConsistencyLoss()
    for function in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in (p, q, r)]
        loss = function(*inputs, target)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in inputs)])
    torch.testing.assert_close(*results)


def test_repr_shows_the_options():
    assert (
        repr(PairwiseConsistencyLoss(0.5)) == "PairwiseConsistencyLoss(alpha=0.5, beta=2, ignore_index=-100)"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": "1"}, TypeError, "alpha is a str; it must be a number of at least 0"),
        ({"beta": True}, TypeError, "beta is a bool; it must be a number of at least 0"),
        (
            {"ignore_index": 1.0},
            TypeError,
            "ignore_index is a float; it must be an integer that fits into 64 bits",
        ),
        ({"alpha": -1}, ValueError, "alpha is -1.0; it must be a finite number of at least 0"),
        ({"beta": float("nan")}, ValueError, "beta is nan; it must be a finite number of at least 0"),
        ({"beta": float("inf")}, ValueError, "beta is inf; it must be a finite number of at least 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=f"^PairwiseConsistencyLoss: {re.escape(message)}$"):
        PairwiseConsistencyLoss(**options)


LOGITS = torch.zeros(2, CLASSES)
TARGET = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, [1.0], TypeError, "logits is a list; it must be a tensor [N, L]"),
        (0, TARGET, TypeError, "logits has dtype int64; allowed are float32, float16, bfloat16, float64"),
        (0, torch.zeros(2), ValueError, "logits has shape [2]; it must be [N, L]"),
        (0, torch.zeros(2, 0), ValueError, "logits has shape [2, 0]; L must be at least 1"),
        (1, None, TypeError, "erased_logits is a NoneType; it must be a tensor [N, L]"),
        (1, LOGITS[:1], ValueError, "erased_logits has shape [1, 5] and logits [2, 5]; they must be equal"),
        (2, LOGITS[:, 1:], ValueError, "side_logits has shape [2, 4] and logits [2, 5]; they must be equal"),
        (
            2,
            LOGITS.to("meta"),
            ValueError,
            "side_logits is on meta and logits on cpu; they must be on one device",
        ),
        (3, 0, TypeError, "target is a int; it must be a tensor [N]"),
        (3, LOGITS[:, 0], TypeError, "target has dtype float32; allowed are int64, int32"),
        (3, TARGET[None], ValueError, "target has shape [1, 2]; it must be [N]"),
        (3, TARGET[:1], ValueError, "target has 1 images and logits 2; they must be equal"),
        (3, TARGET.to("meta"), ValueError, "target is on meta and logits on cpu; they must be on one device"),
    ],
)
def test_bad_input(position, value, error, message):
    inputs = [LOGITS, LOGITS, LOGITS, TARGET]
    inputs[position] = value
    with pytest.raises(error, match=f"^PairwiseConsistencyLoss: {re.escape(message)}$"):
        PairwiseConsistencyLoss()(*inputs)


@pytest.mark.parametrize("ignored", [-100, 0, 255])
def test_an_ignored_image_is_as_if_left_out(ignored):
    *logits, target = batch()
    kept = torch.tensor([True, False, True, True, False, True])
    target[kept], target[~kept] = 1 + target[kept] % (CLASSES - 1), ignored
    criterion = PairwiseConsistencyLoss(0.5, 3, ignore_index=ignored)
    expected = criterion(*(x[kept] for x in logits), target[kept])
    for x, bad in zip(logits, (torch.nan, torch.inf, -torch.inf), strict=True):
        x[1], x[4, 2] = bad, torch.nan
    leaves = [x.requires_grad_() for x in logits]
    loss = criterion(*leaves, target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.item() == pytest.approx(
        written_out(*(x.detach()[kept] for x in logits), target[kept], 0.5, 3), rel=1e-12
    )
    for grad in torch.autograd.grad(loss, leaves):
        assert torch.equal(grad[~kept], torch.zeros_like(grad[~kept]))
        assert grad[kept].isfinite().all()


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_a_class_out_of_range_where_nobody_looks(label):
    # In a compiled graph, as on a GPU.
    compiled = torch.compile(PairwiseConsistencyLoss(alpha=0, beta=0), fullgraph=True, backend="aot_eager")
    assert compiled(LOGITS, LOGITS, LOGITS, torch.tensor([0, label])).isnan()


def test_a_class_ruled_out_by_an_infinite_logit_adds_nothing():
    p, q, r, target = batch()
    target[:] = 0
    for logits in (p, q):
        logits[:, -1] = -torch.inf
    leaves = [x.requires_grad_() for x in (p, q, r)]
    loss = PairwiseConsistencyLoss()(*leaves, target)
    grads = torch.autograd.grad(loss, leaves)
    p, q = (x.detach()[:, :-1] for x in (p, q))
    p, q = (torch.cat([x, torch.full((len(x), 1), -1e4)], 1) for x in (p, q))  # as good as ruled out
    assert loss.item() == pytest.approx(PairwiseConsistencyLoss()(p, q, r, target).item())
    assert all(grad.isfinite().all() for grad in grads)
