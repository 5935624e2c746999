"""fused_negative_cam_loss: the choice against plain Python, values and gradients against float64."""

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from calls import passes
from cases import (
    BACKENDS,
    DEVICE,
    GPU,
    KERNEL_BACKENDS,
    LAYOUTS,
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

import camkernels
from camkernels import _C, fused_negative_cam_loss
from camkernels.ops.negative_cam_loss import KINDS, loss_and_counts, positive_share
from camkernels.reference.cam import accumulate_dtype

everywhere = pytest.mark.parametrize(("backend", "device"), without_cuda(BACKENDS))
on_kernels = pytest.mark.parametrize(("backend", "device"), without_cuda(KERNEL_BACKENDS))
each_kind = pytest.mark.parametrize("kind", KINDS)


def interpreted(backend):
    """Triton's interpreter is slow."""
    return backend == "triton" and not GPU


OPTIONS = {"level": 0.3, "temperature": 1.7}


def shown(target, classes):
    """Whether an image shows a class, [N][L]."""
    if target.dim() == 2:
        return [[value != 0 for value in row] for row in target.tolist()]
    return [[label == own for label in range(classes)] for own in target.tolist()]


def expected_negatives(keys, target, num_negatives):
    """Lists of classes in rising order: those of largest key, equal ones from the first, NaN before all."""
    chosen = []
    for row, present in zip(keys.tolist(), shown(target, keys.shape[1]), strict=True):
        order = [label for label in range(len(row)) if not present[label]]
        order.sort(key=lambda label: (0, 0.0, label) if math.isnan(row[label]) else (1, -row[label], label))
        chosen.append(sorted(order[:num_negatives]))
    return chosen


def loss_of(chosen, kind, level, temperature):
    """The loss as a function of features, weight and bias, for negatives that are settled."""

    def function(features, weight, bias):
        wide = accumulate_dtype(features.dtype)
        losses = []
        for image, labels in zip(features.to(wide), chosen, strict=True):
            if not labels:
                continue
            maps = weight.flatten(1).to(wide)[labels] @ image.flatten(1) + bias.to(wide)[labels][:, None]
            if kind == "mse":
                losses.append((maps - level).square().mean())
            else:
                pixels = maps.shape[1]
                log_share = F.log_softmax(maps / temperature, 1)
                losses.append((-math.log(pixels) - log_share).mean(1).sum())
        total = torch.stack(losses).sum() if losses else features.sum() * 0
        return (total / max(len(chosen), 1)).to(features.dtype)

    return function


def keys_of(features, weight, bias, logits):
    """What ranks the classes, in float64."""
    if logits is not None:
        return logits.cpu().double()
    features, weight, bias = (x.detach().cpu().double() for x in (features, weight.flatten(1), bias))
    return features.sum((2, 3)) @ weight.mT + features.shape[2] * features.shape[3] * bias


def target_of(case, hot):
    if not hot:
        return case.target()
    draw = torch.Generator().manual_seed(case.seed + 5)
    return (torch.rand(case.images, case.classes, generator=draw) < 0.4).to(case.device)


def logits_of(case, dtype=None):
    draw = torch.Generator().manual_seed(case.seed + 6)
    return torch.randn(case.images, case.classes, generator=draw).to(case.device, dtype or case.dtype)


def assert_right(backend, case, kind, *, hot=False, given=True, num_negatives=3, inputs=None, **options):
    options = {**OPTIONS, **options}
    target = target_of(case, hot)
    inputs = inputs or [case.features(), case.weight(), case.bias()]
    logits = logits_of(case) if given else None

    def ours(features, weight, bias):
        return fused_negative_cam_loss(
            features,
            weight,
            target,
            bias=bias,
            logits=logits,
            num_negatives=num_negatives,
            kind=kind,
            **options,
        )

    found = run(backend, ours, inputs)
    chosen = expected_negatives(keys_of(*inputs, logits), target.cpu(), num_negatives)
    function = loss_of(chosen, kind, **options)
    truth = run("reference", function, as_double(inputs))
    plain = run("reference", function, as_plain(inputs))
    mine = [*found.values, *found.grads]
    names = ("loss", "grad_features", "grad_weight", "grad_bias")
    for name, value, other, exact in zip(
        names, mine, [*plain.values, *plain.grads], [*truth.values, *truth.grads], strict=True
    ):
        if kind == "uniform" and (name == "grad_bias" or case.maps == "constant"):
            exact.zero_()  # what float64 has there is rounding
        if name == "grad_bias" and kind == "uniform" and backend != "reference":
            assert not value.any()
        else:
            assert_as_close_as(value.cpu(), other, exact, what=name)
    return found


def spread_matrix():
    """The matrix, with kind, form of target and source of logits drawn for each case."""
    draw = random.Random(0)
    return [
        (backend, case, draw.choice(KINDS), draw.random() < 0.5, draw.random() < 0.5)
        for backend, case in placed_matrix(without_cuda(KERNEL_BACKENDS))
    ]


@may_hold_infinities
@pytest.mark.parametrize(("backend", "case", "kind", "hot", "given"), spread_matrix(), ids=str)
def test_values_and_gradients(backend, case, kind, hot, given):
    assert_right(backend, case, kind, hot=hot, given=given)


@everywhere
@each_kind
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_every_combination(backend, device, kind, hot, given):
    assert_right(backend, Case(device=device, channels=17), kind, hot=hot, given=given)


def numbers_of_negatives():
    """Of 300 classes; the interpreter, being slow, takes two of the numbers."""
    return [
        (backend, device, number)
        for backend, device in without_cuda(KERNEL_BACKENDS)
        for number in ((33, 299) if interpreted(backend) else (1, 33, 100, 190, 299, 300, 1000))
    ]


@each_kind
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize(("backend", "device", "num_negatives"), numbers_of_negatives())
def test_few_negatives_of_many_classes_and_nearly_all(backend, device, kind, hot, num_negatives):
    """More than one block of classes; gathered rows, and the full product where nearly all are wanted."""
    case = Case(device=device, images=2, channels=20, classes=300, shape=(3, 3))
    assert_right(backend, case, kind, hot=hot, num_negatives=num_negatives)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_wide_features_on_the_cpu(layout, dtype):
    """Several blocks of channels, of pixels and of slots."""
    case = Case(dtype=dtype, layout=layout, images=1, channels=600, classes=120, shape=(13, 11))
    assert_right("cpu", case, "mse", num_negatives=100)
    assert_right("cpu", replace(case, channels=70, classes=1200, shape=(2, 2)), "uniform", num_negatives=700)


def test_logits_from_more_features_than_the_cache_holds():
    """The CPU then makes logits and maps for some images at a time."""
    case = Case(images=40, channels=48, classes=9, shape=(36, 38))
    assert case.features().nbytes > 8 << 20
    assert_right("cpu", case, "mse", given=False)


@everywhere
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_may_have_another_dtype(backend, device, weight_dtype):
    case = Case(device=device, dtype=torch.bfloat16, weight_dtype=weight_dtype, channels=17)
    found = assert_right(backend, case, "mse")
    assert found.values[0].dtype == found.grads[0].dtype == torch.bfloat16
    assert found.grads[1].dtype == found.grads[2].dtype == weight_dtype


@everywhere
def test_the_weight_may_be_a_convolution_and_targets_int32(backend, device):
    case = Case(device=device, channels=5)
    features, weight, bias = case.features(), case.weight(), case.bias()
    target = case.target(dtype=torch.int32)

    def ours(features, weight, bias):
        return fused_negative_cam_loss(features, weight, target, bias=bias, num_negatives=2)

    plain = run(backend, ours, [features, weight, bias])
    target = target.long()
    other = run(backend, ours, [features, weight[..., None, None], bias])
    assert torch.equal(plain.values[0], other.values[0])
    assert other.grads[1].shape == (*weight.shape, 1, 1)
    assert torch.equal(plain.grads[1], other.grads[1][..., 0, 0])


@everywhere
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float32, torch.bfloat16])
def test_multi_hot_targets_of_any_dtype(backend, device, dtype):
    """What is not 0 is no negative: present, and with -1 unknown."""
    case = Case(device=device, channels=5)
    hot = target_of(case, hot=True)
    signs = torch.where(torch.arange(case.classes, device=device) % 2 == 0, 1, -1)
    target = hot if dtype == torch.bool else (hot * signs).to(dtype)
    with camkernels.use_backend(backend):
        found, truth = (
            fused_negative_cam_loss(case.features(), case.weight(), t, logits=logits_of(case))
            for t in (target, hot)
        )
    assert torch.equal(found, truth)


