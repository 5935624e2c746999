"""What the autograd functions of all ops share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Grads = tuple[Tensor | None, ...]


class _NoSecondOrder(torch.autograd.Function):
    """The identity, differentiable on paper only: backward through it is an error in words."""

    @staticmethod
    def forward(ctx: Any, function: str, value: Tensor, *anchors: Tensor | None) -> Tensor:
        ctx.function = function
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        raise RuntimeError(f"{ctx.function}: there is no double backward; backend 'reference' has one")


def first_order(function: str) -> Callable[[Callable[..., Grads]], Callable[..., Grads]]:
    """Mark a ``backward`` as one that cannot itself be differentiated.

    ``once_differentiable`` overlooks a gradient that depends on saved tensors only (the loss is linear in
    the output), and would leave its second derivative out in silence.
    """

    def decorate(backward: Callable[..., Grads]) -> Callable[..., Grads]:
        @wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> Grads:
            # Under torch.compile AOTAutograd refuses double backward by itself.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            anchors = (*ctx.saved_tensors, *grads)
            return tuple(r if r is None else _NoSecondOrder.apply(function, r, *anchors) for r in results)

        return wrapper

    return decorate
