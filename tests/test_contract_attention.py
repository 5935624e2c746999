"""What the functions around attention promise beside their values; see test_contract.py."""

from dataclasses import replace

import cases
import pytest
import torch
from cases import DEVICE, GPU, Case, without_cuda
from torch.library import opcheck

import camkernels
from camkernels import (
    attention_boxes,
    crop_and_zoom,
    fused_local_activations,
    local_level_loss,
    masked_max_pool,
    otsu_mask,
)

OPS = torch.ops.camkernels
BACKENDS = without_cuda(cases.BACKENDS)
KERNEL_BACKENDS = without_cuda(cases.KERNEL_BACKENDS)
CLASSIFIERS = 3
BOXES = [[0.25, 0.1, 0.9, 0.6], [0.0, 0.0, 1.0, 1.0], [-0.2, 0.5, 0.3, 1.3]]  # one reaches beyond its image
# Functions with a gradient.
DIFFERENTIABLE = ("fused_local_activations", "local_level_loss", "masked_max_pool", "crop_and_zoom")


def placed(backends):
    """Each function with a gradient where it has kernels."""
    return [(function, backend, device) for function in DIFFERENTIABLE for backend, device in backends]


def small(device="cpu", **options):
    return Case(**{"device": device, "channels": 5, "classes": 4, "shape": (5, 6), **options})


def classifier_inputs(case):
    """Features, weights and biases of the classifiers."""
    wide = replace(case, classes=CLASSIFIERS * case.classes)
    leaves = [
        case.features(),
        wide.weight().view(CLASSIFIERS, case.classes, case.channels),
        wide.bias().view(CLASSIFIERS, case.classes),
    ]
    return [x.requires_grad_() for x in leaves]


def activations_of(case):
    return replace(case, channels=case.classes, layout="contiguous").features()


def images_of(case):
    """Small, since backward of a crop takes long in Triton's interpreter."""
    return replace(case, channels=2, shape=(case.shape[0] - 1, 3), seed=case.seed + 7).features()


def mask_of(case):
    drawn = torch.rand((case.images, *case.shape), generator=case.generator())
    return (drawn < 0.4).to(case.device)


def labels_of(case):
    """No background among them."""
    return case.target() % (case.classes - 1)


def boxes_of(case):
    return torch.tensor(BOXES, device=case.device)[torch.arange(case.images, device=case.device) % 3]


def call_of(function, case):
    """The function of the tensors that have a gradient, and those tensors."""
    mask, target, boxes = mask_of(case), labels_of(case), boxes_of(case)
    return {
        "fused_local_activations": lambda: (fused_local_activations, classifier_inputs(case)),
        "local_level_loss": lambda: (lambda x: local_level_loss(x, mask, target), [activations_of(case)]),
        "masked_max_pool": lambda: (lambda x: masked_max_pool(x, mask), [case.features()]),
        "crop_and_zoom": lambda: (lambda x: crop_and_zoom(x, boxes, (3, 5)), [images_of(case)]),
    }[function]()


def scale(features, weight, bias, target, images):
    """One scale of the multi-scale model: all six functions."""
    activations, attention = fused_local_activations(features, weight, bias)
    mask, threshold = otsu_mask(attention, bins=8)
    pooled = masked_max_pool(features, mask)
    boxes = attention_boxes(mask)
    zoomed = crop_and_zoom(images, boxes, images.shape[2:])
    loss = local_level_loss(activations, mask, target)
    loss = loss + sum(x.float().square().mean() for x in (attention, pooled, zoomed))
    return loss, activations, attention, mask, threshold, boxes, zoomed


def scale_inputs(case):
    """What has a gradient, with the classes last but one and images last."""
    return [*classifier_inputs(case), labels_of(case), images_of(case).requires_grad_()]


def with_grads(outputs, inputs):
    """The outputs of ``scale`` and the gradients of its loss."""
    grads = torch.autograd.grad(outputs[0], [x for x in inputs if x.requires_grad])
    return [x.detach() for x in outputs] + list(grads)


def scale_results(inputs, function=scale):
    return with_grads(function(*inputs), inputs)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype, layout", [(torch.float32, "contiguous"), (torch.float16, "channels_last")])
