"""What every function promises beside its values, for each call of calls.py: torch.library, torch.compile,
export, autocast, autograd, memory, devices."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from calls import CALLS, DIFFERENTIABLE, Call, as_tuple, passes, placed
from cases import BACKENDS, DEVICE, GPU, KERNEL_BACKENDS, Case, peak_bytes
from torch import Tensor
from torch.library import opcheck

import camkernels
from camkernels import (
    crop_and_zoom,
    focus_area,
    fused_cam,
    fused_cam_seeds,
    fused_local_activations,
    masked_max_pool,
    reference,
)
from camkernels._op import OPS, Op
from camkernels.losses import HomogeneousNegativeCAMLoss

# What the front does is the same for all kernels, so that Triton's interpreter, which is slow, need not run.
FRONT = KERNEL_BACKENDS if GPU else [("cpu", "cpu")]
SHARED = ("weight", "bias")  # by all images
by_call = pytest.mark.parametrize("call", CALLS, ids=str)


def small(device: str = "cpu", **changes: Any) -> Case:
    sizes = {"channels": 5, "classes": 4, "shape": (3, 4), "image_size": (5, 4)}
    return Case(**{"device": device, **sizes, **changes})


def half_channels_last(device: str, **changes: Any) -> Case:
    return small(device, dtype=torch.float16, layout="channels_last", **changes)


def random_like(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=draw).to(x.device, x.dtype) for x in tensors]


def gradients(
    inputs: Mapping[str, Tensor],
    outputs: tuple[Tensor, ...],
    make: Callable[[tuple[Tensor, ...]], list[Tensor]] = random_like,
    **options: Any,
) -> dict[str, Tensor | None]:
    """Of all that require one, by name, for the gradients of the outputs that ``make`` gives."""
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    reached = [(x, grad) for x, grad in zip(outputs, make(outputs), strict=True) if x.requires_grad]
    if not reached:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(
        *([x for x, _ in reached], list(leaves.values()), [grad for _, grad in reached]),
        **{"allow_unused": True, **options},
    )
    return dict(zip(leaves, found, strict=True))


def results(call: Call, case: Case, inputs: Mapping[str, Tensor], function: Any = None) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = as_tuple((function or call.bound(case))(**inputs))
    return [*(x.detach() for x in outputs), *gradients(inputs, outputs).values()]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        a is b or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(ours, theirs, strict=True)
    )


def detached(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in inputs.items()}


def test_every_function_is_in_the_table():
    functions = {name for name in camkernels.__all__ if inspect.isfunction(getattr(camkernels, name))}
    assert {call.name for call in CALLS} == functions


@pytest.mark.parametrize("call, backend, device", placed(CALLS, FRONT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_and_reference_agree(call, backend, device, dtype):
    """In values (how closely, each function's own tests say) and dtypes, and where a gradient goes."""
    case = small(device, dtype=dtype, weight_dtype=torch.float32)
    inputs = call.inputs(case)
    found = []
    for name in (backend, "reference"):
        with camkernels.use_backend(name):
            found.append(results(call, case, inputs))
    for ours, theirs in zip(*found, strict=True):
        if dtype == torch.float32 or ours is None or theirs is None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (ours is None) or ours.dtype == theirs.dtype


@pytest.mark.parametrize("call, backend, device", placed(CALLS))
def test_opcheck(call, backend, device):
    """Of each pass, with the arguments that a call gives it. The fake kernels are one for all backends."""
    case = (half_channels_last if backend == "triton" else small)(device, images=2)
    inputs = call.inputs(case)
    with camkernels.use_backend(backend), passes() as seen:
        gradients(inputs, call.outputs(case, inputs))
    assert [each.op for each in seen] == (
        [call.op.forward, call.op.backward] if call.leaves else [call.op.forward]
    )
    for each in seen:
        backward = each.op is not call.op.forward
        args = [x.detach() if backward and isinstance(x, Tensor) else x for x in each.args]
        opcheck(each.op.dispatched, args)


@pytest.mark.parametrize("call, backend, device", placed(CALLS, [("reference", DEVICE), *FRONT]))
def test_compiles_without_a_graph_break(call, backend, device):
    case = small(device)
    inputs, bound = call.inputs(case), call.bound(case)
    torch.compiler.reset()
    with camkernels.use_backend(backend):
        # Of plain PyTorch the tracing is all that could fail.
        compiler = "eager" if backend == "reference" else "aot_eager"
        compiled = torch.compile(lambda **tensors: bound(**tensors), fullgraph=True, backend=compiler)
        found, truth = results(call, case, inputs, compiled), results(call, case, inputs)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("name", sorted({call.name for call in CALLS}))
def test_compiles_with_inductor_for_any_batch(name):
    """One graph for all sizes, some of which are equal by chance."""
    calls = [(call, call.bound(small(DEVICE))) for call in CALLS if call.name == name]

    def all_outputs(each):
        pairs = zip(calls, each, strict=True)
        return tuple(x for (_, bound), inputs in pairs for x in as_tuple(bound(**inputs)))

    torch.compiler.reset()
    compiled = torch.compile(all_outputs, fullgraph=True, dynamic=True)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        for images in (2, 3, 5):
            each = [call.inputs(small(DEVICE, images=images)) for call, _ in calls]
            tensors = {f"{i} {name}": x for i, inputs in enumerate(each) for name, x in inputs.items()}
            ours, theirs = compiled(each), all_outputs(each)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(gradients(tensors, ours), gradients(tensors, theirs))


def test_compiled_seeds_draw_their_own_noise():
    features, weight, target = small(DEVICE).features(), small(DEVICE).weight(), small(DEVICE).target()
    features[:] = features[:, :, :1, :1]  # of a constant map ...
    features[:, :, -1, -1] += 100 * weight[target]  # ... and one pixel nothing is left but noise
    torch.compiler.reset()
    compiled = torch.compile(
        lambda: fused_cam_seeds(-features, weight, target, 6).indices, fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(compiled(), compiled())


def test_a_change_of_backend_reaches_compiled_code():
    features, weight, target = small(DEVICE).features(), small(DEVICE).weight(), small(DEVICE).target()
    torch.compiler.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(lambda: fused_cam(features, weight, target), backend=record)
    for backend in ("auto", "reference"):
        with camkernels.use_backend(backend):
            compiled()
    assert ["camkernels" in graph for graph in graphs] == [True, False]


class Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return as_tuple(self.function(**inputs))


@by_call
@pytest.mark.parametrize("dynamic", [False, True])
def test_exports(call, dynamic):
    inputs, module = detached(call.inputs(small(DEVICE))), Module(call.bound(small(DEVICE)))
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {name: None if name in SHARED else {0: batch} for name in inputs}
    program = torch.export.export(module, (inputs,), dynamic_shapes=(shapes,) if dynamic else None)
    assert f"camkernels.{call.op.name}_fwd" in str(program.graph)
    other = detached(call.inputs(small(DEVICE, images=5 if dynamic else 3, seed=1)))
    assert equal(program.module()(other), module(other))


@pytest.mark.parametrize("call, backend, device", placed(CALLS, [("reference", DEVICE), *FRONT]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(call, backend, device, dtype):
    case = small(device, dtype=dtype, weight_dtype=torch.float32)
    inputs = call.inputs(case)
    with camkernels.use_backend(backend):
        plain = results(call, case, inputs)
        with torch.autocast(device, dtype=torch.bfloat16):
            outputs = call.outputs(case, inputs)
        found = [*outputs, *gradients(inputs, outputs).values()]
    assert equal(found, plain)


@pytest.mark.parametrize("call, backend, device", placed(CALLS, BACKENDS))
def test_no_image_at_all(call, backend, device):
    """A loss is 0, gradients of what all images share are 0, the others have no element. Under this setting
    PyTorch fills what is allocated with NaN."""
    case = small(device, images=0)
    inputs = call.inputs(case)
    torch.use_deterministic_algorithms(True)
    try:
        with camkernels.use_backend(backend):
            outputs = call.outputs(case, inputs)
            grads = gradients(inputs, outputs)
    finally:
        torch.use_deterministic_algorithms(False)
    one = call.outputs(small(device), call.inputs(small(device)))
    assert [x.shape for x in outputs] == [(0, *x.shape[1:]) if x.dim() else () for x in one]
    assert {n: x.shape for n, x in grads.items()} == {n: inputs[n].shape for n in call.leaves}
    assert not any(x.any() for x in (*outputs, *grads.values()))


@pytest.mark.parametrize("call, backend, device", placed(CALLS, [("reference", DEVICE), *FRONT]))
def test_results_require_grad_only_where_an_input_does(call, backend, device):
    """The reference, where PyTorch decides it, says which."""
    case = small(device)
    inputs = detached(call.inputs(case))

    def requires_grad(name, *leaves):
        given = {n: x.clone().requires_grad_(n in leaves) for n, x in inputs.items()}
        with camkernels.use_backend(name):
            return [x.requires_grad for x in call.outputs(case, given)]

    assert not any(requires_grad(backend))
    assert not any(
        requires_grad(backend, *(n for n in inputs if n not in call.leaves and inputs[n].is_floating_point()))
    )
    for leaf in call.leaves:
        assert any(requires_grad(backend, leaf))
        assert requires_grad(backend, leaf) == requires_grad("reference", leaf)
        with torch.no_grad():
            assert not any(requires_grad(backend, leaf))


@pytest.mark.parametrize("call, backend, device", placed(CALLS, FRONT))
def test_in_inference_mode(call, backend, device):
    case = small(device)
    with camkernels.use_backend(backend):
        plain = call.outputs(case, call.inputs(case))
        with torch.inference_mode():
            found = call.outputs(case, call.inputs(case))
    assert all(x.is_inference() for x in found)
    assert equal(found, plain)


@pytest.mark.parametrize("call, backend, device", placed(CALLS, FRONT))
def test_without_grad_mode_nothing_but_the_results_is_made(call, backend, device):
    """Nearly: extrema and partial sums are no maps."""
    case = small(device, images=4, channels=8, classes=40, shape=(24, 24), image_size=(48, 48))
    inputs = call.inputs(case)
    with camkernels.use_backend(backend), torch.no_grad():
        call.outputs(case, inputs)  # what is made once, at the first call
        most, outputs = peak_bytes(lambda: call.outputs(case, inputs), device)
    assert most <= 1.05 * sum(x.numel() * x.element_size() for x in outputs) + 8192


@pytest.mark.parametrize("call, backend, device", placed(DIFFERENTIABLE, [("reference", DEVICE), *FRONT]))
def test_double_backward(call, backend, device):
    """Kernels refuse, also where the gradient is linear in what came; the reference has it."""
    case = small(device)
    for leaf in call.leaves:
        inputs = {n: x.requires_grad_(n == leaf) for n, x in detached(call.inputs(case)).items()}
        with camkernels.use_backend(backend):
            outputs = [x for x in call.outputs(case, inputs) if x.requires_grad]
        given = [torch.ones_like(x, requires_grad=True) for x in outputs]
        (grad,) = torch.autograd.grad(outputs, inputs[leaf], given, create_graph=True)
        if backend == "reference":
            again = torch.autograd.grad(grad.square().sum(), given, allow_unused=True)
            assert any(x is not None for x in again)
        else:
            message = f"{call.name}: there is no double backward; backend 'reference' has one"
            with pytest.raises(RuntimeError, match=message):
                grad.sum().backward()


@pytest.mark.parametrize("call, backend, device", placed(DIFFERENTIABLE, FRONT))
def test_backward_uses_the_backend_of_its_forward(call, backend, device):
    case = small(device)
    inputs = call.inputs(case)
    with camkernels.use_backend(backend):
        outputs = call.outputs(case, inputs)
    with camkernels.use_backend("reference"), passes() as seen:
        gradients(inputs, outputs)
    assert [(each.op.name, each.values.served) for each in seen] == [(f"{call.op.name}_bwd", backend)]


@pytest.mark.parametrize("call, backend, device", placed(DIFFERENTIABLE))
def test_gradients_only_where_asked_for(call, backend, device):
    """Each alone is the one of all together, and the others are not even made."""
    case = small(device)
    with camkernels.use_backend(backend):
        inputs = call.inputs(case)
        together = gradients(inputs, call.outputs(case, inputs))
        for leaf in call.leaves if len(call.leaves) > 1 else ():
            inputs = {n: x.requires_grad_(n == leaf) for n, x in detached(call.inputs(case)).items()}
            with passes() as seen:
                alone = gradients(inputs, call.outputs(case, inputs))
            assert torch.equal(alone[leaf], together[leaf])
            made = {name for name in seen[-1].op.results if getattr(seen[-1].values, name).numel()}
            assert made == {f"grad_{leaf}"}


@pytest.mark.parametrize("call, backend, device", placed(DIFFERENTIABLE))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_gradients_lie_anywhere(call, backend, device, layout):
    """Every second element of something, transposed, channels last, expanded as of a sum. Those of the inputs
    lie as they do. Backward may run many times."""
    case = small(device, layout=layout)
    inputs = call.inputs(case)
    with camkernels.use_backend(backend):
        outputs = call.outputs(case, inputs)

        def found(lay_out):
            grads = gradients(
                inputs, outputs, lambda x: [lay_out(g) for g in random_like(x)], retain_graph=True
            )
            return {name: (x, x.stride()) for name, x in grads.items()}

        plain = found(lambda x: x)
        assert {name: stride for name, (_, stride) in plain.items()} == {
            name: inputs[name].stride() for name in call.leaves
        }
        for lay_out in (
            lambda x: x,
            lambda x: torch.stack([x, x + 1], -1)[..., 0],
            lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
            lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
        ):
            for name, (grad, stride) in found(lay_out).items():
                assert torch.equal(grad, plain[name][0])
                assert stride == plain[name][1]
        ones, expanded = (
            found(torch.ones_like),
            found(lambda x: torch.ones((), device=device).expand(x.shape)),
        )
    assert all(torch.equal(grad, expanded[name][0]) for name, (grad, _) in ones.items())


@pytest.mark.parametrize("call, backend, device", placed(CALLS, BACKENDS))
def test_inputs_and_outputs_are_left_alone(call, backend, device):
    case = small(device, maps="ties")
    inputs = call.inputs(case)
    with camkernels.use_backend(backend):
        before, versions = (
            [x.detach().clone() for x in inputs.values()],
            [x._version for x in inputs.values()],
        )
        outputs = call.outputs(case, inputs)
        given = random_like(outputs)
        before += [x.detach().clone() for x in (*outputs, *given)]
        gradients(inputs, outputs, lambda _: given)
    after = [*inputs.values(), *outputs, *given]
    assert equal(before, after)
    assert [x._version for x in inputs.values()] == versions


@pytest.mark.parametrize("call, backend, device", placed(CALLS))
def test_deterministic_and_everything_is_written(call, backend, device):
    """Run to run, and with any number of threads; what is kept for backward, too. Under this setting PyTorch
    fills what is allocated with NaN, integers with their largest. Images share classes."""
    sizes = {"images": 4, "classes": 3, "shape": (13, 17)} if (backend, device) != ("triton", "cpu") else {}
    cases = [half_channels_last(device, **sizes), *([small(device, **sizes)] if sizes else [])]

    def everything():
        with camkernels.use_backend(backend), passes() as seen:
            for case in cases:
                inputs = call.inputs(case)
                gradients(inputs, call.outputs(case, inputs))
                # Autograd would hide another dtype, for it converts what it is given.
                made = {n: getattr(seen[-1].values, f"grad_{n}").dtype for n in call.leaves if n != "bias"}
                assert made == {n: inputs[n].dtype for n in made}
        return {f"{i} {n}": getattr(x.values, n) for i, x in enumerate(seen) for n in x.op.results}

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        plainly = everything()
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(5)
        again = everything()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    for name, found in plainly.items():
        assert not found.isnan().any(), name
        assert torch.equal(found, again[name]), name


# Beside inputs and outputs: extrema, maps, which classifier won (a byte each), which pixel is the largest.
KEPT = {
    "fused_cam-one-class": [("float32", [3, 1, 2])],
    "fused_cam-raw": [],
    "fused_cam_erase-hard": [("float32", [3, 1, 2])],
    "fused_cam_erase-soft": [("float32", [3, 1, 2])],
    "fused_cam_seeds-own": [("float32", [3, 1, 2])],
    "fused_cam_transform_mse-flip": [("float32", [3, 4, 12])],
    "fused_cam_transform_mse-nearest": [("float32", [3, 4, 24])],
    "fused_negative_cam_loss-mse": [("float32", [3, 2, 12]), ("int32", [3]), ("int32", [3, 2])],
    "fused_negative_cam_loss-uniform": [("float32", [3, 2, 12]), ("int32", [3]), ("int32", [3, 2])],
    "fused_local_activations": [("int32", [3, 3, 4]), ("uint8", [3, 4, 3, 4])],
    "local_level_loss": [],
    "masked_max_pool": [("int32", [3, 5])],
    "crop_and_zoom": [],
    "stochastic_consistency-all": [("float32", []), *[("int64", [3])] * 3],
}
LET_GO = {"fused_cam_erase-hard": "images", "masked_max_pool": "features", "crop_and_zoom": "images"}


@pytest.mark.parametrize(
    "call, backend, device", placed([call for call in DIFFERENTIABLE if str(call) in KEPT], FRONT)
)
def test_what_is_kept_for_backward(call, backend, device):
    inputs, saved = call.inputs(small(device)), []
    with (
        camkernels.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        outputs = call.outputs(small(device), inputs)
    known = {x.data_ptr() for x in (*inputs.values(), *outputs)}
    found = [(str(x.dtype)[6:], list(x.shape)) for x in saved if x.numel() and x.data_ptr() not in known]
    assert sorted(found) == KEPT[str(call)]
    if str(call) in LET_GO:
        assert inputs[LET_GO[str(call)]].data_ptr() not in {x.data_ptr() for x in saved}


@pytest.mark.parametrize("backend, device", FRONT)
@pytest.mark.parametrize("kind", ["mse", "uniform"])
def test_peak_memory_of_negatives(backend, device, kind):
    """Gradients and the chosen maps once, not those of all classes."""
    call = next(call for call in CALLS if str(call) == f"fused_negative_cam_loss-{kind}")
    sizes = {"images": 32, "channels": 1024} if device == "cuda" else {"images": 4, "channels": 32}
    case = small(device, classes=200, shape=(14, 14), **sizes)
    inputs = call.inputs(case)
    backend = "triton" if backend == "cuda" else backend
    with camkernels.use_backend(backend):
        results(call, case, inputs)  # what is made once, at the first call
        most, (_, *grads) = peak_bytes(lambda: results(call, case, inputs), device)
    maps = case.images * (case.classes // 2) * 14 * 14 * 4
    assert maps < most <= 1.05 * (maps + sum(x.numel() * x.element_size() for x in grads))


@by_call
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_meta_tensors_give_shapes(call, layout):
    """Memory formats and dtypes, too."""
    case = small(dtype=torch.bfloat16, layout=layout, weight_dtype=torch.float32)
    inputs = call.inputs(case)
    on_meta = {n: x.detach().to("meta").requires_grad_(x.requires_grad) for n, x in inputs.items()}
    found = results(call, replace(case, device="meta"), on_meta)
    assert {x.device.type for x in found} == {"meta"}
    described = [
        [(x.shape, x.dtype, x.stride()) for x in each] for each in (found, results(call, case, inputs))
    ]
    assert described[0] == described[1]


def test_more_than_int32_elements_are_addressed_in_64_bits():
    """The last of five images begins at element 2.1e9; pages that nobody writes take no memory."""
    images, channels, side = 5, 1024, 724
    features = torch.empty(images, channels, side, side, dtype=torch.float16)
    assert features[-1].storage_offset() > 2**31 - 2**20
    assert features.numel() > 2**31
    draw = torch.Generator().manual_seed(0)
    features[-1, :, -1, -8:] = torch.randn(channels, 8, generator=draw).half()
    weight = torch.randn(2, channels, generator=draw)
    cam = fused_cam(features, weight, torch.tensor([0, 0, 0, 0, 1]), normalize=False)
    truth = weight[1].double() @ features[-1, :, -1, -8:].double()
    assert torch.allclose(cam[-1, -1, -8:].double(), truth, rtol=2e-3, atol=2e-2)

    # The other pixels are all 0, in map and channel sum.
    criterion = HomogeneousNegativeCAMLoss(num_negatives=1)
    loss = criterion(features, weight, torch.zeros(images, dtype=torch.int64))
    assert torch.allclose(loss.double(), truth.square().sum() / (images * side**2), rtol=1e-5)
    assert criterion.positive_share.item() == pytest.approx((truth > 0).sum().item() / (images * side**2))
    mask, coverage = focus_area(features)
    heat = features[-1, :, -1, -8:].double().sum(0)
    assert torch.equal(mask[-1, -1, -8:], heat > heat.sum() / side**2)
    assert coverage.tolist() == pytest.approx([0, 0, 0, 0, mask[-1].sum().item() / side**2])

    pooled = masked_max_pool(features, mask)
    attended = features[-1, :, -1, -8:] * mask[-1, -1, -8:]
    assert torch.equal(pooled[-1], attended.amax(-1).clamp_min(0))
    assert not pooled[:-1].any()
    activations, _ = fused_local_activations(features, weight[None])
    assert torch.allclose(activations[-1, 1, -1, -8:].double(), truth, rtol=2e-3, atol=2e-2)
    corner = torch.tensor([1 - 8 / side, 1 - 1 / side, 1, 1]).expand(images, 4)
    zoomed = crop_and_zoom(features, corner, (1, 8))
    assert torch.allclose(zoomed[-1, :, 0], features[-1, :, -1, -8:], rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("call, backend, device", placed(CALLS, [("triton", "cuda"), ("cuda", "cuda")]))
class TestOnAGpu:
    @pytest.mark.parametrize("shape", [(7, 7), (33, 40)])
    def test_nothing_synchronises(self, call, backend, device, shape):
        case = small(device, shape=shape)
        inputs = call.inputs(case)
        with camkernels.use_backend(backend):
            results(call, case, inputs)
            torch.cuda.set_sync_debug_mode("error")
            try:
                results(call, case, inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("shape", [(7, 7), (177, 177)])
    def test_cuda_graph(self, call, backend, device, shape):
        """For the large map the CUDA kernel of seeds has scratch memory."""
        case = small(device, shape=shape, channels=64 if shape == (7, 7) else 8, maps="ties")
        inputs = call.inputs(case)
        with camkernels.use_backend(backend):
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                results(call, case, inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = results(call, case, inputs)
            with torch.no_grad():
                for name, fresh in call.inputs(replace(case, seed=1)).items():
                    inputs[name].copy_(fresh)
            graph.replay()
            assert equal(captured, results(call, case, inputs))

    def test_current_stream(self, call, backend, device):
        case = small(device, images=64, channels=256, shape=(14, 14))
        inputs, stream = detached(call.inputs(case)), torch.cuda.Stream()
        late = detached(call.inputs(replace(case, seed=1)))
        with camkernels.use_backend(backend):
            expected = call.outputs(case, late)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
                for name, fresh in late.items():
                    inputs[name].copy_(fresh)
                found = call.outputs(case, inputs)
            stream.synchronize()
        assert equal(list(found), list(expected))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_second_device(self, call, backend, device):
        found = []
        for place, name in (("cuda:1", backend), ("cpu", "reference")):
            case = small(place, maps="ties")
            with camkernels.use_backend(name):
                found.append(results(call, case, call.inputs(case)))
        for ours, theirs in zip(*found, strict=True):
            assert ours is None or ours.device.index == 1
            torch.testing.assert_close(ours and ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


# Kernels of the forward pass, a loss's sum among them.
LAUNCHES = {
    "fused_cam_erase-hard": {"cuda": 1, "triton": 2},
    "fused_cam_seeds-own": {"cuda": 1, "triton": 3},
    "fused_negative_cam_loss-mse": {"triton": 5},  # two of them for the sums of the maps
    "fused_negative_cam_loss-shown": {"triton": 3},
    "focus_area": {"triton": 1},
    "fused_local_activations": {"triton": 1},
    "otsu_mask": {"triton": 1},
    "masked_max_pool": {"triton": 1},
    "attention_boxes": {"triton": 1},
    "crop_and_zoom": {"triton": 1},
}
ONE_IN_BACKWARD = ("masked_max_pool", "crop_and_zoom", "local_level_loss")
COUNTED = [call for call in CALLS if str(call) in (*LAUNCHES, *ONE_IN_BACKWARD)]


def launches(function: Callable[[], Any]) -> int:
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("call, backend, device", placed(COUNTED, [("triton", "cuda"), ("cuda", "cuda")]))
def test_launches(call, backend, device):
    inputs = call.inputs(small(device))
    with camkernels.use_backend(backend):
        if str(call) in LAUNCHES:
            count = launches(lambda: call.outputs(small(device), inputs))
            assert count == LAUNCHES[str(call)][backend]
        if str(call) in ONE_IN_BACKWARD:
            outputs = call.outputs(small(device), inputs)
            given = random_like(outputs)
            assert launches(lambda: gradients(inputs, outputs, lambda _: given, retain_graph=True)) == 1


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
class TestSeedsOnAGpu:
    def test_drawing_noise_does_not_synchronise(self, backend):
        case, generator = Case(device="cuda"), torch.Generator("cuda").manual_seed(0)
        tensors = case.features(), case.weight(), case.target()
        with camkernels.use_backend(backend):
            fused_cam_seeds(*tensors, 100)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for given in (None, generator):
                    fused_cam_seeds(*tensors, 100, generator=given)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("shape, num_seeds", [((64, 64), 1024), ((177, 177), 300)])
    def test_many_seeds_of_large_maps(self, backend, shape, num_seeds, layout):
        """In one block's shared memory, and in scratch memory. Integers in the features: maps agree."""
        case = Case(device="cuda", shape=shape, channels=8, maps="ties", layout=layout)
        tensors = case.features(), case.weight(), case.target()
        noise = torch.rand((case.images, shape[0] * shape[1]), generator=case.generator())
        with camkernels.use_backend(backend):
            found = fused_cam_seeds(*tensors, num_seeds, threshold=0.25, noise=noise.to("cuda"))
        on_host = [x.cpu() for x in tensors]
        truth = reference.cam_seeds(*on_host, num_seeds, threshold=0.25, noise=noise)
        assert truth[2].min() > num_seeds
        for ours, theirs in zip(found[:3], truth[:3], strict=True):
            assert torch.equal(ours.cpu(), theirs)


def test_the_lines_written_for_an_op_can_be_read():
    assert "need_features = needs[0] and given" in inspect.getsource(OPS["cam"].first_order)


@pytest.mark.parametrize("taken", ["a", "flow", "numbers", "copied", "needed", "backend"])
def test_arguments_of_an_op_leave_the_written_lines_their_names(taken):
    with pytest.raises(ValueError, match=f"toy: no argument of an op may be called {taken}"):
        Op("toy", f"int {taken}", outputs="x", allocate=lambda a: None, reference=lambda x: x)
