"""torch.compile, torch.func, export and dispatch modes: each rule for every function."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import CALLS, DIFFERENTIABLE, Call, as_tuple, each, loss_of
from cases import Case
from torch._dynamo.testing import CompileCounter

import camkernels
from camkernels.transforms import Affine, Scale, Translate

CASE = Case(images=3, channels=5, classes=4, shape=(4, 6), image_size=(9, 11))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class TestTorchFunc:
    """Kernels are opaque to it: what goes through them is an error, never a gradient that misses a part."""

    @each(DIFFERENTIABLE)
    @pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "compiled grad"])
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
    def test_an_error_names_function_and_remedy(self, call, transform):
        inputs = {name: x.detach() for name, x in call.inputs(CASE).items()}
        leaf = call.leaves[0]

        def loss(value):
            return value.sum() + loss_of(call, CASE, **{**inputs, leaf: value})

        run = {
            "grad": lambda x: torch.func.grad(loss)(x),
            "jvp": lambda x: torch.func.jvp(loss, (x,), (x,)),
            "vmap": lambda x: torch.vmap(loss)(torch.stack([x, x])),
            "compiled grad": torch.compile(torch.func.grad(loss), backend="eager", fullgraph=True),
        }[transform]
        with pytest.raises(Exception, match=rf"{call.name}: torch\.func.*use_backend\('reference'\)"):
            run(inputs[leaf])

    @each(DIFFERENTIABLE)
    def test_backend_reference_has_the_gradient(self, call):
        inputs = call.inputs(CASE)
        leaf = call.leaves[0]
        truth = torch.autograd.grad(loss_of(call, CASE, **inputs), inputs[leaf])[0]
        plain = {name: x.detach() for name, x in inputs.items()}
        with camkernels.use_backend("reference"):
            grad = torch.compile(
                torch.func.grad(lambda x: loss_of(call, CASE, **{**plain, leaf: x})), backend="aot_eager"
            )(plain[leaf])
        assert torch.allclose(grad, truth, rtol=1e-3, atol=1e-4 * truth.abs().max().item())


FLOATS = [
    ("fused_cam-one-class", "eps"),
    ("fused_cam_erase-hard", "threshold"),
    ("fused_cam_erase-soft", "sharpness"),
    ("fused_cam_erase-soft", "threshold"),
    ("fused_cam_erase-soft", "fill"),
    ("fused_cam_erase-soft", "eps"),
    ("fused_cam_seeds-own", "threshold"),
    ("fused_cam_seeds-own", "eps"),
    ("fused_negative_cam_loss-mse", "level"),
    ("fused_negative_cam_loss-uniform", "temperature"),
    ("fused_cam_transform_mse-shift", "dx"),
    ("fused_cam_transform_mse-shift", "dy"),
]
MADE = {  # an option that is not the number itself
    "fill": lambda value: {"fill": (value,) * 3},
    "dx": lambda value: {"transform": Translate(value, 0.25)},
    "dy": lambda value: {"transform": Translate(0.25, value)},
}
BY_ID = {str(call): call for call in CALLS}
VALUES = (0.3, 0.45, 0.2, 0.15, 0.4)


class TestFloatOptions:
    """A number may be another one at each call, such as a schedule's, and may be used elsewhere too."""

    @pytest.mark.parametrize("name, option", FLOATS)
    def test_values_and_gradients_follow_it(self, name, option):
        call = BY_ID[name]
        inputs = call.inputs(CASE)
        leaves = [inputs[leaf] for leaf in call.leaves]

        def loss(s):
            options = MADE.get(option, lambda value: {option: value})(2 * s)
            outputs = as_tuple(call.bound(CASE)(**inputs, **options))
            return s * sum((x.float() ** 2).sum() for x in outputs if x.is_floating_point())

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for s in VALUES:
            for ours, truth in zip(
                (compiled(s), *torch.autograd.grad(compiled(s), leaves)),
                (loss(s), *torch.autograd.grad(loss(s), leaves)),
                strict=True,
            ):
                assert torch.allclose(ours, truth, rtol=1e-4, atol=1e-5), s

    def test_every_float_option_is_here(self):
        """Of every declaration; what a public function fixes by itself is no option."""
        found = {(op.function, name) for op in camkernels._op.OPS.values() for name in op.forward.floats}
        tested = {(BY_ID[name].name, option) for name, option in FLOATS}
        assert found == tested

    def test_constants_stay_constants(self):
        """Of options that never change there is no tensor, which would keep CUDA graphs away."""
        inputs = CASE.features(), CASE.weight(), CASE.target(), CASE.pictures()
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph

        torch.compile(lambda *x: camkernels.fused_cam_erase(*x, threshold=0.6), backend=backend)(*inputs)
        (op,) = (n for n in graphs[0].graph.nodes if "cam_erase_fwd" in str(n.target))
        assert 0.6 in op.args
        assert "zeros" not in graphs[0].code

    def test_the_default_device_is_nothing_to_them(self):
        inputs = CASE.features(), CASE.weight(), CASE.target(), CASE.pictures()

        def erase(threshold):
            return camkernels.fused_cam_erase(*inputs, threshold=threshold).erased

        compiled = torch.compile(erase, backend="aot_eager", dynamic=True, fullgraph=True)
        with torch.device("meta"):
            for threshold in (0.5, 0.6):
                assert torch.equal(compiled(threshold), erase(threshold))

    def test_in_another_process_with_the_disk_cache(self, tmp_path):
        program = (
            "import torch, camkernels\n"
            "torch.manual_seed(0)\n"
            "f, w, t = torch.randn(2, 3, 4, 4), torch.randn(5, 3), torch.tensor([0, 1])\n"
            "def loss(s):\n"
            "    return s * camkernels.fused_negative_cam_loss(f, w, t, kind='uniform', temperature=2 * s)\n"
            "compiled = torch.compile(loss)\n"
            "for s in (0.3, 0.45, 0.6, 0.75):\n"
            "    assert torch.allclose(compiled(s), loss(s)), s\n"
        )
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        for _ in range(2):
            subprocess.run([sys.executable, "-c", program], check=True, env=environment)


