"""Two processes against one with the whole batch: losses, centres, and the gradients that DDP averages."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_as_close_as
from distributed_worker import DIM, PAIRINGS, RANKS, SEEDS, everything, global_criterion

from camkernels import _backend
from camkernels.losses import StochasticConsistencyLoss

pytestmark = pytest.mark.xdist_group("distributed")  # the processes start once

SECONDS = 240  # some ten times what the processes need
WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    try:
        for rank in range(RANKS):
            command = [sys.executable, WORKER, str(rank), folder, _backend.setting()]
            with open(folder / f"{rank}.log", "w") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * RANKS, "\n".join((folder / f"{rank}.log").read_text() for rank in range(RANKS))
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    return everything(None)


CASES = [
    *(("global", preset) for preset in ("paper", "official")),
    *(("stochastic", name) for name in PAIRINGS),
    ("inside", "paper"),
]


@pytest.mark.parametrize(("loss", "name"), CASES)
@pytest.mark.parametrize("rank", range(RANKS))
def test_equals_one_process(ranks, alone, loss, name, rank):
    ours, exact = (ranks[rank][0][loss, name, dtype] for dtype in (torch.float32, torch.float64))
    theirs, truth = (alone[loss, name, dtype] for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(exact, truth, rtol=1e-12, atol=1e-13)
    for kind in ("losses", "grads"):
        for step, wanted in enumerate(truth[kind]):
            what = f"{kind} of step {step}"
            assert_as_close_as(ours[kind][step], theirs[kind][step], wanted, what=what)
    for step, wanted in enumerate(truth["states"]):
        for key, value in wanted.items():
            found = ours["states"][step][key]
            if key == "counters":
                assert torch.equal(found, value), f"step {step}"
            else:
                assert_as_close_as(found, theirs["states"][step][key], value, what=f"{key} of step {step}")
    assert_as_close_as(ours["parameter"], theirs["parameter"], truth["parameter"])


@pytest.mark.parametrize(("loss", "name"), CASES)
def test_ranks_agree_to_the_bit(ranks, loss, name):
    first, second = (found[loss, name, torch.float32] for found, _ in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_last_steps_are_empty(alone):
    """Or the comparison above would not have seen them."""
    for loss in ("global", "stochastic"):
        found = alone[loss, "paper", torch.float32]
        assert found["losses"][0] > 0
        assert found["losses"][-1] == 0
        assert not found["grads"][-1].any()
    assert alone["global", "paper", torch.float32]["states"][-1]["counters"].tolist() == [4, 3, 2, 2, 0, 0]


@pytest.mark.parametrize("loss", ["global", "stochastic"])
@pytest.mark.parametrize("rank", range(RANKS))
def test_compiled(ranks, alone, loss, rank):
    torch.testing.assert_close(
        ranks[rank][0]["compiled", loss, torch.float32], alone["compiled", loss, torch.float32]
    )


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("unequal images", "[3, 2, 4] float32, [2, 2, 4] float32"),
        ("unequal seeds", "[3, 2, 4] float32, [3, 3, 4] float32"),
        ("unequal dtypes", "[3, 2, 4] float32, [3, 2, 4] float64"),
    ],
)
def test_unequal_vectors_raise_on_every_rank(ranks, kind, shapes):
    expected = (
        f"StochasticConsistencyLoss: vectors is {shapes} on the ranks; with gather=True shapes and dtypes "
        "must be equal (the last batch of a DataLoader? drop_last=True)"
    )
    assert [found[kind] for _, found in ranks] == [expected] * RANKS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_vectors_are_gathered(ranks, dtype):
    parts = [found["half", dtype] for _, found in ranks]
    vectors, target = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    vectors.requires_grad_()
    loss = StochasticConsistencyLoss()(vectors, target)
    loss.backward()
    grads = torch.cat([part[3] for part in parts])
    assert grads.dtype == dtype
    assert all(torch.equal(part[2], loss.detach()) for part in parts)
    torch.testing.assert_close(grads, RANKS * vectors.grad, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_nan_of_one_rank_moves_no_centre_of_any(ranks):
    before = global_criterion(torch.float32).centres
    for _, found in ranks:
        assert found["nan loss"].isnan()
        assert found["nan state"]["counters"].tolist() == [0, 0, 1, 0, 0, 0]
        assert torch.equal(found["nan state"]["centres"][1], before[1])
        assert torch.equal(found["nan state"]["centres"][2], torch.ones(DIM))


def test_evaluation_sees_all_ranks_and_changes_nothing(ranks):
    fresh = global_criterion(torch.float32).eval()
    expected = fresh(torch.tensor([0.0, 1.0])[:, None, None].expand(2, SEEDS, DIM), torch.tensor([0, 0]))
    for _, found in ranks:
        torch.testing.assert_close(found["evaluation loss"], expected)
        assert torch.equal(found["evaluation state"]["centres"], fresh.centres)
        assert not found["evaluation state"]["counters"].any()


def test_a_group_of_one_is_alone(ranks):
    for rank, (_, found) in enumerate(ranks):
        assert torch.equal(found["group of one, global"][0], torch.full((DIM,), float(rank)))
        assert found["group of one, stochastic"].item() == 4 * (1 + rank) ** 2


def test_collectives_are_of_the_group_given(ranks):
    assert all(found["groups"] for _, found in ranks)


@pytest.mark.parametrize("loss", ["global", "stochastic"])
def test_double_backward_raises(ranks, loss):
    for _, found in ranks:
        assert "differentiate twice" in found["twice", loss]
