"""``Pass``: one op of ``torch.library``, whose tensors are allocated here and filled by a backend's launcher.

A pass works on a namespace: it holds the arguments by name, then the tensors that the pass allocates. A
launcher takes from it what its own signature names:

    cpu, cuda  camkernels_cpp::<pass>, a C++ kernel under the key CPU or CUDA
    triton     camkernels.triton.<op>.<pass>, a Python function
"""

import importlib
import inspect
import linecache
import math
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from camkernels import _backend
from camkernels.reference.cam import accumulate_dtype as accumulate_dtype  # what kernels compute in

Arguments = SimpleNamespace  # the tensors and options of one call, by name
Allocate = Callable[[Arguments], Any]
CPP_SCHEMAS: dict[str, str] = {}  # of the C++ launchers, by name
CPP_LIBRARIES = {"cpu": "camkernels_cpp", "cuda": "camkernels_cpp"}


def _library(name: str) -> torch.library.Library:
    """A library to define ops in. What an earlier import of camkernels defined there is destroyed
    first: after a purge of ``sys.modules`` the package is imported once more in one process."""
    namespace = getattr(torch.ops, name)
    earlier = vars(namespace).get("library")
    if earlier is not None:
        earlier._destroy()
    library = torch.library.Library(name, "FRAGMENT")
    namespace.library = library
    return library


LIBRARY = _library("camkernels")
_CPP = _library("camkernels_cpp")  # filled by csrc/


def _bits(*keys: str) -> int:
    bits = 0
    for key in keys:
        bits |= torch._C.DispatchKeySet(torch._C._dispatch_key_parse(key)).raw_repr()
    return bits


# Keys of the dispatcher that this thread includes while something looks at the operations: a dispatch mode, a
# transform of torch.func, a trace.
_WATCHING = _bits(
    "Python",
    "PreDispatch",
    "PythonDispatcher",
    "Functionalize",
    "FuncTorchDynamicLayerFrontMode",
    "Tracer",
)
# All keys but those of an ordinary tensor, whose storage holds its values. One of them marks a subclass, a
# wrapper, a negated view or zeros without storage.
_OTHER_THAN_BYTES = ~_bits(
    "ADInplaceOrView",
    *(f"{kind}{device}" for kind in ("", "Autograd", "Autocast") for device in ("CPU", "CUDA", "XPU")),
)
_included, _keys = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_keys


def is_its_bytes(tensor: Tensor) -> bool:
    """Whether the tensor is an ordinary one, whose storage holds its values."""
    return _keys(tensor).raw_repr() & _OTHER_THAN_BYTES == 0


def is_watched() -> bool:
    """Whether something looks at the operations."""
    return _included().raw_repr() & _WATCHING != 0


def is_dense(tensor: Tensor, layout: torch.memory_format = torch.contiguous_format) -> bool:
    """Whether the tensor is contiguous in that layout, also where a trace has sizes that depend on data."""
    try:
        return tensor.is_contiguous(memory_format=layout)
    except Exception as error:
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true

        if not isinstance(error, GuardOnDataDependentSymNode):
            raise
        expected: int = 1
        inner_first = (1, 3, 2, 0) if layout == torch.channels_last else reversed(range(tensor.dim()))
        for dim in inner_first:
            if not statically_known_true(tensor.stride(dim) == expected):
                return False
            expected = expected * tensor.shape[dim]
        return True


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where the tensor lies so and not the plain way too (one channel, one pixel)."""
    if tensor.dim() == 4 and not is_dense(tensor) and is_dense(tensor, torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_like(tensor: Tensor) -> Tensor:
    """Dense, in the memory format of the tensor."""
    return torch.empty_like(tensor, memory_format=memory_format(tensor))


def empty_maps(origin: Tensor, channels_last: bool, *sizes: int) -> Tensor:
    """``[N, C, H, W]`` in that layout, in dtype and on device of ``origin``."""
    if not channels_last:
        return origin.new_empty(*sizes)
    return torch.empty(sizes, dtype=origin.dtype, device=origin.device, memory_format=torch.channels_last)


def like(name: str) -> Callable[[Arguments], Tensor]:
    """A gradient of the shape, dtype and memory format of that argument."""
    return lambda a: empty_like(getattr(a, name))


def per_class(a: Arguments) -> Tensor:
    """The gradient of a bias: one sum for each row of ``weight``, in the type that kernels compute in."""
    return a.weight.new_empty(a.weight.shape[:-1], dtype=accumulate_dtype(a.features.dtype))


def parse(arguments: str) -> dict[str, str]:
    """Types of the arguments of a schema, by name."""
    pairs = (argument.rsplit(" ", 1) for argument in arguments.split(", ") if argument)
    return {name: kind for kind, name in pairs}


def written(name: str, arguments: str, /, *lines: str, **known: Any) -> Callable[..., Any]:
    """A function of these lines, which know the names ``known``.

    What every call of an op does for each of its tensors is written out once, when the op is declared: on
    small tensors loops over their names take longer than the kernels.
    """
    source = "\n    ".join((f"def {name}({arguments}):", *filter(None, lines))) + "\n"
    file = f"<{name} of camkernels>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    exec(compile(source, file, "exec"), known)
    function: Callable[..., Any] = known[name]
    return function


def define_kernel(name: str, reads: str, writes: str) -> None:
    """Declare a launcher of the C++ backends: its arguments, then the tensors that it fills."""
    filled = (f"Tensor({chr(97 + i)}!) {output}" for i, output in enumerate(writes.split()))
    CPP_SCHEMAS[name] = f"{name}({', '.join((reads.replace('SymInt', 'int'), *filled))}) -> ()"
    _CPP.define(CPP_SCHEMAS[name])
    _CPP.impl(name, torch.library.fallthrough_kernel, "Autograd")  # a pass has autograd, not its launcher


@cache
def _launcher(backend: str, kernel: str) -> tuple[Callable[..., None], Callable[..., Any]]:
    """A backend's launcher, and what takes its arguments from a namespace."""
    if backend == "triton":
        launch = getattr(
            importlib.import_module(f"camkernels.triton.{kernel[:-4]}"), kernel
        )  # less _fwd or _bwd
        names: list[str] = list(inspect.signature(launch).parameters)
    else:
        overload = getattr(getattr(torch.ops, CPP_LIBRARIES[backend]), kernel).default
        names = [argument.name for argument in overload._schema.arguments]
        launch = overload._op
    return launch, itemgetter(*names)


