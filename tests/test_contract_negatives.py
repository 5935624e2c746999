"""What fused_negative_cam_loss and focus_area promise beside their values; see test_contract.py."""

from dataclasses import replace

import pytest
import torch
from cases import BACKENDS, DEVICE, GPU, KERNEL_BACKENDS, Case, peak_bytes, run, without_cuda
from torch.library import opcheck

import camkernels
from camkernels import focus_area, fused_negative_cam_loss

OTHER_BACKENDS = without_cuda(BACKENDS)
OTHER_KERNELS = without_cuda(KERNEL_BACKENDS)


def negatives_inputs(case):
    """Features, weight and bias."""
    return [x.requires_grad_() for x in (case.features(), case.weight(), case.bias())]


def negatives_target(case, multi_hot):
    """Classes; or which of them an image shows: of the first all, of the others one."""
    target = case.target()
    if not multi_hot:
        return target
    hot = torch.zeros((case.images, case.classes), dtype=torch.bool, device=case.device)
    hot.scatter_(1, target[:, None], True)
    hot[:1] = True
    return hot


def negatives_logits(case):
    return torch.randn((case.images, case.classes), generator=case.generator()).to(case.device)


@pytest.mark.parametrize("backend, device", OTHER_KERNELS)
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(
    "multi_hot, dtype, layout",
    [
        (False, torch.float32, "contiguous"),
        (True, torch.float32, "channels_last"),
        (True, torch.float16, "contiguous"),
    ],
)
def test_opcheck_of_negative_cam_loss(backend, device, uniform, multi_hot, dtype, layout):
    case = Case(device=device, images=2, channels=5, shape=(3, 4), dtype=dtype, layout=layout)
    features, weight, bias = (x.detach() for x in negatives_inputs(case))
    options = (4, uniform, 0.3, 1.5)
    inputs = (features, weight, negatives_target(case, multi_hot))
    for own, logits, keep in ((None, negatives_logits(case), False), (bias, None, True)):
        forward = (*inputs, own, logits, *options, keep, backend)
        opcheck(torch.ops.camkernels.negative_cam_loss_fwd.default, forward)
    _, chosen, counts, kept, _ = torch.ops.camkernels.negative_cam_loss_fwd(*forward)
    grad = torch.tensor(0.7, device=device)
    backward = (features, weight, grad, chosen, counts, kept, uniform, 1.5)
    opcheck(torch.ops.camkernels.negative_cam_loss_bwd.default, (*backward, True, True, True, backend))
    for needed in () if multi_hot else ((True, False, False), (False, True, False), (False, False, True)):
        opcheck(torch.ops.camkernels.negative_cam_loss_bwd.default, (*backward, *needed, backend))


@pytest.mark.parametrize("backend, device", OTHER_KERNELS)
@pytest.mark.parametrize("dtype, layout", [(torch.float32, "contiguous"), (torch.float16, "channels_last")])
def test_opcheck_of_focus_area(backend, device, dtype, layout):
    case = Case(device=device, channels=5, shape=(3, 4), dtype=dtype, layout=layout)
    opcheck(torch.ops.camkernels.focus_area_fwd.default, (case.features(), backend))


