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

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from operator import itemgetter
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
    written,
)

Gradients = tuple[Tensor | None, ...]
Flow = Callable[[Arguments], Mapping[str, Collection[str]]]

OPS: dict[str, "Op"] = {}
_NO_SECOND_ORDER = "{}: there is no double backward; backend 'reference' has one"
# Names in the lines that are written for an op; its arguments need others.
_TAKEN = (
    "a ctx saved flow backend served options needs needed given reached nothing run reach numbers copied "
    "allocate arrange is_dense make_dense included keys"
)


def _nothing(a: Arguments) -> Tensor:
    """In place of a gradient that nobody asked for."""
    return next(x for x in vars(a).values() if isinstance(x, Tensor)).new_empty(0)


def _is_batched(value: Any) -> bool:
    """Whether it is a tensor that left the ``vmap`` it belongs to."""
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


class _NoSecondOrder(torch.autograd.Function):
    """The identity, differentiable on paper only: backward through it is an error in words."""

    @staticmethod
    def forward(ctx: Any, function: str, value: Tensor, *anchors: Tensor | None) -> Tensor:
        ctx.function = function
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        raise RuntimeError(_NO_SECOND_ORDER.format(ctx.function))


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
        flow: gives for each output the inputs that its gradient reaches; by default all of ``gradients``.
        save: what backward gets under a name, where that is not the argument or result of this name.
        arrange: changes arguments of the backward pass before its results are allocated.
        launch_fwd, launch_bwd: start the kernels of a pass, which ``define_kernel`` declares; by default one
            of the pass's name and arguments.
        channels_last: tensors that kernels read in that layout, too; all others are made contiguous.
        decides: tensors that choose the backend: device and dtype of the first, or float64 if any is of it.
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
        clash = sorted({*_TAKEN.split()} & {*names, *parse(backward)})
        if clash:
            raise ValueError(f"{name}: no argument of an op may be called {' or '.join(clash)}")
        self._keeps = names[-1] == "keep"
        self.outputs = outputs.split()
        self._outputs_of = itemgetter(*self.outputs)
        fills = f"{scratch or outputs} {kept}".strip()
        shared: dict[str, Any] = {
            "channels_last": channels_last,
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
        # Of ctx.needs_input_grad, the inputs by name.
        self._needed = cache(lambda needs: frozenset(n for n, i in self._gradients_at if needs[i]))
        self._everything = dict.fromkeys(self.outputs, tuple(gradients or {}))
        self._flow = flow
        if gradients:
            self._make_backward(backward, gradients, arrange, launch_bwd, shared)
            self._write_autograd(parse(backward), save or {})
            self._register_autograd()
        OPS[name] = self

    def _make_backward(
        self,
        backward: str,
        gradients: Mapping[str, Callable[[Arguments], Tensor]],
        arrange: Allocate | None,
        launch: Callable[[Launch, Arguments], None] | None,
        shared: dict[str, Any],
    ) -> None:
        results = " ".join(f"grad_{n}" for n in gradients)
        if len(gradients) == 1:
            schema, allocated = backward, [f"a.grad_{n} = {n}(a)" for n in gradients]
        else:
            schema = ", ".join((backward, *(f"bool need_{n}" for n in gradients)))
            allocated = [f"a.grad_{n} = {n}(a) if a.need_{n} else nothing(a)" for n in gradients]
        name = f"{self.name}_bwd"
        self.backward = Pass(
            name,
            schema,
            results,
            fills=results,
            allocate=written(f"allocate_{name}", "a", *allocated, nothing=_nothing, **gradients),
            arrange=arrange,
            launch=launch,
            finish=None,
            **shared,
        )
        if launch is None:
            define_kernel(name, schema, results)

    def _write_autograd(self, types: dict[str, str], save: Mapping[str, Callable[[Arguments], Any]]) -> None:
        """Write ``self._save(ctx, a, flow)``, which saves what backward takes, arguments of these types, and
        ``self.first_order(ctx, saved, *grads)``, the gradients of all arguments of the forward pass."""
        grads = [f"grad_{output}" for output in self.outputs]
        saved = [n for n, kind in types.items() if kind.startswith("Tensor") and n not in grads]
        options = [n for n in types if n not in (*saved, *grads)]
        saved.append("numbers")

        def values(names: list[str]) -> str:
            return "".join(f"save_{n}(a), " if n in save else f"a.{n}, " for n in names)

        self._save = written(
            f"save_for_{self.name}_bwd",
            "ctx, a, flow",
            f"ctx.told = flow, a.backend, a.served, ({values(options)})",
            "ctx.set_materialize_grads(False)",
            f"ctx.save_for_backward({values(saved)})",
            **{f"save_{n}": value for n, value in save.items()},
        )
        if self._flow is None:
            reached = f"given = {' or '.join(f'{grad} is not None' for grad in grads)}"
            needs = [f"need_{n} = needs[{i}] and given" for n, i in self._gradients_at]
        else:
            reached = f"reached = reach(flow, {', '.join(grads)})"
            needs = [f"need_{n} = needs[{i}] and {n!r} in reached" for n, i in self._gradients_at]
        results = ", ".join(f"grad_{n}" for n, _ in self._gradients_at)
        returned = ["None"] * (len(self.forward.names) + 1)  # and the backend that served
        for n, i in self._gradients_at:
            returned[i] = f"grad_{n} if need_{n} else None"
        self.first_order = written(
            f"{self.name}_first_order",
            f"ctx, saved, {', '.join(grads)}, *_",  # those of kept results are None
            "flow, backend, served, options = ctx.told",
            "needs = ctx.needs_input_grad",
            reached,
            *needs,
            f"if not ({' or '.join(f'need_{n}' for n, _ in self._gradients_at)}): return nothing",
            f"{', '.join(saved)}, = saved",
            f"{', '.join(options)}, = options" if options else "",
            f"{results} = run(({', '.join(self.backward.names)}), served)",
            f"return {', '.join(returned)}",
            reach=self._reached,
            run=self.backward,
            nothing=(None,) * len(returned),
        )

    def _register_autograd(self) -> None:
        function: Any = type(
            self.name,
            (torch.autograd.Function,),
            # Functions, not bound methods: compiled autograd traces nothing else.
            {
                "forward": staticmethod(lambda ctx, *args: self._forward(ctx, *args)),
                "backward": staticmethod(lambda ctx, *grads: self._backward(ctx, *grads)),
            },
        )
        # Skips what Function.apply does for torch.func: this is never called inside a transform.
        self._apply = vars(torch._C._FunctionBase)["apply"].__get__(None, function)
        for overload in filter(None, (self.forward.dispatched, self.forward.dispatched_open)):
            torch.library.register_autograd(overload, self._backward, setup_context=self._setup, lib=LIBRARY)

    def backend(self, function: str, *args: Any) -> str:
        """The backend that serves a call whose arguments begin so; errors name ``function``."""
        return self._backend(function, _backend.setting(), args)

    def _backend(self, function: str, asked: str, args: tuple[Any, ...]) -> str:
        first = args[self._decides[0]]
        dtype = first.dtype
        for place in self._decides[1:]:
            if args[place] is not None and args[place].dtype == torch.float64:
                dtype = torch.float64
        return _backend.resolve(function, asked, first.device, dtype, self.backends)

    def __call__(self, function: str, *args: Any) -> Any:
        """The outputs, by the backend that was asked for; errors name ``function``."""
        asked = _backend.setting()
        backend = self._backend(function, asked, args)
        if backend == "reference":
            return self._reference(*args)
        needed = False
        if torch.is_grad_enabled():
            for place in self._differentiable:
                tensor = args[place]
                if tensor is not None and tensor.requires_grad:
                    needed = True
                    break
        if self._keeps:
            args = (*args, needed)
        compiling = torch.compiler.is_compiling()
        if not compiling and forward_ad._current_level >= 0:
            self._refuse_tangents(function, args)
        if compiling or not self.forward.may_be_direct(backend, *args, None, asked):
            return self._dispatch(function, asked, args)
        if needed:
            return self._apply(*args, None, asked, backend)
        return self._outputs_of(self.forward.fill((*args, None, asked), backend).__dict__)

    def _refuse_tangents(self, function: str, args: tuple[Any, ...]) -> None:
        """The autograd of ``torch.library`` would drop them in silence."""
        if torch._C._are_functorch_transforms_active():
            return  # _dispatch raises the error for them
        for place in self._differentiable:
            if args[place] is not None and forward_ad.unpack_dual(args[place]).tangent is not None:
                raise RuntimeError(
                    f"{function}: forward-mode differentiation does not see through the kernels; for it use "
                    "camkernels.use_backend('reference')"
                )

    def _dispatch(self, function: str, asked: str, args: tuple[Any, ...]) -> Any:
        """The outputs, by way of the dispatcher, which has all results of the forward pass."""
        numbers = None
        if torch.compiler.is_compiling():
            transformed = torch._C._are_functorch_transforms_active()  # Dynamo traces the question
            args, numbers = self._with_open_numbers(args)
        else:
            transformed = torch._C._are_functorch_transforms_active() or any(map(_is_batched, args))
        if transformed:
            raise RuntimeError(
                f"{function}: torch.func transforms (grad, vjp, jvp, vmap ...) do not see through the "
                "kernels; inside them use camkernels.use_backend('reference')"
            )
        results = self.forward.dispatch((*args, numbers, asked))
        count = len(self.outputs)
        if count == len(self.forward.results):
            return results
        return results[0] if count == 1 else results[:count]

    def _with_open_numbers(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor | None]:
        places = [(i, isinstance(args[i], list)) for i in self._floats_at]
        numbers = open_numbers([x for i, many in places for x in (args[i] if many else [args[i]])])
        if numbers is None:
            return args, None
        changed = list(args)
        for i, many in places:
            changed[i] = [settled(x) for x in args[i]] if many else settled(args[i])
        return tuple(changed), numbers

    def _forward(self, ctx: Any, *args: Any) -> Any:
        """The outputs in eager mode; the last argument is the backend that serves."""
        inputs, served = args[:-1], args[-1]
        a = self.forward.fill(inputs, served)
        outputs = self._outputs_of(a.__dict__)
        if a.copied:  # backward gets what came
            a.__dict__.update(zip(self.forward.names, inputs, strict=True))
        # Without ``flow`` every output is differentiable: none has to be marked.
        self._keep(ctx, a, () if self._flow is None else self.outputs)
        return outputs

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """What backward needs of a call by way of the dispatcher."""
        results = output if isinstance(output, tuple) else (output,)
        found = dict(zip(self.forward.results, results, strict=True))
        found.update(zip(self.forward.names, inputs, strict=True))
        self._keep(ctx, SimpleNamespace(**found, served=None), self.forward.results)

    def _keep(self, ctx: Any, a: Arguments, returned: Sequence[str]) -> None:
        """What backward needs of a call. Results through which no needed gradient flows are marked."""
        found = a.__dict__
        flow = self._everything if self._flow is None else self._flow(a)
        a.needed = needed = self._needed(ctx.needs_input_grad)
        if returned:
            constant = (found[n] for n in returned if needed.isdisjoint(flow.get(n, ())))
            ctx.mark_non_differentiable(*constant)
        if a.numbers is not None:
            a.numbers = self._numbers_of_backward(a)
        self._save(ctx, a, flow)

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
        saved = ctx.saved_tensors
        # Under torch.compile AOTAutograd refuses double backward by itself.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.first_order(ctx, saved, *grads)
        if torch._C._dispatch_tls_is_dispatch_key_included("VmapMode"):
            # A batch of gradients would drop the anchors.
            raise RuntimeError(_NO_SECOND_ORDER.format(self.function))
        with torch.no_grad():
            found = self.first_order(ctx, saved, *grads)
        anchors = (*saved, *grads)  # whatever a second derivative could be asked for
        return tuple(g if g is None else _NoSecondOrder.apply(self.function, g, *anchors) for g in found)

    def _reached(self, flow: Mapping[str, Collection[str]], *grads: Tensor | None) -> set[str]:
        """The inputs that these gradients of the outputs reach."""
        given = zip(self.outputs, grads, strict=True)
        return {n for output, grad in given if grad is not None for n in flow.get(output, ())}
