"""Weakly supervised localisation: boxes from heatmaps, and how often they are wrong.

Evaluation, not training: these functions work on the host, image by image, and have no gradient. A heatmap is
that of the image's class, min-max normalised, as ``fused_cam(features, weight, target)`` gives it:

    maps = fused_cam(features, classifier.weight, target)
    threshold = choose_threshold(held_out_maps, held_out_truth, (224, 224))
    boxes = cam_boxes(maps, threshold, (224, 224))
    errors = localization_errors(boxes, logits, target, truth)

Boxes are ``(x0, y0, x1, y1)`` in pixels of the image: first column and row inside, first ones behind. Those
given as ``(x, y, width, height)``, such as CUB's, are ``(x, y, x + width, y + height)``; to inclusive
corners, such as ILSVRC's, add 1 at the end. Where images have several boxes,
``torch.nn.utils.rnn.pad_sequence`` makes one tensor of them. ``size`` is one for all images: boxes must have
gone through the same resizing and cropping. For a whole test set collect maps and logits of all batches
first: shares of batches of different size have no plain mean.
"""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from camkernels import _checks

__all__ = ["LocalizationErrors", "box_iou", "cam_boxes", "choose_threshold", "localization_errors"]

THRESHOLDS = tuple(percent / 100 for percent in range(5, 100, 5))
_IMAGES_AT_ONCE = 256  # resized maps of a whole test set may be larger than memory
_UNIT = "in (0, 1)"


class LocalizationErrors(NamedTuple):
    """Shares of the images, in [0, 1]."""

    top1: float
    top5: float
    gt_known: float


def cam_boxes(maps: Tensor, threshold: float, size: tuple[int, int] | None = None) -> Tensor:
    """The box of each heatmap: tight around the largest connected region above the threshold.

    Maps are brought to the image's size first, bilinearly as ``F.interpolate(align_corners=False)`` does.
    Pixels that share an edge or a corner are connected, as in the contours of OpenCV that CAM's evaluation
    draws. Of several largest regions the one that comes first counts, row by row.

    Args:
        maps: heatmaps normalised to [0, 1], ``[N, H, W]``.
        threshold: in units of the maps, (0, 1); a pixel belongs to the object where its value is above.
        size: (height, width) of the images; None leaves the maps as they are.

    Returns:
        ``[N, 4]`` int64 on the device of ``maps``: ``(x0, y0, x1, y1)``. A map with no pixel above the
        threshold, such as a constant one or one of NaN, has the empty box (0, 0, 0, 0).

    Raises:
        ImportError: scikit-image, which finds the regions, is missing: ``pip install scikit-image``.
        ValueError, TypeError: bad shape, dtype, threshold or size; the message says which.

    Source: Zhang et al., ECCV 2020 (I2C), end of section 3.3; Zhou et al., CVPR 2016 (CAM).
    """
    maps = _maps("cam_boxes", maps)
    threshold = _checks.in_open_interval("cam_boxes", "threshold", threshold, 0, 1, _UNIT)
    measure = _measure("cam_boxes")
    boxes = [_boxes_of(measure, part > threshold) for part in _resized("cam_boxes", maps, size)]
    return torch.cat(boxes).to(maps.device)


