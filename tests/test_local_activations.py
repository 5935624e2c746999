"""fused_local_activations: values and gradients against float64, with the winners that the kernels chose."""

import pytest
import torch
from calls import passes
from cases import (
    BACKENDS,
    DEVICE,
    GPU,
    KERNEL_BACKENDS,
    Case,
    as_double,
    as_plain,
    lay_out,
    may_hold_infinities,
    peak_bytes,
    placed_matrix,
    run,
    without_cuda,
)
from closeness import assert_as_close_as
from torch.nn import functional as F

import camkernels
from camkernels import _C, fused_local_activations
from camkernels.reference.cam import accumulate_dtype

everywhere = pytest.mark.parametrize(("backend", "device"), without_cuda(BACKENDS))
on_kernels = pytest.mark.parametrize(("backend", "device"), without_cuda(KERNEL_BACKENDS))


def weight_of(case, classifiers=3):
    """[n, L + 1, C] with L + 1 the classes of the case; small integers where the case wants ties."""
    draw = torch.Generator().manual_seed(case.seed + 2)
    shape = (classifiers, case.classes, case.channels)
    values = torch.randn(shape, generator=draw)
    if case.maps in ("ties", "constant"):
        values = torch.randint(-1, 2, shape, generator=draw).float()
    return values.to(case.device, case.weight_dtype or case.dtype)


def bias_of(case, classifiers=3):
    draw = torch.Generator().manual_seed(case.seed + 3)
    values = torch.randint(-1, 2, (classifiers, case.classes), generator=draw).float()
    return values.to(case.device, case.weight_dtype or case.dtype)


def volume_of(features, weight, bias):
    """[N, n, L + 1, H, W] in the accumulation type."""
    wide = accumulate_dtype(features.dtype)
    volume = torch.einsum("nchw,klc->nklhw", features.to(wide), weight.to(wide))
    return volume if bias is None else volume + bias.to(wide)[..., None, None]


def winners_of(backend, features, weight, bias):
    """What the kernel kept for backward: [N, L + 1, H, W] and [N, H, W], int64 on the CPU."""
    with camkernels.use_backend(backend), passes() as seen:
        fused_local_activations(features, weight.detach().requires_grad_(), bias)
    assert seen[0].values.winner.dtype == torch.uint8
    return [x.cpu().long() for x in (seen[0].values.winner, seen[0].values.attention_class)]


def of_winners(winner, attention_class):
    """The op with its winners settled: no rounding can choose others, which would have other gradients."""

    def function(features, weight, bias=None):
        volume = volume_of(features, weight, bias)
        activations = volume.gather(1, winner[:, None])[:, 0]
        attention = activations.gather(1, attention_class[:, None])[:, 0]
        return activations.to(features.dtype), attention.to(features.dtype)

    return function


def assert_winners(winner, attention_class, volume, exact, slack):
    """The winner is the first maximum where sums are exact; else within rounding of the maximum."""
    greatest, first = volume.max(1)
    if exact:
        assert torch.equal(winner, first)
        assert torch.equal(attention_class, greatest[:, :-1].max(1).indices)
        return
    won = volume.gather(1, winner[:, None])[:, 0]
    assert torch.equal(won.isnan(), greatest.isnan())
    assert not (won < greatest - slack).any()
    attention = won.gather(1, attention_class[:, None])[:, 0]
    assert not (attention < won[:, :-1].amax(1) - slack).any()
    assert not (attention_class == volume.shape[2] - 1).any()


def assert_right(backend, case, *, classifiers=3, with_bias=True, inputs=None, needed=None):
    inputs = inputs or [case.features(), weight_of(case, classifiers)]
    if with_bias:
        inputs = [*inputs[:2], bias_of(case, classifiers)]
    found = run(backend, fused_local_activations, inputs, needed=needed)
    doubles = as_double(inputs)
    volume = volume_of(*doubles, *([] if with_bias else [None]))
    if backend == "reference":
        activations, winner = volume.max(1)
        attention_class = activations[:, :-1].max(1).indices
    else:
        winner, attention_class = winners_of(backend, *inputs, *([] if with_bias else [None]))
        rounding = torch.finfo(accumulate_dtype(case.dtype)).eps
        slack = 8 * case.channels * rounding * volume.nan_to_num(0).abs().max()
        assert_winners(winner, attention_class, volume, case.maps in ("ties", "constant"), slack)
    function = of_winners(winner, attention_class)
    truth = run("reference", function, doubles, needed=needed)
    plain = run("reference", function, as_plain(inputs), needed=needed)
    for name, value, other, exact in zip(
        ("activations", "attention", "grad_features", "grad_weight", "grad_bias"),
        [*found.values, *found.grads],
        [*plain.values, *plain.grads],
        [*truth.values, *truth.grads],
        strict=False,  # without a bias the last name is left
    ):
        if exact is None:
            assert value is None, name
            continue
        if case.maps == "nan" and name.startswith("grad"):
            # Here the definition, one dense product, has 0 * NaN; what is finite there must be right.
            hole = exact.isnan()
            value, other, exact = (x.cpu().masked_fill(hole, 0) for x in (value, other, exact))
        assert_as_close_as(value.cpu(), other, exact, what=name)
    return found


