"""What every op promises beside its values: torch.library, torch.compile, export, autocast, devices."""

from dataclasses import replace

import pytest
import torch
from cases import BACKENDS, DEVICE, GPU, KERNEL_BACKENDS, Case, run, without_cuda
from torch.library import opcheck

import camkernels
from camkernels import (
    _backend,
    crop_and_zoom,
    focus_area,
    fused_cam,
    fused_cam_erase,
    fused_cam_seeds,
    fused_cam_transform_mse,
    fused_local_activations,
    masked_max_pool,
    reference,
    stochastic_consistency,
)
from camkernels.losses import HomogeneousNegativeCAMLoss
from camkernels.transforms import Affine, HorizontalFlip, Rotate90, Scale, Translate


def erase_loss(features, weight, target, images, sharpness):
    erased, cam = fused_cam_erase(features, weight, target, images, sharpness=sharpness)
    return (erased * erased).mean() + (cam * cam).mean()


def erase_inputs(case):
    return [x.requires_grad_() for x in (case.features(), case.weight(), case.pictures())]


def consistency_of(vectors, target, **options):
    """CUDA C++ has no kernels of stochastic_consistency; under that backend another loss of the vectors."""
    if _backend.setting() == "cuda":
        return vectors.square().mean()
    return stochastic_consistency(vectors, target, **options)


def seeds_loss(features, weight, target, noise, seed_features=None):
    """Of vectors, map and the consistency of the vectors, all at once."""
    found = fused_cam_seeds(features, weight, target, 4, seed_features=seed_features, noise=noise)
    consistency = consistency_of(found.vectors, target)
    return found.vectors.square().mean() + found.cam.square().mean() + consistency


def seeds_inputs(case, own=True):
    """Features, weight and, where they are another tensor, seed_features; then target and noise."""
    leaves = [case.features(), case.weight()]
    if not own:
        leaves.append(replace(case, channels=3, seed=1).features())
    noise = torch.rand((case.images, case.shape[0] * case.shape[1]), generator=case.generator())
    return [x.requires_grad_() for x in leaves], case.target(), noise.to(case.device)


TRANSFORMS = {
    "flip": HorizontalFlip(),
    "quarter turn": Rotate90(1),
    "shift": Translate(0.3, -0.2),
    "affine": Affine([[0.9, 0.3, 0.1], [-0.2, 1.1, 0.0]]),
    "nearest": Scale(64),
    "bilinear": Scale(64, "bilinear"),
}


def on(device, transform):
    return Affine(transform.matrix.to(device)) if isinstance(transform, Affine) else transform


