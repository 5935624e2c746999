"""``Op``: one declaration, from which an op's schema, fake kernel, autograd and choice of backend follow.

    SQUARE = Op(
        "square",
        "Tensor values",
        outputs="squared",
        allocate=lambda a: setattr(a, "squared", torch.empty_like(a.values)),
        backward="Tensor? grad_squared, Tensor values",
        gradients={"values": like("values")},
        reference=lambda values: values * values,
    )
    squared = SQUARE("square", values)

An op has two passes, ``camkernels::<op>_fwd`` and ``camkernels::<op>_bwd``, each an op of ``torch.library``.
A pass works on a namespace: it holds the arguments by name, then the tensors that the pass allocates. A
backend's launcher takes from it what its own signature names, and fills what was allocated:

    cpu, cuda  camkernels_cpp::<pass>, a C++ kernel under the key CPU or CUDA
    triton     camkernels.triton.<pass>, a Python function

In eager mode a call goes straight to the launcher. The dispatcher is for what has to see the op: tracing,
tensor subclasses, dispatch modes.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from camkernels import _backend

Arguments = SimpleNamespace  # the tensors and options of one call, by name
Allocate = Callable[[Arguments], Any]
Gradients = tuple[Tensor | None, ...]

OPS: dict[str, "Op"] = {}
CPP_SCHEMAS: dict[str, str] = {}  # of the C++ launchers, by name
CPP_LIBRARIES = {"cpu": "camkernels_cpp", "cuda": "camkernels_cpp"}


def _library(name: str) -> torch.library.Library:
    """A library to define ops in. What an earlier import of camkernels defined there goes first: after a
    purge of ``sys.modules`` the package is imported once more in one process."""
    namespace = getattr(torch.ops, name)
    earlier = vars(namespace).get("library")
    if earlier is not None:
        earlier._destroy()
    library = torch.library.Library(name, "FRAGMENT")
    namespace.library = library
    return library


_LIB = _library("camkernels")
_CPP = _library("camkernels_cpp")  # filled by csrc/


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where the tensor lies so and not the plain way too (one channel, one pixel)."""
    if (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_like(tensor: Tensor) -> Tensor:
    """Dense, in the memory format of the tensor."""
    return torch.empty_like(tensor, memory_format=memory_format(tensor))


def like(name: str) -> Callable[[Arguments], Tensor]:
    """A gradient of the shape, dtype and memory format of that argument."""
    return lambda a: empty_like(getattr(a, name))


def per_class(a: Arguments) -> Tensor:
    """The gradient of a bias: one sum for each row of ``weight``, in the type that kernels compute in."""
    return a.weight.new_empty(a.weight.shape[:-1], dtype=accumulate_dtype(a.features.dtype))


def _parse(arguments: str) -> dict[str, str]:
    """Types of the arguments of a schema, by name."""
    pairs = (argument.rsplit(" ", 1) for argument in arguments.split(", ") if argument)
    return {name: kind for kind, name in pairs}


def define_kernel(name: str, reads: str, writes: str) -> None:
    """Declare a launcher of the C++ backends: its arguments, then the tensors that it fills."""
    filled = (f"Tensor({chr(97 + i)}!) {output}" for i, output in enumerate(writes.split()))
    CPP_SCHEMAS[name] = f"{name}({', '.join((reads.replace('SymInt', 'int'), *filled))}) -> ()"
    _CPP.define(CPP_SCHEMAS[name])


@cache
def _launcher(backend: str, kernel: str) -> tuple[Callable[..., None], Callable[..., Any]]:
    """A backend's launcher, and what takes its arguments from a namespace."""
    if backend == "triton":
        launch = getattr(importlib.import_module("camkernels.triton"), kernel)
        names: list[str] = list(inspect.signature(launch).parameters)
    else:
        launch = getattr(getattr(torch.ops, CPP_LIBRARIES[backend]), kernel).default
        names = [argument.name for argument in launch._schema.arguments]
    return launch, itemgetter(*names)


def clear_caches() -> None:
    _launcher.cache_clear()


class Launch:
    """Starts kernels of one backend: ``launch("cam_bwd", a, normalize=True)``."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, kernel: str, a: Arguments, **changed: Any) -> None:
        launch, pick = _launcher(self.backend, kernel)
        found = pick({**vars(a), **changed} if changed else vars(a))
        launch(*found)


def _is_open(number: float) -> bool:
    """Whether torch.compile, which is tracing, keeps the number open: the graph is for other values, too.

    Dynamo shows such a number as a plain float. But of a constant it knows whether it equals another one. The
    sine hides what is known of the number's range.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    hidden, other = math.sin(math.atan(number)), 0.1234567
    return not (statically_known_true(hidden == other) or statically_known_true(hidden != other))


def _settled(number: float) -> float:
    """A number of no meaning in place of one that is open, 0 only for 0."""
    return 1.0 if number else 0.0


def _open_numbers(floats: list[float]) -> Tensor | None:
    """All of them in a tensor, if torch.compile keeps one of them open.

    An op's argument of type float would be fixed to its first value: some versions then compile anew for
    each other value, and some go on with the first one. Only a sum with a tensor stays open.
    """
    if not any(_is_open(number) for number in floats):
        return None
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([zero + number for number in floats])


class _Pass:
    """One op of ``torch.library`` that allocates tensors and has a backend fill them.

    Beside its arguments it takes ``numbers``: None, or the values of all its options of type float.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        results: str,
        *,
        fills: str,
        allocate: Allocate,
        arrange: Allocate,
        launch: Callable[[Launch, Arguments], None] | None,
        finish: Allocate,
        channels_last: frozenset[str],
        backends: tuple[str, ...],
        suits_cuda: Callable[[Arguments], bool],
    ) -> None:
        self.name, self.backends = name, backends
        types = _parse(arguments)
        self.floats = [n for n, kind in types.items() if kind in ("float", "float[]")]
        self.names = (*types, "numbers", "backend")
        self.results = results.split()
        self._fills = fills.split()
        self._tensors = [(n, n in channels_last) for n, kind in types.items() if kind.startswith("Tensor")]
        self._allocate, self._arrange, self._finish = allocate, arrange, finish
        self._suits_cuda = suits_cuda
        self._launch = launch or (lambda launch, a: launch(name, a))
        returned = ", ".join("Tensor" for _ in self.results)
        tags = (torch.Tag.pt2_compliant_tag,)
        _LIB.define(f"{name}({arguments}, Tensor? numbers, str backend) -> ({returned})", tags=tags)
        _LIB.impl(name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"camkernels::{name}", self._fake, lib=_LIB)
        self.dispatched = getattr(torch.ops.camkernels, name).default

    def _prepared(self, args: tuple[Any, ...]) -> Arguments:
        """Arguments that kernels can read in place, and what they fill."""
        a = SimpleNamespace(**dict(zip(self.names, args, strict=True)))
        found = vars(a)
        for name, either_layout in self._tensors:
            tensor = found[name]
            if tensor is None or tensor.is_contiguous():
                continue
            if not (either_layout and memory_format(tensor) == torch.channels_last):
                found[name] = tensor.contiguous()
        self._arrange(a)
        self._allocate(a)
        return a

    def _returned(self, a: Arguments) -> Any:
        self._finish(a)
        if len(self.results) == 1:
            return getattr(a, self.results[0])
        found = vars(a)
        return tuple([found[name] for name in self.results])

    def _fake(self, *args: Any) -> Any:
        return self._returned(self._prepared(args))

    def _read_numbers(self, a: Arguments) -> None:
        values = iter(a.numbers.tolist())
        found = vars(a)
        for name in self.floats:
            many = isinstance(found[name], list)
            found[name] = [next(values) for _ in found[name]] if many else next(values)

    def run(self, *args: Any) -> Any:
        a = self._prepared(args)
        if a.numbers is not None:
            self._read_numbers(a)
        first = next(x for x in args if x is not None)
        if first.shape[0] == 0:  # no image: nothing to launch, gradients of parameters are zero
            for name in self._fills:
                getattr(a, name).zero_()
            return self._returned(a)
        backend = _backend.resolve(self.name, a.backend, first.device, first.dtype, self.backends)
        unsuited = backend == "cuda" and a.backend == "auto" and not self._suits_cuda(a)
        if unsuited and _backend.why_not("triton", first.device, first.dtype) is None:
            backend = "triton"
        self._launch(Launch(backend), a)
        return self._returned(a)


def _nothing(a: Arguments) -> None:
    pass


def is_plain(*values: Any) -> bool:
    """Whether a call may bypass the dispatcher: nothing traces it, and its tensors are no more than tensors,
    but have data."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and all(
            (type(value) is Tensor or type(value) is torch.nn.Parameter) and not value.is_meta
            for value in values
            if isinstance(value, Tensor)
        )
    )