def thinned_matrix():
    """The interpreter, being slow, takes the largest map once."""
    return [
        (backend, case)
        for backend, case in placed_matrix(without_cuda(KERNEL_BACKENDS))
        if GPU or backend != "triton" or case.shape != (33, 40) or case.maps == "ties"
    ]


@may_hold_infinities
@pytest.mark.parametrize(("backend", "case"), thinned_matrix(), ids=str)
def test_values_and_gradients(backend, case):
    found = assert_right(backend, case)
    assert all(value.is_contiguous() for value in found.values)


SHAPES = [  # classifiers, classes with background, channels, map
    (1, 6, 33, (7, 7)),
    (4, 2, 20, (5, 3)),  # one class beside the background
    (16, 51, 70, (4, 5)),
    (5, 130, 129, (3, 11)),
    (256, 3, 8, (2, 3)),
    (2, 17, 300, (1, 1)),
]


@everywhere
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("classifiers", "classes", "channels", "shape"), SHAPES)
def test_sizes(backend, device, layout, classifiers, classes, channels, shape):
    images = 1 if classes > 100 else 2
    case = Case(device=device, layout=layout, classes=classes, channels=channels, shape=shape, images=images)
    assert_right(backend, case, classifiers=classifiers, with_bias=layout == "contiguous")


@pytest.mark.parametrize(("classifiers", "shape"), [(3, (40, 30)), (2, (9, 60)), (3, (11, 13))])
def test_more_pixels_than_a_thread_holds_at_once(classifiers, shape):
    case = Case(channels=5, classes=3, shape=shape, images=9 if shape == (11, 13) else 2)
    assert_right("cpu", case, classifiers=classifiers)


@everywhere
def test_one_classifier_is_a_1x1_convolution(backend, device):
    case = Case(device=device, shape=(5, 9))
    features, weight, bias = case.features(), weight_of(case, 1), bias_of(case, 1)
    with camkernels.use_backend(backend):
        activations, attention = fused_local_activations(features, weight, bias)

    def convolution(features):
        return F.conv2d(features, weight[0, ..., None, None].to(features), bias[0].to(features))

    truth = convolution(features.double()).cpu()
    assert_as_close_as(activations.cpu(), convolution(features).cpu(), truth)
    assert torch.equal(attention, activations[:, :-1].amax(1))


@everywhere
def test_equal_classifiers_and_classes_give_their_gradient_to_the_first(backend, device):
    features = torch.ones(1, 2, 1, 2, device=device)
    weight = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]] * 3, device=device)  # 3 equal classifiers
    leaf = weight.clone().requires_grad_()
    with camkernels.use_backend(backend):
        activations, attention = fused_local_activations(features, leaf)
        assert attention.tolist() == [[[1.0, 1.0]]]  # not the background's 18
        (of_activations,) = torch.autograd.grad(activations.sum(), leaf, retain_graph=True)
        (of_attention,) = torch.autograd.grad(attention.sum(), leaf)
    assert of_activations[0].tolist() == [[2.0, 2.0]] * 3
    assert not of_activations[1:].any()
    assert of_attention[0].tolist() == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert not of_attention[1:].any()


@may_hold_infinities
@everywhere
def test_a_nan_wins_and_minus_infinity_loses(backend, device):
    features = torch.ones(1, 1, 1, 1, device=device)
    weight = (
        torch.tensor([-torch.inf, torch.nan, 3.0, torch.nan], device=device).view(4, 1, 1).repeat(1, 2, 1)
    )
    weight[:, 1] = torch.tensor([[-torch.inf], [-torch.inf], [-2.0], [-2.0]])
    with camkernels.use_backend(backend):
        activations, attention = fused_local_activations(features, weight)
    assert activations.flatten().isnan().tolist() == [True, False]
    assert activations[0, 1].item() == -2
    assert attention.isnan().all()
    if backend != "reference":
        winner, _ = winners_of(backend, features, weight, None)
        assert winner.flatten().tolist() == [1, 2]


@may_hold_infinities
@on_kernels
def test_maps_of_minus_infinity(backend, device):
    features = torch.full((1, 1, 2, 2), -torch.inf, device=device)
    with camkernels.use_backend(backend):
        activations, attention = fused_local_activations(features, torch.ones(2, 3, 1, device=device))
    assert activations.isneginf().all()
    assert attention.isneginf().all()
    winner, attention_class = winners_of(backend, features, torch.ones(2, 3, 1, device=device), None)
    assert not winner.any()
    assert not attention_class.any()