def clear_caches() -> None:
    _launcher.cache_clear()


class Launch:
    """Starts kernels of one backend: ``launch("cam_bwd", a, normalize=True)``."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, kernel: str, a: Arguments, **changed: Any) -> None:
        launch, pick = _launcher(self.backend, kernel)
        launch(*pick({**a.__dict__, **changed} if changed else a.__dict__))


_LAUNCHES = {backend: Launch(backend) for backend in _backend.BACKENDS}


def _is_open(number: float) -> bool:
    """Whether torch.compile, which is tracing, keeps the number open: the graph is for other values, too.

    Dynamo shows such a number as a plain float. But of a constant it knows whether it equals another one. The
    sine hides what is known of the number's range.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    hidden, other = math.sin(math.atan(number)), 0.1234567
    return not (statically_known_true(hidden == other) or statically_known_true(hidden != other))


def settled(number: float) -> float:
    """What stands for a number that torch.compile keeps open and ``numbers`` holds: 0 only for 0."""
    return 1.0 if number else 0.0


def open_numbers(floats: list[float]) -> Tensor | None:
    """All of them in a tensor, if torch.compile keeps one of them open.

    An op's argument of type float would be fixed to its first value: some versions then compile anew for
    each other value, and some go on with the first one. Only a sum with a tensor stays open.
    """
    if not any(_is_open(number) for number in floats):
        return None
    zero = torch.zeros((), dtype=torch.float64, device="cpu")  # read by the host, whatever the default device
    return torch.stack([zero + number for number in floats])


def _make_dense(a: Arguments, name: str, channels_last: bool) -> None:
    tensor = getattr(a, name)
    if not (channels_last and memory_format(tensor) == torch.channels_last):
        setattr(a, name, tensor.contiguous())
        a.copied = True


