"""Runs one row of ``workloads.json``: every provider checked, then all of them timed in turns."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import measure
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from schema import Row
from torch import Tensor

from camkernels import _backend, _op

WORKLOADS = Path(__file__).with_name("workloads.json")
DIRECTIONS = ("forward", "forward+backward")
WorkloadRow = Mapping[str, Any]  # of workloads.json
Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensor | Tensors]
WARM_UP = 3  # calls; a CUDA graph is recorded by the second
MIN_ROUNDS, MAX_ROUNDS = 7, 60


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, all of them fresh and random."""

    args: Tensors
    options: Mapping[str, Any]
    differentiable: tuple[int, ...]  # which of the arguments take a gradient
    grads: tuple[Tensor | None, ...]  # of the outputs; None where one has no gradient

    def double(self) -> "Inputs":
        def widen(tensor: Tensor) -> Tensor:
            wide = tensor.detach().double() if tensor.is_floating_point() else tensor
            return wide.requires_grad_(tensor.requires_grad)

        args = tuple(widen(tensor) for tensor in self.args)
        grads = tuple(None if grad is None else widen(grad) for grad in self.grads)
        return Inputs(args, self.options, self.differentiable, grads)

    def tensors(self) -> Tensors:
        return self.args + tuple(grad for grad in self.grads if grad is not None)


@dataclass(frozen=True)
class Op:
    """What a ``bench_<op>.py`` says about its op."""

    name: str
    variants: Callable[[WorkloadRow], tuple[str, ...]]  # of a row
    tiny: Callable[[str], WorkloadRow]  # for a variant, a row whose arithmetic takes no time
    reference: Function  # the definition; in float64 it is the truth
    eager: Function  # in plain PyTorch as a user would write it; the reference, where it is written so
    fused: Function  # the op of camkernels
    make: Callable[[WorkloadRow, str, torch.dtype, torch.Generator], Inputs]
    cost: Callable[[WorkloadRow, str, torch.dtype, str], measure.Cost]  # of "forward", of "backward" alone
    # Raises AssertionError where results (outputs, then gradients) are wronger than they may be, given
    # (inputs, results, those of eager, those in float64).
    check: Callable[[Inputs, Tensors, Tensors, Tensors], None]
    # What backward may keep besides inputs and outputs: added to what memory is judged by.
    kept_bytes: Callable[[WorkloadRow], int] = lambda row: 0
    # Other ways to the same that users take, by name, for a row and variant where they fit. Nothing is judged
    # against them: the code that came with the paper ("released"), a careful user's ("gathered").
    others: Callable[[WorkloadRow, str], Mapping[str, Function]] = lambda row, variant: {}
    directions: tuple[str, ...] = DIRECTIONS

    @property
    def backends(self) -> tuple[str, ...]:
        """Those that have kernels for it."""
        return next(op.backends for op in _op.OPS.values() if op.function == self.name)


def workload_rows(op: str, selection: str) -> list[dict[str, Any]]:
    rows = json.loads(WORKLOADS.read_text())[op]
    return [row for row in rows if selection == "all" or row["id"].startswith("smoke")]


def assert_as_close_as(
    name: str, ours: Tensor, eager: Tensor, truth: Tensor, factor: float = 4.0, ulps: float = 4.0
) -> None:
    """At most ``factor`` times as far from the truth as eager PyTorch, plus ``ulps`` of the largest value."""
    allowed = factor * _distance(eager, truth) + ulps * torch.finfo(ours.dtype).eps * truth.abs().max().item()
    distance = _distance(ours, truth)
    assert distance <= allowed, f"{name} is {distance:.3g} from the float64 truth; {allowed:.3g} is allowed"


def as_close_as_eager(*names: str) -> Callable[[Inputs, Tensors, Tensors, Tensors], None]:
    """An ``Op.check`` of results that have these names, outputs and then gradients."""

    def check(inputs: Inputs, results: Tensors, eager: Tensors, truth: Tensors) -> None:
        for name, ours, theirs, true in zip(names, results, eager, truth, strict=True):
            assert_as_close_as(name, ours, theirs, true)

    return check


def _distance(tensor: Tensor, truth: Tensor) -> float:
    return (tensor.double() - truth).abs().max().item()