@on_kernels
@pytest.mark.parametrize(
    "needed",
    [(True, False, False), (False, True, False), (False, False, True)],
    ids=["features", "weight", "bias"],
)
def test_only_the_gradients_that_are_wanted(backend, device, needed):
    assert_right(backend, Case(device=device, channels=9), needed=needed)


@on_kernels
@pytest.mark.parametrize("which", ["activations", "attention"])
def test_a_gradient_of_one_result_only(backend, device, which):
    case = Case(device=device, channels=20)
    inputs = [case.features(), weight_of(case), bias_of(case)]
    winners = winners_of(backend, *inputs)

    def only(function):
        return lambda *args: function(*args)[which == "attention"]

    found = run(backend, only(fused_local_activations), inputs)
    truth = run("reference", only(of_winners(*winners)), as_double(inputs))
    plain = run("reference", only(of_winners(*winners)), as_plain(inputs))
    for value, other, exact in zip(found.grads, plain.grads, truth.grads, strict=True):
        assert_as_close_as(value.cpu(), other, exact)


@may_hold_infinities
@on_kernels
def test_an_infinite_gradient_of_the_attention_stays_with_its_class(backend, device):
    features = torch.ones(1, 1, 1, 2, device=device)
    weight = torch.tensor([[[1.0], [2.0], [3.0]], [[0.0], [1.0], [2.0]]], device=device, requires_grad=True)
    with camkernels.use_backend(backend):
        results = fused_local_activations(features, weight)
        upstream = [torch.ones_like(results[0]), torch.full_like(results[1], torch.inf)]
        (grad,) = torch.autograd.grad(results, weight, upstream)
    assert grad.flatten().tolist() == [2.0, torch.inf, 2.0, 0.0, 0.0, 0.0]


@on_kernels
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_weight_of_another_dtype(backend, device, weight_dtype):
    dtype = torch.float16 if weight_dtype == torch.float32 else torch.float32
    case = Case(device=device, dtype=dtype, weight_dtype=weight_dtype, shape=(3, 5))
    found = assert_right(backend, case)
    assert [grad.dtype for grad in found.grads] == [dtype, weight_dtype, weight_dtype]


@on_kernels
def test_strides_of_weight_and_output_gradient(backend, device):
    case = Case(device=device, shape=(4, 6))
    features, weight, bias = case.features(), weight_of(case), bias_of(case)
    odd = lay_out(weight.transpose(0, 1).contiguous(), "strided").transpose(0, 1)
    grads = []
    for each in (weight, odd):
        leaf = each.detach().requires_grad_()
        with camkernels.use_backend(backend):
            activations, attention = fused_local_activations(features, leaf, bias)
            upstream = torch.arange(activations.numel(), device=device, dtype=torch.float32)
            upstream = upstream.view(activations.shape).flip(3)
            if each is odd:
                upstream = upstream.contiguous(memory_format=torch.channels_last)
            (grad,) = torch.autograd.grad(
                [activations, attention], leaf, [upstream, torch.ones((), device=device).expand_as(attention)]
            )
        grads.append(grad)
    assert torch.equal(*grads)


def test_gradcheck_of_the_cpu_kernels():
    case = Case(dtype=torch.float64, shape=(3, 2), channels=4, images=2, classes=4)
    inputs = [x.requires_grad_() for x in (case.features(), weight_of(case), bias_of(case))]
    with camkernels.use_backend("cpu"):
        assert torch.autograd.gradcheck(fused_local_activations, inputs)


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_each_instruction_set(capability):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for layout in ("contiguous", "channels_last"):
                case = Case(dtype=dtype, layout=layout, shape=(5, 7), channels=70, classes=11)
                assert_right("cpu", case, classifiers=5)
    finally:
        _C.use_cpu_capability(chosen)


@pytest.mark.parametrize("images", [1, 3])
def test_the_number_of_threads_changes_no_bit(images):
    case = Case(images=images, channels=150, classes=40, shape=(9, 11))
    inputs = [case.features(), weight_of(case, 6), bias_of(case, 6)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = run("cpu", fused_local_activations, inputs)
            results.append([*found.values, *found.grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("backend", "device"), [("cpu", "cpu"), *([("triton", DEVICE)] if GPU else [])])
def test_no_volume_of_all_classifiers_is_held(backend, device):
    """Activations, attention, one byte of winner and one class of attention; backward: gradients."""
    case = Case(device=device, channels=64, classes=40, shape=(14, 14), images=4)
    features, weight = case.features().requires_grad_(), weight_of(case, 16).requires_grad_()
    cells = 4 * 14 * 14
    with camkernels.use_backend(backend):
        forward, (activations, _) = peak_bytes(lambda: fused_local_activations(features, weight), device)
        assert forward <= 1.05 * (cells * 40 * (4 + 1) + cells * (4 + 4))
        upstream = torch.ones_like(activations)
        backward, _ = peak_bytes(
            lambda: torch.autograd.grad(activations, [features, weight], upstream), device
        )
        assert backward <= 1.05 * 4 * (features.numel() + weight.numel())