def chosen_by_op(backend, keys, target, num_negatives):
    """``chosen`` and ``counts`` as the op gives them, for logits [N, L]."""
    images, classes = keys.shape
    features = torch.ones(images, 2, 1, 2, device=keys.device)
    weight = torch.ones(classes, 2, device=keys.device)
    with camkernels.use_backend(backend), passes() as seen:
        fused_negative_cam_loss(features, weight, target, logits=keys, num_negatives=num_negatives)
    found = seen[0].values
    lists = zip(found.chosen.tolist(), found.counts.tolist(), strict=True)
    return [row[:count] for row, count in lists], found.chosen


HARD_KEYS = {
    "random": lambda shape, draw: torch.randn(shape, generator=draw),
    "ties": lambda shape, draw: torch.randint(-2, 3, shape, generator=draw).float(),
    "equal": lambda shape, draw: torch.full(shape, -1.5),
    "zeros": lambda shape, draw: torch.randint(0, 2, shape, generator=draw).float() * -0.0,
    "infinite": lambda shape, draw: torch.randn(shape, generator=draw).mul(50).exp2().mul(1e30).log(),
    "nan": lambda shape, draw: torch.randn(shape, generator=draw).log(),
    "lowest": lambda shape, draw: torch.full(shape, -torch.inf),
    "denormal": lambda shape, draw: torch.randn(shape, generator=draw) * 1e-40,
}


