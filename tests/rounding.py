"""How far rounding alone moves the results of a computation, found by rounding at random (Monte Carlo
arithmetic: Parker, 1997)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# They hand on values that are there already, and round nothing.
EXACT = (
    *("amax", "amin", "max", "min", "sort", "topk", "gather", "index", "index_select", "masked_select"),
    *("where", "masked_fill", "cat", "stack", "clone", "copy_", "_to_copy", "_unsafe_view"),
    *("neg", "abs", "relu", "zero_"),
)
REPEATS = 3


def is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


class Decisions(TorchDispatchMode):
    """Notes every comparison, index and the like that a computation draws from numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if draws_decisions(func, args, result):
            kept = [x.clone() if isinstance(x, Tensor) else x for x in decisions_in(result)]
            self.taken.append((func, kept))
        return result


def draws_decisions(func: Any, args: Any, result: Any) -> bool:
    reads = any(is_real(x) for x in tree_flatten(args)[0])
    return reads and not func._schema.is_mutable and bool(list(decisions_in(result)))


def decisions_in(result: Any) -> Iterator[Any]:
    return (x for x in tree_flatten(result)[0] if not is_real(x))


class RandomRounding(TorchDispatchMode):
    """Multiplies results by 1 + eps * u, with a random u in [-1, 1]. What is not pointwise may be a sum, the
    error of which is that of its terms: there the operands are multiplied too. The decisions are those of the
    exact computation: of two tied minima none becomes the only one."""

    def __init__(self, decisions: Decisions, eps: float, seed: int) -> None:
        super().__init__()
        self.taken = iter(decisions.taken)
        self.eps = eps
        self.draw = torch.Generator().manual_seed(seed)

    def factor(self, x: Tensor) -> Tensor:
        return 1 + self.eps * (2 * torch.rand(x.shape, generator=self.draw, dtype=x.dtype) - 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        is_view = not schema.is_mutable and any(x.alias_info is not None for x in schema.returns)
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        rounds = not (is_view or drawn or func.overloadpacket.__name__ in EXACT)
        if rounds and torch.Tag.pointwise not in func.tags:
            kept = args[:1] if schema.is_mutable else ()
            args = (*kept, *tree_map(lambda x: x * self.factor(x) if is_real(x) else x, args[len(kept) :]))
        result = func(*args, **(kwargs or {}))
        if draws_decisions(func, args, result):
            asked, taken = next(self.taken)
            assert asked == func, f"{asked} came first, now {func}"
            decided = iter(taken)
            leaves, tree = tree_flatten(result)
            result = tree_unflatten([x if is_real(x) else next(decided) for x in leaves], tree)
        if not rounds:
            return result
        if schema.is_mutable:
            return tree_map(lambda x: x.mul_(self.factor(x)) if is_real(x) else x, result)
        return tree_map(lambda x: x * self.factor(x) if is_real(x) else x, result)


class Rounding:
    """What rounding to ``eps`` may change in each result of ``compute``, which is in float64 and always the
    same: the worst change over all elements and a few runs."""

    def __init__(self, compute: Callable[[], Sequence[Tensor | None]]) -> None:
        self.compute = compute
        self.known: dict[float, list[float]] = {}

    def worst(self, eps: float) -> list[float]:
        if eps not in self.known:
            decisions = Decisions()
            with decisions:
                exact = self.compute()
            worst = [0.0] * len(exact)
            for seed in range(REPEATS):
                with RandomRounding(decisions, eps, seed):
                    moved = self.compute()
                for index, (a, b) in enumerate(zip(moved, exact, strict=True)):
                    if a is not None and b is not None and a.numel() and a.is_floating_point():
                        change = (a - b).nan_to_num(0.0, 0.0, 0.0).abs().max().item()
                        worst[index] = max(worst[index], change)
            self.known[eps] = worst
        return self.known[eps]