@dataclass(frozen=True)
class Provider:
    name: str
    function: Function
    graphs: bool = False  # replays CUDA graphs, whose results the next call overwrites

    def __call__(self, inputs: Inputs, direction: str) -> Tensors:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        found = self.function(*inputs.args, **inputs.options)
        outputs = (found,) if isinstance(found, Tensor) else tuple(found)
        if direction == "forward":
            return outputs
        pairs = zip(outputs, inputs.grads, strict=True)
        ends, grads = zip(*((end, grad) for end, grad in pairs if grad is not None), strict=True)
        return outputs + torch.autograd.grad(ends, [inputs.args[i] for i in inputs.differentiable], grads)


def providers(
    op: Op, row: WorkloadRow, variant: str, device: torch.device, wanted: set[str]
) -> list[Provider]:
    offered = [Provider("eager", op.eager), Provider("camkernels", op.fused)]
    if "compile" in wanted:
        offered.insert(1, Provider("compile", torch.compile(op.eager, fullgraph=True, dynamic=False)))
    if "compile-max-autotune" in wanted and device.type == "cuda":
        tuned = torch.compile(op.eager, fullgraph=True, dynamic=False, mode="max-autotune")
        offered.insert(2, Provider("compile-max-autotune", tuned, graphs=True))
    offered += [Provider(name, function) for name, function in op.others(row, variant).items()]
    return [provider for provider in offered if provider.name in wanted]