@pytest.mark.parametrize("backend, device", OTHER_BACKENDS)
@pytest.mark.parametrize("kind", ["mse", "uniform"])
@pytest.mark.parametrize("multi_hot", [False, True], ids=["classes", "multi-hot"])
def test_negatives_compile_without_a_graph_break(backend, device, kind, multi_hot):
    case = Case(device=device, channels=5)
    inputs, target = negatives_inputs(case), negatives_target(case, multi_hot)
    logits = negatives_logits(case) if multi_hot else None

    def loss(features, weight, bias):
        return fused_negative_cam_loss(
            features, weight, target, bias=bias, logits=logits, num_negatives=3, kind=kind, level=0.3
        )

    torch.compiler.reset()
    with camkernels.use_backend(backend):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found, truth = compiled(*inputs), loss(*inputs)
        pairs = zip(torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs), strict=True)
    assert torch.allclose(found, truth, rtol=1e-5, atol=1e-6)
    for mine, exact in pairs:
        assert torch.allclose(mine, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend, device", OTHER_BACKENDS)
def test_focus_area_compiles_without_a_graph_break(backend, device):
    features = Case(device=device, channels=5).features().requires_grad_()
    torch.compiler.reset()
    with camkernels.use_backend(backend):
        found = torch.compile(focus_area, fullgraph=True, backend="aot_eager")(features)
        truth = focus_area(features)
    assert torch.equal(found.mask, truth.mask)
    assert torch.equal(found.coverage, truth.coverage)
    assert not found.coverage.requires_grad


@pytest.mark.parametrize("kind", ["mse", "uniform"])
def test_negatives_compile_with_inductor_and_a_dynamic_batch(kind):
    """Of other numbers of classes as well: more negatives than there are, and fewer."""

    def loss(features, weight, bias, target):
        found = fused_negative_cam_loss(features, weight, target, bias=bias, num_negatives=5, kind=kind)
        return found + focus_area(features).coverage.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for images, classes in ((2, 4), (3, 6), (5, 9)):
        case = Case(device=DEVICE, channels=5, images=images, classes=classes)
        inputs, target = negatives_inputs(case), case.target()
        found, truth = compiled(*inputs, target), loss(*inputs, target)
        assert torch.allclose(found, truth, rtol=1e-5)
        pairs = zip(torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs), strict=True)
        for mine, exact in pairs:
            assert torch.allclose(mine, exact, rtol=1e-5, atol=1e-6)


class Negatives(torch.nn.Module):
    def forward(self, features, weight, target, logits):
        loss = fused_negative_cam_loss(features, weight, target, logits=logits, num_negatives=3)
        return loss, *focus_area(features)


