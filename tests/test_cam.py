"""fused_cam: values and gradients against the reference in float64."""

from dataclasses import replace

import pytest
import torch
from cases import BACKENDS, GPU, KERNEL_BACKENDS, Case, as_double, as_plain, placed_matrix, run
from closeness import assert_as_close_as

import camkernels
from camkernels import _C, fused_cam, reference


def assert_matches_reference(backend, case, inputs, target, **options):
    """``inputs`` are features, weight and, for raw maps, bias."""

    def ours(features, weight, *bias):
        return fused_cam(features, weight, target, bias=bias[0] if bias else None, **options)

    def theirs(features, weight, *bias):
        goal = None if target is None else target.to(features.device)
        return reference.cam(features, weight, goal, bias=bias[0] if bias else None, **options)

    found = run(backend, ours, inputs)
    plain = run("reference", theirs, as_plain(inputs))
    truth = run("reference", theirs, as_double(inputs))
    names = ("cam", "grad_features", "grad_weight", "grad_bias")
    results = zip(
        names,
        found.values + found.grads,
        plain.values + plain.grads,
        truth.values + truth.grads,
        strict=False,
    )
    for name, mine, other, exact in results:
        if inputs[0].dtype != torch.float64 and mine.dtype == torch.float64:
            mine = mine.float()  # the arithmetic is that of the features, whatever the weight's dtype
        assert_as_close_as(mine.cpu(), other, exact, what=name)
    assert found.grads[0].dtype == inputs[0].dtype
    assert found.grads[1].shape == inputs[1].shape
    return found


