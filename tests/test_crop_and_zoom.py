"""crop_and_zoom: against F.grid_sample in float64, and against slicing and F.interpolate."""

import pytest
import torch
from calls import run_pass
from cases import (
    BACKENDS,
    DEVICE,
    GPU,
    KERNEL_BACKENDS,
    LAYOUTS,
    as_double,
    as_plain,
    lay_out,
    peak_bytes,
    run,
    without_cuda,
)
from closeness import assert_as_close_as
from torch.nn import functional as F

import camkernels
from camkernels import _C, crop_and_zoom
from camkernels.ops.crop_and_zoom import CROP_AND_ZOOM

everywhere = pytest.mark.parametrize(("backend", "device"), without_cuda(BACKENDS))
on_kernels = pytest.mark.parametrize(("backend", "device"), without_cuda(KERNEL_BACKENDS))

BOXES = [
    (0.0, 0.0, 1.0, 1.0),
    (0.25, 0.5, 0.75, 1.0),
    (0.1, 0.37, 0.42, 0.91),
    (-0.2, -0.1, 0.3, 1.4),  # beyond the image, where its border repeats
    (0.5, 0.5, 0.501, 0.502),  # less than a pixel
]


def images_of(shape=(5, 3, 19, 23), dtype=torch.float32, layout="contiguous", device="cpu"):
    draw = torch.Generator().manual_seed(0)
    return lay_out(torch.randn(shape, generator=draw).to(device, dtype), layout)


def boxes_of(images):
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    return torch.tensor(BOXES[: images.shape[0]], device=images.device, dtype=wide)


def by_grid_sample(boxes, size):
    def function(images):
        wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        x0, y0, x1, y1 = boxes.to(images.device, wide).unbind(1)
        matrix = torch.zeros(len(boxes), 2, 3, dtype=wide, device=images.device)
        matrix[:, 0, 0], matrix[:, 0, 2] = x1 - x0, x0 + x1 - 1
        matrix[:, 1, 1], matrix[:, 1, 2] = y1 - y0, y0 + y1 - 1
        grid = F.affine_grid(matrix, [*images.shape[:2], *size], align_corners=False)
        sampled = F.grid_sample(images.to(wide), grid, padding_mode="border", align_corners=False)
        return sampled.to(images.dtype)

    return function


def assert_right(backend, images, size):
    boxes = boxes_of(images)
    found = run(backend, crop_and_zoom, [images], boxes, size)
    truth = run("reference", by_grid_sample(boxes.cpu(), size), as_double([images]))
    plain = run("reference", by_grid_sample(boxes.cpu(), size), as_plain([images]))
    assert_as_close_as(found.values[0].cpu(), plain.values[0], truth.values[0], what="zoomed")
    assert_as_close_as(found.grads[0].cpu(), plain.grads[0], truth.grads[0], what="gradient")
    return found


SIZES = [(19, 23), (7, 11), (40, 33), (1, 1), (2, 70)]


@pytest.mark.parametrize(
    ("backend", "device", "size"),
    [
        (backend, device, size)
        for backend, device in without_cuda(BACKENDS)
        for size in SIZES
        # The interpreter is slow where all outputs read one pixel, as the last box's do.
        if GPU or backend != "triton" or size[0] < 10
    ],
)
def test_sizes(backend, device, size):
    assert_right(backend, images_of(device=device), size)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(backend, device, dtype, layout):
    if dtype == torch.float64 and backend == "triton":
        dtype = torch.float32  # Triton refuses float64, which test_bad_input asserts
    images = images_of((3, 4, 9, 17), dtype, layout, device)
    found = assert_right(backend, images, (13, 10))
    plain = layout != "channels_last"
    for result in (found.values[0], found.grads[0]):
        assert result.is_contiguous(memory_format=torch.contiguous_format if plain else torch.channels_last)


@everywhere
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 5, 1, 9), (1, 2, 33, 2)])
def test_small_images(backend, device, shape):
    assert_right(backend, images_of(shape, device=device), (6, 5))


@everywhere
def test_the_whole_image_at_its_own_size_is_the_image(backend, device):
    images = images_of(device=device)
    whole = torch.tensor([BOXES[0]] * 5, device=device)
    found = run(backend, crop_and_zoom, [images], whole, (19, 23))
    if backend == "reference":  # F.affine_grid rounds positions
        assert torch.allclose(found.values[0], images, atol=1e-4)
    else:
        assert torch.equal(found.values[0], images)


