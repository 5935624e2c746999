"""``crop_and_zoom``: a box of each image, resampled to one size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from camkernels import _checks, reference
from camkernels._op import Op
from camkernels._pass import Arguments, empty_maps, memory_format


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
    zoomed: Tensor = CROP_AND_ZOOM(name, images, boxes, height, width)
    return zoomed


def _allocate(a: Arguments) -> None:
    channels_last = memory_format(a.images) == torch.channels_last
    a.zoomed = empty_maps(a.images, channels_last, *a.images.shape[:2], a.height, a.width)


def _grad_images(a: Arguments) -> Tensor:
    return empty_maps(a.grad_zoomed, a.channels_last, *a.grad_zoomed.shape[:2], a.height, a.width)


def _reference(images: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    zoomed = reference.crop_and_zoom(images, boxes, (height, width))
    return zoomed.contiguous(memory_format=memory_format(images))


def _arrange_bwd(a: Arguments) -> None:
    layout = torch.channels_last if a.channels_last else torch.contiguous_format
    a.grad_zoomed = a.grad_zoomed.contiguous(memory_format=layout)


CROP_AND_ZOOM = Op(
    "crop_and_zoom",
    "Tensor images, Tensor boxes, SymInt height, SymInt width",
    outputs="zoomed",
    allocate=_allocate,
    reference=_reference,
    backward="Tensor grad_zoomed, Tensor boxes, SymInt height, SymInt width, bool channels_last",
    gradients={"images": _grad_images},
    save={
        "height": lambda a: a.images.shape[2],
        "width": lambda a: a.images.shape[3],
        "channels_last": lambda a: memory_format(a.images) == torch.channels_last,
    },
    arrange=_arrange_bwd,
    channels_last="images grad_zoomed",
    backends=("reference", "cpu", "triton"),
)