def transform_inputs(case, transform):
    """Maps of 3 x 4 and those that the transform makes of them."""
    shape_t = {Rotate90: (4, 3), Scale: (2, 3)}.get(type(transform), (3, 4))
    case = replace(case, shape=(3, 4))
    features_t = replace(case, shape=shape_t, seed=case.seed + 1).features()
    return [x.requires_grad_() for x in (case.features(), features_t, case.weight())]


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("maps", [1, 2, None])
def test_opcheck_of_cam(backend, device, normalize, maps):
    case = Case(device=device, channels=5, shape=(3, 4))
    target = None if maps is None else case.target(maps)
    bias = None if normalize else case.bias()
    forward = (case.features(), case.weight(), target, bias, normalize, 1e-8, backend)
    opcheck(torch.ops.camkernels.cam_fwd.default, forward)
    cam, _, extent = torch.ops.camkernels.cam_fwd(*forward)
    backward = (torch.rand_like(cam), case.features(), case.weight(), target, cam, extent, normalize, 1e-8)
    opcheck(torch.ops.camkernels.cam_bwd.default, (*backward, True, True, not normalize, backend))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("sharpness", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_of_cam_erase(backend, device, sharpness, dtype):
    case = Case(device=device, channels=5, shape=(3, 4), dtype=dtype)
    target, images = case.target(1), case.pictures()
    options = (0.7, sharpness, [0.0], False)
    opcheck(
        torch.ops.camkernels.cam_erase_fwd.default,
        (case.features(), case.weight(), target, images, *options, 1e-8, backend),
    )
    cam = torch.rand(3, 1, 3, 4, device=device)
    opcheck(
        torch.ops.camkernels.cam_erase_bwd.default,
        (
            torch.rand_like(images),
            cam,
            images if sharpness else None,
            cam,
            *options,
            True,
            bool(sharpness),
            backend,
        ),
    )


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_opcheck_of_cam_transform_mse(backend, device, kind):
    transform = TRANSFORMS[kind]
    case = Case(device=device, channels=3, classes=2, images=1, layout="channels_last")
    features, features_t, weight = (x.detach() for x in transform_inputs(case, transform))
    found = transform.resampling(3, 4)
    whole, fractions = found.flat() if found else ([], [])
    matrix = transform.matrix[None].to(device) if kind == "affine" else None
    comparison = {"nearest": 1, "bilinear": 2}.get(kind, 0)
    inputs = (features, features_t, weight, matrix)
    for keep in (False, True) if kind in ("flip", "nearest") else (True,):
        forward = (*inputs, whole, fractions, comparison, keep, backend)
        opcheck(torch.ops.camkernels.cam_transform_mse_fwd.default, forward)
    means, kept = torch.ops.camkernels.cam_transform_mse_fwd(*forward)
    needed = [[True, True, True], [False, True, False]][kind == "shift"]
    backward = (torch.rand_like(means), *inputs, kept, whole, fractions, comparison, *needed, backend)
    opcheck(torch.ops.camkernels.cam_transform_mse_bwd.default, backward)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype, layout", [(torch.float32, "contiguous"), (torch.float16, "channels_last")])
def test_opcheck_of_cam_seeds(backend, device, dtype, layout):
    case = Case(device=device, channels=5, shape=(3, 4), dtype=dtype, layout=layout)
    inputs, _, noise = seeds_inputs(case, own=False)
    features, weight, seed_features = (x.detach() for x in inputs)
    forward = (features, weight, case.target(1), seed_features)
    for keys in (noise, None) if layout == "contiguous" else (noise,):
        opcheck(torch.ops.camkernels.cam_seeds_fwd.default, (*forward, keys, 4, 0.7, 1e-8, backend))
    grad_vectors = torch.rand((3, 4, 3), device=device).to(dtype)
    indices = torch.tensor([[0, 3, 11, 3]] * 3, device=device)
    for add in (False, True):
        into = torch.ones_like(seed_features)
        opcheck(torch.ops.camkernels.cam_seeds_bwd.default, (into, grad_vectors, indices, add, backend))


@pytest.mark.parametrize("backend, device", without_cuda(KERNEL_BACKENDS))
@pytest.mark.parametrize("squared", [True, False])
def test_opcheck_of_stochastic_consistency(backend, device, squared):
    vectors = torch.randn((4, 2, 3), device=device)
    order, begin, end = (torch.tensor(x, device=device) for x in ([2, 0, 1, 3], [0, 0, 2, 2], [2, 2, 4, 4]))
    groups = (order, begin, end, squared, backend)
    opcheck(torch.ops.camkernels.stochastic_consistency_fwd.default, (vectors, *groups))
    scale = torch.tensor(0.5, device=device)
    opcheck(torch.ops.camkernels.stochastic_consistency_bwd.default, (vectors, scale, *groups))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("sharpness", [None, 5.0])
def test_compiles_without_a_graph_break(backend, device, sharpness):
    case = Case(device=device, channels=5)
    inputs, target = erase_inputs(case), case.target()
    torch.compiler.reset()
    with camkernels.use_backend(backend):
        compiled = torch.compile(erase_loss, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(
            compiled(inputs[0], inputs[1], target, inputs[2], sharpness), inputs, allow_unused=True
        )
        truth = torch.autograd.grad(
            erase_loss(inputs[0], inputs[1], target, inputs[2], sharpness), inputs, allow_unused=True
        )
    for mine, exact in zip(found, truth, strict=True):
        assert torch.allclose(mine, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transform_mse_compiles_without_a_graph_break(backend, device, kind):
    transform = on(device, TRANSFORMS[kind])
    inputs = transform_inputs(Case(device=device, channels=5), transform)
    torch.compiler.reset()
    with camkernels.use_backend(backend):
        compiled = torch.compile(fused_cam_transform_mse, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*inputs, transform), inputs)
        truth = torch.autograd.grad(fused_cam_transform_mse(*inputs, transform), inputs)
    for mine, exact in zip(found, truth, strict=True):
        assert torch.allclose(mine, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("own", [True, False], ids=["features", "seed_features"])
def test_seeds_compile_without_a_graph_break(backend, device, own):
    """In the graph too, the gradient of the vectors is written into that of the map."""
    inputs, target, noise = seeds_inputs(Case(device=device, channels=5, maps="ties"), own)
    torch.compiler.reset()
    with camkernels.use_backend(backend):
        compiled = torch.compile(seeds_loss, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*inputs[:2], target, noise, *inputs[2:]), inputs)
        truth = torch.autograd.grad(seeds_loss(*inputs[:2], target, noise, *inputs[2:]), inputs)
    for mine, exact in zip(found, truth, strict=True):
        assert torch.allclose(mine, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend, device", without_cuda(BACKENDS))
@pytest.mark.parametrize("pairs, squared", [("all", True), ("all", False), ("adjacent", True)])
def test_stochastic_consistency_compiles_without_a_graph_break(backend, device, pairs, squared):
    vectors = torch.randn((6, 2, 3), device=device, requires_grad=True)
    target = torch.tensor([0, 0, 1, 0, 1, 2], device=device)

    def loss(vectors, target):
        return stochastic_consistency(vectors, target, pairs=pairs, squared=squared)

    torch.compiler.reset()
    with camkernels.use_backend(backend):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        (found,) = torch.autograd.grad(compiled(vectors, target), vectors)
        (truth,) = torch.autograd.grad(loss(vectors, target), vectors)
    assert torch.allclose(found, truth, rtol=1e-5, atol=1e-6)


def test_seeds_compile_with_inductor_and_a_dynamic_batch():
    torch.compiler.reset()
    compiled = torch.compile(seeds_loss, fullgraph=True, dynamic=True)
    for images in (2, 3, 5):
        inputs, target, noise = seeds_inputs(Case(device=DEVICE, channels=5, images=images, maps="ties"))
        found = torch.autograd.grad(compiled(*inputs, target, noise), inputs)
        truth = torch.autograd.grad(seeds_loss(*inputs, target, noise), inputs)
        for mine, exact in zip(found, truth, strict=True):
            assert torch.allclose(mine, exact, rtol=1e-5, atol=1e-6)


def test_compiled_seeds_draw_their_own_noise():
    inputs, target, _ = seeds_inputs(Case(device=DEVICE, channels=5, maps="ties"))
    torch.compiler.reset()
    compiled = torch.compile(lambda: fused_cam_seeds(*inputs, target, 6).indices, fullgraph=True)
    assert not torch.equal(compiled(), compiled())


@pytest.mark.parametrize("kind", ["flip", "affine", "nearest"])
def test_transform_mse_compiles_with_inductor_and_a_dynamic_batch(kind):
    transform = on(DEVICE, TRANSFORMS[kind])
    torch.compiler.reset()
    compiled = torch.compile(fused_cam_transform_mse, fullgraph=True, dynamic=True)
    for images in (2, 3, 5):
        inputs = transform_inputs(Case(device=DEVICE, channels=5, images=images), transform)
        found = torch.autograd.grad(compiled(*inputs, transform), inputs)
        truth = torch.autograd.grad(fused_cam_transform_mse(*inputs, transform), inputs)
        for mine, exact in zip(found, truth, strict=True):
            assert torch.allclose(mine, exact, rtol=1e-5, atol=1e-6)


def test_compiles_with_inductor_and_a_dynamic_batch():
    torch.compiler.reset()
    compiled = torch.compile(erase_loss, fullgraph=True, dynamic=True)
    for images in (2, 3, 5):
        case = Case(device=DEVICE, channels=5, images=images)
        inputs, target = erase_inputs(case), case.target()
        found = torch.autograd.grad(compiled(inputs[0], inputs[1], target, inputs[2], 5.0), inputs)
        truth = torch.autograd.grad(erase_loss(inputs[0], inputs[1], target, inputs[2], 5.0), inputs)
        for mine, exact in zip(found, truth, strict=True):
            assert torch.allclose(mine, exact, rtol=1e-5, atol=1e-6)


def test_a_change_of_backend_reaches_compiled_code():
    case = Case(device=DEVICE, channels=5)
    features, weight, target = case.features(), case.weight(), case.target()
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


class Erase(torch.nn.Module):
    def forward(self, features, weight, target, images):
        return fused_cam_erase(features, weight, target, images)


@pytest.mark.parametrize("dynamic", [False, True])
def test_exports(dynamic):
    case = Case(device=DEVICE)
    arguments = (case.features(), case.weight(), case.target(), case.pictures())
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"features": {0: batch}, "weight": None, "target": {0: batch}, "images": {0: batch}}
    program = torch.export.export(Erase(), arguments, dynamic_shapes=shapes if dynamic else None)
    assert "camkernels.cam_erase_fwd" in str(program.graph)
    other = Case(device=DEVICE, images=5 if dynamic else 3, seed=1)
    arguments = (other.features(), other.weight(), other.target(), other.pictures())
    for mine, exact in zip(program.module()(*arguments), fused_cam_erase(*arguments), strict=True):
        assert torch.equal(mine, exact)


class Seeds(torch.nn.Module):
    def forward(self, features, weight, target, noise):
        found = fused_cam_seeds(features, weight, target, 4, noise=noise)
        return *found, stochastic_consistency(found.vectors, target)


@pytest.mark.parametrize("dynamic", [False, True])
def test_seeds_export(dynamic):
    def arguments(images, seed):
        inputs, target, noise = seeds_inputs(Case(device=DEVICE, images=images, seed=seed))
        return (*(x.detach() for x in inputs), target, noise)

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"features": {0: batch}, "weight": None, "target": {0: batch}, "noise": {0: batch}}
    program = torch.export.export(Seeds(), arguments(3, 0), dynamic_shapes=shapes if dynamic else None)
    assert "camkernels.cam_seeds_fwd" in str(program.graph)
    assert "camkernels.stochastic_consistency_fwd" in str(program.graph)
    other = arguments(5 if dynamic else 3, 1)
    for mine, exact in zip(program.module()(*other), Seeds()(*other), strict=True):
        assert torch.equal(mine, exact)


class TransformMse(torch.nn.Module):
    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, features, features_t, weight):
        return fused_cam_transform_mse(features, features_t, weight, self.transform, reduction="none")