def test_opcheck_of_local_activations(backend, device, dtype, layout):
    case = small(device, images=2, classes=3, shape=(2, 3), dtype=dtype, layout=layout)
    features, weight, bias = (x.detach() for x in classifier_inputs(case))
    whole = layout == "contiguous"
    bias = bias if whole else None
    forward = (features, weight, bias, True, backend)
    opcheck(OPS.local_activations_fwd.default, forward)
    activations, attention, *kept = OPS.local_activations_fwd(*forward)
    given = (torch.rand_like(activations) if whole else None, torch.rand_like(attention))
    needed = (True, whole, whole)
    backward = (features, weight, *given, *kept, *needed, backend)
    opcheck(OPS.local_activations_bwd.default, backward)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_of_otsu_mask(backend, device, dtype):
    maps = torch.randn((2, 12), device=device, dtype=dtype)
    opcheck(OPS.otsu_mask_fwd.default, (maps, 4, backend))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_of_local_level_loss(backend, device, dtype):
    case = small(device, images=2, shape=(3, 4), dtype=dtype)
    inputs = activations_of(case), mask_of(case), labels_of(case)
    opcheck(OPS.local_level_loss_fwd.default, (*inputs, -100, backend))
    opcheck(OPS.local_level_loss_bwd.default, (*inputs, torch.tensor(0.7, device=device), -100, backend))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype, layout", [(torch.float32, "contiguous"), (torch.float16, "channels_last")])
def test_opcheck_of_masked_max_pool(backend, device, dtype, layout):
    case = small(device, images=2, shape=(3, 4), dtype=dtype, layout=layout)
    features, mask = case.features(), mask_of(case)
    opcheck(OPS.masked_max_pool_fwd.default, (features, mask, backend))
    pooled, index = OPS.masked_max_pool_fwd(features, mask, backend)
    backward = (torch.rand_like(pooled), mask, index, layout == "channels_last", backend)
    opcheck(OPS.masked_max_pool_bwd.default, backward)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype, layout", [(torch.float32, "contiguous"), (torch.float16, "channels_last")])
def test_opcheck_of_boxes_and_crops(backend, device, dtype, layout):
    case = small(device, images=2, channels=2, shape=(3, 4), dtype=dtype, layout=layout)
    images, boxes = case.features(), boxes_of(case)
    opcheck(OPS.attention_boxes_fwd.default, (mask_of(case), backend))
    opcheck(OPS.crop_and_zoom_fwd.default, (images, boxes, 5, 3, backend))
    grad = torch.rand_like(OPS.crop_and_zoom_fwd(images, boxes, 5, 3, backend))
    opcheck(OPS.crop_and_zoom_bwd.default, (grad, boxes, 3, 4, backend))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_attention_compiles_without_a_graph_break(backend, device):
    inputs = scale_inputs(small(device))
    torch.compiler.reset()
    with camkernels.use_backend(backend):
        # Of plain PyTorch the tracing is all that could fail.
        compiler = "eager" if backend == "reference" else "aot_eager"
        compiled = torch.compile(scale, fullgraph=True, backend=compiler)
        found, truth = scale_results(inputs, compiled), scale_results(inputs)
    torch.testing.assert_close(found, truth)


def test_attention_compiles_with_inductor_and_dynamic_shapes():
    """One graph for all sizes, some of which are equal by chance."""
    torch.compiler.reset()
    compiled = torch.compile(scale, fullgraph=True, dynamic=True)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        for images, height in ((2, 5), (3, 7), (5, 9)):
            inputs = scale_inputs(small(DEVICE, images=images, shape=(height, 6)))
            torch.testing.assert_close(scale_results(inputs, compiled), scale_results(inputs))