# Twelve values of each size, all of them at once.
SIZES = [
    Case(images=n, channels=5, classes=classes, shape=shape, image_size=(2 * shape[0] + 1, 3 * shape[1]))
    for n, classes, shape in zip(
        (3, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13),
        (4, 7, 3, 5, 9, 6, 12, 8, 15, 10, 13, 11),
        (
            (4, 6),
            (3, 5),
            (5, 7),
            (9, 4),
            (8, 8),
            (6, 12),
            (7, 3),
            (10, 10),
            (11, 9),
            (2, 13),
            (12, 2),
            (14, 14),
        ),
        strict=True,
    )
]


def sized(call: Call):
    """The function, with those of its options that count things made from the tensors' sizes."""

    def function(**tensors):
        options = dict(call.options)
        if call.name == "fused_cam_seeds":
            options["num_seeds"] = tensors["features"].shape[2]
        elif call.name == "fused_negative_cam_loss":
            options["num_negatives"] = tensors["weight"].shape[0] // 2
        elif call.name == "crop_and_zoom":
            options["size"] = tuple(tensors["images"].shape[2:])
        return getattr(camkernels, call.name)(**tensors, **options)

    return function


class TestSizes:
    @each(CALLS)
    def test_few_graphs_for_many_sizes(self, call):
        counter = CompileCounter()
        function = sized(call)
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        for case in SIZES:
            inputs = call.inputs(case)
            for ours, truth in zip(as_tuple(compiled(**inputs)), as_tuple(function(**inputs)), strict=True):
                assert torch.equal(ours, truth)
        assert counter.frame_count <= 3

    @each(CALLS)
    def test_export_with_open_sizes(self, call):
        class Module(torch.nn.Module):
            def forward(self, tensors):
                return as_tuple(sized(call)(**tensors))

        inputs = {name: x.detach() for name, x in call.inputs(CASE).items()}
        auto = torch.export.Dim.AUTO
        kept = {"weight": {0}, "bias": {0}}  # the classes
        shapes = {
            name: {d: auto for d in range(x.dim()) if d in kept.get(name, range(x.dim()))}
            for name, x in inputs.items()
        }
        if call.name == "fused_local_activations":
            shapes["weight"] = {}
        if call.name == "crop_and_zoom":
            shapes["boxes"] = {0: auto}
        program = torch.export.export(Module(), (inputs,), dynamic_shapes=(shapes,))
        other = call.inputs(replace(CASE, images=5, shape=(7, 3), seed=3))
        for ours, truth in zip(program.module()(other), as_tuple(sized(call)(**other)), strict=True):
            assert torch.equal(ours, truth)

    @each(CALLS)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
    def test_a_number_of_images_that_depends_on_data(self, call, layout):
        """As many rows as a mask keeps, chosen inside the graph."""
        case = replace(CASE, images=6, layout=layout)
        inputs = {name: x.detach() for name, x in call.inputs(case).items()}
        keep = torch.tensor([True, False, True, True, False, True])
        by_class = ("weight", "bias")

        def chosen(keep, **tensors):
            index = keep.nonzero().squeeze(1)
            return sized(call)(**{n: x if n in by_class else x[index] for n, x in tensors.items()})

        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            compiled = torch.compile(chosen, backend="aot_eager", fullgraph=True)
            found = as_tuple(compiled(keep, **inputs))
        for ours, truth in zip(found, as_tuple(chosen(keep, **inputs)), strict=True):
            assert torch.equal(ours, truth)