@pytest.mark.parametrize("kind", ["flip", "affine", "bilinear"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_transform_mse_exports(kind, dynamic):
    transform = on(DEVICE, TRANSFORMS[kind])
    arguments = tuple(x.detach() for x in transform_inputs(Case(device=DEVICE), transform))
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"features": {0: batch}, "features_t": {0: batch}, "weight": None}
    program = torch.export.export(
        TransformMse(transform), arguments, dynamic_shapes=shapes if dynamic else None
    )
    assert "camkernels.cam_transform_mse_fwd" in str(program.graph)
    other = Case(device=DEVICE, images=5 if dynamic else 3, seed=1)
    arguments = tuple(x.detach() for x in transform_inputs(other, transform))
    assert torch.equal(program.module()(*arguments), TransformMse(transform)(*arguments))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("kind", ["shift", "nearest"])
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_in_transform_mse(backend, device, kind, features_dtype):
    case = Case(device=device, dtype=features_dtype, weight_dtype=torch.float32, channels=5)
    transform = TRANSFORMS[kind]
    inputs = transform_inputs(case, transform)
    with camkernels.use_backend(backend):
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = fused_cam_transform_mse(*inputs, transform)
        plain = fused_cam_transform_mse(*inputs, transform)
        found, truth = torch.autograd.grad(loss, inputs), torch.autograd.grad(plain, inputs)
    assert torch.equal(loss, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_in_seeds(backend, device, features_dtype):
    case = Case(device=device, dtype=features_dtype, weight_dtype=torch.float32, channels=5)
    inputs, target, noise = seeds_inputs(case)

    def results():
        found = fused_cam_seeds(*inputs, target, 4, noise=noise)
        return *found, consistency_of(found.vectors, target)

    with camkernels.use_backend(backend):
        with torch.autocast(device, dtype=torch.bfloat16):
            found = results()
        plain = results()
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
        assert [x.dtype for x in found] == [x.dtype for x in plain]
        grads = [
            torch.autograd.grad([vectors.sum(), cam.square().sum(), loss], inputs)
            for vectors, _, _, cam, loss in (found, plain)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(backend, device, dtype, features_dtype):
    case = Case(device=device, dtype=features_dtype, weight_dtype=torch.float32, channels=5)
    inputs, target = erase_inputs(case), case.target()
    with camkernels.use_backend(backend):
        with torch.autocast(device, dtype=dtype):
            loss = erase_loss(inputs[0], inputs[1], target, inputs[2], 5.0)
        plain = erase_loss(inputs[0], inputs[1], target, inputs[2], 5.0)
        found = torch.autograd.grad(loss, inputs)
        truth = torch.autograd.grad(plain, inputs)
    for mine, exact in zip(found, truth, strict=True):
        assert mine.dtype == exact.dtype
        assert torch.allclose(mine, exact, rtol=1e-2 if features_dtype != torch.float32 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_double_backward_raises(backend, device):
    case = Case(device=device, channels=5)
    inputs, target = erase_inputs(case), case.target()
    with camkernels.use_backend(backend):
        for result in (
            fused_cam(inputs[0], inputs[1], target),
            erase_loss(inputs[0], inputs[1], target, inputs[2], 5.0),
        ):
            (grad,) = torch.autograd.grad(result.sum(), inputs[0], create_graph=True)
            with pytest.raises(RuntimeError, match="there is no double backward"):
                grad.sum().backward()


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", ["flip", "nearest"])
def test_double_backward_of_transform_mse_raises(backend, device, kind):
    transform = TRANSFORMS[kind]
    inputs = transform_inputs(Case(device=device, channels=5), transform)
    for place in range(3):
        with camkernels.use_backend(backend):
            loss = fused_cam_transform_mse(*inputs, transform)
        (grad,) = torch.autograd.grad(loss, inputs[place], create_graph=True)
        with pytest.raises(RuntimeError, match="there is no double backward"):
            grad.sum().backward()


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_double_backward_of_seeds_raises(backend, device):
    """Through vectors alone the gradient is linear in what came, and depends on no input."""
    inputs, target, noise = seeds_inputs(Case(device=device, channels=5), own=False)
    features, weight, seed_features = inputs
    with camkernels.use_backend(backend):
        found = fused_cam_seeds(features, weight, target, 4, seed_features=seed_features, noise=noise)
        consistency = consistency_of(found.vectors, target)
    for output, wanted in (
        (found.vectors, seed_features),
        (found.cam, features),
        (consistency, seed_features),
    ):
        given = torch.ones_like(output, requires_grad=True)
        (grad,) = torch.autograd.grad(output, wanted, given, create_graph=True)
        with pytest.raises(RuntimeError, match="there is no double backward"):
            grad.sum().backward()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_without_requires_grad_and_without_grad_mode(backend, device):
    case = Case(device=device, channels=5)
    with camkernels.use_backend(backend):
        erased, cam = fused_cam_erase(case.features(), case.weight(), case.target(), case.pictures())
        assert not erased.requires_grad
        assert not cam.requires_grad
        inputs = erase_inputs(case)
        with torch.no_grad():
            assert not fused_cam(inputs[0], inputs[1]).requires_grad
            same = inputs[0], inputs[0], inputs[1], HorizontalFlip()
            assert not fused_cam_transform_mse(*same).requires_grad
            found = fused_cam_seeds(inputs[0], inputs[1], case.target(), 2)
            assert not found.vectors.requires_grad
            leaf = found.vectors.detach().requires_grad_()
            assert not consistency_of(leaf, case.target()).requires_grad
        assert not fused_cam_transform_mse(*(x.detach() for x in same[:3]), same[3]).requires_grad


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_deterministic_run_to_run(backend, device):
    case = Case(device=device, images=6, classes=2, maps="ties")  # images share classes: sums of gradients
    inputs, target = [case.features(), case.weight(), case.pictures()], case.target()
    torch.use_deterministic_algorithms(True)
    try:
        results = [
            run(backend, lambda f, w, i: fused_cam_erase(f, w, target, i, sharpness=5.0), inputs)
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        pairs = zip(results[0].values + results[0].grads, other.values + other.grads, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", ["shift", "affine", "nearest", "bilinear"])
def test_transform_mse_is_deterministic_run_to_run(backend, device, kind):
    """Several outputs read one cell, all images share the weight."""
    transform = on(device, TRANSFORMS[kind])
    inputs = [x.detach() for x in transform_inputs(Case(device=device, images=4, classes=3), transform)]
    torch.use_deterministic_algorithms(True)
    try:
        results = [run(backend, lambda *x: fused_cam_transform_mse(*x, transform), inputs) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = zip(*(found.values + found.grads for found in results), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_backward_uses_the_backend_of_its_forward(backend, device, monkeypatch):
    case = Case(device=device, channels=5)
    features, weight = case.features().requires_grad_(), case.weight().requires_grad_()
    with camkernels.use_backend(backend):
        cam = fused_cam(features, weight, case.target())
    seen = []
    resolve = camkernels._backend.resolve
    monkeypatch.setattr(
        camkernels._backend,
        "resolve",
        lambda name, requested, *rest: seen.append(requested) or resolve(name, requested, *rest),
    )
    with camkernels.use_backend("reference"):
        cam.sum().backward()
    assert seen == [backend]


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
@pytest.mark.parametrize("backend", ["triton", "cuda"])
class TestOnAGpu:
    def test_nothing_synchronises(self, backend):
        case = Case(device="cuda")
        inputs, target = erase_inputs(case), case.target()
        with camkernels.use_backend(backend):
            erase_loss(inputs[0], inputs[1], target, inputs[2], 5.0).backward()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for sharpness in (None, 5.0):
                    erase_loss(inputs[0], inputs[1], target, inputs[2], sharpness).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("own", [True, False])
    def test_seeds_never_synchronise(self, backend, own):
        inputs, target, noise = seeds_inputs(Case(device="cuda"), own)
        generator = torch.Generator("cuda").manual_seed(0)

        def step():
            for keys in (noise, None):
                seeds_loss(*inputs[:2], target, keys, *inputs[2:]).backward()
            fused_cam_seeds(*inputs[:2], target, 100, generator=generator)
            vectors = fused_cam_seeds(*inputs[:2], target, 3, sampling="first").vectors
            for pairs, squared in (("all", False), ("adjacent", True)):
                consistency_of(vectors, target, pairs=pairs, squared=squared).backward(retain_graph=True)

        with camkernels.use_backend(backend):
            step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("channels, shape", [(64, (7, 7)), (8, (177, 177))])
    def test_seeds_in_a_cuda_graph(self, backend, channels, shape):
        """For the large map the CUDA kernel has scratch memory."""
        case = Case(device="cuda", channels=channels, shape=shape, maps="ties")
        inputs, target, noise = seeds_inputs(case)

        def step():
            return torch.autograd.grad(seeds_loss(*inputs, target, noise), inputs)

        with camkernels.use_backend(backend):
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            with torch.no_grad():
                inputs[0].copy_(replace(case, seed=1).features())
                noise.uniform_()
            graph.replay()
            fresh = step()
        assert all(torch.equal(a, b) for a, b in zip(captured, fresh, strict=True))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("shape, num_seeds", [((64, 64), 1024), ((177, 177), 300)])
    def test_many_seeds_of_large_maps(self, backend, shape, num_seeds, layout):
        """In one block's shared memory, and in scratch memory. Integers in the features: maps agree."""
        case = Case(device="cuda", shape=shape, channels=8, maps="ties", layout=layout)
        (features, weight), target, noise = seeds_inputs(case)
        with camkernels.use_backend(backend):
            found = fused_cam_seeds(features, weight, target, num_seeds, threshold=0.25, noise=noise)
        on_host = [x.detach().cpu() for x in (features, weight, target)]
        truth = reference.cam_seeds(*on_host, num_seeds, threshold=0.25, noise=noise.cpu())
        assert truth[2].min() > num_seeds
        for ours, theirs in zip(found[:3], truth[:3], strict=True):
            assert torch.equal(ours.cpu(), theirs)

    def test_launches_of_seeds(self, backend):
        """With the noise given; drawing it is one more."""
        inputs, target, noise = seeds_inputs(Case(device="cuda"))

        def work(function):
            function()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                result = function()
                torch.cuda.synchronize()
            kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            return len(kernels), result

        with camkernels.use_backend(backend):
            forward, found = work(lambda: fused_cam_seeds(*inputs, target, 20, noise=noise))
            grad = torch.ones_like(found.vectors)
            backward, _ = work(lambda: torch.autograd.grad(found.vectors, inputs[0], grad, retain_graph=True))
        assert forward == {"cuda": 1, "triton": 3}[backend]
        assert backward == 1

    @pytest.mark.parametrize("kind", TRANSFORMS)
    def test_transform_mse_never_synchronises(self, backend, kind):
        transform = on("cuda", TRANSFORMS[kind])
        inputs = transform_inputs(Case(device="cuda"), transform)
        with camkernels.use_backend(backend):
            fused_cam_transform_mse(*inputs, transform).backward()
            torch.cuda.set_sync_debug_mode("error")
            try:
                fused_cam_transform_mse(*inputs, transform).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("kind", TRANSFORMS)
    def test_transform_mse_in_a_cuda_graph(self, backend, kind):
        transform = on("cuda", TRANSFORMS[kind])
        inputs = transform_inputs(Case(device="cuda", channels=64), transform)

        def step():
            return torch.autograd.grad(fused_cam_transform_mse(*inputs, transform), inputs)

        with camkernels.use_backend(backend):
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            with torch.no_grad():
                inputs[0].mul_(-0.5)
            graph.replay()
            fresh = step()
        assert all(torch.equal(a, b) for a, b in zip(captured, fresh, strict=True))

    def test_cuda_graph(self, backend):
        case = Case(device="cuda", channels=64, shape=(14, 14), image_size=(64, 64))
        inputs, target = erase_inputs(case), case.target()

        def step():
            return torch.autograd.grad(erase_loss(inputs[0], inputs[1], target, inputs[2], 5.0), inputs)

        with camkernels.use_backend(backend):
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            with torch.no_grad():
                inputs[0].copy_(replace(case, seed=1).features())
            graph.replay()
            fresh = step()
        assert all(torch.equal(a, b) for a, b in zip(captured, fresh, strict=True))

    def test_current_stream(self, backend):
        case = Case(device="cuda", images=64, channels=256, shape=(14, 14))
        features, weight, target, images = case.features(), case.weight(), case.target(), case.pictures()
        stream = torch.cuda.Stream()
        late = torch.randn_like(features)
        with camkernels.use_backend(backend):
            expected = fused_cam_erase(late, weight, target, images).erased
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
                features.copy_(late)
                found = fused_cam_erase(features, weight, target, images).erased
            stream.synchronize()
        assert torch.equal(found, expected)

    def test_launches_of_the_forward(self, backend):
        case = Case(device="cuda")
        arguments = (case.features(), case.weight(), case.target(), case.pictures())
        with camkernels.use_backend(backend):
            fused_cam_erase(*arguments)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                fused_cam_erase(*arguments)
                torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == {"cuda": 1, "triton": 2}[backend]

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_second_device(self, backend):
        case = Case(device="cuda:1")
        with camkernels.use_backend(backend):
            found = fused_cam(case.features(), case.weight(), case.target())
        assert found.device.index == 1
        plain = fused_cam(Case().features(), Case().weight(), Case().target())
        assert torch.allclose(found.cpu(), plain, atol=1e-5)