@pytest.mark.parametrize("multi_hot", [False, True], ids=["classes", "multi-hot"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_negatives_and_focus_area_export(dynamic, multi_hot):
    def arguments(images, seed):
        case = Case(device=DEVICE, images=images, seed=seed)
        return case.features(), case.weight(), negatives_target(case, multi_hot), negatives_logits(case)

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"features": {0: batch}, "weight": None, "target": {0: batch}, "logits": {0: batch}}
    program = torch.export.export(Negatives(), arguments(3, 0), dynamic_shapes=shapes if dynamic else None)
    assert "camkernels.negative_cam_loss_fwd" in str(program.graph)
    assert "camkernels.focus_area_fwd" in str(program.graph)
    other = arguments(5 if dynamic else 3, 1)
    for mine, exact in zip(program.module()(*other), Negatives()(*other), strict=True):
        assert torch.equal(mine, exact)


@pytest.mark.parametrize("backend, device", OTHER_BACKENDS)
@pytest.mark.parametrize("kind", ["mse", "uniform"])
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_in_negatives_and_focus_area(backend, device, kind, features_dtype):
    case = Case(device=device, dtype=features_dtype, weight_dtype=torch.float32, channels=5)
    inputs, target = negatives_inputs(case), case.target()

    def results():
        loss = fused_negative_cam_loss(*inputs[:2], target, bias=inputs[2], num_negatives=3, kind=kind)
        return loss, *focus_area(inputs[0])

    with camkernels.use_backend(backend):
        with torch.autocast(device, dtype=torch.bfloat16):
            found = results()
        plain = results()
        grads = [torch.autograd.grad(loss, inputs) for loss, _, _ in (found, plain)]
    assert [x.dtype for x in found] == [features_dtype, torch.bool, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend, device", OTHER_KERNELS)
@pytest.mark.parametrize("kind", ["mse", "uniform"])
@pytest.mark.parametrize("place", range(3))
def test_double_backward_of_negatives_raises(backend, device, kind, place):
    """The gradient is linear in what came."""
    case = Case(device=device, channels=5)
    inputs = negatives_inputs(case)
    with camkernels.use_backend(backend):
        loss = fused_negative_cam_loss(*inputs[:2], case.target(), bias=inputs[2], kind=kind)
    given = torch.ones_like(loss, requires_grad=True)
    (grad,) = torch.autograd.grad(loss, inputs[place], given, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_negative_cam_loss: there is no double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("backend, device", OTHER_BACKENDS)
def test_negatives_and_focus_area_require_grad_only_where_there_is_one(backend, device):
    case = Case(device=device, channels=5)
    inputs, target = negatives_inputs(case), case.target()
    with camkernels.use_backend(backend):
        for place in range(3):
            leaves = [x if i == place else x.detach() for i, x in enumerate(inputs)]
            assert fused_negative_cam_loss(*leaves[:2], target, bias=leaves[2]).requires_grad
        assert not fused_negative_cam_loss(*(x.detach() for x in inputs[:2]), target).requires_grad
        with torch.no_grad():
            assert not fused_negative_cam_loss(*inputs[:2], target).requires_grad
        assert not any(x.requires_grad for x in focus_area(inputs[0]))


@pytest.mark.parametrize("backend, device", OTHER_KERNELS)
@pytest.mark.parametrize("kind", ["mse", "uniform"])
def test_gradients_of_negatives_only_where_asked_for(backend, device, kind):
    """Each alone is the one of all together."""
    case = Case(device=device, channels=5)
    inputs, target = [x.detach() for x in negatives_inputs(case)], case.target()

    def loss(features, weight, bias):
        return fused_negative_cam_loss(features, weight, target, bias=bias, num_negatives=3, kind=kind)

    together = run(backend, loss, inputs).grads
    for place in range(3):
        alone = run(backend, loss, inputs, needed=[i == place for i in range(3)]).grads
        assert [x is not None for x in alone] == [i == place for i in range(3)]
        assert torch.equal(alone[place], together[place])


@pytest.mark.parametrize("backend, device", OTHER_KERNELS)
@pytest.mark.parametrize("kind", ["mse", "uniform"])
def test_output_gradient_of_negatives_lies_anywhere(backend, device, kind):
    case = Case(device=device, channels=5)
    inputs, target = negatives_inputs(case), case.target()
    of_many = torch.tensor([7.0, 0.5, 7.0], device=device)
    with camkernels.use_backend(backend):
        found = []
        for given in (torch.tensor(0.5, device=device), of_many[1]):
            loss = fused_negative_cam_loss(*inputs[:2], target, bias=inputs[2], kind=kind)
            found.append(torch.autograd.grad(loss, inputs, given))
        doubled = torch.autograd.grad(
            fused_negative_cam_loss(*inputs[:2], target, bias=inputs[2], kind=kind).expand(3, 2).sum(), inputs
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for half, six in zip(found[0], doubled, strict=True):
        assert torch.allclose(12 * half, six, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend, device", OTHER_KERNELS)
@pytest.mark.parametrize("kind", ["mse", "uniform"])
def test_backward_of_negatives_may_run_twice(backend, device, kind):
    """It leaves the maps that it was given as they are."""
    case = Case(device=device, channels=5)
    inputs = negatives_inputs(case)
    with camkernels.use_backend(backend):
        loss = fused_negative_cam_loss(*inputs[:2], case.target(), bias=inputs[2], kind=kind)
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend, device", OTHER_BACKENDS)
@pytest.mark.parametrize("multi_hot", [False, True], ids=["classes", "multi-hot"])
def test_negatives_and_focus_area_leave_their_inputs_alone(backend, device, multi_hot):
    case = Case(device=device, channels=5, maps="ties")
    inputs = [x.detach() for x in negatives_inputs(case)]
    others = [negatives_target(case, multi_hot), negatives_logits(case)]
    before = [x.clone() for x in (*inputs, *others)]
    for logits in (None, others[1]):
        for kind in ("mse", "uniform"):
            options = {"logits": logits, "num_negatives": 3, "kind": kind}
            run(backend, lambda f, w, b: fused_negative_cam_loss(f, w, others[0], bias=b, **options), inputs)  # noqa: B023
    with camkernels.use_backend(backend):
        focus_area(inputs[0])
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, *others), strict=True))


@pytest.mark.parametrize("backend, device", OTHER_KERNELS)
@pytest.mark.parametrize("kind", ["mse", "uniform"])
@pytest.mark.parametrize("multi_hot", [False, True], ids=["classes", "multi-hot"])
def test_negatives_and_focus_area_are_deterministic_and_write_everything(backend, device, kind, multi_hot):
    """Images share classes, whose gradients add up, and one has no negative. Under this setting PyTorch fills
    what is allocated with NaN, integers with their largest."""
    case = Case(device=device, images=3, channels=5, classes=3)
    inputs, target = [x.detach() for x in negatives_inputs(case)], negatives_target(case, multi_hot)

    def results():
        def loss(features, weight, bias):
            return fused_negative_cam_loss(features, weight, target, bias=bias, num_negatives=2, kind=kind)

        found = run(backend, loss, inputs)
        options = (inputs[2], None, 2, kind == "uniform", 0.0, 1.0, True, backend)
        forward = torch.ops.camkernels.negative_cam_loss_fwd(*inputs[:2], target, *options)
        return [
            *found.values,
            *found.grads,
            *forward,
            *torch.ops.camkernels.focus_area_fwd(inputs[0], backend),
        ]

    plainly = results()
    torch.use_deterministic_algorithms(True)
    try:
        again = results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plainly, again, strict=True))


