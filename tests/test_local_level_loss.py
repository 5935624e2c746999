"""local_level_loss: DLA eq. 2-4 written out, values and gradients against float64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from cases import (
    BACKENDS,
    DEVICE,
    GPU,
    KERNEL_BACKENDS,
    as_double,
    as_plain,
    lay_out,
    may_hold_infinities,
    peak_bytes,
    run,
    without_cuda,
)
from closeness import assert_as_close_as

import camkernels
from camkernels import _C, local_level_loss
from camkernels.ops.local_level_loss import loss_of
from camkernels.reference.cam import accumulate_dtype

everywhere = pytest.mark.parametrize(("backend", "device"), without_cuda(BACKENDS))
on_kernels = pytest.mark.parametrize(("backend", "device"), without_cuda(KERNEL_BACKENDS))

SHAPES = [(6, 7, 7), (201, 14, 14), (2, 1, 1), (11, 5, 13), (70, 3, 43)]  # L + 1, H, W


@dataclass(frozen=True)
class Sample:
    shape: tuple[int, int, int] = (6, 7, 7)
    images: int = 3
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    device: str = "cpu"

    def activations(self):
        draw = torch.Generator().manual_seed(0)
        values = 3 * torch.randn((self.images, *self.shape), generator=draw)
        return lay_out(values.to(self.device, self.dtype), self.layout)

    def mask(self):
        """Of images in turn: half of the pixels, an eighth, none, all."""
        draw = torch.Generator().manual_seed(1)
        share = torch.tensor([0.5, 0.125, 0.0, 1.0]).repeat(self.images)[: self.images]
        drawn = torch.rand((self.images, *self.shape[1:]), generator=draw) < share[:, None, None]
        return drawn.to(self.device)

    def target(self):
        draw = torch.Generator().manual_seed(2)
        return torch.randint(0, self.shape[0] - 1, (self.images,), generator=draw).to(self.device)


def by_definition(mask, target):
    def function(activations):
        losses = []
        p = activations.to(accumulate_dtype(activations.dtype)).log_softmax(1)
        for log_p, attended, label in zip(p, mask.to(p.device), target.tolist(), strict=True):
            w = attended.to(p.dtype).mean()
            attended_loss = -log_p[label][attended].sum()
            background_loss = -log_p[-1][~attended].sum()
            losses.append(((1 - w) * attended_loss + w * background_loss) / attended.numel())
        return (sum(losses) / max(len(losses), 1)).to(activations.dtype)

    return function


def assert_right(backend, sample):
    inputs, mask, target = [sample.activations()], sample.mask(), sample.target()
    found = run(backend, local_level_loss, inputs, mask, target)
    truth = run("reference", by_definition(mask, target), as_double(inputs))
    plain = run("reference", by_definition(mask, target), as_plain(inputs))
    assert found.values[0].shape == ()
    assert_as_close_as(found.values[0].cpu(), plain.values[0], truth.values[0], what="loss")
    assert_as_close_as(found.grads[0].cpu(), plain.grads[0], truth.grads[0], what="gradient")
    return found


@everywhere
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(backend, device, shape):
    images = 2 if shape[0] > 100 else 4
    assert_right(backend, Sample(shape, images, device=device))


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "offset"])
def test_dtypes_and_layouts(backend, device, dtype, layout):
    if dtype == torch.float64 and backend == "triton":
        dtype = torch.float32  # Triton refuses float64, which test_bad_input asserts
    assert_right(backend, Sample((12, 5, 9), dtype=dtype, layout=layout, device=device))


@everywhere
def test_by_hand(backend, device):
    """Two pixels, one attended, three classes and the background, all equally likely but for one."""
    activations = torch.zeros(1, 4, 1, 2, device=device)
    activations[0, 1, 0, 0] = math.log(5)  # 5 / 8 for the target where attended
    mask = torch.tensor([[[True, False]]], device=device)
    with camkernels.use_backend(backend):
        loss = local_level_loss(activations, mask, torch.tensor([1], device=device))
    assert loss.item() == pytest.approx((0.5 * math.log(8 / 5) + 0.5 * math.log(4)) / 2)


@everywhere
@pytest.mark.parametrize("attended", [False, True])
def test_an_empty_or_full_mask_gives_exactly_zero(backend, device, attended):
    activations = Sample(device=device).activations().requires_grad_()
    mask = torch.full((3, 7, 7), attended, device=device)
    with camkernels.use_backend(backend):
        loss = local_level_loss(activations, mask, Sample(device=device).target())
        (grad,) = torch.autograd.grad(loss, activations)
    assert loss.item() == 0
    assert not grad.any()


@may_hold_infinities
@everywhere
def test_nan_shows_in_the_loss_and_stays_in_its_pixel(backend, device):
    sample = Sample(device=device)
    activations = sample.activations()
    activations[1, 2, 3, 4] = torch.nan
    activations.requires_grad_()
    with camkernels.use_backend(backend):
        loss = local_level_loss(activations, sample.mask(), sample.target())
        (grad,) = torch.autograd.grad(loss, activations)
    assert loss.isnan()
    hole = torch.zeros_like(grad, dtype=torch.bool)
    hole[1, :, 3, 4] = True
    assert torch.equal(grad.isnan(), hole)


@everywhere
def test_large_activations_do_not_overflow(backend, device):
    activations = torch.tensor([1e4, -1e4, 0.0], device=device).view(1, 3, 1, 1).repeat(1, 1, 1, 2)
    mask = torch.tensor([[[True, False]]], device=device)
    with camkernels.use_backend(backend):
        loss = local_level_loss(activations, mask, torch.tensor([1], device=device))
    assert loss.item() == pytest.approx((0.5 * 2e4 + 0.5 * 1e4) / 2)


@everywhere
def test_minus_infinity_rules_a_class_out(backend, device):
    activations = torch.zeros(1, 3, 1, 2, device=device)
    activations[0, 1] = -torch.inf
    activations.requires_grad_()
    mask = torch.tensor([[[True, False]]], device=device)
    with camkernels.use_backend(backend):
        loss = local_level_loss(activations, mask, torch.tensor([0], device=device))
        (grad,) = torch.autograd.grad(loss, activations)
    assert loss.item() == pytest.approx(0.5 * math.log(2))
    assert not grad[0, 1].any()
    assert grad.isfinite().all()


@on_kernels
def test_the_accumulation_type_is_there_for_the_module(backend, device):
    sample = Sample(dtype=torch.float16, device=device)
    with camkernels.use_backend(backend):
        wide = loss_of("test", sample.activations(), sample.mask(), sample.target())
        assert wide.dtype == torch.float32
        assert local_level_loss(sample.activations(), sample.mask(), sample.target()).dtype == torch.float16


def test_gradcheck_of_the_cpu_kernels():
    sample = Sample((5, 3, 4), dtype=torch.float64)
    with camkernels.use_backend("cpu"):
        assert torch.autograd.gradcheck(
            lambda a: local_level_loss(a, sample.mask(), sample.target()),
            sample.activations().requires_grad_(),
        )


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_each_instruction_set(capability):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert_right("cpu", Sample((37, 7, 19), dtype=dtype))
    finally:
        _C.use_cpu_capability(chosen)


@pytest.mark.parametrize("images", [1, 3])
def test_the_number_of_threads_changes_no_bit(images):
    sample = Sample((40, 13, 17), images)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = run("cpu", local_level_loss, [sample.activations()], sample.mask(), sample.target())
            results.append([*found.values, *found.grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("backend", "device"), [("cpu", "cpu"), *([("triton", DEVICE)] if GPU else [])])
def test_nothing_but_the_gradient_is_held(backend, device):
    sample = Sample((50, 14, 14), 8, device=device)
    activations, mask, target = sample.activations().requires_grad_(), sample.mask(), sample.target()
    with camkernels.use_backend(backend):
        forward, loss = peak_bytes(lambda: local_level_loss(activations, mask, target), device)
        assert forward <= 0.01 * activations.nbytes
        backward, _ = peak_bytes(lambda: torch.autograd.grad(loss, activations), device)
        assert backward <= 1.05 * activations.nbytes


@may_hold_infinities
@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "ignored"), [((6, 7, 7), -100), ((6, 1, 1), 3), ((2, 9, 11), 2**40), ((1100, 2, 3), -1)]
)
def test_an_ignored_image_is_as_if_left_out(backend, device, dtype, shape, ignored):
    sample = Sample(shape, 7, dtype, device=device)
    activations, mask, target = sample.activations(), sample.mask(), sample.target()
    kept = torch.tensor([True, False, True, True, False, True, False], device=device)
    if ignored == 3:
        target[target == 3] = 2
    target[~kept] = ignored
    expected = run(
        backend, local_level_loss, [activations[kept]], mask[kept], target[kept], ignore_index=ignored
    )
    activations[1, 0] = torch.nan  # not all classes of a pixel: of that the interpreter warns
    activations[4, :, 0, 0] = torch.inf
    found = run(backend, local_level_loss, [activations], mask, target, ignore_index=ignored)
    assert expected.values[0].isfinite()
    assert_as_close_as(
        found.values[0].cpu(),
        expected.values[0].cpu(),
        run(
            "reference",
            by_definition(mask[kept].cpu(), target[kept].cpu()),
            as_double([activations[kept]]),
        ).values[0],
        what="loss",
    )
    assert torch.equal(found.grads[0][kept], expected.grads[0])
    assert torch.equal(found.grads[0][~kept], torch.zeros_like(activations[~kept]))


@everywhere
def test_a_batch_of_ignored_images_is_as_an_empty_one(backend, device):
    activations = torch.full((3, 6, 7, 7), torch.nan, device=device)
    target = torch.full((3,), -100, dtype=torch.int32, device=device)
    found = run(backend, local_level_loss, [activations], Sample(device=device).mask(), target)
    assert found.values[0].item() == 0
    assert torch.equal(found.grads[0], torch.zeros_like(activations))


@on_kernels
def test_no_images(backend, device):
    sample = replace(Sample(device=device), images=0)
    found = run(
        backend,
        local_level_loss,
        [torch.empty(0, 6, 7, 7, device=device)],
        torch.empty(0, 7, 7, dtype=torch.bool, device=device),
        torch.empty(0, dtype=torch.int64, device=device),
    )
    assert found.values[0].item() == 0
    assert found.grads[0].shape == (0, *sample.shape)