def box_iou(boxes: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of each image's box with that image's true boxes.

    Args:
        boxes: ``[N, 4]``.
        truth: ``[N, 4]``, or ``[N, B, 4]`` for several true boxes in an image; where an image has fewer than
            B, the rest are empty boxes.

    Returns:
        ``[N]`` or ``[N, B]`` float64 in [0, 1]; 0 where either box is empty.

    Raises:
        ValueError, TypeError: bad shape or dtype, or a box that ends before it begins.
    """
    boxes, truth = _box_pair("box_iou", boxes, truth)
    mine = boxes.double() if truth.dim() == 2 else boxes.double()[:, None]
    true = truth.double()
    start, end = torch.maximum(mine[..., :2], true[..., :2]), torch.minimum(mine[..., 2:], true[..., 2:])
    common = (end - start).clamp_min(0).prod(-1)
    union = _area(mine) + _area(true) - common
    return torch.where(common > 0, common / union, 0)


def localization_errors(
    boxes: Tensor, logits: Tensor, target: Tensor, truth: Tensor, *, iou: float = 0.5
) -> LocalizationErrors:
    """How often images are not both classified and localised.

    A box is right where its IoU with any of the image's true boxes is above ``iou``: "over 50 %", as the
    paper has it. Exactly half is wrong; wsolevaluation counts it as right.

        gt_known: the box is wrong
        top1:     the box is wrong or the class of largest logit is not ``target``
        top5:     the box is wrong or ``target`` is not among the five classes of largest logits

    The boxes are those of the class ``target`` for all three: a box of another class cannot make an image
    right, for its class is wrong already.

    Args:
        boxes: of the heatmaps of class ``target``, ``[N, 4]``, from ``cam_boxes``.
        logits: of all classes, ``[N, L]``. Of equal ones the lower class comes first; an image that has a NaN
            among them is wrongly classified. Of fewer than five classes all are among the five.
        target: class of each image, ``[N]`` int64 or int32.
        truth: true boxes, ``[N, 4]`` or ``[N, B, 4]``; see ``box_iou``.
        iou: what a right box has to exceed, (0, 1).

    Returns:
        ``LocalizationErrors(top1, top5, gt_known)``, shares of the N images.

    Raises:
        ValueError, TypeError: no image at all, or a bad shape, dtype or value; the message says which.
        IndexError: a class outside [0, L).

    Source: Zhang et al., ECCV 2020 (I2C), section 4.1; Russakovsky et al., IJCV 2015 (ILSVRC).
    """
    function = "localization_errors"
    boxes, truth = _box_pair(function, boxes, truth)
    iou = _checks.in_open_interval(function, "iou", iou, 0, 1, _UNIT)
    logits = _logits(function, logits, boxes)
    target = _target(function, target, logits)
    order = logits.sort(dim=1, descending=True, stable=True).indices  # [N, L]
    known = ~logits.isnan().any(1)
    localised = _right(boxes, truth, iou)

    def error(right: Tensor) -> float:
        return 1 - right.double().mean().item()

    found = order == target.to(order)[:, None]
    return LocalizationErrors(
        top1=error(localised & known & found[:, 0]),
        top5=error(localised & known & found[:, :5].any(1)),
        gt_known=error(localised),
    )


def choose_threshold(
    maps: Tensor,
    truth: Tensor,
    size: tuple[int, int] | None = None,
    *,
    thresholds: Sequence[float] | Tensor = THRESHOLDS,
    iou: float = 0.5,
) -> float:
    """The threshold with the fewest wrong boxes. Choose it on images that are kept from the test.

    Args:
        maps: heatmaps of each image's own class, normalised to [0, 1], ``[N, H, W]``.
        truth: true boxes, ``[N, 4]`` or ``[N, B, 4]``; see ``box_iou``.
        size: (height, width) of the images; None leaves the maps as they are.
        thresholds: those to try, each in (0, 1); 0.05, 0.10 ... 0.95 by default.
        iou: what a right box has to exceed, (0, 1).

    Returns:
        One of ``thresholds``. Of several equally good ones it is the middle one in rising order (the lower of
        two in the middle): where they are neighbours it lies farthest from where boxes get worse.

    Raises:
        ImportError: scikit-image is missing: ``pip install scikit-image``.
        ValueError, TypeError: no image at all, no threshold, or a bad argument; the message says which.
    """
    function = "choose_threshold"
    maps = _maps(function, maps)
    truth = _boxes(function, "truth", truth, "[N, 4] or [N, B, 4]", (2, 3))
    _same_images(function, "truth", truth, "maps", maps)
    tried = _thresholds(function, thresholds)
    iou = _checks.in_open_interval(function, "iou", iou, 0, 1, _UNIT)
    measure = _measure(function)
    right = torch.zeros(len(tried), dtype=torch.int64)
    truths = truth.cpu().split(_IMAGES_AT_ONCE)
    for part, part_truth in zip(_resized(function, maps, size), truths, strict=True):
        for place, threshold in enumerate(tried):
            right[place] += _right(_boxes_of(measure, part > threshold), part_truth, iou).sum()
    best = (right == right.max()).nonzero()[:, 0]
    return tried[int(best[(len(best) - 1) // 2])]


def _measure(function: str) -> Any:
    """scikit-image's measurements, imported here so that ``import camkernels`` does without them."""
    try:
        from skimage import measure
    except ImportError as error:
        raise ImportError(
            f"{function}: needs scikit-image for connected regions: pip install scikit-image"
        ) from error
    return measure


def _boxes_of(measure: Any, masks: Tensor) -> Tensor:
    """Of the largest region of each mask, [N, H, W] bool on the CPU."""
    boxes = torch.zeros(len(masks), 4, dtype=torch.int64)
    for box, mask in zip(boxes, masks.numpy(), strict=True):
        regions = measure.regionprops(measure.label(mask, connectivity=2))
        if regions:
            y0, x0, y1, x1 = max(regions, key=lambda region: region.area).bbox  # the first one of equals
            box[:] = torch.tensor((x0, y0, x1, y1))
    return boxes


def _resized(function: str, maps: Tensor, size: tuple[int, int] | None) -> Iterator[Tensor]:
    """The maps at the image's size on the CPU, some images at a time."""
    if size is not None:
        _check_size(function, size)
    for part in maps.detach().split(_IMAGES_AT_ONCE):
        if part.dtype != torch.float64:
            part = part.float()
        if size is not None and len(part) > 0:
            part = F.interpolate(part[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]
        yield part.cpu()


def _right(boxes: Tensor, truth: Tensor, iou: float) -> Tensor:
    overlap = box_iou(boxes, truth)
    return (overlap > iou) if overlap.dim() == 1 else (overlap > iou).any(1)  # [N]


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def _maps(function: str, value: object) -> Tensor:
    value = _checks.tensor(function, "maps", value, "[N, H, W]", (3,))
    if 0 in value.shape[1:]:
        raise ValueError(
            f"{function}: maps has shape {list(value.shape)}; H and W must be at least 1 (N may be 0)"
        )
    if bool(((value < 0) | (value > 1)).any()):
        low, high = (x.item() for x in value[~value.isnan()].aminmax())
        raise ValueError(
            f"{function}: maps holds values from {low:g} to {high:g}; it must be normalised to [0, 1], as "
            "fused_cam gives it"
        )
    return value


def _boxes(function: str, argument: str, value: object, shape: str, dims: Sequence[int]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {argument} is a {type(value).__name__}; it must be a tensor {shape}")
    if value.dtype == torch.bool or value.is_complex():
        name = _checks.dtype_name(value.dtype)
        raise TypeError(f"{function}: {argument} has dtype {name}; allowed are integers and floats")
    if value.dim() not in dims or value.shape[-1] != 4:
        raise ValueError(f"{function}: {argument} has shape {list(value.shape)}; it must be {shape}")
    if not bool((value[..., 2:] >= value[..., :2]).all()):  # a NaN fails as well
        raise ValueError(
            f"{function}: {argument} holds a box that ends before it begins; boxes must be "
            "(x0, y0, x1, y1), not (x, y, width, height)"
        )
    return value


def _box_pair(function: str, boxes: object, truth: object) -> tuple[Tensor, Tensor]:
    mine = _boxes(function, "boxes", boxes, "[N, 4]", (2,))
    true = _boxes(function, "truth", truth, "[N, 4] or [N, B, 4]", (2, 3))
    _same_images(function, "truth", true, "boxes", mine, allow_none=function == "box_iou")
    return mine, _checks.same_device(function, "truth", true, mine, "boxes")


def _same_images(
    function: str, argument: str, value: Tensor, other_argument: str, other: Tensor, allow_none: bool = False
) -> None:
    if len(value) != len(other):
        raise ValueError(
            f"{function}: {argument} has {len(value)} images and {other_argument} {len(other)}; "
            "they must be equal"
        )
    if len(other) == 0 and not allow_none:
        raise ValueError(f"{function}: {other_argument} has no images; at least 1 is needed")


def _logits(function: str, value: object, boxes: Tensor) -> Tensor:
    value = _checks.tensor(function, "logits", value, "[N, L]", (2,))
    if value.shape[1] == 0:
        raise ValueError(f"{function}: logits has shape {list(value.shape)}; L must be at least 1")
    _same_images(function, "logits", value, "boxes", boxes)
    return _checks.same_device(function, "logits", value, boxes, "boxes")


def _target(function: str, value: object, logits: Tensor) -> Tensor:
    value = _checks.target(function, value, logits, "[N]", (1,), "logits")
    _checks.classes_in_range(function, value.cpu(), logits.shape[1], "logits has {} classes")
    return value


def _thresholds(function: str, value: object) -> list[float]:
    """In rising order, each once."""
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(
            f"{function}: thresholds is a {type(value).__name__}; it must be a sequence of numbers {_UNIT}"
        )
    if len(value) == 0:
        raise ValueError(f"{function}: thresholds is empty; it must hold at least one number {_UNIT}")
    return sorted(
        {_checks.in_open_interval(function, "one of thresholds", item, 0, 1, _UNIT) for item in value}
    )


def _check_size(function: str, value: object) -> None:
    allowed = "a pair (height, width) of integers of at least 1, or None"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{function}: size is a {type(value).__name__}; it must be {allowed}")
    if len(value) != 2 or any(isinstance(v, bool) or not isinstance(v, Integral) or v < 1 for v in value):
        raise ValueError(f"{function}: size is {value}; it must be {allowed}")