@on_kernels
@pytest.mark.parametrize("size", [(50, 41), (6, 9)])
def test_the_whole_image_is_interpolated(backend, device, size):
    images = images_of(device=device)
    whole = torch.tensor([BOXES[0]] * 5, device=device)
    found = run(backend, crop_and_zoom, [images], whole, size)

    def interpolate(x):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    truth, plain = (run("reference", interpolate, f([images])) for f in (as_double, as_plain))
    assert_as_close_as(found.values[0].cpu(), plain.values[0], truth.values[0])
    assert_as_close_as(found.grads[0].cpu(), plain.grads[0], truth.grads[0])


@everywhere
def test_pixels_of_a_box_that_is_not_resized(backend, device):
    images = images_of((1, 2, 16, 8), device=device)
    box = torch.tensor([[2 / 8, 4 / 16, 6 / 8, 12 / 16]], device=device)
    with camkernels.use_backend(backend):
        zoomed = crop_and_zoom(images, box, (8, 4))
    assert torch.allclose(zoomed, images[..., 4:12, 2:6], atol=1e-5)


@everywhere
def test_one_number_is_both_sides(backend, device):
    images = images_of(device=device)
    with camkernels.use_backend(backend):
        assert torch.equal(
            crop_and_zoom(images, boxes_of(images), 6), crop_and_zoom(images, boxes_of(images), [6, 6])
        )


@on_kernels
def test_a_box_that_is_none_gives_nan(backend, device):
    """As on a device that cannot raise; the checks of the public function are left out here."""
    images = images_of((11, 2, 3, 4), device=device)
    boxes = torch.tensor([BOXES[0]] * 11)
    boxes[1, 0], boxes[2, 1] = 1.0, 1.5  # no width, and less than no height
    boxes[range(3, 7), range(4)] = torch.nan
    boxes[range(7, 11), range(4)] = torch.tensor([-torch.inf, -torch.inf, torch.inf, torch.inf])
    boxes = boxes.to(device)
    both = {"boxes": boxes, "backend": backend}
    zoomed = run_pass(CROP_AND_ZOOM.forward, images=images, height=2, width=3, **both).zoomed
    size = {"height": 3, "width": 4, "channels_last": False}
    grad = run_pass(CROP_AND_ZOOM.backward, grad_zoomed=torch.ones_like(zoomed), **size, **both).grad_images
    by_definition = camkernels.reference.crop_and_zoom(images, boxes, (2, 3))
    for result in (zoomed, grad, by_definition):
        assert result[0].isfinite().all()
        assert result[1:].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_that_are_written_past_the_caches(layout):
    found = assert_right("cpu", images_of((1, 3, 601, 593), layout=layout), (593, 601))
    assert min(found.values[0].numel(), found.grads[0].numel()) > 1 << 20


def test_gradcheck_of_the_cpu_kernels():
    images = images_of((2, 2, 5, 4), torch.float64).requires_grad_()
    boxes = torch.tensor(BOXES[1:3])
    with camkernels.use_backend("cpu"):
        assert torch.autograd.gradcheck(lambda x: crop_and_zoom(x, boxes, (4, 7)), images)


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_each_instruction_set(capability):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for layout in ("contiguous", "channels_last"):
                assert_right("cpu", images_of((5, 3, 40, 37), dtype, layout), (29, 50))
    finally:
        _C.use_cpu_capability(chosen)


def test_the_number_of_threads_changes_no_bit():
    images = images_of((2, 3, 60, 50))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = run("cpu", crop_and_zoom, [images], boxes_of(images), (70, 45))
            results.append([*found.values, *found.grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("backend", "device"), [("cpu", "cpu"), *([("triton", DEVICE)] if GPU else [])])
def test_only_results_are_held(backend, device):
    images = images_of((4, 3, 64, 64), device=device).requires_grad_()
    boxes = boxes_of(images)
    with camkernels.use_backend(backend):
        forward, zoomed = peak_bytes(lambda: crop_and_zoom(images, boxes, 64), device)
        assert forward <= 1.05 * zoomed.nbytes
        backward, _ = peak_bytes(lambda: torch.autograd.grad(zoomed, images, zoomed.detach()), device)
        assert backward <= 1.05 * images.nbytes


@everywhere
def test_no_images(backend, device):
    images = torch.empty(0, 3, 5, 6, device=device)
    found = run(backend, crop_and_zoom, [images], torch.empty(0, 4, device=device), (4, 7))
    assert found.values[0].shape == (0, 3, 4, 7)
    assert found.grads[0].shape == images.shape