class Scale(torch.nn.Module):
    def forward(self, features, weight, bias, target, images):
        return scale(features, weight, bias, target, images)


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_exports(dynamic):
    def arguments(images, seed):
        return tuple(x.detach() for x in scale_inputs(small(DEVICE, images=images, seed=seed)))

    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    shapes = {"features": batch, "weight": None, "bias": None, "target": batch, "images": batch}
    program = torch.export.export(Scale(), arguments(3, 0), dynamic_shapes=shapes if dynamic else None)
    for op in (
        "local_activations",
        "otsu_mask",
        "masked_max_pool",
        "attention_boxes",
        "crop_and_zoom",
        "local_level_loss",
    ):
        assert f"camkernels.{op}_fwd" in str(program.graph)
    other = arguments(5 if dynamic else 3, 1)
    for mine, exact in zip(program.module()(*other), scale(*other), strict=True):
        assert torch.equal(mine, exact)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_around_attention(backend, device, dtype):
    inputs = scale_inputs(small(device, dtype=dtype, weight_dtype=torch.float32))
    with camkernels.use_backend(backend):
        plain = scale_results(inputs)
        with torch.autocast(device, dtype=torch.bfloat16):
            outputs = scale(*inputs)
        found = with_grads(outputs, inputs)
    masks = [torch.bool, dtype, torch.float32, dtype]  # mask, threshold, boxes, zoomed
    grads = [dtype, torch.float32, torch.float32, dtype]
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype, *masks, *grads]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("function, backend, device", placed(BACKENDS))
def test_double_backward_around_attention(function, backend, device):
    """Kernels refuse, also where the gradient is linear in what came; the reference has it."""
    call, inputs = call_of(function, small(device))
    for place in range(len(inputs)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with camkernels.use_backend(backend):
            result = call(*leaves)
        result = result[0] if isinstance(result, tuple) else result
        given = torch.ones_like(result, requires_grad=True)
        (grad,) = torch.autograd.grad(result, leaves[place], given, create_graph=True)
        if backend == "reference":
            (again,) = torch.autograd.grad(grad.square().sum(), given)
            assert again.any()
        else:
            with pytest.raises(RuntimeError, match=f"{function}: there is no double backward"):
                grad.sum().backward()


@pytest.mark.parametrize("function, backend, device", placed(BACKENDS))
def test_results_around_attention_require_grad_only_where_an_input_does(function, backend, device):
    call, inputs = call_of(function, small(device))
    inputs = [x.detach() for x in inputs]

    def require_grad(leaves):
        with camkernels.use_backend(backend):
            results = call(*leaves)
        return {x.requires_grad for x in (results if isinstance(results, tuple) else (results,))}

    assert require_grad(inputs) == {False}
    for place in range(len(inputs)):
        leaves = [x.clone().requires_grad_(i == place) for i, x in enumerate(inputs)]
        assert require_grad(leaves) == {True}
        with torch.no_grad():
            assert require_grad(leaves) == {False}


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_masks_and_boxes_have_no_gradient(backend, device):
    case = small(device, images=1)
    images, boxes = images_of(case).requires_grad_(), boxes_of(case).requires_grad_()
    with camkernels.use_backend(backend):
        found = otsu_mask(images, bins=4)
        zoomed = crop_and_zoom(images, boxes, 2)
        assert not crop_and_zoom(images.detach(), boxes, 2).requires_grad
    assert not any(x.requires_grad for x in found)
    assert torch.autograd.grad(zoomed.sum(), (images, boxes), allow_unused=True)[1] is None


@pytest.mark.parametrize("function, backend, device", placed(KERNEL_BACKENDS))
def test_output_gradients_around_attention_lie_anywhere(function, backend, device):
    """Expanded, as of a sum; every second element of something; channels first or last."""
    call, inputs = call_of(function, small(device, layout="channels_last"))
    inputs = [x.detach().requires_grad_() for x in inputs]
    with camkernels.use_backend(backend):
        results = call(*inputs)
        results = results if isinstance(results, tuple) else (results,)

        def grads(given):
            return torch.autograd.grad(results, inputs, given, retain_graph=True)

        draw = torch.Generator().manual_seed(1)
        plain = [torch.randn(x.shape, generator=draw).to(device) for x in results]
        expected = grads(plain)
        sparse = [torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in plain]
        turned = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in plain]
        last = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in plain]
        assert [x.stride() for x in expected] == [x.stride() for x in inputs]
        for other in (sparse, turned, last):
            assert all(
                torch.equal(a, b) and a.stride() == b.stride()
                for a, b in zip(expected, grads(other), strict=True)
            )
        ones = [torch.ones_like(x) for x in results]
        expanded = [torch.ones((), device=device).expand(x.shape) for x in results]
        assert all(torch.equal(a, b) for a, b in zip(grads(ones), grads(expanded), strict=True))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_functions_around_attention_leave_their_inputs_alone(backend, device):
    case = small(device, maps="ties")
    inputs = scale_inputs(case)
    others = [mask_of(case), boxes_of(case)]
    before = [x.detach().clone() for x in (*inputs, *others)]
    with camkernels.use_backend(backend):
        scale_results(inputs)
        masked_max_pool(inputs[0], others[0])
        attention_boxes(others[0])
        crop_and_zoom(inputs[4], others[1], 3)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, *others), strict=True))


