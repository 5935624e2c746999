"""``attention_boxes``: the tight box of each image's attended region."""

import torch
from torch import Tensor

from camkernels import _checks, reference
from camkernels._op import Op
from camkernels._pass import Arguments


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
    boxes: Tensor = ATTENTION_BOXES(name, mask)
    return boxes


def _allocate(a: Arguments) -> None:
    a.boxes = a.mask.new_empty(a.mask.shape[0], 4, dtype=torch.float32)


ATTENTION_BOXES = Op(
    "attention_boxes",
    "Tensor mask",
    outputs="boxes",
    allocate=_allocate,
    reference=reference.attention_boxes,
    backends=("reference", "cpu", "triton"),
)