@on_kernels
@pytest.mark.parametrize("keys", HARD_KEYS)
@pytest.mark.parametrize(("classes", "num_negatives"), [(1, 1), (2, 1), (37, 5), (130, 129), (1030, 100)])
@pytest.mark.parametrize("hot", [False, True])
def test_the_choice(backend, device, keys, classes, num_negatives, hot):
    draw = torch.Generator().manual_seed(classes)
    values = HARD_KEYS[keys]((3, classes), draw).to(device)
    if keys == "infinite":
        values[:, ::3] = torch.inf
        values[:, 1::5] = -torch.inf
    target = torch.randint(classes, (3,), generator=draw).to(device)
    if hot:
        target = (torch.rand(3, classes, generator=draw) < 0.3).to(device)
    found, chosen = chosen_by_op(backend, values, target, num_negatives)
    wanted = expected_negatives(values.cpu(), target.cpu(), num_negatives)
    assert found == wanted
    for row, labels in zip(chosen.tolist(), wanted, strict=True):
        assert row[len(labels) :] == [-1] * (len(row) - len(labels))


@everywhere
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("hot", [False, True])
def test_negatives_by_logit_are_those_by_map_sum(backend, device, layout, hot):
    """Small integers, whose sums are exact: the loss is the same to the last bit."""
    case = Case(device=device, maps="ties", layout=layout, classes=40, channels=12, shape=(5, 7))
    features, weight, bias = case.features(), case.weight(), case.bias().mul(4).round()
    target = target_of(case, hot)
    logits = F.linear(features.sum((2, 3)), weight, 35 * bias)
    assert len(logits.unique()) > 20  # an order by something else would show

    def loss(logits):
        return fused_negative_cam_loss(features, weight, target, bias=bias, logits=logits, num_negatives=7)

    with camkernels.use_backend(backend):
        assert torch.equal(loss(None), loss(logits))
        assert not torch.equal(loss(None), loss(-logits))


@everywhere
def test_the_uniform_kind_is_the_released_loss_less_its_constant(backend, device):
    case = Case(device=device, channels=17, classes=12)
    features, weight, bias, target = case.features(), case.weight(), case.bias(), case.target()
    logits, negatives = logits_of(case), 5
    masked = logits.scatter(1, target[:, None], -torch.inf)
    maps = torch.einsum("lc,nchw->nlhw", weight, features) + bias[:, None, None]
    maps = maps.gather(1, masked.topk(negatives).indices[..., None, None].expand(-1, -1, *case.shape))
    even = torch.full_like(maps.flatten(2), 1 / maps[0, 0].numel())
    released = F.cross_entropy(maps.flatten(2).mT, even.mT, reduction="none").sum(1).mean()
    with camkernels.use_backend(backend):
        loss = fused_negative_cam_loss(
            features, weight, target, bias=bias, logits=logits, num_negatives=negatives, kind="uniform"
        )
    assert loss.item() + negatives * math.log(even.shape[2]) == pytest.approx(released.item(), rel=1e-5)