def outputs_of(backend, device, case):
    """Everything that the ops write."""
    features, weight, bias = (x.detach() for x in classifier_inputs(case))
    mask, target, boxes = mask_of(case), labels_of(case), boxes_of(case)
    draw = torch.Generator().manual_seed(2)

    def like(tensor):
        return torch.randn(tensor.shape, generator=draw).to(tensor)

    pooled, index = OPS.masked_max_pool_fwd(features, mask, backend)
    thresholds = OPS.otsu_mask_fwd(features[:, 0].flatten(1), 4, backend)
    lies_last = not features.is_contiguous()
    results = [
        pooled,
        index,
        *thresholds,
        OPS.masked_max_pool_bwd(like(pooled), mask, index, lies_last, backend),
    ]
    forward = OPS.local_activations_fwd(features, weight, bias, True, backend)
    given = like(forward[0]), like(forward[1])
    kept = *forward[2:], True, True, True, backend
    losses = (forward[0], mask, target)
    images = images_of(case)
    zoomed = OPS.crop_and_zoom_fwd(images, boxes, 5, 4, backend)
    return [
        *results,
        *forward,
        *OPS.local_activations_bwd(features, weight, *given, *kept),
        OPS.local_level_loss_fwd(*losses, -100, backend),
        OPS.local_level_loss_bwd(*losses, torch.tensor(0.7, device=device), -100, backend),
        OPS.attention_boxes_fwd(mask, backend),
        zoomed,
        OPS.crop_and_zoom_bwd(like(zoomed), boxes, *images.shape[2:], backend),
    ]


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype, layout", [(torch.float32, "contiguous"), (torch.float16, "channels_last")])
def test_ops_around_attention_are_deterministic_and_write_everything(backend, device, dtype, layout):
    """Run to run, and with any number of threads. Under this setting PyTorch fills what is allocated with
    NaN, integers with their largest."""
    # More pixels than a tile of the loss has.
    shape = (7, 11) if device == "cpu" and backend == "triton" else (13, 17)
    case = small(device, shape=shape, dtype=dtype, layout=layout)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        plainly = outputs_of(backend, device, case)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(5)
        again = outputs_of(backend, device, case)
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    for index, (found, other) in enumerate(zip(plainly, again, strict=True)):
        assert not found.isnan().any(), index
        assert torch.equal(found, other), index