@pytest.mark.parametrize("backend, device", OTHER_KERNELS)
@pytest.mark.parametrize("kind", ["mse", "uniform"])
def test_only_the_chosen_maps_of_negatives_are_kept_for_backward(backend, device, kind):
    case = Case(device=device, channels=5, classes=40)
    inputs, target, logits = negatives_inputs(case), case.target(), negatives_logits(case)
    kept = {}
    with (
        camkernels.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x}) or x, lambda x: x),
    ):
        fused_negative_cam_loss(
            *inputs[:2], target, bias=inputs[2], logits=logits, num_negatives=4, kind=kind
        )
    own = {x.data_ptr() for x in inputs}
    shapes = sorted(list(x.shape) for pointer, x in kept.items() if pointer not in own)
    assert shapes == [[3], [3, 4], [3, 4, 49]]  # how many, which classes, their maps


@pytest.mark.parametrize("backend, device", OTHER_KERNELS)
def test_no_map_of_negatives_is_kept_where_the_gradient_is_0(backend, device):
    """That of the bias, for the uniform kind."""
    case = Case(device=device, channels=5)
    bias, saved = case.bias().requires_grad_(), []
    with (
        camkernels.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        fused_negative_cam_loss(case.features(), case.weight(), case.target(), bias=bias, kind="uniform")
    assert [0] in [list(x.shape) for x in saved]


@pytest.mark.parametrize("backend, device", [("cpu", "cpu"), *([("triton", "cuda")] if GPU else [])])
@pytest.mark.parametrize("kind", ["mse", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_peak_memory_of_negatives(backend, device, kind, dtype):
    """Gradients and the chosen maps once; in its interpreter Triton copies all that kernels read."""
    large = {"images": 32, "channels": 1024, "classes": 1000} if device == "cuda" else {}
    case = Case(
        **{"images": 4, "channels": 32, "classes": 200, **large},
        device=device,
        shape=(14, 14),
        dtype=dtype,
        weight_dtype=torch.float32,
    )
    inputs, target, logits = negatives_inputs(case), case.target(), negatives_logits(case)

    def loss():
        return fused_negative_cam_loss(
            *inputs[:2], target, bias=inputs[2], logits=logits, num_negatives=20, kind=kind
        )

    maps = case.images * 20 * 14 * 14 * 4
    with camkernels.use_backend(backend):
        loss().backward()  # what is made once, at the first call
        most, grads = peak_bytes(lambda: torch.autograd.grad(loss(), inputs), device)
        with torch.no_grad():
            least, _ = peak_bytes(loss, device)
    needed = sum(x.numel() * x.element_size() for x in grads) + maps
    assert maps < most <= 1.05 * needed
    assert least <= 0.05 * maps  # nothing is kept where no gradient will be asked for


@pytest.mark.parametrize("backend, device", OTHER_KERNELS)
def test_backward_of_negatives_uses_the_backend_of_its_forward(backend, device, monkeypatch):
    case = Case(device=device, channels=5)
    inputs = negatives_inputs(case)
    with camkernels.use_backend(backend):
        loss = fused_negative_cam_loss(*inputs[:2], case.target(), bias=inputs[2])
    seen = []
    resolve = camkernels._backend.resolve
    monkeypatch.setattr(
        camkernels._backend,
        "resolve",
        lambda name, requested, *rest: seen.append((name, requested)) or resolve(name, requested, *rest),
    )
    with camkernels.use_backend("reference"):
        loss.backward()
    assert seen == [("negative_cam_loss_bwd", backend)]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", ["mse", "uniform"])
class TestNegativesAndFocusAreaOnAGpu:
    """With Triton, which ``auto`` takes."""

    @pytest.mark.parametrize("multi_hot", [False, True], ids=["classes", "multi-hot"])
    @pytest.mark.parametrize("shape", [(7, 7), (33, 40)])
    def test_nothing_synchronises(self, kind, multi_hot, shape):
        case = Case(device="cuda", shape=shape)
        inputs, target, given = (
            negatives_inputs(case),
            negatives_target(case, multi_hot),
            negatives_logits(case),
        )

        def step():
            for logits in (None, given):
                options = {"bias": inputs[2], "logits": logits, "num_negatives": 3, "kind": kind}
                fused_negative_cam_loss(*inputs[:2], target, **options).backward()
            focus_area(inputs[0])

        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("shape", [(7, 7), (33, 40)])
    def test_cuda_graph(self, kind, shape):
        case = Case(device="cuda", channels=64, shape=shape)
        inputs, target = negatives_inputs(case), case.target()

        def step():
            loss = fused_negative_cam_loss(*inputs[:2], target, bias=inputs[2], num_negatives=3, kind=kind)
            return loss, *torch.autograd.grad(loss, inputs), *focus_area(inputs[0])

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

    def test_current_stream(self, kind):
        case = Case(device="cuda", images=64, channels=256, shape=(14, 14))
        features, weight, target = case.features(), case.weight(), case.target()
        stream = torch.cuda.Stream()
        late = torch.randn_like(features)

        def results(features):
            return fused_negative_cam_loss(features, weight, target, kind=kind), *focus_area(features)

        expected = results(late)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            features.copy_(late)
            found = results(features)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_launches_of_the_forward(self, kind):
        """The choice and the maps with their losses; without logits two more, for the sums of the maps."""
        case = Case(device="cuda")
        features, weight, bias = (x.detach() for x in negatives_inputs(case))
        options = (3, kind == "uniform", 0.0, 1.0, True, "triton")

        def launches(op, *arguments):
            op(*arguments)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                op(*arguments)
                torch.cuda.synchronize()
            events = profile.events()
            return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)

        loss = torch.ops.camkernels.negative_cam_loss_fwd
        for logits, expected in ((negatives_logits(case), 2), (None, 4)):
            assert launches(loss, features, weight, case.target(), bias, logits, *options) == expected
        assert launches(torch.ops.camkernels.focus_area_fwd, features, "triton") == 1

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_second_device(self, kind):
        def results(case):
            return fused_negative_cam_loss(
                case.features(), case.weight(), case.target(), kind=kind
            ), *focus_area(case.features())

        for found, plain in zip(results(Case(device="cuda:1")), results(Case()), strict=True):
            assert found.device.index == 1
            assert torch.allclose(found.cpu().double(), plain.double(), rtol=1e-5)