class Pass:
    """One op of ``torch.library`` that allocates tensors and has a backend fill them.

    After its own arguments it takes ``numbers`` (None, or the values of all its options of type float) and
    ``backend``, the one asked for.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        results: str,
        *,
        fills: str,
        allocate: Allocate,
        arrange: Allocate | None,
        launch: Callable[[Launch, Arguments], None] | None,
        finish: Allocate | None,
        channels_last: str,
        backends: tuple[str, ...],
        suits_cuda: Callable[[Arguments], bool],
    ) -> None:
        self.name, self.backends = name, backends
        types = parse(arguments)
        self.floats = [n for n, kind in types.items() if kind in ("float", "float[]")]
        self.names = (*types, "numbers", "backend")
        self.results = results.split()
        self._fills = fills.split()
        self._finish, self._launch, self._suits_cuda = finish, launch, suits_cuda
        self._results_of = itemgetter(*self.results)
        tensors = [n for n, kind in types.items() if kind.startswith("Tensor")]
        given = {n: f"{n} is not None and " if types[n] == "Tensor?" else "" for n in tensors}
        self._prepare = written(
            f"prepare_{name}",
            f"is_dense, {', '.join(self.names)}",
            f"a = Arguments({', '.join(f'{n}={n}' for n in self.names)}, copied=False)",
            *(
                f"if {given[n]}not is_dense({n}): make_dense(a, {n!r}, {n in channels_last.split()})"
                for n in tensors
            ),
            "arrange(a)" if arrange else "",
            "allocate(a)",
            "return a",
            Arguments=Arguments,
            make_dense=_make_dense,
            arrange=arrange,
            allocate=allocate,
        )
        # Whether a call that is not compiled may bypass the dispatcher: nothing watches, and its tensors are
        # no more and no less than their bytes. Launchers of C++ kernels are ops, too, but they cannot leave
        # this to the dispatcher: for zeros that are not stored it would hand them one element, expanded.
        self.may_be_direct = written(
            f"{name}_may_be_direct",
            f"served, {', '.join(self.names)}",
            "if included().raw_repr() & WATCHING or served == 'meta': return False",
            *(
                f"if {given[n]}(type({n}) not in PLAIN or keys({n}).raw_repr() & OTHERS): return False"
                for n in tensors
            ),
            "return True",
            included=_included,
            keys=_keys,
            OTHERS=_OTHER_THAN_BYTES,
            PLAIN=(Tensor, Parameter),
            WATCHING=_WATCHING,
        )
        returned = ", ".join("Tensor" for _ in self.results)
        signature = f"({arguments}, Tensor? numbers, str backend) -> ({returned})"
        self.dispatched = self._define(name, signature, (torch.Tag.pt2_compliant_tag,))
        # A CUDA graph would go on with the numbers that it was captured with.
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
        self.dispatched_open: Any = self._define(f"{name}_open", signature, tags) if self.floats else None

    def _define(self, name: str, signature: str, tags: tuple[torch.Tag, ...]) -> Any:
        LIBRARY.define(name + signature, tags=tags)
        LIBRARY.impl(name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"camkernels::{name}", self._fake, lib=LIBRARY)
        return getattr(torch.ops.camkernels, name).default

    def dispatch(self, args: Sequence[Any]) -> Any:
        """The results, by way of the dispatcher."""
        return (self.dispatched if args[-2] is None else self.dispatched_open)(*args)

    def _finished(self, a: Arguments) -> Arguments:
        if self._finish is not None:
            self._finish(a)
        return a

    def _fake(self, *args: Any) -> Any:
        return self._results_of(self._finished(self._prepare(is_dense, *args)).__dict__)

    def _read_numbers(self, a: Arguments) -> None:
        values = iter(a.numbers.tolist())
        found = vars(a)
        for name in self.floats:
            many = isinstance(found[name], list)
            found[name] = [next(values) for _ in found[name]] if many else next(values)

    def __call__(self, args: Sequence[Any], backend: str | None) -> Any:
        """The results, by the shortest way; ``backend`` is the one that serves, where it is known."""
        if not torch.compiler.is_compiling():
            backend = backend or self._backend(args)
            if self.may_be_direct(backend, *args):
                return self._results_of(self.fill(args, backend).__dict__)
        return self.dispatch(args)

    def run(self, *args: Any) -> Any:
        """The results, by the backend that is asked for: what the dispatcher calls."""
        return self._results_of(self.fill(args, self._backend(args)).__dict__)

    def _backend(self, args: Sequence[Any]) -> str:
        first = args[0] if args[0] is not None else args[1]
        backend = _backend.resolve(self.name, args[-1], first.device, first.dtype, self.backends)
        if backend == "reference":  # a graph that was made where there were kernels
            raise RuntimeError(
                f"{self.name}: no backend here has kernels for {first.device} tensors of {first.dtype}; "
                "python -m camkernels doctor says why"
            )
        return backend

    def fill(self, args: Sequence[Any], backend: str) -> Arguments:
        """The arguments and results by name, the latter by that backend."""
        a = self._prepare(Tensor.is_contiguous, *args)
        a.served = backend  # as backward gets it; ``suits_cuda`` it asks for itself
        if a.numbers is not None:
            self._read_numbers(a)
        first = args[0] if args[0] is not None else args[1]
        if first.shape[0] == 0:  # no image: nothing to launch, gradients of parameters are zero
            for name in self._fills:
                getattr(a, name).zero_()
            return self._finished(a)
        if backend == "cuda" and a.backend == "auto" and not self._suits_cuda(a):
            unable = _backend.why_not("triton", first.device, first.dtype)
            backend = "triton" if unable is None else backend
        if self._launch is None:
            launch, pick = _launcher(backend, self.name)
            launch(*pick(a.__dict__))
        else:
            self._launch(_LAUNCHES[backend], a)
        return self._finished(a)