@pytest.mark.parametrize("function, backend, device", placed(KERNEL_BACKENDS))
def test_backward_around_attention_may_run_twice(function, backend, device):
    call, inputs = call_of(function, small(device))
    inputs = [x.detach().requires_grad_() for x in inputs]
    with camkernels.use_backend(backend):
        results = call(*inputs)
    results = list(results) if isinstance(results, tuple) else [results]
    given = [torch.full_like(x, 0.3) for x in results]
    first, second = (torch.autograd.grad(results, inputs, given, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("function, backend, device", placed(KERNEL_BACKENDS))
def test_what_is_kept_for_backward_around_attention(function, backend, device):
    """Which classifier won, a byte each, and of which class the attention is; which pixel is the largest, and
    not the features; of a crop the boxes alone."""
    case = small(device)
    call, inputs = call_of(function, case)
    saved = []
    with (
        camkernels.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        call(*(x.detach().requires_grad_() for x in inputs))
    images, channels, classes, pixels = case.images, case.channels, case.classes, list(case.shape)
    expected = {
        "fused_local_activations": [
            (torch.float32, [images, channels, *pixels]),
            (torch.float32, [CLASSIFIERS, classes, channels]),
            (torch.uint8, [images, classes, *pixels]),
            (torch.int32, [images, *pixels]),
        ],
        "local_level_loss": [
            (torch.float32, [images, classes, *pixels]),
            (torch.bool, [images, *pixels]),
            (torch.int64, [images]),
        ],
        "masked_max_pool": [(torch.bool, [images, *pixels]), (torch.int32, [images, channels])],
        "crop_and_zoom": [(torch.float32, [images, 4])],
    }[function]
    found = [(x.dtype, list(x.shape)) for x in saved if x.numel() > 0]
    assert sorted(found, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_no_image_at_all(backend, device):
    """Gradients of what all images share are 0, the others have no element."""
    case = small(device, images=0)
    inputs = scale_inputs(case)
    with camkernels.use_backend(backend):
        outputs = scale(*inputs)
        sums = sum(x.sum() for x in (*outputs[:3], outputs[6], masked_max_pool(inputs[0], mask_of(case))))
        grads = torch.autograd.grad(sums, [x for x in inputs if x.requires_grad])
        assert local_level_loss(outputs[1], outputs[3], inputs[3]).item() == 0
    shapes = [[0, 4, 5, 6], [0, 5, 6], [0, 5, 6], [0], [0, 4], [0, 2, 4, 3]]
    assert [list(x.shape) for x in outputs[1:]] == shapes
    assert [x.shape for x in grads] == [x.shape for x in inputs if x.requires_grad]
    assert not any(x.any() for x in grads)


def test_meta_tensors_give_shapes():
    """Memory formats and dtypes, too."""
    case = small(dtype=torch.bfloat16, layout="channels_last", weight_dtype=torch.float32)
    real = scale_results(scale_inputs(case))
    found = scale_results([x.detach().to("meta").requires_grad_(x.requires_grad) for x in scale_inputs(case)])
    assert {x.device.type for x in found} == {"meta"}
    for mine, exact in zip(found, real, strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (exact.shape, exact.dtype, exact.stride())


@pytest.mark.parametrize("function, backend, device", placed(KERNEL_BACKENDS))
def test_backward_around_attention_uses_the_backend_of_its_forward(function, backend, device, monkeypatch):
    call, inputs = call_of(function, small(device))
    inputs = [x.detach().requires_grad_() for x in inputs]
    with camkernels.use_backend(backend):
        result = call(*inputs)
    seen = []
    resolve = camkernels._backend.resolve
    monkeypatch.setattr(
        camkernels._backend,
        "resolve",
        lambda name, requested, *rest: seen.append((name, requested)) or resolve(name, requested, *rest),
    )
    with camkernels.use_backend("reference"):
        (result[0] if isinstance(result, tuple) else result).sum().backward()
    assert seen == [(f"{function.removeprefix('fused_')}_bwd", backend)]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
class TestAttentionOnAGpu:
    """With the backends that ``auto`` takes, unless it is said otherwise."""

    @pytest.mark.parametrize("shape", [(7, 7), (33, 40)])
    def test_nothing_synchronises(self, shape):
        inputs = scale_inputs(small("cuda", shape=shape))
        scale_results(inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            scale_results(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("shape", [(7, 7), (33, 40)])
    def test_cuda_graph(self, shape):
        case = small("cuda", channels=64, shape=shape)
        inputs = scale_inputs(case)

        def step():
            return scale_results(inputs)

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

    def test_current_stream(self):
        case = small("cuda", images=64, channels=256, shape=(14, 14))
        features, weight, bias, target, images = (x.detach() for x in scale_inputs(case))
        stream = torch.cuda.Stream()
        late = torch.randn_like(features)
        expected = scale(late, weight, bias, target, images)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            features.copy_(late)
            found = scale(features, weight, bias, target, images)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_launches(self, layout):
        case = small("cuda", layout=layout)
        features, weight, bias = (x.detach() for x in classifier_inputs(case))
        mask, target, boxes = mask_of(case), labels_of(case), boxes_of(case)
        activations = activations_of(case)

        def launches(function):
            function()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                function()
                torch.cuda.synchronize()
            events = profile.events()
            return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)

        pooled, index = OPS.masked_max_pool_fwd(features, mask, "triton")
        assert launches(lambda: OPS.masked_max_pool_fwd(features, mask, "triton")) == 1
        backward = pooled, mask, index, layout == "channels_last", "triton"
        assert launches(lambda: OPS.masked_max_pool_bwd(*backward)) == 1
        keep = True, "triton"
        assert launches(lambda: OPS.local_activations_fwd(features, weight, bias, *keep)) == 1
        assert launches(lambda: attention_boxes(mask)) == 1
        zoomed = OPS.crop_and_zoom_fwd(features, boxes, 8, 9, "triton")
        assert launches(lambda: OPS.crop_and_zoom_fwd(features, boxes, 8, 9, "triton")) == 1
        assert launches(lambda: OPS.crop_and_zoom_bwd(zoomed, boxes, 5, 6, "triton")) == 1
        # The tiles of the loss, and their sum.
        assert launches(lambda: local_level_loss(activations, mask, target)) == 2
        grad = torch.ones((), device="cuda")
        losses = activations, mask, target, grad, -100, "triton"
        assert launches(lambda: OPS.local_level_loss_bwd(*losses)) == 1

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_second_device(self):
        def results(device):
            return scale_results(scale_inputs(small(device, maps="ties")))

        for found, plain in zip(results("cuda:1"), results("cpu"), strict=True):
            assert found.device.index == 1
            torch.testing.assert_close(found.cpu(), plain, rtol=1e-4, atol=1e-5)
