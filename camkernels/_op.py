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

An op has two passes, ``camkernels::<op>_fwd`` and ``camkernels::<op>_bwd``, see ``_pass.py``. In eager mode a
call goes straight to their launchers. The dispatcher is for what has to see the op: tracing, tensor
subclasses, dispatch modes.
"""

from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from camkernels import _backend
from camkernels._pass import (
    LIBRARY,
    Allocate,
    Arguments,
    Launch,
    Pass,
    define_kernel,
    open_numbers,
    parse,
    settled,
)

Gradients = tuple[Tensor | None, ...]
Flow = Callable[[Arguments], Mapping[str, str]]

OPS: dict[str, "Op"] = {}


@cache
def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


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
        launch_fwd, launch_bwd: start the kernels of a pass, which ``define_kernel`` declares; by default one
            of the pass's name and arguments.
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
        finish: Allocate | None = None,
        backward: str = "",
        gradients: Mapping[str, Callable[[Arguments], Tensor]] | None = None,
        flow: Flow | None = None,
        save: Mapping[str, Callable[[Arguments], Any]] | None = None,
        arrange: Allocate | None = None,
        launch_fwd: Callable[[Launch, Arguments], None] | None = None,
        launch_bwd: Callable[[Launch, Arguments], None] | None = None,
        channels_last: str = "features",
        decides: str = "",
        backends: tuple[str, ...] = _backend.BACKENDS,
        suits_cuda: Callable[[Arguments], bool] = lambda a: True,
    ) -> None:
        self.name, self.function = name, function or name
        self.backends, self._reference = backends, reference
        names = list(parse(inputs))
        self._keeps = names[-1] == "keep"
        self._outputs = outputs.split()
        fills = f"{scratch or outputs} {kept}".strip()
        shared: dict[str, Any] = {
            "channels_last": frozenset(channels_last.split()),
            "backends": backends,
            "suits_cuda": suits_cuda,
        }
        self.forward = Pass(
            f"{name}_fwd",
            inputs,
            f"{outputs} {kept}",
            fills=fills,
            allocate=allocate,
            arrange=None,
            launch=launch_fwd,
            finish=finish,
            **shared,
        )
        if launch_fwd is None:
            define_kernel(f"{name}_fwd", inputs, fills)
        self._decides = [names.index(n) for n in (decides or names[0]).split()]
        self._floats_at = [names.index(n) for n in self.forward.floats]
        self._gradients_at = [(n, names.index(n)) for n in gradients or {}]
        self._differentiable = [i for _, i in self._gradients_at]
        if gradients:
            self._make_backward(backward, gradients, flow, save or {}, arrange, launch_bwd, shared)
        OPS[name] = self

    def _make_backward(
        self,
        backward: str,
        gradients: Mapping[str, Callable[[Arguments], Tensor]],
        flow: Flow | None,
        save: Mapping[str, Callable[[Arguments], Any]],
        arrange: Allocate | None,
        launch: Callable[[Launch, Arguments], None] | None,
        shared: dict[str, Any],
    ) -> None:
        everything = dict.fromkeys(self._outputs, " ".join(gradients))
        self._flow = flow or (lambda a: everything)
        types = parse(backward)
        grads = {f"grad_{output}" for output in self._outputs}
        self._saved = [n for n, kind in types.items() if kind.startswith("Tensor") and n not in grads]
        self._saved.append("numbers")
        self._options = [n for n in types if n not in self._saved and n not in grads]
        self._save = save
        results = " ".join(f"grad_{n}" for n in gradients)
        schema = ", ".join((backward, *(f"bool need_{n}" for n in gradients if len(gradients) > 1)))

        def allocate(a: Arguments) -> None:
            found = vars(a)
            for n, gradient in gradients.items():
                found[f"grad_{n}"] = gradient(a) if found.get(f"need_{n}", True) else empty(a)

        def empty(a: Arguments) -> Tensor:
            return next(x for x in vars(a).values() if x is not None).new_empty(0)

        self.backward = Pass(
            f"{self.name}_bwd",
            schema,
            results,
            fills=results,
            allocate=allocate,
            arrange=arrange,
            launch=launch,
            finish=None,
            **shared,
        )
        if launch is None:
            define_kernel(f"{self.name}_bwd", schema, results)
        op = self

        class Function(torch.autograd.Function):
            """The op in eager mode, around its launchers."""

            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                # The last one is the backend that serves, after the one that was asked for.
                results = op.forward.fill(args[:-1], args[-1])
                op._setup(ctx, args[:-1], results)
                return op._public(results)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
                return op._backward(ctx, *grads)

        Function.__name__ = Function.__qualname__ = self.name
        self._function = Function
        for overload in filter(None, (self.forward.dispatched, self.forward.dispatched_open)):
            torch.library.register_autograd(overload, self._backward, setup_context=self._setup, lib=LIBRARY)

    def backend(self, function: str, first: Tensor, *others: Tensor | None) -> str:
        """The backend that serves these tensors; errors name ``function``."""
        dtype = first.dtype
        for tensor in others:
            if tensor is not None and tensor.dtype == torch.float64:
                dtype = tensor.dtype
        return _backend.resolve(function, _backend.setting(), first.device, dtype, self.backends)

    def __call__(self, function: str, *args: Any) -> Any:
        """The outputs, by the backend that was asked for; errors name ``function``."""
        backend = self.backend(function, *[args[i] for i in self._decides])
        if backend == "reference":
            return self._reference(*args)
        if torch._C._are_functorch_transforms_active():  # Dynamo traces the question
            raise RuntimeError(
                f"{function}: torch.func transforms (grad, vjp, jvp, vmap ...) do not see through the "
                "kernels; inside them use camkernels.use_backend('reference')"
            )
        needed = False
        if torch.is_grad_enabled():
            for place in self._differentiable:
                tensor = args[place]
                if tensor is not None and tensor.requires_grad:
                    needed = True
                    break
        if self._keeps:
            args = (*args, needed)
        numbers = None
        if torch.compiler.is_compiling():
            args, numbers = self._with_open_numbers(args)
        args = (*args, numbers, _backend.setting())
        if not self.forward.may_be_direct(args):
            return self._public(self.forward.dispatch(args))
        if needed or (self._differentiable and forward_ad._current_level >= 0):
            return self._function.apply(*args, backend)
        return self._public(self.forward.fill(args, backend))

    def _with_open_numbers(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor | None]:
        places = [(i, isinstance(args[i], list)) for i in self._floats_at]
        numbers = open_numbers([x for i, many in places for x in (args[i] if many else [args[i]])])
        if numbers is None:
            return args, None
        changed = list(args)
        for i, many in places:
            changed[i] = [settled(x) for x in args[i]] if many else settled(args[i])
        return tuple(changed), numbers

    def _public(self, results: Any) -> Any:
        """The outputs among the results of the forward pass."""
        count = len(self._outputs)
        if count == len(self.forward.results):
            return results
        return results[0] if count == 1 else results[:count]

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """What backward needs of a call."""
        a = SimpleNamespace()
        found = a.__dict__
        found.update(zip(self.forward.names, inputs, strict=True))
        results = output if isinstance(output, tuple) else (output,)
        found.update(zip(self.forward.results, results, strict=True))
        ctx.flow = flow = self._flow(a)
        a.needed = needed = {n for n, i in self._gradients_at if ctx.needs_input_grad[i]}
        constant = [found[n] for n in self.forward.results if needed.isdisjoint(_words(flow.get(n, "")))]
        if constant:
            ctx.mark_non_differentiable(*constant)
        if self._save:
            found |= {name: value(a) for name, value in self._save.items()}
        ctx.options = [found[name] for name in self._options]
        ctx.backend = a.backend
        if a.numbers is not None:
            a.numbers = self._numbers_of_backward(a)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[found[name] for name in self._saved])

    def _numbers_of_backward(self, a: Arguments) -> Tensor:
        """Those of ``numbers`` that are options of the backward pass, in its order."""
        counts = [len(getattr(a, n)) if isinstance(getattr(a, n), list) else 1 for n in self.forward.floats]
        parts = dict(zip(self.forward.floats, a.numbers.split(counts), strict=True))
        return torch.cat([parts[n] for n in self.backward.floats] or [a.numbers[:0]])

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
        known: dict[str, Any] = {"backend": ctx.backend}
        reached: set[str] = set()
        for output, grad in zip(self._outputs, grads, strict=False):  # kept results have no gradient
            known[f"grad_{output}"] = grad
            if grad is not None:
                reached |= _words(ctx.flow.get(output, ""))
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        needs = {n: i for n, i in self._gradients_at if n in reached and ctx.needs_input_grad[i]}
        if not needs:
            return tuple(gradients)
        known.update(zip(self._saved, ctx.saved_tensors, strict=True))
        known.update(zip(self._options, ctx.options, strict=True))
        for n, _ in self._gradients_at:
            known[f"need_{n}"] = n in needs
        args = [known[name] for name in self.backward.names]
        # A batch of gradients comes as tensors that have no storage.
        direct = self.backward.may_be_direct(args) and all(
            grad is None or torch._C._has_storage(grad) for grad in grads
        )
        results = self.backward.run(*args) if direct else self.backward.dispatch(args)
        results = results if isinstance(results, tuple) else (results,)
        for (n, i), grad in zip(self._gradients_at, results, strict=True):
            gradients[i] = grad if n in needs else None
        return tuple(gradients)
