"""HomogeneousNegativeCAMLoss against its formulas in loops and the released form, and what it monitors."""

import copy
import pickle
import re
from collections.abc import Sequence
from math import exp, inf, log, nan

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import BACKENDS, DEVICE, GPU, without_cuda
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import camkernels
from camkernels import fused_negative_cam_loss
from camkernels.losses import HomogeneousNegativeCAMLoss

IMAGES, CHANNELS, CLASSES, SHAPE = 3, 5, 7, (3, 4)
HNC_BACKENDS = without_cuda(BACKENDS)
KINDS = ["mse", "uniform"]
TARGET = [2, 0, 6]
# Image 0 has one negative, image 1 none, image 2 four: -1 is a class of which nobody knows.
HOT = [[1, 1, 1, 0, 1, 1, 1], [1] * 7, [0, 1, 0, -1, 0, 1, 0]]


def batch(dtype: torch.dtype = torch.float64, images: int = IMAGES, device: str = "cpu") -> list[Tensor]:
    """Features, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((images, CHANNELS, *SHAPE), (CLASSES, CHANNELS), (CLASSES,))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def scores(dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits with ties, in another order than the maps have."""
    drawn = torch.randint(0, 3, (IMAGES, CLASSES), generator=torch.Generator().manual_seed(1))
    return drawn.to(dtype)


def maps_of(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("lc,nchw->nlhw", weight, features) + bias[:, None, None]


def negatives_of(
    target: Sequence[int] | Sequence[Sequence[int]], n: int, key: Tensor, most: int
) -> list[int]:
    """By definition: those that the image does not show, the largest first, equal ones in their order."""
    entry = target[n]
    shown = {entry} if isinstance(entry, int) else {label for label in range(CLASSES) if entry[label] != 0}
    left = [label for label in range(CLASSES) if label not in shown]
    return sorted(left, key=lambda label: -key[n, label].item())[:most]


def written_out(
    inputs: Sequence[Tensor],
    target: Sequence[int] | Sequence[Sequence[int]],
    key: Tensor | None,
    kind: str,
    most: int,
    level: float,
    temperature: float,
) -> Tensor:
    maps = maps_of(*inputs)
    of_images = []
    for n in range(IMAGES):
        terms = []
        for label in negatives_of(target, n, maps.mean((-2, -1)) if key is None else key, most):
            values = list(maps[n, label].flatten())
            if kind == "mse":
                terms.append(sum((value - level) ** 2 for value in values) / len(values))
            else:
                powers = [(value / temperature).exp() for value in values]
                shares = [power / sum(powers) for power in powers]
                terms.append(sum((1 / len(values) / share).log() / len(values) for share in shares))
        total = sum(terms, torch.zeros((), dtype=maps.dtype))
        of_images.append(total / max(len(terms), 1) if kind == "mse" else total)
    return sum(of_images) / IMAGES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [2, 100])
@pytest.mark.parametrize("given", [True, False], ids=["logits", "maps"])
@pytest.mark.parametrize("target", [TARGET, HOT], ids=["classes", "multi-hot"])
def test_equals_the_formulas(kind, most, given, target):
    key = scores() if given else None
    ours, theirs = batch(), batch()
    criterion = HomogeneousNegativeCAMLoss(
        weight=0.3, kind=kind, num_negatives=most, level=0.4, temperature=1.7
    )
    loss = criterion(*ours[:2], torch.tensor(target), bias=ours[2], logits=key)
    expected = 0.3 * written_out(theirs, target, key, kind, most, 0.4, 1.7)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("backend, device", HNC_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 0.3, 0])
def test_is_the_function_times_the_weight(backend, device, kind, factor):
    features, weight, bias = batch(torch.float32, device=device)
    target, logits = torch.tensor(TARGET, device=device), scores(torch.float32).to(device)
    options = {"kind": kind, "num_negatives": 2, "level": 0.4, "temperature": 1.7}
    arguments = {"bias": bias, "logits": logits}
    with camkernels.use_backend(backend):
        loss = HomogeneousNegativeCAMLoss(weight=factor, **options)(features, weight, target, **arguments)
        expected = fused_negative_cam_loss(features, weight, target, **arguments, **options)
    assert torch.equal(loss, factor * expected)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "mse"),
        ({"preset": "paper"}, "mse"),
        ({"preset": "official"}, "uniform"),
        ({"preset": "paper", "kind": "uniform"}, "uniform"),
        ({"preset": "official", "kind": "mse"}, "mse"),
    ],
)
def test_the_preset_settles_the_kind_that_is_left_open(options, kind):
    criterion = HomogeneousNegativeCAMLoss(**options)
    assert criterion.kind == kind
    features, weight, _ = batch()
    target = torch.tensor(TARGET)
    expected = fused_negative_cam_loss(features, weight, target, kind=kind)
    assert torch.equal(criterion(features, weight, target), expected)
    others = {name: getattr(criterion, name) for name in ("weight", "num_negatives", "level", "temperature")}
    assert others == {"weight": 1, "num_negatives": 100, "level": 0, "temperature": 1}