TARGET = CASE.target()
SAME = {
    "transform_mse": lambda f, w: camkernels.fused_cam_transform_mse(
        f, f, w, camkernels.transforms.HorizontalFlip()
    ),
    "erase": lambda f, w: camkernels.fused_cam_erase(f, w, TARGET, f, sharpness=3.0).erased.sum(),
    "seeds": lambda f, w: camkernels.fused_cam_seeds(
        f, w, TARGET, 2, seed_features=f.view_as(f), sampling="first"
    )
    .cam.square()
    .sum(),
    "consistency": lambda f, w: camkernels.losses.AttentionConsistencyLoss(
        [camkernels.transforms.HorizontalFlip(), camkernels.transforms.VerticalFlip()]
    )(f, [f, f], w).total,
    "pairwise": lambda f, w: camkernels.losses.PairwiseConsistencyLoss()(*[f.mean((2, 3)) @ w.T] * 3, TARGET),
    "negatives": lambda f, w: camkernels.fused_negative_cam_loss(f, w, TARGET, bias=w[:, 0]),
}


@pytest.mark.parametrize("name", SAME)
def test_one_tensor_in_two_places(name):
    leaves = [CASE.features().requires_grad_(), CASE.weight().requires_grad_()]
    compiled = torch.compile(SAME[name], backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves), leaves)
    truth = torch.autograd.grad(SAME[name](*leaves), leaves)
    for ours, theirs in zip(found, truth, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@each(DIFFERENTIABLE)
def test_a_batch_of_gradients(call):
    """``is_grads_batched``, as torch.autograd.functional.jacobian(vectorize=True) has it."""
    inputs = call.inputs(CASE)
    outputs = [x for x in call.outputs(CASE, inputs) if x.requires_grad]
    leaves = [inputs[name] for name in call.leaves]
    draw = CASE.generator()
    grads = [torch.randn((2, *x.shape), generator=draw) for x in outputs]
    many = torch.autograd.grad(
        outputs, leaves, grads, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    for row in range(2):
        one = torch.autograd.grad(
            outputs, leaves, [g[row] for g in grads], retain_graph=True, allow_unused=True
        )
        for ours, truth in zip(many, one, strict=True):
            assert (ours is None) == (truth is None)
            assert ours is None or torch.equal(ours[row], truth)


@each(CALLS)
def test_under_make_fx_and_fake_tensors(call):
    """No question about values, no error."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = {name: x.detach() for name, x in call.inputs(CASE).items()}
    truth = call.outputs(CASE, inputs)
    graph = make_fx(lambda tensors: call.outputs(CASE, tensors))(inputs)
    for ours, theirs in zip(graph(inputs), truth, strict=True):
        assert torch.equal(ours, theirs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # such as the matrix of a transform
        fakes = {name: mode.from_tensor(x) for name, x in inputs.items()}
        for ours, theirs in zip(call.outputs(CASE, fakes), truth, strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


# What torch itself does on the way to a package.
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize(
    "transform", [Scale(5), Affine([[0.9, 0.1, 0.0], [0.0, 1.0, 0.1]])], ids=["scale", "affine"]
)
def test_a_package_of_aot_inductor(transform, tmp_path):
    class Module(torch.nn.Module):
        def forward(self, features, features_t, weight):
            return camkernels.fused_cam_transform_mse(features, features_t, weight, transform)

    inputs = CASE.features(), replace(CASE, seed=1).features(), CASE.weight()
    program = torch.export.export(Module(), inputs)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    found = torch._inductor.aoti_load_package(path)(*inputs)
    assert torch.allclose(found, Module()(*inputs))


def test_imported_a_second_time():
    """In a process of its own: what was imported first is gone then, but torch keeps its libraries."""
    program = (
        "import importlib, sys, torch, camkernels\n"
        "f, w, t = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(5, 3), torch.tensor([0, 1])\n"
        "first = camkernels.fused_cam(f, w, t)\n"
        "importlib.reload(camkernels)\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'camkernels']:\n"
        "    del sys.modules[name]\n"
        "import camkernels\n"
        "again = camkernels.fused_cam(f, w, t)\n"
        "assert torch.equal(first, again)\n"
        "again.sum().backward()\n"
        "graph = torch.compile(camkernels.fused_cam, backend='aot_eager', fullgraph=True)\n"
        "assert torch.equal(graph(f, w, t), first)\n"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=True, cwd=Path(__file__).parent.parent
    )


OTHER_LAYOUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.flatten(1).to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
}


@each(CALLS)
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors)")  # PyTorch's: it calls them a prototype
def test_other_layouts_are_refused_in_words(call, layout):
    inputs = {name: x.detach() for name, x in call.inputs(CASE).items()}
    for name, tensor in inputs.items():
        if tensor.dim() < 2 or (layout == "mkldnn" and tensor.dtype != torch.float32):
            continue  # there is none
        if layout == "sparse_csr" and tensor.dim() != 2 and name == "weight":
            continue  # it has two dimensions, which for this weight is an error of its own
        with pytest.raises(TypeError, match=f"{call.name}: {name} is {layout}; it must be a dense tensor"):
            call.outputs(CASE, {**inputs, name: OTHER_LAYOUTS[layout](tensor)})
