"""One op, one schema in ``torch.library``; here a call meets its backend.

Every op is defined by a signature and a function that allocates its outputs. That function is the fake
(meta) kernel as well, so that a traced shape can never differ from a real one. A backend only fills:

    allocate(*arguments) -> outputs
    launcher(*arguments, *outputs) -> None
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from camkernels import _backend

_LIB = torch.library.Library("camkernels", "DEF")
_CPP = torch.library.Library("camkernels_cpp", "DEF")  # filled by csrc/, for the CPU and CUDA keys


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where the tensor lies so and not the plain way too (one channel, one pixel)."""
    if (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself if kernels can read it in place, else a contiguous copy."""
    return tensor if memory_format(tensor) == torch.channels_last else tensor.contiguous()


def prepare_inputs(*args: Any) -> tuple[Any, ...]:
    return tuple(readable(arg) if isinstance(arg, Tensor) else arg for arg in args)


def define_op(
    name: str,
    arguments: str,
    outputs: Sequence[str],
    *,
    allocate: Callable[..., tuple[Tensor, ...]],
    prepare: Callable[..., tuple[Any, ...]] = prepare_inputs,
    suits_cuda: Callable[..., bool] = lambda *args: True,
    backends: tuple[str, ...] = _backend.BACKENDS,
) -> None:
    """Define ``camkernels::<name>(arguments, str backend) -> outputs``.

    ``prepare`` maps the arguments to those that kernels read in place; the device and the dtype of the
    first choose the backend. An op that writes into an argument, ``Tensor(a!)``, has no outputs, and its
    ``prepare`` leaves that argument as it is. ``suits_cuda`` tells from the prepared arguments whether
    ``auto`` should take the CUDA kernels; else it takes Triton's, where those work. ``backends`` are those
    that have kernels for the op.
    """
    results = ", ".join("Tensor" for _ in outputs)
    written = (f"Tensor({chr(97 + i)}!) {output}" for i, output in enumerate(outputs))
    _LIB.define(f"{name}({arguments}, str backend) -> ({results})", tags=(torch.Tag.pt2_compliant_tag,))
    _CPP.define(f"{name}({', '.join((arguments, *written))}) -> ()")
    cpp = getattr(torch.ops.camkernels_cpp, name)

    def returned(filled: tuple[Tensor, ...]) -> Any:
        """As the schema has it: nothing, a tensor, or a tuple of them."""
        return filled if len(filled) > 1 else (*filled, None)[0]

    def fake(*args: Any) -> Any:
        return returned(allocate(*prepare(*args[:-1])))

    def run(*args: Any) -> Any:
        *inputs, requested = args
        prepared = prepare(*inputs)
        filled = allocate(*prepared)
        first = prepared[0]
        if first.shape[0] == 0:  # no image: nothing to launch, gradients of parameters are zero
            for output in filled:
                output.zero_()
            return returned(filled)
        backend = _backend.resolve(name, requested, first.device, first.dtype, backends)
        if backend == "cuda" and requested == "auto" and not suits_cuda(*prepared):
            reason = _backend.why_not("triton", first.device, first.dtype)
            backend = "triton" if reason is None else backend
        launcher = getattr(importlib.import_module("camkernels.triton"), name) if backend == "triton" else cpp
        launcher(*prepared, *filled)
        return returned(filled)

    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"camkernels::{name}", fake, lib=_LIB)
