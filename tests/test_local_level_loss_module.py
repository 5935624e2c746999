"""LocalLevelLoss against its formulas in loops, and how it comes by its mask."""

import copy
import pickle
import re
from collections.abc import Sequence
from math import exp, inf, log, nan

import pytest
import torch
from cases import BACKENDS, DEVICE, GPU, KERNEL_BACKENDS, without_cuda
from torch import Tensor

import camkernels
from camkernels import fused_local_activations, local_level_loss, otsu_mask
from camkernels.losses import LocalLevelLoss

LOSS_BACKENDS = without_cuda(BACKENDS)
IMAGES, LABELS, SHAPE = 3, 5, (4, 6)  # the fifth label is background
TARGET = [2, 0, 3]


def batch(dtype: torch.dtype = torch.float64, images: int = IMAGES, device: str = "cpu") -> list[Tensor]:
    """Activations and attention: not the largest of them, so that neither follows from the other."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((images, LABELS, *SHAPE), (images, *SHAPE))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def some_mask(device: str = "cpu") -> Tensor:
    """Of the first image a quarter, of the second all but a pixel, of the third one pixel."""
    mask = torch.zeros((IMAGES, *SHAPE), dtype=torch.bool)
    mask[0, 1:3, 2:5] = mask[1] = mask[2, 3, 0] = True
    mask[1, 0, 0] = False
    return mask.to(device)


def written_out(activations: Tensor, mask: Tensor, target: Sequence[int]) -> Tensor:
    """Eq. 2-4, a pixel at a time, without the usual care for large numbers."""
    of_images = []
    for n, label in enumerate(target):
        inside, outside = [], []
        for y in range(SHAPE[0]):
            for x in range(SHAPE[1]):
                powers = activations[n, :, y, x].exp()
                if mask[n, y, x]:
                    inside.append(-(powers[label] / powers.sum()).log())
                else:
                    outside.append(-(powers[-1] / powers.sum()).log())
        pixels = len(inside) + len(outside)
        w = len(inside) / pixels
        of_images.append(((1 - w) * sum(inside) + w * sum(outside)) / pixels)
    return sum(of_images) / len(target)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_equals_the_formulas(dtype):
    ours, theirs = batch()[0], batch()[0]
    loss = LocalLevelLoss(weight=0.3)(ours, some_mask(), torch.tensor(TARGET, dtype=dtype))
    expected = 0.3 * written_out(theirs, some_mask(), TARGET)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bins", [None, 3])
def test_the_mask_is_that_of_scikit_image(dtype, bins):
    filters = pytest.importorskip(
        "skimage.filters", reason="compares with scikit-image (pip install scikit-image)"
    )
    activations, attention = (x.detach() for x in batch(dtype))
    thresholds = [filters.threshold_otsu(x.numpy(), nbins=bins or 256).item() for x in attention]
    mask = attention > torch.tensor(thresholds, dtype=dtype)[:, None, None]
    target = torch.tensor(TARGET)
    criterion = LocalLevelLoss() if bins is None else LocalLevelLoss(bins=bins)
    assert torch.equal(criterion(activations, attention, target), LocalLevelLoss()(activations, mask, target))
    assert not torch.equal(mask, otsu_mask(attention, bins=256 if bins else 3).mask)  # bins matter here


@pytest.mark.parametrize("backend, device", LOSS_BACKENDS)
@pytest.mark.parametrize("factor", [1, 0.3, 0])
def test_is_the_function_times_the_weight(backend, device, factor):
    activations, attention = batch(torch.float32, device=device)
    target = torch.tensor(TARGET, device=device)
    with camkernels.use_backend(backend):
        loss = LocalLevelLoss(weight=factor)(activations, attention, target)
        expected = local_level_loss(activations, otsu_mask(attention).mask, target)
    assert expected.item() > 0
    assert torch.equal(loss, factor * expected)


@pytest.mark.parametrize("backend, device", LOSS_BACKENDS)
@pytest.mark.parametrize("attended", [False, True, 0.7, nan], ids=["empty", "full", "constant", "nan"])
def test_a_mask_without_two_sides_costs_nothing(backend, device, attended):
    """Attention that is constant or holds a NaN has such a mask. The image still counts in the mean."""
    activations, attention = batch(torch.float32, device=device)
    target = torch.tensor(TARGET, device=device)
    one_sided = some_mask(device) if isinstance(attended, bool) else attention.detach().clone()
    where = (1, 2, 3) if attended != attended else 1  # a single NaN is enough
    one_sided[where] = attended
    criterion = LocalLevelLoss()
    with camkernels.use_backend(backend):
        loss = criterion(activations, one_sided, target)
        loss.backward()
        without = criterion(activations[[0, 2]], one_sided[[0, 2]], target[[0, 2]])
        assert criterion(activations[1:2], one_sided[1:2], target[1:2]).item() == 0
    assert without.item() > 0
    torch.testing.assert_close(loss, without * 2 / 3)
    assert torch.equal(activations.grad[1], torch.zeros_like(activations[1]))


def test_two_pixels_by_hand():
    """Activations 0 and 2 for the class, 0 for background; the second pixel attended: 0.125 of each term."""
    activations = torch.tensor([[[[0.0, 2.0]], [[0.0, 0.0]]]], dtype=torch.float64)
    attention = activations[:, 0].detach()
    loss = LocalLevelLoss(weight=2)(activations, attention, torch.tensor([0]))
    inside, outside = -log(exp(2) / (1 + exp(2))), log(2)
    assert loss.item() == pytest.approx(2 * 0.5 * (0.5 * inside + 0.5 * outside), rel=1e-12)


@pytest.mark.parametrize("backend, device", LOSS_BACKENDS)
def test_the_attention_has_no_gradient(backend, device):
    """The loss reaches the classifiers through the activations alone."""
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    target = torch.tensor([2, 0], device=device)
    criterion = LocalLevelLoss()
    with camkernels.use_backend(backend):
        activations, attention = fused_local_activations(features, weight)
        loss = criterion(activations, attention, target)
        found = torch.autograd.grad(loss, (weight, attention), allow_unused=True, retain_graph=True)
        (expected,) = torch.autograd.grad(criterion(activations, attention.detach(), target), weight)
    assert found[1] is None
    assert found[0].any()
    assert torch.equal(found[0], expected)


def test_without_any_gradient():
    activations, attention = batch()
    with torch.no_grad():
        assert not LocalLevelLoss()(activations, attention, torch.tensor(TARGET)).requires_grad
    assert not LocalLevelLoss()(activations.detach(), attention, torch.tensor(TARGET)).requires_grad


@pytest.mark.parametrize("backend, device", LOSS_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_activations_give_float32(backend, device, dtype):
    """The attention may be of another type."""
    activations, attention = batch(dtype, device=device)
    wide = activations.detach().float()
    target = torch.tensor(TARGET, device=device)
    criterion = LocalLevelLoss(weight=0.3)
    with camkernels.use_backend(backend):
        loss = criterion(activations, attention, target)
        loss.backward()
        assert torch.equal(criterion(activations, attention.detach().float(), target), loss)
        expected = criterion(wide, attention, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    assert activations.grad.dtype == dtype


def test_under_autocast():
    activations, attention = batch(torch.float32)
    target, criterion = torch.tensor(TARGET), LocalLevelLoss()
    with torch.autocast("cpu", torch.bfloat16):
        inside = criterion(activations, attention, target)
    assert torch.equal(inside, criterion(activations, attention, target))


@pytest.mark.parametrize("backend, device", LOSS_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["attention", "mask"])
def test_empty_batch(backend, device, dtype):
    activations, attention = batch(torch.float32, images=0, device=device)
    with camkernels.use_backend(backend):
        target = torch.zeros(0, dtype=torch.int64, device=device)
        loss = LocalLevelLoss()(activations, attention.to(dtype), target)
        loss.backward()
    assert loss.item() == 0
    assert torch.equal(activations.grad, torch.zeros_like(activations))


@pytest.mark.parametrize("backend, device", without_cuda(KERNEL_BACKENDS))
@pytest.mark.parametrize("form", ["attention", "mask"])
def test_compiles_to_one_graph(backend, device, form):
    torch.compiler.reset()
    criterion = LocalLevelLoss(weight=0.3, bins=8)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    target = torch.tensor(TARGET, device=device)
    results = []
    with camkernels.use_backend(backend):
        for function in (criterion, compiled):
            activations, attention = batch(torch.float32, device=device)
            loss = function(activations, some_mask(device) if form == "mask" else attention, target)
            results.append([loss.detach(), *torch.autograd.grad(loss, activations)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict):
    activations, attention = (x.detach() for x in batch(torch.float32))
    arguments = activations, attention, torch.tensor(TARGET)
    criterion = LocalLevelLoss(weight=0.3, bins=64)
    program = torch.export.export(criterion, arguments, strict=strict)
    for op in ("otsu_mask_fwd", "local_level_loss_fwd"):
        assert f"camkernels.{op}" in str(program.graph)
    assert torch.equal(program.module()(*arguments), criterion(*arguments))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(how):
    activations, attention = batch()
    criterion = LocalLevelLoss(weight=2, bins=7)
    other = how(criterion)
    assert repr(other) == repr(criterion)
    assert other.state_dict() == {}
    target = torch.tensor(TARGET)
    assert torch.equal(other(activations, attention, target), criterion(activations, attention, target))


def test_repr_shows_the_options():
    assert repr(LocalLevelLoss()) == "LocalLevelLoss(weight=1, bins=256, ignore_index=-100)"
    assert (
        repr(LocalLevelLoss(bins=32, ignore_index=7)) == "LocalLevelLoss(weight=1, bins=32, ignore_index=7)"
    )


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_nothing_synchronises_on_a_gpu():
    activations, attention = batch(torch.float32, device="cuda")
    mask, target = some_mask("cuda"), torch.tensor(TARGET, device="cuda")
    criterion = LocalLevelLoss()

    def step():
        for attended in (attention, mask):
            criterion(activations, attended, target).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("label", [-1, LABELS - 1])
def test_a_class_that_does_not_exist(label):
    """Background is none of the classes that an image may have."""
    activations, attention = batch(torch.float32, device=DEVICE)
    target = torch.tensor([0, label, 1], device=DEVICE)
    criterion = LocalLevelLoss()
    if GPU:
        assert criterion(activations, attention, target).isnan()
    else:
        message = (
            f"^LocalLevelLoss: target holds class {label}; activations has 4 classes beside the background"
        )
        for backend in ("reference", "auto"):
            with camkernels.use_backend(backend), pytest.raises(IndexError, match=message):
                criterion(activations, attention, target)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": "1"}, TypeError, "weight is a str; it must be a number of at least 0"),
        ({"weight": True}, TypeError, "weight is a bool; it must be a number of at least 0"),
        ({"weight": -1}, ValueError, "weight is -1.0; it must be a finite number of at least 0"),
        ({"weight": inf}, ValueError, "weight is inf; it must be a finite number of at least 0"),
        ({"weight": nan}, ValueError, "weight is nan; it must be a finite number of at least 0"),
        ({"bins": 256.0}, TypeError, "bins is a float; it must be an integer from 2 to 4096"),
        ({"bins": True}, TypeError, "bins is a bool; it must be an integer from 2 to 4096"),
        ({"bins": 1}, ValueError, "bins is 1; it must be an integer from 2 to 4096"),
        (
            {"ignore_index": 1.0},
            TypeError,
            "ignore_index is a float; it must be an integer that fits into 64 bits",
        ),
        (
            {"ignore_index": True},
            TypeError,
            "ignore_index is a bool; it must be an integer that fits into 64 bits",
        ),
        (
            {"ignore_index": 2**63},
            ValueError,
            f"ignore_index is {2**63}; it must be an integer that fits into 64 bits",
        ),
        ({"bins": 4097}, ValueError, "bins is 4097; it must be an integer from 2 to 4096"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=f"^LocalLevelLoss: {re.escape(message)}$"):
        LocalLevelLoss(**options)


ACTIVATIONS, ATTENTION = torch.zeros(2, 5, 3, 4), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"activations": ATTENTION},
            ValueError,
            "activations has shape [2, 3, 4]; it must be [N, L + 1, H, W]",
        ),
        ({"attention": [0.5]}, TypeError, "attention is a list; it must be a tensor [N, H, W]"),
        (
            {"attention": camkernels.LocalActivations(ACTIVATIONS, ATTENTION)},
            TypeError,
            "attention is a LocalActivations; it must be a tensor [N, H, W]: pass its .attention",
        ),
        (
            {"attention": ATTENTION.byte()},
            TypeError,
            "attention has dtype uint8; allowed are bool, float32, float16, bfloat16, float64",
        ),
        (
            {"attention": ATTENTION[0]},
            ValueError,
            "attention has shape [3, 4] and activations [2, 5, 3, 4]; it must be [2, 3, 4]",
        ),
        (
            {"attention": ATTENTION.mT.bool()},
            ValueError,
            "attention has shape [2, 4, 3] and activations [2, 5, 3, 4]; it must be [2, 3, 4]",
        ),
        (
            {"attention": ATTENTION.to("meta")},
            ValueError,
            "attention is on meta and activations on cpu; they must be on one device",
        ),
        ({"target": None}, TypeError, "target is a NoneType; it must be a tensor [N]"),
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "target has 3 images and activations 2; they must be equal",
        ),
    ],
)
def test_bad_input(changed, error, message):
    arguments = {
        "activations": ACTIVATIONS,
        "attention": ATTENTION,
        "target": torch.zeros(2, dtype=torch.int64),
        **changed,
    }
    with pytest.raises(error, match=f"^LocalLevelLoss: {re.escape(message)}$"):
        LocalLevelLoss()(**arguments)
