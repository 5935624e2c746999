"""Boxes from heatmaps and localisation errors, on maps whose answer the eye can see."""

import subprocess
import sys

import pytest
import torch

import camkernels
from camkernels import metrics
from camkernels.metrics import box_iou, cam_boxes, choose_threshold, localization_errors

pytest.importorskip("skimage", reason="boxes need scikit-image (pip install scikit-image)")

ALL = [0, 0, 4, 4]


def drawn(*pictures: str) -> torch.Tensor:
    """[N, H, W]: each picture's digits are tenths, a dot is 0."""
    rows = [[list(line.replace(".", "0")) for line in picture.split()] for picture in pictures]
    return torch.tensor([[[int(x) / 10 for x in row] for row in picture] for picture in rows])


def test_tight_box_of_the_largest_region():
    heat = drawn(
        """
        ......9
        ..77...
        .898...
        ...9...
        .......
        """
    )
    assert cam_boxes(heat, 0.5).tolist() == [[1, 1, 4, 4]]
    assert cam_boxes(heat, 0.75).tolist() == [[1, 2, 4, 4]]


def test_pixels_that_share_a_corner_are_one_region():
    heat = drawn("9.... .9... ..9.. ...99 .....")
    assert cam_boxes(heat, 0.5).tolist() == [[0, 0, 5, 4]]


def test_area_is_counted_in_pixels_not_by_the_box():
    ring = drawn("999.. 9..99 99..9 .9999 .....")  # 11 pixels
    assert cam_boxes(ring, 0.5).tolist() == [[0, 0, 5, 4]]
    thin = drawn("9...... .9..... ..9.... ....... ....999 ....999")  # 3 pixels in 3 x 3, 6 in 3 x 2
    assert cam_boxes(thin, 0.5).tolist() == [[4, 4, 7, 6]]


@pytest.mark.parametrize(
    ("picture", "box"),
    [
        ("..99 .... 99..", [2, 0, 4, 1]),
        ("...9 9..9 9...", [3, 0, 4, 2]),  # the left one begins a row later
        ("9..9 9..9 ....", [0, 0, 1, 2]),
    ],
)
def test_of_equal_areas_the_first_in_raster_order(picture, box):
    assert cam_boxes(drawn(picture), 0.5).tolist() == [box]


def test_a_pixel_at_the_threshold_is_outside():
    heat = torch.tensor([[[0.7, 0.7, 0.0], [0.0, 0.8, 0.0]]])
    assert cam_boxes(heat, 0.7).tolist() == [[1, 1, 2, 2]]
    assert cam_boxes(heat.double(), 0.7).tolist() == [[1, 1, 2, 2]]
    assert cam_boxes(heat.double(), 0.69).tolist() == [[0, 0, 2, 2]]


def test_nothing_above_the_threshold_is_an_empty_box():
    empty = torch.stack([torch.zeros(4, 4), torch.full((4, 4), 0.4), torch.full((4, 4), float("nan"))])
    boxes = cam_boxes(empty, 0.5)
    assert boxes.tolist() == [[0, 0, 0, 0]] * 3
    assert cam_boxes(empty, 0.5, (8, 8)).tolist() == [[0, 0, 0, 0]] * 3
    assert box_iou(boxes, torch.tensor([ALL] * 3)).tolist() == [0, 0, 0]
    assert localization_errors(boxes, torch.eye(3), torch.arange(3), torch.tensor([ALL] * 3)) == (1, 1, 1)