class _NoSecondOrder(torch.autograd.Function):
    """The identity, differentiable on paper only: backward through it is an error in words."""

    @staticmethod
    def forward(ctx: Any, function: str, value: Tensor, *anchors: Tensor | None) -> Tensor:
        ctx.function = function
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        raise RuntimeError(f"{ctx.function}: there is no double backward; backend 'reference' has one")


class Op:
    """One differentiable operation with kernels.

    Args:
        name: the basename of all its files; the passes are ``<name>_fwd`` and ``<name>_bwd``.
        function: the public function, where it has another name.
        inputs: the schema of the forward pass. ``bool keep``, if last, is filled in here: whether a gradient
            will be asked for.
        outputs: names of what a call returns.
        allocate: gives the namespace every tensor that the launcher fills.
        reference: the definition in plain PyTorch; takes ``inputs`` and returns ``outputs``.
        kept: further results, for backward only.
        scratch: what the launcher fills and ``finish`` reads.
        finish: makes results of what the launcher filled, with torch operations.
        backward: the schema of the backward pass: ``grad_<output>`` and whatever it needs of ``inputs``,
            ``outputs`` and ``kept``, which is what a call saves.
        gradients: for each differentiable input, what allocates its gradient.
        flow: for each output the inputs that its gradient reaches; by default all of ``gradients``.
        save: what backward gets under a name, where that is not the argument or result of this name.
        arrange: changes arguments before anything is allocated, such as the layout of a gradient.
        launch_fwd, launch_bwd: start the kernels of a pass; by default the one of the pass's name.
        channels_last: tensors that kernels read in that layout, too; all others are made contiguous.
        decides: tensors whose widest dtype the backend must serve, the first of them its device.
        backends: those that have kernels for the op.
        suits_cuda: whether ``auto`` should prefer the CUDA kernels to Triton's for these arguments.
    """

    def __init__(
        self,
        name: str,
        inputs: str,
        *,
        outputs: str,
        function: str = "",
        allocate: Allocate,
        reference: Callable[..., Any],
        kept: str = "",
        scratch: str = "",
        finish: Allocate = _nothing,
        backward: str = "",
        gradients: Mapping[str, Callable[[Arguments], Tensor]] | None = None,
        flow: Callable[[Arguments], Mapping[str, str]] | None = None,
        save: Mapping[str, Callable[[Arguments], Any]] | None = None,
        arrange: Allocate = _nothing,
        launch_fwd: Callable[[Launch, Arguments], None] | None = None,
        launch_bwd: Callable[[Launch, Arguments], None] | None = None,
        channels_last: str = "features",
        decides: str = "",
        backends: tuple[str, ...] = _backend.BACKENDS,
        suits_cuda: Callable[[Arguments], bool] = lambda a: True,
    ) -> None:
        self.name, self.function = name, function or name
        self.backends, self._reference = backends, reference
        names = list(_parse(inputs))
        self._keeps = names[-1] == "keep"
        self._outputs = outputs.split()
        fills = f"{scratch or outputs} {kept}".strip()
        shared = {
            "channels_last": frozenset(channels_last.split()),
            "backends": backends,
            "suits_cuda": suits_cuda,
        }
        self.forward = _Pass(
            f"{name}_fwd",
            inputs,
            f"{outputs} {kept}",
            fills=fills,
            allocate=allocate,
            arrange=_nothing,
            launch=launch_fwd,
            finish=finish,
            **shared,
        )
        define_kernel(f"{name}_fwd", inputs, fills)
        self._decides = [names.index(n) for n in (decides or names[0]).split()]
        self._floats_at = [names.index(n) for n in self.forward.floats]
        self._gradients_at = {n: names.index(n) for n in gradients or {}}
        if gradients:
            self._make_backward(backward, gradients, flow, save or {}, arrange, launch_bwd, shared)
        OPS[name] = self

    def _make_backward(
        self,
        backward: str,
        gradients: Mapping[str, Callable[[Arguments], Tensor]],
        flow: Callable[[Arguments], Mapping[str, str]] | None,
        save: Mapping[str, Callable[[Arguments], Any]],
        arrange: Allocate,
        launch: Callable[[Launch, Arguments], None] | None,
        shared: dict[str, Any],
    ) -> None:
        everything = dict.fromkeys(self._outputs, " ".join(gradients))
        self._flow = flow or (lambda a: everything)
        types = _parse(backward)
        grads = {f"grad_{output}" for output in self._outputs}
        self._saved = [n for n, kind in types.items() if kind.startswith("Tensor") and n not in grads]
        self._options = [n for n in types if n not in self._saved and n not in grads]
        self._save = save
        results = " ".join(f"grad_{n}" for n in gradients)
        schema = ", ".join((backward, *(f"bool need_{n}" for n in gradients if len(gradients) > 1)))

        def allocate(a: Arguments) -> None:
            found = vars(a)
            for n, gradient in gradients.items():
                found[f"grad_{n}"] = gradient(a) if found.get(f"need_{n}", True) else nothing(a)

        def nothing(a: Arguments) -> Tensor:
            return next(x for x in vars(a).values() if x is not None).new_empty(0)

        self.backward = _Pass(
            f"{self.name}_bwd",
            schema,
            results,
            fills=results,
            allocate=allocate,
            arrange=arrange,
            launch=launch,
            finish=_nothing,
            **shared,
        )
        if launch is None:
            define_kernel(f"{self.name}_bwd", schema, results)
        op = self

        class Function(torch.autograd.Function):
            """The op in eager mode, around its launchers."""

            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                results = op.forward.run(*args)
                op._setup(ctx, args, results)
                return op._public(results)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
                return op._backward(ctx, *grads)

        Function.__name__ = Function.__qualname__ = self.name
        self._function = Function
        torch.library.register_autograd(
            f"camkernels::{self.name}_fwd", self._backward, setup_context=self._setup, lib=_LIB
        )

    def by_reference(self, function: str, first: Tensor, *others: Tensor | None) -> bool:
        """Whether the definition in plain PyTorch serves these tensors."""
        dtype = first.dtype
        for tensor in others:
            if tensor is not None and tensor.dtype == torch.float64:
                dtype = tensor.dtype
        requested = _backend.setting()
        return _backend.resolve(function, requested, first.device, dtype, self.backends) == "reference"

    def __call__(self, function: str, *args: Any) -> Any:
        """The outputs, by the backend that was asked for; errors name ``function``."""
        if self.by_reference(function, *[args[i] for i in self._decides]):
            return self._reference(*args)
        if torch._C._are_functorch_transforms_active():  # Dynamo traces the question
            raise RuntimeError(
                f"{function}: torch.func transforms (grad, vjp, jvp, vmap ...) do not see through the "
                "kernels; inside them use camkernels.use_backend('reference')"
            )
        needed = torch.is_grad_enabled() and any(
            args[i] is not None and args[i].requires_grad for i in self._gradients_at.values()
        )
        requested = _backend.setting()
        if self._keeps:
            args = (*args, needed)
        numbers = None
        if torch.compiler.is_compiling():
            args, numbers = self._with_open_numbers(args)
        args = (*args, numbers, requested)
        if not is_plain(*args):
            return self._public(self.forward.dispatched(*args))
        if needed or torch.autograd.forward_ad._current_level >= 0:
            return self._function.apply(*args)
        return self._public(self.forward.run(*args))

    def _with_open_numbers(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor | None]:
        places = [(i, isinstance(args[i], list)) for i in self._floats_at]
        numbers = _open_numbers([x for i, many in places for x in (args[i] if many else [args[i]])])
        if numbers is None:
            return args, None
        settled = list(args)
        for i, many in places:
            settled[i] = [_settled(x) for x in args[i]] if many else _settled(args[i])
        return tuple(settled), numbers

    def _public(self, results: Any) -> Any:
        """The outputs among the results of the forward pass."""
        count = len(self._outputs)
        if count == len(self.forward.results):
            return results
        return results[0] if count == 1 else results[:count]

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """What backward needs of a call."""
        results = output if isinstance(output, tuple) else (output,)
        names = (*self.forward.names, *self.forward.results)
        a = SimpleNamespace(**dict(zip(names, (*inputs, *results), strict=True)))
        found = vars(a)
        ctx.flow = flow = self._flow(a)
        needed = {n for n, i in self._gradients_at.items() if ctx.needs_input_grad[i]}
        constant = [n for n in self.forward.results if needed.isdisjoint(flow.get(n, "").split())]
        ctx.mark_non_differentiable(*[found[name] for name in constant])
        a.needed = needed
        found |= {name: value(a) for name, value in self._save.items()}
        ctx.options = {name: found[name] for name in self._options}
        ctx.backend = a.backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[found[name] for name in self._saved], a.numbers)

    def _backward(self, ctx: Any, *grads: Tensor | None) -> Gradients:
        """Gradients of all arguments of the forward pass.

        ``once_differentiable`` overlooks a gradient that depends on saved tensors only (the loss is linear in
        the output), and would leave its second derivative out in silence.
        """
        # Under torch.compile AOTAutograd refuses double backward by itself.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self._first_order(ctx, grads)
        with torch.no_grad():
            found = self._first_order(ctx, grads)
        anchors = (*ctx.saved_tensors, *grads)  # whatever a second derivative could be asked for
        return tuple(g if g is None else _NoSecondOrder.apply(self.function, g, *anchors) for g in found)

    def _first_order(self, ctx: Any, grads: Gradients) -> Gradients:
        given = dict(zip(self._outputs, grads, strict=False))  # of kept results there is none
        reached = {n for output, grad in given.items() if grad is not None for n in ctx.flow[output].split()}
        needs = {n: ctx.needs_input_grad[i] and n in reached for n, i in self._gradients_at.items()}
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if not any(needs.values()):
            return tuple(found)
        known = {
            **{f"grad_{output}": grad for output, grad in given.items()},
            **dict(zip((*self._saved, "numbers"), ctx.saved_tensors, strict=True)),
            **ctx.options,
            **{f"need_{n}": need for n, need in needs.items()},
            "backend": ctx.backend,
        }
        args = [known[name] for name in self.backward.names]
        results = (self.backward.run if is_plain(*args) else self.backward.dispatched)(*args)
        results = results if isinstance(results, tuple) else (results,)
        for (n, i), grad in zip(self._gradients_at.items(), results, strict=True):
            found[i] = grad if needs[n] else None
        return tuple(found)
