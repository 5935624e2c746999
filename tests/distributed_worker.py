"""One of the processes of test_distributed.py, and what it does, which the test does alone for comparison."""

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import camkernels
from camkernels.losses import GlobalConsistencyLoss, StochasticConsistencyLoss

RANKS = 2
CLASSES, SEEDS, DIM, INPUTS = 6, 2, 5, 4
# The classes of every step, rank by rank: on both ranks, on one only, several times, of one image only; a
# batch of one rank and at last of both may be empty. Class 5 never comes.
UNEVEN = (([0, 0, 1, 2], [0, 3, 3]), ([0, 1], [2, 2, 2, 0]), ([], [3, 0]), ([1, 1, 0], []), ([], []))
EVEN = (([0, 1, 0], [1, 0, 2]), ([0, 0, 2], [2, 2, 1]), ([0, 1, 2], [3, 4, 5]), ([], []))
PAIRINGS = {
    "paper": {},
    "official": {"preset": "official"},
    "all plain": {"squared": False},
    "adjacent squared": {"pairs": "adjacent"},
}


def batches(split: Sequence[Any], rank: int | None, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Those of one rank; of all of them where there is none."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for step in split:
        parts = []
        for classes in step:
            target = torch.tensor(classes, dtype=torch.int64)
            inputs = torch.randn(len(classes), INPUTS, generator=generator, dtype=torch.float64)
            parts.append(((inputs + target[:, None]).to(dtype), target))
        inputs, targets = zip(*(parts if rank is None else parts[rank : rank + 1]), strict=True)
        result.append((torch.cat(inputs), torch.cat(targets)))
    return result


class Network(nn.Module):
    """Seed vectors of inputs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(SEEDS * DIM, INPUTS, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight.to(dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs @ self.weight.T).view(-1, SEEDS, DIM)


class WithLoss(nn.Module):
    """A network that holds its criterion, whose buffers DDP then broadcasts."""

    def __init__(self, network: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.network(inputs), target)


def train(
    criterion: nn.Module,
    split: Sequence[Any],
    rank: int | None,
    dtype: torch.dtype,
    *,
    inside: bool = False,
    compiler: str | None = None,
) -> dict[str, Any]:
    """Losses, gradients and the criterion's state, step by step; ``rank`` None is one process for all."""
    network = Network(dtype)
    parameter = network.weight
    compute: Callable[..., Tensor] = criterion
    if compiler is not None:
        compute = torch.compile(criterion, fullgraph=True, backend=compiler)
    if inside:
        model: nn.Module = WithLoss(network, criterion)
        step_of = model if rank is None else DistributedDataParallel(model)
    else:
        network_of = network if rank is None else DistributedDataParallel(network)

        def step_of(inputs: Tensor, target: Tensor) -> Tensor:
            return compute(network_of(inputs), target)

    losses, grads, states = [], [], []
    for inputs, target in batches(split, rank, dtype):
        parameter.grad = None
        loss = step_of(inputs, target)
        loss.backward()
        with torch.no_grad():
            parameter -= 0.01 * parameter.grad
        losses.append(loss.detach())
        grads.append(parameter.grad.clone())
        states.append({name: value.clone() for name, value in criterion.state_dict().items()})
    return {"losses": losses, "grads": grads, "states": states, "parameter": parameter.detach().clone()}


def global_criterion(dtype: torch.dtype, preset: str = "paper", group: Any = None) -> GlobalConsistencyLoss:
    criterion = GlobalConsistencyLoss(CLASSES, DIM, decay=0.1, preset=preset, process_group=group)
    return criterion.double() if dtype == torch.float64 else criterion


def everything(rank: int | None) -> dict[str, Any]:
    """What must come out alike of one process and of several."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        for preset in ("paper", "official"):
            criterion = global_criterion(dtype, preset)
            found["global", preset, dtype] = train(criterion, UNEVEN, rank, dtype)
        for name, options in PAIRINGS.items():
            criterion = StochasticConsistencyLoss(gather=True, **options)
            found["stochastic", name, dtype] = train(criterion, EVEN, rank, dtype)
        found["inside", "paper", dtype] = train(global_criterion(dtype), UNEVEN, rank, dtype, inside=True)
    for name, criterion, split in (
        ("global", global_criterion(torch.float32), UNEVEN[:1]),
        ("stochastic", StochasticConsistencyLoss(gather=True), EVEN[:1]),
    ):
        compiler = None if rank is None else "aot_eager_decomp_partition"
        found["compiled", name, torch.float32] = train(
            criterion, split, rank, torch.float32, compiler=compiler
        )
    return found


def message(function: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    try:
        function()
    except kind as error:
        return str(error)
    return "no error"


def twice(loss: Tensor, vectors: Tensor) -> None:
    (grad,) = torch.autograd.grad(loss, vectors, create_graph=True)
    grad.sum().backward()


def groups_of_collectives(group: Any) -> list[Any]:
    """The group that each collective of the two losses was called for."""
    called = []
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def noting(name: str) -> Callable[..., Any]:
        def collective(*args: Any, group: Any = None) -> Any:
            called.append(group)
            return plain[name](*args, group=group)

        return collective

    try:
        for name in plain:
            setattr(dist, name, noting(name))
        vectors, target = torch.ones(1, SEEDS, DIM), torch.tensor([0])
        global_criterion(torch.float32, group=group)(vectors, target)
        StochasticConsistencyLoss(gather=True, process_group=group)(vectors, target)
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
    return called


def of_ranks(rank: int) -> dict[str, Any]:
    """What only several processes can show."""
    found: dict[str, Any] = {}
    gather = StochasticConsistencyLoss(gather=True)

    images, seeds = 3 - rank, 2 + rank
    target = torch.zeros(3, dtype=torch.int64)
    found["unequal images"] = message(lambda: gather(torch.zeros(images, 2, 4), target[:images]))
    found["unequal seeds"] = message(lambda: gather(torch.zeros(3, seeds, 4), target))
    dtype = (torch.float32, torch.float64)[rank]
    found["unequal dtypes"] = message(lambda: gather(torch.zeros(3, 2, 4, dtype=dtype), target))

    for dtype in (torch.float16, torch.bfloat16):
        inputs, target = batches(EVEN, rank, torch.float32)[0]
        vectors = Network(torch.float32)(inputs).detach().to(dtype).requires_grad_()
        loss = gather(vectors, target.int() if rank == 0 else target)
        loss.backward()
        found["half", dtype] = (vectors.detach(), target, loss.detach(), vectors.grad)

    criterion = global_criterion(torch.float32)
    vectors = torch.ones(2, SEEDS, DIM)
    if rank == 0:
        vectors[0] = torch.nan
    found["nan loss"] = criterion(vectors, torch.tensor([1, 2]))
    found["nan state"] = criterion.state_dict()

    criterion = global_criterion(torch.float32).eval()
    found["evaluation loss"] = criterion(torch.full((1, SEEDS, DIM), float(rank)), torch.tensor([0]))
    found["evaluation state"] = criterion.state_dict()

    pair = dist.new_group(range(RANKS))
    found["groups"] = groups_of_collectives(pair) == [pair] * 4

    vectors = torch.ones(1, SEEDS, DIM, requires_grad=True)
    for name, criterion in (("global", global_criterion(torch.float64)), ("stochastic", gather)):
        wide = vectors.double()
        loss = criterion(wide + rank, torch.tensor([0]))
        found["twice", name] = message(lambda: twice(loss, wide), RuntimeError)  # noqa: B023

    groups = [dist.new_group([member]) for member in range(RANKS)]
    vectors, target = torch.full((1, SEEDS, DIM), float(rank)), torch.tensor([0])
    criterion = global_criterion(torch.float32, group=groups[rank])
    criterion(vectors, target)
    found["group of one, global"] = criterion.centres
    images = torch.tensor([0.0, 1.0 + rank])[:, None, None].expand(2, 1, 4)
    alone = StochasticConsistencyLoss(gather=True, process_group=groups[rank])
    found["group of one, stochastic"] = alone(images, torch.tensor([0, 0]))
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = (folder / "rendezvous").as_uri()
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    try:
        torch.save((everything(rank), of_ranks(rank)), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    with camkernels.use_backend(sys.argv[3]):
        main(int(sys.argv[1]), Path(sys.argv[2]))
