"""Results of the emulated kernels against the reference's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import Outcome, as_double, as_plain, run
from closeness import assert_as_close_as
from torch import Tensor

CLUSTERS = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Against 2 for PyTorch's own order of operations: the map is rounded once more, when it is normalised, before
# the gradient is made from it.
MARGIN = 3.0


def outcomes(
    ours: Callable[..., Any], theirs: Callable[..., Any], inputs: Sequence[Tensor]
) -> tuple[Outcome, Outcome, Outcome]:
    """Of the emulated kernels, of the reference, and of the reference in float64."""
    found = run("cuda", ours, inputs)
    return found, run("reference", theirs, as_plain(inputs)), run("reference", theirs, as_double(inputs))


def assert_matches(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    inputs: Sequence[Tensor],
    names: Sequence[str],
    margin: float = MARGIN,
) -> Outcome:
    """Values and gradients as close to the float64 reference as PyTorch's own at this dtype."""
    sides = outcomes(ours, theirs, inputs)
    columns = (side.values + side.grads for side in sides)
    for name, mine, other, exact in zip(names, *columns, strict=True):
        if exact is None:
            assert mine is None or not mine.any(), name
        else:
            assert_as_close_as(mine, other, exact, margin, name)
    return sides[0]
