"""Checks that several losses make; messages as in ``camkernels._checks``."""

from math import isfinite

from torch import Tensor

from camkernels import _checks


def factor(function: str, argument: str, value: object) -> float:
    """The weight of a term."""
    result = _checks.number(function, argument, value, "of at least 0")
    if not (result >= 0 and isfinite(result)):
        raise ValueError(f"{function}: {argument} is {result}; it must be a finite number of at least 0")
    return result


def logits(function: str, argument: str, value: object, like: Tensor | None = None) -> Tensor:
    """[N, L], of the shape and device of the argument ``logits`` where that is given as ``like``."""
    result = _checks.tensor(function, argument, value, "[N, L]", (2,))
    if result.shape[1] == 0:
        raise ValueError(f"{function}: {argument} has shape {list(result.shape)}; L must be at least 1")
    if like is None:
        return result
    if result.shape != like.shape:
        raise ValueError(
            f"{function}: {argument} has shape {list(result.shape)} and logits {list(like.shape)}; "
            "they must be equal"
        )
    return _checks.same_device(function, argument, result, like, "logits")
