"""GlobalConsistencyLoss against I2C eq. 2-5 in loops, and its state, in one process."""

import copy
import re
from math import exp, inf, nan

import pytest
import torch
import torch.distributed as dist
from cases import DEVICE, GPU
from closeness import assert_as_close_as
from torch import Tensor

from camkernels import CamSeeds
from camkernels.losses import GlobalConsistencyLoss, _distributed

CLASSES, SEEDS, DIM, DECAY = 5, 3, 7, 0.1
# Class 0 several times in one batch and in all of them, 4 in none, 2 in the last one for the first time.
TARGETS = ([0, 1, 0, 0, 3, 1], [0, 3, 3, 0, 0, 1], [1, 0, 1, 1, 0, 0], [2, 2, 0, 1, 3, 2])
PRESETS = ["paper", "official"]


def criterion(preset: str = "paper", classes: int = CLASSES, dim: int = DIM) -> GlobalConsistencyLoss:
    return GlobalConsistencyLoss(classes, dim, decay=DECAY, preset=preset)


def batch(step: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    target = torch.tensor(TARGETS[step])
    vectors = torch.randn(len(target), SEEDS, DIM, generator=generator, dtype=torch.float64)
    return (vectors + target[:, None, None]).to(dtype), target


class WrittenOut:
    """Eq. 2-5, class after class."""

    def __init__(self, centres: Tensor, preset: str) -> None:
        self.centres = list(centres.clone())
        self.steps = [0] * len(self.centres)
        self.preset = preset

    def __call__(self, vectors: Tensor, target: Tensor) -> Tensor:
        distances = []
        for y in sorted(set(target.tolist())):
            seeds = [vectors[i, k] for i in range(len(target)) if target[i] == y for k in range(SEEDS)]
            mean = sum(seeds) / len(seeds)
            square = ((mean - self.centres[y]) ** 2).sum()
            distances.append(square if self.preset == "paper" else square.sqrt())
            rate = exp(-DECAY * self.steps[y])
            self.centres[y] = (1 - rate) * self.centres[y] + rate * mean.detach()
            self.steps[y] += 1
        return sum(distances) / len(distances)


def run(loss, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Losses and gradients of every step."""
    losses, grads = [], []
    for step in range(len(TARGETS)):
        vectors, target = (x.to(device) for x in batch(step, dtype))
        value = loss(vectors.requires_grad_(), target)
        value.backward()
        losses.append(value.detach().cpu())
        grads.append(vectors.grad.cpu())
    return losses, grads


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_equations(preset):
    ours = criterion(preset).double()
    truth = WrittenOut(ours.centres, preset)
    untouched = ours.centres[4].clone()
    torch.testing.assert_close(run(ours), run(truth), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.centres, torch.stack(truth.centres), rtol=1e-12, atol=1e-13)
    assert ours.counters.tolist() == truth.steps == [4, 4, 1, 3, 0]
    assert torch.equal(ours.centres[4], untouched)


@pytest.mark.parametrize("device", ["cpu", "cuda"] if GPU else ["cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_as_exact_as_pytorch(preset, dtype, device):
    ours = criterion(preset).to(device)
    theirs, truth = (
        WrittenOut(ours.centres.cpu().to(wide), preset) for wide in (torch.float32, torch.float64)
    )
    losses, grads = run(ours, dtype, device)
    their_losses, their_grads = run(lambda vectors, target: theirs(vectors.float(), target), dtype)
    for step in range(len(TARGETS)):
        vectors, target = batch(step, dtype)
        wide = vectors.double().requires_grad_()  # a gradient of its own, not rounded to the dtype
        true_loss = truth(wide, target)
        true_loss.backward()
        assert losses[step].dtype == torch.float32
        assert grads[step].dtype == dtype
        assert_as_close_as(losses[step], their_losses[step], true_loss)
        assert_as_close_as(grads[step], their_grads[step], wide.grad)
    assert_as_close_as(ours.centres.cpu(), torch.stack(theirs.centres), torch.stack(truth.centres))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_both_kinds_of_index(kind):
    vectors, target = batch()
    assert torch.equal(criterion()(vectors, target.to(kind)), criterion()(vectors, target))


def test_the_loss_uses_the_centres_as_they_were():
    loss = criterion("official")
    before = loss.centres.clone()
    vectors, _ = batch(dtype=torch.float32)
    value = loss(vectors[:1], torch.tensor([2]))
    mean = vectors[0].mean(0)
    assert value.item() == pytest.approx((mean - before[2]).norm().item(), rel=1e-6)
    assert loss(vectors[:1], torch.tensor([2])).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("start", [0.5, nan, inf])
def test_the_first_visit_overwrites(start):
    loss = criterion()
    loss.centres.fill_(start)
    vectors, _ = batch(dtype=torch.float32)
    one = vectors[:1, :1]
    loss(one, torch.tensor([1]))
    assert torch.equal(loss.centres[1], one[0, 0])
    loss(one, torch.tensor([1]))
    torch.testing.assert_close(loss.centres[1], one[0, 0])
    assert loss.counters.tolist() == [0, 2, 0, 0, 0]


@pytest.mark.parametrize("start", [nan, inf])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_absent_class_may_have_any_centre(preset, start):
    loss = criterion(preset)
    loss.centres[4] = start
    vectors, target = batch(dtype=torch.float32)
    value = loss(vectors.requires_grad_(), target)
    value.backward()
    assert torch.equal(value, criterion(preset)(vectors, target))
    assert vectors.grad.isfinite().all()
    assert [str(x) for x in loss.centres[4].tolist()] == [str(start)] * DIM


def test_each_class_has_its_own_rate():
    loss = GlobalConsistencyLoss(2, 1, decay=0.5)
    zero, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    loss(zero, torch.tensor([0]))
    expected = 0.0
    for step in range(1, 4):
        loss(one, torch.tensor([0]))
        expected = (1 - exp(-0.5 * step)) * expected + exp(-0.5 * step)
        assert loss.centres[0].item() == pytest.approx(expected, rel=1e-6)
    loss(zero, torch.tensor([1]))
    loss(one, torch.tensor([1]))
    assert loss.centres[1].item() == pytest.approx(exp(-0.5), rel=1e-6)


def test_a_rate_close_to_one_keeps_its_digits():
    # In float32, 1 - exp(-1e-7) is 1.19e-7, a fifth too much.
    loss = GlobalConsistencyLoss(1, 1, decay=1e-7)
    loss(torch.full((1, 1, 1), 1e7), torch.tensor([0]))
    loss(torch.zeros(1, 1, 1), torch.tensor([0]))
    assert loss.centres.item() == pytest.approx(1, rel=1e-6)


def test_images_of_one_class_are_averaged():
    loss = criterion()
    vectors, _ = batch(dtype=torch.float32)
    loss(vectors, torch.full((6,), 3))
    torch.testing.assert_close(loss.centres[3], vectors.mean((0, 1)))
    assert loss.counters.tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("preset", PRESETS)
def test_gradcheck(preset):
    loss = criterion(preset).double().eval()
    vectors, target = batch()
    assert torch.autograd.gradcheck(lambda x: loss(x, target), vectors.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: loss(x, target), vectors)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_gradient_at_distance_0_is_0(preset):
    loss = criterion(preset)
    loss.centres.round_()  # whole numbers, whose mean is exact
    vectors = loss.centres[2].repeat(2, SEEDS, 1).requires_grad_()
    value = loss(vectors, torch.tensor([2, 2]))
    value.backward()
    assert value.item() == 0
    assert torch.equal(vectors.grad, torch.zeros_like(vectors))


def test_no_gradient_reaches_the_state():
    loss = criterion()
    vectors, target = batch(dtype=torch.float32)
    loss(vectors.requires_grad_(), target).backward()
    assert not loss.centres.requires_grad
    assert list(loss.parameters()) == []
    loss(vectors, target).backward()  # would need the first step's graph if the centres were part of it


def test_both_forwards_before_both_backwards():
    losses, grads = [], []
    for order in ("alternating", "forwards first"):
        loss = criterion()
        leaves = [batch(step, torch.float32)[0].requires_grad_() for step in (0, 1)]
        values = []
        for step, leaf in enumerate(leaves):
            values.append(loss(leaf, batch(step)[1]))
            if order == "alternating":
                values[-1].backward()
        if order == "forwards first":
            sum(values).backward()
        losses.append([value.detach() for value in values])
        grads.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *losses))
    assert all(map(torch.equal, *grads))


def test_evaluation_changes_nothing():
    loss = criterion()
    vectors, target = batch(dtype=torch.float32)
    in_training = loss(vectors, target)
    loss = criterion().eval()
    before = copy.deepcopy(loss.state_dict())
    assert torch.equal(loss(vectors, target), in_training)
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_centres_move_without_grad_mode():
    vectors, target = batch(dtype=torch.float32)
    with_grad, without = criterion(), criterion()
    with_grad(vectors, target)
    with torch.no_grad():
        without(vectors, target)
    assert torch.equal(without.centres, with_grad.centres)
    assert torch.equal(without.counters, with_grad.counters)


def test_empty_batch():
    loss = criterion()
    before = copy.deepcopy(loss.state_dict())
    vectors = torch.zeros(0, SEEDS, DIM, requires_grad=True)
    value = loss(vectors, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert vectors.grad.shape == vectors.shape
    assert all(torch.equal(before[name], state) for name, state in loss.state_dict().items())


@pytest.mark.parametrize("wrong", [nan, inf, -inf])
def test_a_mean_that_is_not_finite_moves_nothing(wrong):
    loss = criterion()
    before = loss.centres.clone()
    vectors, target = batch(dtype=torch.float32)
    vectors[4, 1, 2] = wrong  # the only image of class 3
    value = loss(vectors, target)
    assert not value.isfinite()
    assert loss.counters.tolist() == [1, 1, 0, 0, 0]
    assert torch.equal(loss.centres[3], before[3])
    healthy = criterion()
    healthy(*batch(dtype=torch.float32))
    assert torch.equal(loss.centres[:2], healthy.centres[:2])


def test_a_mean_beyond_the_type_of_the_centres_moves_nothing():
    loss = criterion().half()
    before = loss.centres.clone()
    value = loss(torch.full((1, SEEDS, DIM), 1e5), torch.tensor([0]))
    assert value.isfinite()
    assert torch.equal(loss.centres, before)
    assert loss.counters.tolist() == [0] * CLASSES


def test_strided_vectors():
    vectors, target = batch(dtype=torch.float32)
    expected = criterion()(vectors, target)
    assert torch.equal(criterion()(vectors.transpose(1, 2).contiguous().transpose(1, 2), target), expected)
    leaf = torch.ones(1, 1, DIM, requires_grad=True)
    criterion()(leaf.expand(6, SEEDS, DIM), target).backward()
    dense = torch.ones(6, SEEDS, DIM, requires_grad=True)
    criterion()(dense, target).backward()
    torch.testing.assert_close(leaf.grad, dense.grad.sum((0, 1), keepdim=True))


def test_any_number_of_seeds():
    vectors, target = batch(dtype=torch.float32)
    once, twice = criterion(), criterion()
    torch.testing.assert_close(once(vectors, target), twice(torch.cat([vectors, vectors], 1), target))
    torch.testing.assert_close(once.centres, twice.centres)


def test_under_autocast():
    vectors, target = batch(dtype=torch.float32)
    inside, outside = criterion(), criterion()
    with torch.autocast("cpu", torch.bfloat16):
        value = inside(vectors, target)
    assert torch.equal(value, outside(vectors, target))
    assert torch.equal(inside.centres, outside.centres)


def test_float64_vectors_and_float32_centres():
    loss = criterion()
    value = loss(*batch())
    assert value.dtype == torch.float64
    assert loss.centres.dtype == torch.float32
    expected = WrittenOut(criterion().centres.double(), "paper")(*batch())
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_float32_vectors_and_float64_centres():
    loss = criterion().double()
    vectors, target = batch(dtype=torch.float32)
    expected = WrittenOut(loss.centres, "paper")(vectors.double(), target)
    value = loss(vectors, target)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("preset", "compiler"), [("paper", "aot_eager"), ("official", "aot_eager"), ("paper", "inductor")]
)
def test_compiles_to_one_graph_with_its_state(preset, compiler):
    results = []
    for compiled in (False, True):
        loss = criterion(preset)
        function = torch.compile(loss, fullgraph=True, backend=compiler) if compiled else loss
        results.append([*run(function, torch.float32), loss.centres, loss.counters])
    torch.testing.assert_close(*results)


def test_the_snapshot_of_compiled_graphs_passes_opcheck():
    torch.library.opcheck(torch.ops.camkernels.snapshot.default, (torch.randn(3, 4),))


@pytest.mark.parametrize("index", [-1, CLASSES])
def test_a_class_out_of_range(index):
    vectors, target = batch(dtype=torch.float32)
    target[1] = index
    message = f"target holds class {index}; num_classes is {CLASSES}, so it must be in [0, {CLASSES})"
    with pytest.raises(IndexError, match=f"^GlobalConsistencyLoss: {re.escape(message)}$"):
        criterion()(vectors, target)


@pytest.mark.parametrize("index", [-1, CLASSES])
def test_a_class_out_of_range_where_nobody_looks(index):
    # In a compiled graph, as on a GPU.
    loss = criterion()
    before = loss.centres.clone()
    vectors, _ = batch(dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value = compiled(vectors, torch.tensor([2, index, 2, 2, 2, 2]))
    assert value.isnan()
    assert loss.counters.tolist() == [0, 0, 1, 0, 0]
    others = [0, 1, 3, 4]
    assert torch.equal(loss.centres[others], before[others])


def test_nothing_depends_on_values():
    with torch.device("meta"):
        loss = criterion()
    assert loss.centres.is_meta
    assert loss.counters.is_meta
    vectors, target = batch(dtype=torch.float16)
    value = loss(vectors.to("meta").requires_grad_(), target.to("meta"))
    value.backward()
    assert value.shape == ()
    assert value.dtype == torch.float32


def test_deterministic_algorithms():
    # On a GPU index_add has a deterministic kernel, which this asks for.
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(criterion().to(DEVICE), torch.float32, DEVICE) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.skipif(not GPU, reason="synchronisation with a GPU needs one")
def test_no_synchronisation():
    loss = criterion().to(DEVICE)
    vectors, target = (x.to(DEVICE) for x in batch(dtype=torch.float32))
    vectors.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(vectors, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU, reason="nccl needs a GPU")
def test_collectives_by_nccl(tmp_path):
    """One process is all that one GPU can hold: the collectives are called, and give what was there."""
    dist.init_process_group("nccl", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    try:
        values = torch.randn(3, 4, device=DEVICE, requires_grad=True)
        for collective in (_distributed._AllReduce, _distributed._AllGather):
            result = collective.apply(values, None)
            assert torch.equal(result, values)
            (grad,) = torch.autograd.grad(result.square().sum(), values)
            torch.testing.assert_close(grad, 2 * values)
    finally:
        dist.destroy_process_group()


def test_centres_begin_alike_and_leave_the_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = GlobalConsistencyLoss(50, 200)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.centres, GlobalConsistencyLoss(50, 200).centres)
    assert first.centres.dtype == torch.float32
    # 10,000 standard normal numbers: six standard errors of mean and variance.
    assert abs(first.centres.mean().item()) < 0.06
    assert abs(first.centres.var().item() - 1) < 0.085
    assert torch.equal(first.counters, torch.zeros(50, dtype=torch.int64))


def test_state_dict_round_trip():
    loss, other = criterion(), criterion()
    for step in (0, 1):
        loss(*batch(step, torch.float32))
    saved = copy.deepcopy(loss.state_dict())
    assert list(saved) == ["centres", "counters"]
    other.load_state_dict(saved, strict=True)
    assert torch.equal(loss(*batch(2, torch.float32)), other(*batch(2, torch.float32)))
    assert torch.equal(loss.centres, other.centres)
    assert torch.equal(loss.counters, other.counters)
    with pytest.raises(RuntimeError, match="size mismatch for centres"):
        criterion(classes=CLASSES + 1).load_state_dict(saved)


def test_a_copy_has_its_own_state():
    loss = criterion()
    twin = copy.deepcopy(loss)
    loss(*batch(dtype=torch.float32))
    assert twin.counters.tolist() == [0] * CLASSES
    assert torch.equal(twin(*batch(dtype=torch.float32)), criterion()(*batch(dtype=torch.float32)))


def test_casts_leave_the_counters():
    loss = criterion()
    loss.counters.fill_(2**24 + 1)  # beyond the integers of float32, and far beyond those of float16
    for cast in (loss.half, loss.bfloat16, loss.double):
        cast()
        assert loss.counters.dtype == torch.int64
        assert loss.counters.tolist() == [2**24 + 1] * CLASSES
    assert loss.centres.dtype == torch.float64
    loss = criterion().half()
    value = loss(*batch(dtype=torch.float16))
    assert value.dtype == torch.float32
    assert loss.centres.dtype == torch.float16


def test_repr_shows_the_options():
    assert repr(criterion("official")) == (
        "GlobalConsistencyLoss(num_classes=5, dim=7, decay=0.1, preset='official')"
    )
    assert GlobalConsistencyLoss(5, 7).decay == 0.002


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"num_classes": 2.0},
            TypeError,
            "num_classes is a float; it must be an integer of at least 1",
        ),
        ({"num_classes": True}, TypeError, "num_classes is a bool; it must be an integer of at least 1"),
        ({"num_classes": 0}, ValueError, "num_classes is 0; it must be an integer of at least 1"),
        ({"dim": "7"}, TypeError, "dim is a str; it must be an integer of at least 1"),
        ({"dim": -1}, ValueError, "dim is -1; it must be an integer of at least 1"),
        ({"decay": None}, TypeError, "decay is a NoneType; it must be a number in (0, 1)"),
        ({"decay": 0}, ValueError, "decay is 0.0; it must be a number in (0, 1)"),
        ({"decay": 1.0}, ValueError, "decay is 1.0; it must be a number in (0, 1)"),
        ({"decay": nan}, ValueError, "decay is nan; it must be a number in (0, 1)"),
        ({"preset": "released"}, ValueError, "preset is 'released'; allowed are paper, official"),
        ({"preset": 1}, TypeError, "preset is a int; allowed are paper, official"),
        (
            {"process_group": "gloo"},
            TypeError,
            "process_group is a str; it must be a ProcessGroup, or None for the default group",
        ),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=f"^GlobalConsistencyLoss: {re.escape(message)}$"):
        GlobalConsistencyLoss(**{"num_classes": CLASSES, "dim": DIM, **options})


V, T = torch.zeros(2, SEEDS, DIM), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, [1.0], TypeError, "vectors is a list; it must be a tensor [N, K, D]"),
        (
            0,
            CamSeeds(*4 * [torch.zeros(1)]),
            TypeError,
            "vectors is a CamSeeds; it must be a tensor [N, K, D]: pass its .vectors",
        ),
        (0, V.int(), TypeError, "vectors has dtype int32; allowed are float32, float16, bfloat16, float64"),
        (0, V[0], ValueError, "vectors has shape [3, 7]; it must be [N, K, D]"),
        (
            0,
            V[:, :0],
            ValueError,
            "vectors has shape [2, 0, 7]; K and D must be at least 1 (N may be 0)",
        ),
        (
            0,
            V[..., 1:],
            ValueError,
            "vectors has shape [2, 3, 6]; it must be [N, K, D] with D = dim = 7",
        ),
        (0, V.to("meta"), ValueError, "vectors is on meta and centres on cpu; they must be on one device"),
        (1, [0, 0], TypeError, "target is a list; it must be a tensor [N]"),
        (1, T.float(), TypeError, "target has dtype float32; allowed are int64, int32"),
        (1, T[:, None], ValueError, "target has shape [2, 1]; it must be [N]"),
        (1, T[:1], ValueError, "target has 1 images and vectors 2; they must be equal"),
        (1, T.to("meta"), ValueError, "target is on meta and vectors on cpu; they must be on one device"),
    ],
)
def test_bad_input(position, value, error, message):
    inputs = [V, T]
    inputs[position] = value
    with pytest.raises(error, match=f"^GlobalConsistencyLoss: {re.escape(message)}$"):
        criterion()(*inputs)
