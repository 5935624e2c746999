"""``attention_boxes``: the tight box of each image's attended region."""

import torch
from torch import Tensor

from camkernels import _backend, reference
from camkernels._library import define_op
from camkernels.ops import _checks

BACKENDS = ("reference", "cpu", "triton")


def attention_boxes(mask: Tensor) -> Tensor:
    """The smallest box that holds all True pixels of each mask.

        boxes = attention_boxes(otsu_mask(attention).mask)
        zoomed = crop_and_zoom(images, boxes, size=448)

    Args:
        mask: ``[N, H, W]``, bool.

    Returns:
        ``[N, 4]`` float32: left, top, right and bottom edge ``(x0, y0, x1, y1)`` as fractions of width and
        height, from 0 to 1, so that they hold for the image as for its map. An empty mask has the box of the
        whole image, ``(0, 0, 1, 1)``.

    Gradients: none.
    Numerics: exact quotients rounded to float32; deterministic; does not wait for the device.

    Raises:
        TypeError: ``mask`` is not a bool tensor.
        ValueError: ``mask`` is not ``[N, H, W]`` with at least one pixel.

    Source: Shen and Liu, "Generating Attention from Classifier Activations for Fine-grained Recognition",
    §4.4 and 5.5.
    """
    name = "attention_boxes"
    mask = _checks.mask(name, mask)
    requested = _backend.setting()
    if _backend.resolve(name, requested, mask.device, mask.dtype, BACKENDS) == "reference":
        return reference.attention_boxes(mask)
    boxes: Tensor = torch.ops.camkernels.attention_boxes_fwd(mask, requested)
    return boxes


def _allocate(mask: Tensor) -> tuple[Tensor, ...]:
    return (mask.new_empty((mask.shape[0], 4), dtype=torch.float32),)


define_op("attention_boxes_fwd", "Tensor mask", ("boxes",), allocate=_allocate, backends=BACKENDS)