def test_maps_are_resized_bilinearly_before_the_threshold():
    """One cell in four, 1 at its centre and 0 at its neighbours': half the way is at 0.5."""
    heat = drawn(".... .X.. .... ....".replace("X", "9")) / 0.9
    # Cell 1 has its centre at pixel 12 of 32 (between 11 and 12); the next centres are 8 pixels away.
    assert cam_boxes(heat, 0.45, (32, 32)).tolist() == [[8, 8, 16, 16]]
    assert cam_boxes(heat, 0.45, (64, 32)).tolist() == [[8, 16, 16, 32]]
    assert cam_boxes(heat, 0.45).tolist() == [[1, 1, 2, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype(dtype):
    heat = drawn(".... .88. .88. ....").to(dtype)
    boxes = cam_boxes(heat, 0.5, [8, 8])
    assert boxes.dtype == torch.int64
    assert boxes.tolist() == [[2, 2, 6, 6]]


def test_many_images_and_none():
    heat = torch.zeros(600, 5, 5)
    for image in range(600):
        heat[image, image % 5, image % 3] = 1
    boxes = cam_boxes(heat, 0.5)
    assert boxes.tolist() == [[i % 3, i % 5, i % 3 + 1, i % 5 + 1] for i in range(600)]
    assert cam_boxes(heat[:0], 0.5, (9, 9)).shape == (0, 4)
    assert choose_threshold(heat, boxes, thresholds=[0.5]) == 0.5
    assert box_iou(boxes[:0], boxes[:0]).shape == (0,)


def test_maps_with_a_gradient_are_taken():
    heat = drawn(".... .88. .88. ....").requires_grad_()
    assert cam_boxes(heat, 0.5).tolist() == [[1, 1, 3, 3]]


@pytest.mark.parametrize(
    ("box", "truth", "expected"),
    [
        (ALL, ALL, 1.0),
        (ALL, [0, 0, 2, 4], 0.5),
        (ALL, [2, 2, 6, 6], 4 / 28),
        (ALL, [4, 0, 8, 4], 0.0),  # they touch
        (ALL, [5, 5, 6, 6], 0.0),
        (ALL, [2, 2, 2, 2], 0.0),
        ([2, 2, 2, 2], [2, 2, 2, 2], 0.0),
    ],
)
def test_iou(box, truth, expected):
    assert box_iou(torch.tensor([box]), torch.tensor([truth])).tolist() == [expected]
    assert box_iou(torch.tensor([truth]).float(), torch.tensor([box])).tolist() == [expected]


def test_iou_with_several_true_boxes():
    truth = torch.tensor([[ALL, [0, 0, 2, 4], [0, 0, 0, 0]], [[0, 0, 1, 1], [2, 2, 6, 6], ALL]])
    assert box_iou(torch.tensor([ALL, ALL]), truth).tolist() == [[1, 0.5, 0], [1 / 16, 4 / 28, 1]]


def test_errors():
    """Four images: all right; box wrong; class third of six; class last of six."""
    boxes = torch.tensor([ALL, [4, 4, 8, 8], ALL, ALL])
    truth = torch.tensor([ALL] * 4)
    target = torch.tensor([5, 5, 3, 0])
    logits = torch.arange(6.0).expand(4, 6)
    errors = localization_errors(boxes, logits, target, truth)
    assert errors == (0.75, 0.5, 0.25)
    assert errors._fields == ("top1", "top5", "gt_known")
    assert localization_errors(boxes, logits, target.int(), truth.double()) == errors


def test_exactly_half_is_not_over_half():
    target, logits = torch.tensor([0]), torch.zeros(1, 1)
    truth = torch.tensor([[0, 0, 2, 4]])
    assert localization_errors(torch.tensor([ALL]), logits, target, truth).gt_known == 1
    assert localization_errors(torch.tensor([ALL]), logits, target, truth, iou=0.49).gt_known == 0
    assert localization_errors(torch.tensor([[0, 0, 3, 4]]), logits, target, truth).gt_known == 0


def test_any_of_the_true_boxes_will_do():
    truth = torch.tensor([[[6, 6, 8, 8], ALL]])
    logits, target = torch.zeros(1, 1), torch.tensor([0])
    assert localization_errors(torch.tensor([ALL]), logits, target, truth) == (0, 0, 0)
    assert localization_errors(torch.tensor([[0, 0, 8, 8]]), logits, target, truth) == (1, 1, 1)


def test_order_of_equal_logits_and_of_nan():
    boxes, truth = torch.tensor([ALL] * 2), torch.tensor([ALL] * 2)
    logits = torch.zeros(2, 7)
    assert localization_errors(boxes, logits, torch.tensor([0, 1]), truth) == (0.5, 0, 0)
    assert localization_errors(boxes, logits, torch.tensor([4, 5]), truth) == (1, 0.5, 0)
    logits[0, 2] = float("nan")
    assert localization_errors(boxes, logits, torch.tensor([2, 0]), truth) == (0.5, 0.5, 0)
    many = torch.zeros(2, 4000)  # enough of them for a sort that is not stable to show
    assert localization_errors(boxes, many, torch.tensor([0, 4]), truth) == (0.5, 0, 0)
    few = torch.tensor([[0.0, 1, 2], [0, 1, 2]])
    assert localization_errors(boxes, few, torch.tensor([0, 2]), truth) == (0.5, 0, 0)


def test_threshold_of_least_error():
    """The object is at 0.5; below is its surroundings' 0.3, above only its middle."""
    heat = drawn("333333 355553 358853 358853 355553 333333") / 0.9
    truth = torch.tensor([[1, 1, 5, 5]])
    chosen = choose_threshold(heat, truth)
    good = [t for t in metrics.THRESHOLDS if 0.3 / 0.9 <= t < 0.5 / 0.9]
    assert good == [0.35, 0.40, 0.45, 0.50, 0.55]
    assert chosen == 0.45
    assert choose_threshold(heat, truth, thresholds=[0.5, 0.35, 0.35, 0.1, 0.4, 0.9, 0.55]) == 0.4
    assert choose_threshold(heat, truth, thresholds=[0.9]) == 0.9
    assert choose_threshold(heat, truth, thresholds=torch.tensor([0.25, 0.5])) in (0.25, 0.5)


def test_threshold_weighs_all_images_and_resizes():
    wide, narrow = drawn("3333 3883 3883 3333", "1111 1331 1331 1111")
    truth = torch.tensor([[4, 4, 12, 12]])
    maps = torch.stack([wide, wide, narrow])
    assert choose_threshold(maps, truth.expand(3, 4), (16, 16), thresholds=[0.2, 0.5]) == 0.5
    assert choose_threshold(maps[1:], truth.expand(2, 4), (16, 16), thresholds=[0.2, 0.6]) == 0.2
    # More images than are looked at in one go: the last ones alone would choose otherwise.
    both = torch.cat([wide.expand(300, 4, 4), narrow.expand(280, 4, 4)])
    assert choose_threshold(both, truth.expand(580, 4), (16, 16), thresholds=[0.2, 0.5]) == 0.5
    several = torch.stack([torch.zeros_like(truth), truth], 1).expand(3, 2, 4)
    assert choose_threshold(maps, several, (16, 16), thresholds=[0.2, 0.5]) == 0.5


def test_importing_camkernels_leaves_scikit_image_alone():
    code = "import sys, camkernels; camkernels.metrics; sys.exit('skimage' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert camkernels.metrics is metrics


def test_missing_scikit_image_is_said_plainly(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    heat, truth = drawn("99 .."), torch.tensor([[0, 0, 2, 1]])
    message = r"needs scikit-image for connected regions: pip install scikit-image"
    with pytest.raises(ImportError, match="cam_boxes: " + message):
        cam_boxes(heat, 0.5)
    with pytest.raises(ImportError, match="choose_threshold: " + message):
        choose_threshold(heat, truth)
    assert box_iou(truth, truth).tolist() == [1]


MAPS = torch.rand(2, 4, 4)
BOXES = torch.tensor([ALL, ALL])
LOGITS = torch.zeros(2, 3)
TARGET = torch.tensor([0, 2])
FUNCTIONS = {
    cam_boxes: {"maps": MAPS, "threshold": 0.5},
    box_iou: {"boxes": BOXES, "truth": BOXES},
    localization_errors: {"boxes": BOXES, "logits": LOGITS, "target": TARGET, "truth": BOXES},
    choose_threshold: {"maps": MAPS, "truth": BOXES},
}
UNIT = "it must be a number in (0, 1)"
SIZE = "it must be a pair (height, width) of integers of at least 1, or None"

ABOUT_MAPS = [
    ({"maps": [1.0]}, TypeError, "maps is a list; it must be a tensor [N, H, W]"),
    (
        {"maps": 10 * torch.eye(4).expand(2, 4, 4) - 2},
        ValueError,
        "maps holds values from -2 to 8; it must be normalised to [0, 1], as fused_cam gives it",
    ),
    (
        {"maps": MAPS.byte()},
        TypeError,
        "maps has dtype uint8; allowed are float32, float16, bfloat16, float64",
    ),
    ({"maps": MAPS[0]}, ValueError, "maps has shape [4, 4]; it must be [N, H, W]"),
    (
        {"maps": MAPS[..., :0]},
        ValueError,
        "maps has shape [2, 4, 0]; H and W must be at least 1 (N may be 0)",
    ),
    ({"size": 224}, TypeError, f"size is a int; {SIZE}"),
    ({"size": (8, 0)}, ValueError, f"size is (8, 0); {SIZE}"),
    ({"size": (8, 8.0)}, ValueError, f"size is (8, 8.0); {SIZE}"),
    ({"size": (8, 8, 8)}, ValueError, f"size is (8, 8, 8); {SIZE}"),
]
ABOUT_THRESHOLD = [
    ({"threshold": "0.5"}, TypeError, f"threshold is a str; {UNIT}"),
    ({"threshold": 0}, ValueError, f"threshold is 0.0; {UNIT}"),
    ({"threshold": 1.0}, ValueError, f"threshold is 1.0; {UNIT}"),
]
ABOUT_TRUTH = [
    ({"truth": [ALL]}, TypeError, "truth is a list; it must be a tensor [N, 4] or [N, B, 4]"),
    ({"truth": BOXES > 0}, TypeError, "truth has dtype bool; allowed are integers and floats"),
    ({"truth": BOXES[0]}, ValueError, "truth has shape [4]; it must be [N, 4] or [N, B, 4]"),
    ({"truth": BOXES[:, :2]}, ValueError, "truth has shape [2, 2]; it must be [N, 4] or [N, B, 4]"),
    (
        {"truth": torch.tensor([ALL, [3, 0, 1, 1]])},
        ValueError,
        "truth holds a box that ends before it begins; boxes must be "
        "(x0, y0, x1, y1), not (x, y, width, height)",
    ),
]
ABOUT_BOXES = [
    ({"boxes": None}, TypeError, "boxes is a NoneType; it must be a tensor [N, 4]"),
    ({"boxes": BOXES[:, None]}, ValueError, "boxes has shape [2, 1, 4]; it must be [N, 4]"),
    (
        {"boxes": torch.full((2, 4), float("nan"))},
        ValueError,
        "boxes holds a box that ends before it begins; boxes must be "
        "(x0, y0, x1, y1), not (x, y, width, height)",
    ),
    ({"truth": BOXES[:1]}, ValueError, "truth has 1 images and boxes 2; they must be equal"),
]
ABOUT_CLASSES = [
    ({"logits": None}, TypeError, "logits is a NoneType; it must be a tensor [N, L]"),
    ({"logits": LOGITS[0]}, ValueError, "logits has shape [3]; it must be [N, L]"),
    ({"logits": LOGITS[:, :0]}, ValueError, "logits has shape [2, 0]; L must be at least 1"),
    ({"logits": LOGITS[:1]}, ValueError, "logits has 1 images and boxes 2; they must be equal"),
    ({"target": [0, 2]}, TypeError, "target is a list; it must be a tensor [N]"),
    ({"target": TARGET.float()}, TypeError, "target has dtype float32; allowed are int64, int32"),
    ({"target": TARGET[:, None]}, ValueError, "target has shape [2, 1]; it must be [N]"),
    ({"target": TARGET[:1]}, ValueError, "target has 1 images and logits 2; they must be equal"),
    (
        {"target": TARGET + 1},
        IndexError,
        "target holds class 3; logits has 3 classes, so it must be in [0, 3)",
    ),
    ({"iou": 1}, ValueError, f"iou is 1.0; {UNIT}"),
    (
        {"boxes": BOXES[:0], "truth": BOXES[:0]},
        ValueError,
        "boxes has no images; at least 1 is needed",
    ),
]
ABOUT_THRESHOLDS = [
    ({"truth": BOXES[:1]}, ValueError, "truth has 1 images and maps 2; they must be equal"),
    ({"maps": MAPS[:0], "truth": BOXES[:0]}, ValueError, "maps has no images; at least 1 is needed"),
    ({"thresholds": 0.5}, TypeError, "thresholds is a float; it must be a sequence of numbers in (0, 1)"),
    ({"thresholds": ()}, ValueError, "thresholds is empty; it must hold at least one number in (0, 1)"),
    ({"thresholds": [0.5, None]}, TypeError, f"one of thresholds is a NoneType; {UNIT}"),
    ({"thresholds": [0.5, 1.5]}, ValueError, f"one of thresholds is 1.5; {UNIT}"),
    ({"iou": "half"}, TypeError, f"iou is a str; {UNIT}"),
]
CASES = [
    *((cam_boxes, *case) for case in ABOUT_MAPS + ABOUT_THRESHOLD),
    *((box_iou, *case) for case in ABOUT_BOXES + ABOUT_TRUTH),
    *((localization_errors, *case) for case in ABOUT_BOXES + ABOUT_TRUTH + ABOUT_CLASSES),
    *((choose_threshold, *case) for case in ABOUT_MAPS + ABOUT_TRUTH + ABOUT_THRESHOLDS),
]


@pytest.mark.parametrize(("function", "changed", "error", "message"), CASES)
def test_bad_input(function, changed, error, message):
    with pytest.raises(error) as caught:
        function(**{**FUNCTIONS[function], **changed})
    # The arguments in the order of the call: one that does not fit is named before those that follow from it.
    assert str(caught.value) == f"{function.__name__}: {message}"
