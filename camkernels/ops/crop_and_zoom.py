"""``crop_and_zoom``: a box of each image, resampled to one size."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camkernels import _backend, reference
from camkernels._library import define_op, memory_format
from camkernels.ops import _checks
from camkernels.ops._autograd import first_order

BACKENDS = ("reference", "cpu", "triton")


def crop_and_zoom(images: Tensor, boxes: Tensor, size: int | Sequence[int]) -> Tensor:
    """Cut a box out of each image and resize it, bilinearly: the next scale of a fine-grained model.

        zoomed = crop_and_zoom(images, attention_boxes(mask), size=448)

    Pixel ``(i, j)`` of ``[h, w]`` reads its image at

        y = y0 * H0 + (i + 0.5) * (y1 - y0) * H0 / h - 0.5
        x = x0 * W0 + (j + 0.5) * (x1 - x0) * W0 / w - 0.5

    between the four pixels around, ``align_corners=False``; beyond the image its border repeats. The box of a
    whole image gives ``F.interpolate(images, size, mode="bilinear")``. A box of another shape than ``size``
    is stretched; a zoom out does not smooth first.

    Args:
        images: ``[N, D, H0, W0]``, any float dtype; NCHW or channels_last, read in place.
        boxes: ``[N, 4]``, float: ``(x0, y0, x1, y1)`` as fractions of width and height, as
            ``attention_boxes`` gives them, not pixels; ``x0 < x1`` and ``y0 < y1``. They may reach beyond the
            image.
        size: height and width of the result, or one number for both.

    Returns:
        ``[N, D, h, w]`` in dtype and memory format of ``images``.

    Gradients: ``images``; none to ``boxes``. No double backward but with backend ``"reference"``.
    Numerics: float32 inside (float64 for float64); deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or size; on the CPU a box that is none, or lies outside its image.
            On a GPU, and under ``torch.compile``, the image of a box that is none is NaN instead.

    Source: Shen and Liu, "Generating Attention from Classifier Activations for Fine-grained Recognition",
    §4.4.
    """
    name = "crop_and_zoom"
    images = _checks.pictures(name, images)
    boxes = _checks.boxes(name, boxes, images)
    height, width = _checks.size(name, size)
    requested = _backend.setting()
    if _backend.resolve(name, requested, images.device, images.dtype, BACKENDS) == "reference":
        zoomed = reference.crop_and_zoom(images, boxes, (height, width))
        return zoomed.contiguous(memory_format=memory_format(images))
    zoomed = _CropAndZoom.apply(images, boxes, height, width, requested)
    return zoomed


class _CropAndZoom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, boxes: Tensor, height: int, width: int, requested: str) -> Tensor:
        zoomed: Tensor = torch.ops.camkernels.crop_and_zoom_fwd(images, boxes, height, width, requested)
        ctx.save_for_backward(boxes)
        ctx.size = images.shape[2:]
        ctx.layout = memory_format(images)
        ctx.requested = requested
        return zoomed

    @staticmethod
    @first_order("crop_and_zoom")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (boxes,) = ctx.saved_tensors
        grad_images = torch.ops.camkernels.crop_and_zoom_bwd(
            grad.contiguous(memory_format=ctx.layout), boxes, *ctx.size, ctx.requested
        )
        return grad_images, None, None, None, None


def _allocate(images: Tensor, boxes: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    return (
        torch.empty(
            (*images.shape[:2], height, width),
            dtype=images.dtype,
            device=images.device,
            memory_format=memory_format(images),
        ),
    )


define_op(
    "crop_and_zoom_fwd",
    "Tensor images, Tensor boxes, SymInt height, SymInt width",
    ("zoomed",),
    allocate=_allocate,
    backends=BACKENDS,
)
define_op(
    "crop_and_zoom_bwd",
    "Tensor grad, Tensor boxes, SymInt height, SymInt width",
    ("grad_images",),
    allocate=_allocate,
    backends=BACKENDS,
)