@everywhere
@each_kind
@pytest.mark.parametrize("shape", [(7, 7), (14, 19)])
def test_maps_that_are_constant_at_the_level_give_nothing(backend, device, kind, shape):
    features = torch.full((2, 3, *shape), 0.5, device=device, requires_grad=True)
    weight = torch.full((4, 3), 0.25, device=device, requires_grad=True)
    bias = torch.full((4,), 0.125, device=device, requires_grad=True)
    inputs = features, weight, bias
    target = torch.tensor([0, 3], device=device)
    with camkernels.use_backend(backend):
        loss = fused_negative_cam_loss(features, weight, target, bias=bias, kind=kind, level=0.5)
        grads = torch.autograd.grad(loss, inputs)
        above = fused_negative_cam_loss(features, weight, target, bias=bias, level=0.25)
    assert loss.item() == 0
    if kind == "mse":
        assert not any(grad.any() for grad in grads)
    else:
        assert all(grad.abs().max() < 1e-7 for grad in grads)
    assert above.item() == 0.0625


@everywhere
@each_kind
@pytest.mark.parametrize("num_negatives", [2, 15])
def test_an_image_that_shows_every_class_adds_nothing(backend, device, kind, num_negatives):
    case = Case(device=device, channels=17, images=4, classes=20)
    target = target_of(case, hot=True)
    target[1] = True

    def loss(features, weight, bias, target, count):
        found = fused_negative_cam_loss(
            features, weight, target, bias=bias, num_negatives=num_negatives, kind=kind
        )
        return found * count

    inputs = [case.features(), case.weight(), case.bias()]
    all_images = run(backend, lambda *x: loss(*x, target, 4), inputs)
    rest = [0, 2, 3]
    inputs[0] = inputs[0][rest]
    others = run(backend, lambda *x: loss(*x, target[rest], 3), inputs)
    assert torch.allclose(all_images.values[0], others.values[0], rtol=1e-6)
    assert not all_images.grads[0][1].any()
    assert torch.allclose(all_images.grads[0][rest], others.grads[0], rtol=1e-5, atol=1e-7)
    assert torch.allclose(all_images.grads[1], others.grads[1], rtol=1e-5, atol=1e-6)

    nothing = run(backend, lambda *x: loss(*x, torch.ones_like(target[rest]), 1), inputs)
    assert nothing.values[0].item() == 0
    assert not any(grad.any() for grad in nothing.grads)


@on_kernels
@each_kind
@pytest.mark.parametrize("num_negatives", [1, 19, 38, 39])
def test_a_nan_reaches_chosen_classes_only(backend, device, kind, num_negatives):
    """Also where nearly all are chosen: the true class's row has no gradient from its image."""
    case = Case(device=device, maps="nan", classes=40, channels=5, images=2)
    assert_right(backend, case, kind, num_negatives=num_negatives)


@on_kernels
@pytest.mark.parametrize("num_negatives", [19, 39])
def test_the_row_of_a_class_that_is_not_chosen_may_hold_anything(backend, device, num_negatives):
    case = Case(device=device, classes=40, channels=5, images=1)
    weight, target = case.weight(), torch.tensor([17], device=device)
    weight[17] = torch.nan
    found = run(
        backend,
        lambda *x: fused_negative_cam_loss(
            x[0], x[1], target, logits=logits_of(case), num_negatives=num_negatives
        ),
        [case.features(), weight],
    )
    assert found.values[0].isfinite()
    assert all(grad.isfinite().all() for grad in found.grads)


@on_kernels
def test_an_image_without_negatives_may_hold_anything(backend, device):
    case = Case(device=device, channels=5)
    features, target = case.features(), target_of(case, hot=True)
    features[1], target[1] = torch.nan, True
    found = run(
        backend,
        lambda *x: fused_negative_cam_loss(x[0], x[1], target, num_negatives=2, logits=logits_of(case)),
        [features, case.weight()],
    )
    assert found.values[0].isfinite()
    assert all(grad.isfinite().all() for grad in found.grads)
    assert not found.grads[0][1].any()