@dataclass
class Session:
    """What all rows of one pytest session share."""

    device: torch.device
    dtype: torch.dtype
    wanted: set[str]
    seconds: float  # of timed rounds, per row and direction
    max_images: int | None
    freed: measure.FreedMemory
    copy: measure.Copy = field(init=False)
    matrix_rate: float = field(init=False)
    results: dict[str, list[Row]] = field(default_factory=dict)
    host: dict[tuple[str, str], dict[tuple[str, str], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.copy = measure.Copy(self.device)
        # Many CPUs have no matrix units for half types, and float32 is what the op computes in.
        matrix_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        self.matrix_rate = measure.matrix_rate(self.device, matrix_dtype)

    def inputs(self, op: Op, row: WorkloadRow, variant: str, seed: int) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(seed)
        return op.make(row, variant, self.dtype, generator)

    def tiny_host_seconds(self, op: Op, variant: str) -> dict[tuple[str, str], float]:
        """Host time by direction and provider of a call on tiny tensors.

        On the CPU this is the only host time that can be told from the arithmetic. Forgets what is compiled.
        """
        if (op.name, variant) not in self.host:
            row = op.tiny(variant)
            inputs = self.inputs(op, row, variant, seed=0)
            calls = max(3, min(300, round(120 * self.seconds)))
            playing = providers(op, row, variant, self.device, self.wanted)
            self.host[op.name, variant] = {
                (direction, provider.name): seconds
                for direction in op.directions
                for provider, seconds in zip(
                    playing,
                    measure.host_seconds(
                        [partial(provider, inputs, direction) for provider in playing], self.device, calls
                    ),
                    strict=True,
                )
            }
            measure.forget_compiled(self.device)
        return self.host[op.name, variant]


class Case:
    """One row in one variant, at the batch that fits, with its inputs and compiled providers."""

    def __init__(self, session: Session, op: Op, row: WorkloadRow, variant: str) -> None:
        self.session, self.op, self.variant = session, op, variant
        self.full_images = row["N"]
        per_image = op.cost(row, variant, session.dtype, "forward").bytes // row["N"]
        images = min(row["N"], session.max_images or row["N"])
        images = measure.images_that_fit(images, per_image, measure.memory_of(session.device))
        self.row = {**row, "N": images}
        on_cpu = session.device.type == "cpu"
        self.tiny_host_seconds = session.tiny_host_seconds(op, variant) if on_cpu else {}
        self.providers = providers(op, self.row, variant, session.device, session.wanted)
        first = session.inputs(op, self.row, variant, seed=1)
        set_bytes = measure.tensor_bytes(first.tensors())
        count = measure.input_sets(set_bytes, measure.last_level_cache(session.device))
        self.sets = [first, *(session.inputs(op, self.row, variant, seed) for seed in range(2, count + 1))]
        self._check()

    def _check(self) -> None:
        inputs, direction = self.sets[0], self.op.directions[-1]
        truth = Provider("reference", self.op.reference)(inputs.double(), direction)
        truth = tuple(tensor.detach() for tensor in truth)
        eager = tuple(tensor.detach() for tensor in Provider("eager", self.op.eager)(inputs, direction))
        for provider in self.providers:
            # A later call, too: only then CUDA graphs are replayed.
            for _ in range(3 if provider.graphs else 1):
                found = tuple(tensor.detach() for tensor in provider(inputs, direction))
                try:
                    self.op.check(inputs, found, eager, truth)
                except AssertionError as error:
                    raise AssertionError(f"{provider.name}: {error}") from error
            del found

    def release(self) -> None:
        """Free inputs and compiled code before the next case takes its own."""
        self.sets.clear()
        self.providers.clear()
        measure.forget_compiled(self.session.device)
        self.session.freed.give_back()

    def backend(self, provider: Provider) -> str:
        if provider.name != "camkernels":
            return "torch"
        device, dtype = self.session.device, self.session.dtype
        return _backend.resolve(self.op.name, _backend.setting(), device, dtype, self.op.backends)


def run_case(benchmark: BenchmarkFixture, case: Case, direction: str) -> list[Row]:
    """Time all providers in turns, round by round, a copy of memory between them; one row for each."""
    session, device = case.session, case.session.device
    sets = cycle(case.sets)
    calls: list[Callable[[Inputs], Any]] = [lambda inputs: session.copy()]
    calls += [partial(provider, direction=direction) for provider in case.providers]

    spent, host = [], []
    for call in calls:
        for _ in range(WARM_UP):
            start = measure.clock(device)
            result = call(next(sets))
            last = measure.clock(device) - start
            del result
        spent.append(last)
        if device.type == "cuda":
            host += measure.host_seconds([partial(call, case.sets[0])], device, count=3)
    fewest = MIN_ROUNDS if session.seconds else 2  # no time: whether it runs is all that is asked
    rounds = max(fewest, min(MAX_ROUNDS, math.ceil(session.seconds / sum(spent))))
    # On a GPU, work ahead of each timed call, so that the device never waits for the host in between: the
    # host's time is a column of its own.
    head_start = 1 + math.ceil(1.5 * max(host) / spent[0]) if device.type == "cuda" else 0

    turns = cycle(calls)
    kept: list[Any] = []

    def next_turn() -> tuple[tuple[Any, ...], dict[str, Any]]:
        kept.clear()  # outside the timed region
        for _ in range(head_start):
            session.copy()
        return (next(turns), next(sets)), {}

    def timed(call: Callable[[Inputs], Any], inputs: Inputs) -> None:
        kept.append(call(inputs))

    benchmark.pedantic(timed, setup=next_turn, rounds=rounds * len(calls), iterations=1)
    kept.clear()
    if benchmark.stats is None:
        raise RuntimeError("pytest-benchmark is disabled (by its option, or because xdist is active)")
    copies, *times = turns_of(benchmark.stats.stats.data, len(calls))
    bandwidth = session.copy.bytes / statistics.median(copies)
    cost = case.op.cost(case.row, case.variant, session.dtype, "forward")
    if direction != "forward":
        cost = cost + case.op.cost(case.row, case.variant, session.dtype, "backward")
    floor = measure.floor(cost, bandwidth, session.matrix_rate)

    rows = []
    for provider, seconds in zip(case.providers, times, strict=True):
        once = partial(provider, case.sets[0], direction)
        result_bytes = measure.tensor_bytes(once())
        events = measure.trace(once, device)
        host_seconds = case.tiny_host_seconds.get((direction, provider.name))
        if host_seconds is None:
            (host_seconds,) = measure.host_seconds([once], device)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        rows.append(
            Row(
                id=case.row["id"],
                variant=case.variant,
                direction=direction,
                dtype=str(session.dtype).removeprefix("torch."),
                shape={key: value for key, value in case.row.items() if key != "id"},
                full_images=case.full_images,
                provider=provider.name,
                backend=case.backend(provider),
                seconds=median,
                seconds_low=low,
                seconds_high=high,
                rounds=len(seconds),
                peak_extra_bytes=None if provider.graphs else measure.peak_extra_bytes(once, device, events),
                result_bytes=result_bytes,
                kept_bytes=case.op.kept_bytes(case.row),
                launches=measure.launches(events, device),
                host_seconds=host_seconds,
                floor_bytes=cost.bytes,
                floor_flops=cost.flops,
                floor_seconds=floor.seconds,
                floor_bound=floor.bound,
                copy_bytes_per_second=bandwidth,
            )
        )
    session.results.setdefault(case.op.name, []).extend(rows)
    return rows


def turns_of(times: Sequence[float], players: int) -> list[list[float]]:
    """Each player's times out of those of rounds played in turns."""
    return [list(times[first::players]) for first in range(players)]