def released(maps: Tensor, target: Tensor, most: int, kind: str) -> Tensor:
    """As the released code defines it: over all maps, by a mask of those whose sum is among the largest."""
    sums = maps.detach().sum((-2, -1)).scatter(1, target[:, None], -inf)
    mask = torch.zeros_like(sums, dtype=torch.bool).scatter(1, sums.topk(most).indices, True)
    if kind == "mse":
        return F.mse_loss(maps[mask], torch.zeros_like(maps[mask]))
    return -F.log_softmax(maps.flatten(2), 2).mean(2)[mask].sum() / len(maps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 4, CLASSES - 1])
@pytest.mark.parametrize("given", [True, False], ids=["logits", "maps"])
def test_the_released_form(kind, most, given):
    """The uniform kind lacks a constant, log(H * W) for each negative; gradients are the same."""
    ours, theirs = batch(), batch()
    target = torch.tensor(TARGET)
    maps = maps_of(*ours).detach()
    criterion = HomogeneousNegativeCAMLoss(preset="official", kind=kind, num_negatives=most)
    logits = maps.mean((-2, -1)) if given else None
    loss = criterion(*ours[:2], target, bias=ours[2], logits=logits)
    expected = released(maps_of(*theirs), target, most, kind)
    constant = most * log(maps[0, 0].numel()) if kind == "uniform" else 0
    torch.testing.assert_close(loss + constant, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("backend, device", HNC_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_map_that_is_as_it_should_be_costs_nothing(backend, device, kind):
    """Constant at the level; for the uniform kind, constant."""
    features = torch.arange(1.0, 3.0, device=device)[:, None, None, None].expand(2, 3, 3, 4)
    features = features.clone().requires_grad_()
    weight = torch.tensor([[9.0, 9.0, 9.0], [1.0, -2.0, 1.0]], device=device, requires_grad=True)
    bias = torch.tensor([4.0, 0.5], device=device, requires_grad=True)
    criterion = HomogeneousNegativeCAMLoss(kind=kind, level=0.5)
    with camkernels.use_backend(backend):
        loss = criterion(features, weight, torch.tensor([0, 0], device=device), bias=bias)
        loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (weight, bias))
    assert features.grad.abs().max() <= (0 if kind == "mse" else 1e-7)
    assert criterion.positive_share.item() == 1


@pytest.mark.parametrize("backend, device", HNC_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_shows_everything_adds_nothing(backend, device, kind):
    """But it counts among the images of the mean."""
    features, weight, _ = batch(torch.float32, device=device)
    hot = torch.tensor(HOT, device=device)
    criterion = HomogeneousNegativeCAMLoss(kind=kind)
    with camkernels.use_backend(backend):
        loss = criterion(features, weight, hot)
        loss.backward()
        share = criterion.positive_share
        without = criterion(features[[0, 2]], weight, hot[[0, 2]])
        assert loss.item() > 0
        torch.testing.assert_close(loss, without * 2 / 3)
        torch.testing.assert_close(share, criterion.positive_share)
        assert torch.equal(features.grad[1], torch.zeros_like(features[1]))
        assert criterion(features, weight, torch.ones_like(hot)).item() == 0
        assert criterion.positive_share.item() == 0


@pytest.mark.parametrize("backend, device", HNC_BACKENDS)
@pytest.mark.parametrize(
    ("most", "target", "share"),
    [
        (1, [0, 2], (2 + 1) / 8),
        (2, [0, 2], (1 + 2 + 1 + 3) / 16),
        (9, [0, 2], (1 + 2 + 1 + 3) / 16),
        (2, [[1, 0, 0], [1, 1, 1]], (1 + 2) / 8),
        (2, [[1, 1, 0], [0, 1, 0]], (2 + 1 + 1) / 12),
    ],
)
def test_the_share_of_positive_pixels_by_hand(backend, device, most, target, share):
    """A value of 0 is not above 0. The sums of the maps are 2, -2, 4, and all 0."""
    features = torch.tensor([[1.0, -1.0, 2.0, 0.0], [-1.0, -1.0, -1.0, 3.0]], device=device)[:, None, None]
    weight = torch.tensor([[1.0], [-1.0], [2.0]], device=device)
    criterion = HomogeneousNegativeCAMLoss(num_negatives=most)
    with camkernels.use_backend(backend):
        criterion(features, weight, torch.tensor(target, device=device))
    assert criterion.positive_share.item() == pytest.approx(share, rel=1e-6)


def test_a_nan_is_not_above_0():
    features = torch.tensor([[[[1.0, nan], [1.0, 1.0]]]])
    criterion = HomogeneousNegativeCAMLoss()
    loss = criterion(features, torch.ones(2, 1), torch.tensor([0]))
    assert loss.isnan()
    assert criterion.positive_share.item() == 0.75


@pytest.mark.parametrize("backend, device", HNC_BACKENDS)
def test_the_share_is_of_the_last_call_and_of_no_state(backend, device):
    criterion = HomogeneousNegativeCAMLoss()
    assert criterion.positive_share is None
    features, weight, bias = batch(torch.float32, device=device)
    target = torch.tensor(TARGET, device=device)
    with camkernels.use_backend(backend):
        criterion(features, weight, target, bias=bias + 100)
        first = criterion.positive_share
        criterion.eval()(features, weight, target, bias=bias - 100)
    assert (first.item(), criterion.positive_share.item()) == (1, 0)
    assert first.shape == ()
    assert first.dtype == torch.float32
    assert first.device == features.device
    assert not first.requires_grad
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == list(criterion.buffers()) == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(how):
    features, weight, _ = batch()
    target = torch.tensor(TARGET)
    criterion = HomogeneousNegativeCAMLoss(weight=2, preset="official")
    loss = criterion(features, weight, target)
    other = how(criterion)
    assert repr(other) == repr(criterion)
    assert torch.equal(other.positive_share, criterion.positive_share)
    assert torch.equal(other(features, weight, target), loss)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    criterion = HomogeneousNegativeCAMLoss(weight=0.7, kind=kind, num_negatives=2, level=0.3, temperature=0.8)

    def loss(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return criterion(features, weight, torch.tensor(HOT), bias=bias, logits=scores())

    assert torch.autograd.gradcheck(loss, batch())


def test_gradients():
    """None to the logits; that of the bias is 0 for the uniform kind."""
    for kind in KINDS:
        features, weight, bias = batch()
        logits = scores().requires_grad_()
        criterion = HomogeneousNegativeCAMLoss(kind=kind)
        criterion(features, weight, torch.tensor(TARGET), bias=bias, logits=logits).backward()
        assert logits.grad is None
        assert features.grad.any()
        assert weight.grad.any()
        assert (bias.grad.abs().max() > 1e-14) == (kind == "mse")


def test_without_any_gradient():
    features, weight, _ = batch()
    with torch.no_grad():
        assert not HomogeneousNegativeCAMLoss()(features, weight, torch.tensor(TARGET)).requires_grad


@pytest.mark.parametrize("backend, device", HNC_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_give_float32(backend, device, kind, dtype):
    inputs = batch(dtype, device=device)
    wide = [x.detach().float() for x in inputs]
    target = torch.tensor(TARGET, device=device)
    criterion = HomogeneousNegativeCAMLoss(weight=0.3, kind=kind, num_negatives=3)
    with camkernels.use_backend(backend):
        loss = criterion(*inputs[:2], target, bias=inputs[2])
        share = criterion.positive_share
        expected = criterion(*wide[:2], target, bias=wide[2])
        loss.backward()
    assert loss.dtype == share.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    assert torch.equal(share, criterion.positive_share)
    assert [x.grad.dtype for x in inputs] == [dtype] * 3


@pytest.mark.parametrize("backend, device", HNC_BACKENDS)
def test_large_maps_in_half_stay_finite(backend, device):
    # The square of 1e4 is beyond float16, whose largest number is 65504.
    features = torch.full((1, 1, 2, 2), 1e4, dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.ones(2, 1, dtype=torch.float16, device=device, requires_grad=True)
    with camkernels.use_backend(backend):
        loss = HomogeneousNegativeCAMLoss()(features, weight, torch.tensor([0], device=device))
        (loss / 1e4).backward()
    assert loss.item() == pytest.approx(1e8)
    assert weight.grad[1].item() == pytest.approx(2e4)
    assert features.grad.flatten().tolist() == pytest.approx([0.5] * 4)


def test_weight_of_a_convolution_and_int32_classes():
    features, weight, _ = batch()
    target, criterion = torch.tensor(TARGET), HomogeneousNegativeCAMLoss()
    expected = criterion(features, weight, target)
    assert torch.equal(criterion(features, weight[..., None, None], target.int()), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_a_multi_hot_target_of_any_kind(dtype):
    features, weight, _ = batch()
    hot = torch.tensor(HOT).abs()
    criterion = HomogeneousNegativeCAMLoss()
    assert torch.equal(criterion(features, weight, hot.to(dtype)), criterion(features, weight, hot))


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind):
    features, weight, bias = batch(torch.float32)
    target, logits = torch.tensor(TARGET), scores(torch.float32)
    criterion = HomogeneousNegativeCAMLoss(kind=kind, num_negatives=3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = criterion(features, weight, target, bias=bias, logits=logits)
    share = criterion.positive_share
    assert torch.equal(inside, criterion(features, weight, target, bias=bias, logits=logits))
    assert torch.equal(share, criterion.positive_share)


@pytest.mark.parametrize("backend, device", HNC_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0,), (0, CLASSES)], ids=["classes", "multi-hot"])
def test_empty_batch(backend, device, kind, shape):
    inputs = batch(torch.float32, images=0, device=device)
    criterion = HomogeneousNegativeCAMLoss(kind=kind)
    with camkernels.use_backend(backend):
        loss = criterion(*inputs[:2], torch.zeros(shape, dtype=torch.int64, device=device), bias=inputs[2])
        loss.backward()
    assert loss.item() == criterion.positive_share.item() == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


@pytest.mark.parametrize("backend, device", HNC_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph(backend, device, kind):
    """And to one only, though each call sets the share."""
    torch.compiler.reset()
    criterion = HomogeneousNegativeCAMLoss(weight=0.3, kind=kind, num_negatives=3)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    target, logits = torch.tensor(TARGET, device=device), scores(torch.float32).to(device)
    with camkernels.use_backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for shift in (0, 0.5, -1):
            results = []
            for function in (criterion, compiled):
                features, weight, bias = batch(torch.float32, device=device)
                with torch.no_grad():
                    features += shift
                loss = function(features, weight, target, bias=bias, logits=logits)
                loss.backward()
                grads = [x.grad for x in (features, weight, bias)]
                results.append([loss.detach(), criterion.positive_share, *grads])
            torch.testing.assert_close(*results)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_without_the_share(strict):
    features, weight, _ = (x.detach() for x in batch(torch.float32))
    arguments = features, weight, torch.tensor(TARGET)
    criterion = HomogeneousNegativeCAMLoss(weight=0.3, preset="official")
    program = torch.export.export(criterion, arguments, strict=strict)
    assert criterion.positive_share is None
    assert torch.equal(program.module()(*arguments), criterion(*arguments))


class Network(nn.Module):
    """A classifier that holds its criterion."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 1)
        self.classifier = nn.Linear(CHANNELS, CLASSES)
        self.criterion = HomogeneousNegativeCAMLoss(num_negatives=3)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        features = self.stem(images)
        return self.criterion(features, self.classifier.weight, target, bias=self.classifier.bias)


def test_in_a_model_under_ddp():
    torch.manual_seed(0)
    model = Network()
    images, target = torch.randn(IMAGES, 3, *SHAPE), torch.tensor(TARGET)
    expected = model(images, target)
    truth = torch.autograd.grad(expected, model.parameters())
    share = model.criterion.positive_share
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            loss = wrapped(images, target)
            loss.backward()
    finally:
        dist.destroy_process_group()
    assert torch.equal(loss, expected)
    torch.testing.assert_close([x.grad for x in model.parameters()], list(truth))
    assert torch.equal(model.criterion.positive_share, share)
    assert list(model.state_dict()) == ["stem.weight", "stem.bias", "classifier.weight", "classifier.bias"]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_synchronises_on_a_gpu(kind):
    features, weight, bias = batch(torch.float32, device="cuda")
    logits = scores(torch.float32).cuda()
    targets = [torch.tensor(x, device="cuda") for x in (TARGET, HOT)]
    criterion = HomogeneousNegativeCAMLoss(kind=kind, num_negatives=3)
    seen = []

    def step():
        for target in targets:
            for given in (None, logits):
                criterion(features, weight, target, bias=bias, logits=given).backward()
                seen.append(criterion.positive_share)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 < share.item() < 1 for share in seen)


@pytest.mark.parametrize("target", [-1, CLASSES])
def test_a_class_that_does_not_exist(target):
    features, weight, _ = batch(torch.float32, device=DEVICE)
    classes = torch.tensor([0, target, 1], device=DEVICE)
    criterion = HomogeneousNegativeCAMLoss()
    if GPU:
        assert criterion(features, weight, classes).isnan()
    else:
        message = rf"^HomogeneousNegativeCAMLoss: target holds class {target}; weight has {CLASSES} classes"
        for backend in ("reference", "auto"):
            with camkernels.use_backend(backend), pytest.raises(IndexError, match=message):
                criterion(features, weight, classes)


def test_what_the_uniform_kind_is_for_two_pixels():
    """Of maps 0 and 2 the softmax is 1 / (1 + e**2) and the rest."""
    features = torch.tensor([[[[0.0, 2.0]]]], dtype=torch.float64)
    loss = HomogeneousNegativeCAMLoss(kind="uniform")(features, torch.ones(2, 1).double(), torch.tensor([1]))
    p = 1 / (1 + exp(2))
    assert loss.item() == pytest.approx(0.5 * log(0.5 / p) + 0.5 * log(0.5 / (1 - p)), rel=1e-12)


def test_repr_shows_the_options():
    assert repr(HomogeneousNegativeCAMLoss(weight=0.07, num_negatives=5, level=-0.5)) == (
        "HomogeneousNegativeCAMLoss(weight=0.07, num_negatives=5, kind='mse', level=-0.5, preset='paper')"
    )
    assert repr(HomogeneousNegativeCAMLoss(temperature=2, preset="official")) == (
        "HomogeneousNegativeCAMLoss(weight=1, num_negatives=100, kind='uniform', temperature=2, "
        "preset='official')"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": "1"}, TypeError, "weight is a str; it must be a number of at least 0"),
        ({"weight": True}, TypeError, "weight is a bool; it must be a number of at least 0"),
        ({"weight": -1}, ValueError, "weight is -1.0; it must be a finite number of at least 0"),
        ({"weight": inf}, ValueError, "weight is inf; it must be a finite number of at least 0"),
        ({"num_negatives": 0}, ValueError, "num_negatives is 0; it must be an integer of at least 1"),
        ({"num_negatives": True}, TypeError, "num_negatives is a bool; it must be an integer of at least 1"),
        ({"num_negatives": 2.0}, TypeError, "num_negatives is a float; it must be an integer of at least 1"),
        ({"kind": "kd"}, ValueError, "kind is 'kd'; allowed are mse, uniform"),
        ({"kind": 0}, TypeError, "kind is a int; allowed are mse, uniform"),
        ({"level": "0"}, TypeError, "level is a str; it must be a number that is finite"),
        ({"level": nan}, ValueError, "level is nan; it must be a number that is finite"),
        ({"temperature": 0}, ValueError, "temperature is 0.0; it must be a number above 0 and finite"),
        ({"temperature": inf}, ValueError, "temperature is inf; it must be a number above 0 and finite"),
        (
            {"temperature": None},
            TypeError,
            "temperature is a NoneType; it must be a number above 0 and finite",
        ),
        ({"preset": "released"}, ValueError, "preset is 'released'; allowed are paper, official"),
        ({"preset": None}, TypeError, "preset is a NoneType; allowed are paper, official"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=f"^HomogeneousNegativeCAMLoss: {re.escape(message)}$"):
        HomogeneousNegativeCAMLoss(**options)


X, W, T = torch.zeros(2, CHANNELS, 4, 4), torch.zeros(CLASSES, CHANNELS), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": X[0]}, ValueError, "features has shape [5, 4, 4]; it must be [N, C, H, W]"),
        ({"weight": None}, TypeError, "weight is a NoneType; it must be a tensor [L, C] or [L, C, 1, 1]"),
        ({"target": T.float()}, TypeError, "target has dtype float32; allowed are int64, int32"),
        ({"target": T[:1]}, ValueError, "target has 1 images and features 2; they must be equal"),
        ({"bias": W[:-1, 0]}, ValueError, "bias has 6 classes and weight 7; they must be equal"),
        (
            {"logits": X[:, :, 0, 0]},
            ValueError,
            "logits has shape [2, 5]; with features [2, 5, 4, 4] and weight [7, 5] it must be [2, 7]",
        ),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=f"^HomogeneousNegativeCAMLoss: {re.escape(message)}$"):
        HomogeneousNegativeCAMLoss()(**{"features": X, "weight": W, "target": T, **changed})