@pytest.mark.parametrize("backend, case", placed_matrix(), ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
def test_one_class_per_image(backend, case, normalize):
    inputs = [case.features(), case.weight()]
    found = assert_matches_reference(backend, case, inputs, case.target(), normalize=normalize)
    if normalize and case.maps != "nan":
        cam = found.values[0].flatten(1)
        if case.maps == "constant" or case.shape == (1, 1):
            assert not cam.any()
        else:
            assert torch.equal(cam.amin(1), torch.zeros_like(cam[:, 0]))
            assert torch.equal(cam.amax(1), torch.ones_like(cam[:, 0]))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("maps", [1, 3, 11, None], ids=["1 map", "3 maps", "11 maps", "all classes"])
def test_several_maps_per_image(backend, device, layout, normalize, maps):
    case = Case(device=device, layout=layout, shape=(5, 9), classes=37, channels=19)
    inputs = [case.features(), case.weight(), *([] if normalize else [case.bias()])]
    target = None if maps is None else case.target(maps, torch.int32)
    assert_matches_reference(backend, case, inputs, target, normalize=normalize)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weight_of_another_dtype(backend, device, dtype, weight_dtype):
    case = Case(device=device, dtype=dtype, weight_dtype=weight_dtype, maps="ties")
    for target in (case.target(), None):
        found = assert_matches_reference(backend, case, [case.features(), case.weight()], target)
        assert found.grads[1].dtype == weight_dtype


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_weight_as_a_convolution_keeps_its_shape(backend, device):
    case = Case(device=device)
    weight = case.weight()[..., None, None]
    found = assert_matches_reference(backend, case, [case.features(), weight], case.target())
    assert found.grads[1].shape == (case.classes, case.channels, 1, 1)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("channels", [1, 2, 8, 64, 257])
@pytest.mark.parametrize("shape", [(7, 7), (4, 4), (3, 5)])
def test_numbers_of_channels(backend, device, channels, shape):
    for layout in ("contiguous", "channels_last"):
        case = Case(device=device, channels=channels, shape=shape, layout=layout)
        assert_matches_reference(backend, case, [case.features(), case.weight()], case.target())


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("target", ["one", "several", "all"])
def test_empty_batch(backend, device, target):
    case = Case(device=device, images=0)
    goal = {"one": case.target(), "several": case.target(2), "all": None}[target]
    shape = {"one": (0, 7, 7), "several": (0, 2, 7, 7), "all": (0, 6, 7, 7)}[target]
    found = run(backend, lambda f, w: fused_cam(f, w, goal), [case.features(), case.weight()])
    assert found.values[0].shape == shape
    assert found.grads[0].shape == (0, 33, 7, 7)
    assert torch.equal(found.grads[1], torch.zeros_like(case.weight()))


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_tied_extrema_share_the_gradient_evenly(backend, device):
    features = torch.tensor([[[[0.0, 0.0], [3.0, 3.0]]]], device=device)
    found = run(
        backend,
        lambda f, w: fused_cam(f, w, torch.zeros(1, dtype=torch.int64, device=device))[0, 0, 0],
        [features, torch.ones(1, 1, device=device)],
    )
    # d/dM of (M[0] - lo) / (hi - lo): M[0] is at the minimum, and both minima carry half of its gradient.
    truth = torch.tensor([[[[0.5, -0.5], [0.0, 0.0]]]]) / 3
    grad = found.grads[0].cpu() * 1
    assert torch.allclose(grad / grad.abs().max(), truth / truth.abs().max())


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_neighbours_of_the_extrema_do_not_count_as_ties(backend, device):
    """Values a rounding apart: only true extrema receive the gradient of minimum and maximum."""
    low = 1.0
    near = torch.nextafter(torch.tensor(low), torch.tensor(2.0)).item()
    features = torch.tensor([[[[low, near, 2.0**20, 2.0**20 - 0.0625]]]], device=device)
    zeros = torch.zeros(1, dtype=torch.int64, device=device)
    found = run(backend, lambda f, w: fused_cam(f, w, zeros), [features, torch.ones(1, 1, device=device)])
    cam = found.values[0].flatten()
    assert cam[0] == 0
    assert cam[1] > 0
    assert cam[2] == 1
    assert cam[3] < 1
    truth = run(
        "reference",
        lambda f, w: reference.cam(f, w, zeros.cpu()),
        [features.cpu().double(), torch.ones(1, 1).double()],
    )
    assert torch.allclose(found.grads[0].cpu().double(), truth.grads[0], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_eps_decides_what_is_constant(backend, device):
    features = torch.tensor([[[[0.0, 2.5e-4, 1e-3]]]], device=device)
    weight = torch.ones(1, 1, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    for eps, top in ((1e-2, 0.0), (1e-4, 1.0)):
        found = run(backend, lambda f, w, eps=eps: fused_cam(f, w, target, eps=eps), [features, weight])
        assert found.values[0].flatten().tolist() == pytest.approx([0.0, top / 4, top])
        assert bool(found.grads[0].any()) == bool(top)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced", "channels_last"])
@pytest.mark.parametrize("maps", [1, 3, None])
def test_output_gradient_of_any_stride(backend, device, layout, maps):
    case = Case(device=device, shape=(5, 5))
    target = None if maps is None else case.target(maps)
    grad = torch.randn(3, maps or case.classes, 5, 5, generator=case.generator()).to(device)
    grad = {
        "expanded": grad[:1, :1, :1, :1].expand_as(grad),
        "transposed": grad.transpose(2, 3),
        "sliced": torch.cat([grad, grad], 3)[..., ::2],
        "channels_last": grad.contiguous(memory_format=torch.channels_last),
    }[layout]
    features, weight = (x.requires_grad_() for x in (case.features(), case.weight()))
    with camkernels.use_backend(backend):
        ours = torch.autograd.grad(fused_cam(features, weight, target), [features, weight], grad)
        dense = torch.autograd.grad(
            fused_cam(features, weight, target), [features, weight], grad.contiguous()
        )
    for a, b in zip(ours, dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_only_where_asked_for(backend, device, needed):
    case = Case(device=device)
    target = case.target()

    def op(features, weight, bias):
        return fused_cam(features, weight, target, bias=bias, normalize=False)

    inputs = [case.features(), case.weight(), case.bias()]
    alone, together = run(backend, op, inputs, needed=needed), run(backend, op, inputs)
    for need, one, all_of_them in zip(needed, alone.grads, together.grads, strict=True):
        assert torch.equal(one, all_of_them) if need else one is None


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_gradient_keeps_the_memory_format(backend, device):
    case = Case(device=device, layout="channels_last")
    target = case.target()
    found = run(backend, lambda f, w: fused_cam(f, w, target), [case.features(), case.weight()])
    assert found.grads[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_inputs_are_not_written_to(backend, device):
    case = Case(device=device)
    inputs = [case.features(), case.weight()]
    before = [x.clone() for x in inputs]
    target = case.target()
    run(backend, lambda f, w: fused_cam(f, w, target), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("target", ["one", "several", "all"])
def test_gradcheck(normalize, target):
    case = Case(dtype=torch.float64, shape=(3, 4), channels=4, classes=3, images=2)
    goal = {"one": case.target(), "several": case.target(2), "all": None}[target]
    inputs = [x.requires_grad_() for x in (case.features(), case.weight(), case.bias())]
    assert torch.autograd.gradcheck(
        lambda f, w, b: fused_cam(f, w, goal, bias=b, normalize=normalize), inputs, atol=1e-6
    )


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_instruction_set(capability, dtype):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        for layout in ("contiguous", "channels_last"):
            for shape in ((7, 7), (14, 14)):
                case = Case(dtype=dtype, layout=layout, shape=shape, channels=37)
                for target in (case.target(), None):
                    assert_matches_reference("cpu", case, [case.features(), case.weight()], target)
    finally:
        _C.use_cpu_capability(chosen)


def test_half_conversions_round_as_torch_does():
    """All of float16 and bfloat16, and values halfway between two of them, through every instruction set."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        values = values[values.isfinite() & ((values == 0) | (values.abs() > 2.0**-120))].float()
        between = values * 0.5 + values.roll(1) * 0.5
        for capability in _C.cpu_capabilities():
            chosen = _C.cpu_capability()
            _C.use_cpu_capability(capability)
            try:
                row = values.to(dtype)[None, None, None]  # [1, 1, 1, W]: one channel of weight 1
                one = torch.ones(1, 1)
                exact = fused_cam(row, one, normalize=False).flatten()
                assert torch.equal(exact.float(), values)
                halves = torch.stack([values, values.roll(1)])[None, :, None].to(
                    dtype
                )  # two channels, averaged
                mean = fused_cam(halves, torch.full((1, 2), 0.5), normalize=False).flatten()
                assert torch.equal(mean, between.to(dtype))
            finally:
                _C.use_cpu_capability(chosen)


@pytest.mark.skipif(not GPU, reason="needs a GPU: on a CPU an index out of range raises")
@pytest.mark.parametrize("backend, device", [b for b in BACKENDS if b[1] == "cuda"])
def test_index_out_of_range_gives_nan_on_a_gpu(backend, device):
    case = replace(Case(device=device), images=4)
    target = torch.tensor([0, -1, case.classes, 1], device=device)
    found = run(backend, lambda f, w: fused_cam(f, w, target), [case.features(), case.weight()])
    assert found.values[0].isnan().flatten(1).all(1).tolist() == [False, True, True, False]
    assert not found.grads[1].isnan().any()


@pytest.mark.parametrize("index", [-1, 6])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_index_out_of_range_raises_on_the_cpu(backend, index):
    case = Case()
    with camkernels.use_backend(backend), pytest.raises(IndexError):
        fused_cam(case.features(), case.weight(), torch.tensor([0, index, 1]))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_bias_of_a_normalised_map_has_a_gradient_of_zero(backend, device):
    case = Case(device=device)
    target = case.target()
    found = run(
        backend,
        lambda f, w, b: fused_cam(f, w, target, bias=b),
        [case.features(), case.weight(), case.bias()],
    )
    assert torch.equal(found.grads[2], torch.zeros_like(case.bias()))
    assert found.grads[0].any()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_constant_map_at_eps_zero_has_a_gradient_of_zero(backend, device):
    case = Case(device=device, maps="constant")
    target = case.target()
    found = run(backend, lambda f, w: fused_cam(f, w, target, eps=0.0), [case.features(), case.weight()])
    assert not found.values[0].any()
    assert not found.grads[0].any()
    assert not found.grads[1].any()


# NumPy, on which Triton's interpreter runs, warns of inf / inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_an_infinite_map_has_no_gradient_in_disguise(backend, device):
    """As in the reference: NaN at the infinity, 0 elsewhere, and every gradient of that image NaN."""
    case = Case(device=device, channels=4)
    features, target = case.features(), case.target()
    features[1, :, 2, 3] = torch.inf
    weight = case.weight().abs()
    found = run(backend, lambda f, w: fused_cam(f, w, target), [features, weight])
    truth = run("reference", lambda f, w: reference.cam(f, w, target), [features, weight])
    assert torch.equal(found.values[0].isnan(), truth.values[0].isnan())
    assert torch.allclose(found.values[0], truth.values[0], equal_nan=True, atol=1e-6)
    assert torch.equal(found.grads[0].isnan(), truth.grads[0].isnan())


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
def test_gradient_of_the_bias_over_a_large_map(backend, device):
    """A running sum in float32 would lose digits here."""
    case = Case(device=device, images=1, channels=1, classes=1, shape=(128, 128))
    inputs = [case.features(), case.weight(), case.bias()]
    leaves = [x.requires_grad_() for x in inputs]
    target = case.target()
    with camkernels.use_backend(backend):
        fused_cam(leaves[0], leaves[1], target, bias=leaves[2], normalize=False).mean().backward()
    assert torch.allclose(leaves[2].grad, torch.ones(1, device=device), rtol=4e-7, atol=0)


@pytest.mark.parametrize("backend, device", KERNEL_BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_map_may_be_changed_in_place_where_backward_does_not_need_it(backend, device, normalize):
    case = Case(device=device)
    features, weight = case.features().requires_grad_(), case.weight()
    with camkernels.use_backend(backend):
        cam = fused_cam(features, weight, case.target(), normalize=normalize).clamp_(0.1)
        if normalize:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                cam.sum().backward()
        else:
            cam.sum().backward()
            assert features.grad.any()