@everywhere
def test_any_number_of_negatives(backend, device):
    case = Case(device=device, channels=5)
    with camkernels.use_backend(backend):
        all_, more = (
            fused_negative_cam_loss(case.features(), case.weight(), case.target(), num_negatives=number)
            for number in (case.classes - 1, 2**70)
        )
    assert torch.equal(all_, more)


@everywhere
def test_one_class_has_no_negative(backend, device):
    case = Case(device=device, classes=1, channels=5)
    found = run(
        backend,
        lambda *x: fused_negative_cam_loss(x[0], x[1], case.target(), bias=x[2]),
        [case.features(), case.weight(), case.bias()],
    )
    assert found.values[0].item() == 0
    assert not any(grad.any() for grad in found.grads)


@everywhere
@each_kind
def test_the_choice_has_no_gradient(backend, device, kind):
    case = Case(device=device, channels=5)
    logits = logits_of(case).requires_grad_()
    features = case.features().requires_grad_()
    with camkernels.use_backend(backend):
        loss = fused_negative_cam_loss(features, case.weight(), case.target(), logits=logits, kind=kind)
    assert torch.autograd.grad(loss, (features, logits), allow_unused=True)[1] is None


@everywhere
@pytest.mark.parametrize("hot", [False, True])
def test_share_of_positive_pixels(backend, device, hot):
    case = Case(device=device, maps="ties", channels=5, classes=9)
    features, weight = case.features() - 1, case.weight()
    bias = torch.linspace(-6, 6, case.classes, device=device).round()
    target, logits = target_of(case, hot), logits_of(case)
    with camkernels.use_backend(backend):
        _, positive, counts = loss_and_counts(
            "function", features, weight, target, bias, logits, 4, "mse", 0.0, 1.0
        )
        share = positive_share(features, positive, counts)
    maps = torch.einsum("lc,nchw->nlhw", weight, features) + bias[:, None, None]
    chosen = expected_negatives(logits.cpu(), target.cpu(), 4)
    pixels = torch.cat([maps[n, labels].flatten() for n, labels in enumerate(chosen)])
    assert (pixels == 0).any()
    assert not share.requires_grad
    assert share.item() == pytest.approx((pixels > 0).float().mean().item())


@everywhere
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_keep_the_memory_format(backend, device, layout):
    case = Case(device=device, layout=layout, channels=17)
    features = case.features().requires_grad_()
    with camkernels.use_backend(backend):
        loss = fused_negative_cam_loss(features, case.weight(), case.target())
    (grad,) = torch.autograd.grad(loss, features)
    if backend != "reference":
        assert grad.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@on_kernels
@each_kind
def test_backward_twice_gives_the_same_bits(backend, device, kind):
    """Backward leaves what it kept as it was, and adds in an order of its own."""
    case = Case(device=device, channels=17, classes=30, images=4)
    inputs = [x.requires_grad_() for x in (case.features(), case.weight(), case.bias())]
    target = case.target()

    def loss():
        return fused_negative_cam_loss(
            *inputs[:2], target, bias=inputs[2], num_negatives=12, kind=kind, level=0.1
        )

    with camkernels.use_backend(backend):
        first = loss()
        grads = torch.autograd.grad(first, inputs, retain_graph=True)
        again = torch.autograd.grad(first, inputs)
        second = loss()
        assert torch.equal(first, second)
        anew = torch.autograd.grad(second, inputs)
    for one, two, three in zip(grads, again, anew, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize(
    ("images", "num_negatives"), [(3, 100), (1, 100), (1, 40), (1, 24), (1, 16), (1, 12)]
)
def test_one_thread_and_several_give_the_same_bits(images, num_negatives):
    """The slots of a lone image are shared out."""
    case = Case(channels=150, classes=150, images=images)
    target = case.target()
    inputs = [case.features(), case.weight(), case.bias()]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(
                run(
                    "cpu",
                    lambda *x: fused_negative_cam_loss(
                        x[0], x[1], target, bias=x[2], num_negatives=num_negatives
                    ),
                    inputs,
                )
            )
    finally:
        torch.set_num_threads(threads)
    one, several = found
    pairs = zip(one.values + one.grads, several.values + several.grads, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_instruction_set(capability, dtype):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        case = Case(dtype=dtype, channels=77, classes=40, shape=(5, 9))
        for layout in ("contiguous", "channels_last"):
            for kind in KINDS:
                assert_right("cpu", replace(case, layout=layout), kind, num_negatives=11, given=False)
    finally:
        _C.use_cpu_capability(chosen)


@everywhere
@each_kind
@pytest.mark.parametrize("given", [False, True])
def test_empty_batch(backend, device, kind, given):
    case = Case(device=device, images=0, channels=5)
    logits = logits_of(case) if given else None
    found = run(
        backend,
        lambda *x: fused_negative_cam_loss(x[0], x[1], case.target(), bias=x[2], logits=logits, kind=kind),
        [case.features(), case.weight(), case.bias()],
    )
    assert found.values[0].item() == 0
    assert found.grads[0].shape == case.features().shape
    assert not found.grads[1].any()
    assert not found.grads[2].any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@each_kind
@pytest.mark.parametrize("hot", [False, True])
def test_gradcheck(backend, kind, hot):
    case = Case(dtype=torch.float64, channels=3, shape=(2, 3), classes=5)
    inputs = [x.requires_grad_() for x in (case.features(), case.weight(), case.bias())]
    target, logits = target_of(case, hot), logits_of(case)

    def loss(features, weight, bias):
        return fused_negative_cam_loss(
            features, weight, target, bias=bias, logits=logits, num_negatives=2, kind=kind, **OPTIONS
        )

    with camkernels.use_backend(backend):
        assert torch.autograd.gradcheck(loss, inputs)


@on_kernels
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e6])
def test_the_uniform_kind_at_any_temperature(backend, device, temperature):
    case = Case(device=device, channels=17)
    assert_right(backend, case, "uniform", temperature=temperature)


@pytest.mark.parametrize(
    ("backend", "device"), [pair for pair in without_cuda(KERNEL_BACKENDS) if not interpreted(pair[0])]
)
@each_kind
@pytest.mark.parametrize("given", [False, True])
def test_memory_is_the_gradients_and_the_chosen_maps_once(backend, device, kind, given):
    images, classes, negatives = 8, 512, 100
    case = Case(device=device, images=images, channels=16, classes=classes, shape=(8, 8))
    inputs = [x.requires_grad_() for x in (case.features(), case.weight(), case.bias())]
    target, logits = case.target(), logits_of(case) if given else None

    def step():
        loss = fused_negative_cam_loss(
            *inputs[:2], target, bias=inputs[2], logits=logits, num_negatives=negatives, kind=kind
        )
        return torch.autograd.grad(loss, inputs)

    with camkernels.use_backend(backend):
        step()
        most, grads = peak_bytes(step, device)
    results = sum(grad.nbytes for grad in grads)
    chosen_maps = images * negatives * 64 * 4
    all_maps = images * classes * 64 * 4
    # Per slot an index, a loss and a count; and what is kept per class: logits, or the slot of a class.
    per_slot = images * negatives * 3 * 8
    per_class = images * classes * 8
    assert most <= results + chosen_maps + per_slot + per_class
    assert results + chosen_maps + per_slot + per_class < all_maps


@pytest.mark.skipif(not GPU, reason="a class out of range is an IndexError on the CPU")
def test_a_class_out_of_range_shows_as_nan_on_a_gpu():
    case = Case(device=DEVICE)
    features, weight = case.features().requires_grad_(), case.weight().requires_grad_()
    for index in (-1, case.classes, 2**40):
        target = case.target()
        target[1] = index
        with camkernels.use_backend("triton"):
            loss = fused_negative_cam_loss(features, weight, target)
            torch.autograd.grad(loss, (features, weight))
        assert loss.isnan()


@on_kernels
def test_logits_of_any_layout(backend, device):
    case = Case(device=device, channels=5)
    logits = logits_of(case)
    strided = lay_out(logits[None, None], "strided")[0, 0]
    with camkernels.use_backend(backend):
        one, two, three = (
            fused_negative_cam_loss(case.features(), case.weight(), case.target(), logits=x, num_negatives=2)
            for x in (logits, strided, logits.double())
        )
    assert torch.equal(one, two)
    assert torch.equal(one, three)
