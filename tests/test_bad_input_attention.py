"""Bad input to the functions around attention; see test_bad_input.py."""

import pytest
import torch

import camkernels
from camkernels import (
    LocalActivations,
    OtsuMask,
    attention_boxes,
    crop_and_zoom,
    fused_local_activations,
    local_level_loss,
    masked_max_pool,
    otsu_mask,
)

FLOATS = "allowed are float32, float16, bfloat16, float64"
ONE_DEVICE = "they must be on one device"

FEATURES = torch.randn(2, 3, 4, 5)
WEIGHT = torch.randn(6, 4, 3)
BIAS = torch.randn(6, 4)
ACTIVATIONS = torch.randn(2, 4, 4, 5)
ATTENTION = torch.randn(2, 4, 5)
MASK = torch.ones(2, 4, 5, dtype=torch.bool)
TARGET = torch.tensor([0, 2])
IMAGES = torch.randn(2, 3, 8, 9)
BOXES = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.3, 0.5, 0.9]])
INF, NAN = float("inf"), float("nan")

OF_FEATURES = [
    # changed arguments, error, message after the function's name
    ({"features": [1.0]}, TypeError, "features is a list; it must be a tensor [N, C, H, W]"),
    ({"features": FEATURES.int()}, TypeError, f"features has dtype int32; {FLOATS}"),
    ({"features": FEATURES[0]}, ValueError, "features has shape [3, 4, 5]; it must be [N, C, H, W]"),
    (
        {"features": FEATURES[..., :0]},
        ValueError,
        "features has shape [2, 3, 4, 0]; C, H and W must be at least 1 (N may be 0)",
    ),
]

OF_CLASSIFIERS = (
    "[n, L + 1, C] must have 1 to 256 classifiers and at least 2 classes, the last being the background"
)
LOCAL_ACTIVATIONS = [
    *OF_FEATURES,
    ({"weight": None}, TypeError, "weight is a NoneType; it must be a tensor [n, L + 1, C]"),
    (
        {"weight": torch.nn.Conv2d(3, 24, 1)},
        TypeError,
        "weight is a Conv2d; it must be a tensor [n, L + 1, C]: pass its .weight",
    ),
    ({"weight": WEIGHT.long()}, TypeError, f"weight has dtype int64; {FLOATS}"),
    ({"weight": WEIGHT[0, 0]}, ValueError, "weight has shape [3]; it must be [n, L + 1, C]"),
    *(
        (
            {"weight": weight},
            ValueError,
            f"weight has shape {list(weight.shape)}; it must be [n, L + 1, C]: of a linear layer or a 1 x 1 "
            "convolution pass weight.view(n, L + 1, C)",
        )
        for weight in (WEIGHT.view(24, 3), WEIGHT.view(24, 3, 1, 1))
    ),
    *(
        ({"weight": weight}, ValueError, f"weight has shape {list(weight.shape)}; {OF_CLASSIFIERS}")
        for weight in (WEIGHT[:0], WEIGHT[:, :1], WEIGHT[:, :0], torch.zeros(257, 2, 3))
    ),
    (
        {"weight": WEIGHT[..., :2]},
        ValueError,
        "weight has 2 channels and features 3, being [2, 3, 4, 5]; they must be equal",
    ),
    ({"weight": WEIGHT.to("meta")}, ValueError, f"weight is on meta and features on cpu; {ONE_DEVICE}"),
    ({"bias": 1.0}, TypeError, "bias is a float; it must be a tensor [n, L + 1]"),
    ({"bias": BIAS.int()}, TypeError, f"bias has dtype int32; {FLOATS}"),
    (
        {"bias": BIAS.flatten()},
        ValueError,
        "bias has shape [24] and weight [6, 4, 3]; it must be [6, 4]: pass bias.view(n, L + 1)",
    ),
    (
        {"bias": BIAS[:5]},
        ValueError,
        "bias has shape [5, 4] and weight [6, 4, 3]; it must be [6, 4]",
    ),
    ({"bias": BIAS.T}, ValueError, "bias has shape [4, 6] and weight [6, 4, 3]; it must be [6, 4]"),
    ({"bias": BIAS.to("meta")}, ValueError, f"bias is on meta and weight on cpu; {ONE_DEVICE}"),
]

OTSU_MASK = [
    ({"maps": [1.0]}, TypeError, "maps is a list; it must be a tensor [..., H, W]"),
    (
        {"maps": LocalActivations(ATTENTION, ATTENTION)},
        TypeError,
        "maps is a LocalActivations; it must be a tensor [..., H, W]: pass its .attention",
    ),
    ({"maps": ATTENTION.int()}, TypeError, f"maps has dtype int32; {FLOATS}"),
    ({"maps": MASK}, TypeError, f"maps has dtype bool; {FLOATS}"),
    ({"maps": ATTENTION[0, 0]}, ValueError, "maps has shape [5]; it must be [..., H, W]"),
    ({"maps": torch.tensor(1.0)}, ValueError, "maps has shape []; it must be [..., H, W]"),
    ({"maps": ATTENTION[:, :0]}, ValueError, "maps has shape [2, 0, 5]; H and W must be at least 1"),
    ({"maps": ATTENTION[..., :0]}, ValueError, "maps has shape [2, 4, 0]; H and W must be at least 1"),
    ({"bins": 256.0}, TypeError, "bins is a float; it must be an integer from 2 to 4096"),
    ({"bins": None}, TypeError, "bins is a NoneType; it must be an integer from 2 to 4096"),
    ({"bins": True}, TypeError, "bins is a bool; it must be an integer from 2 to 4096"),
    ({"bins": -2}, ValueError, "bins is -2; it must be an integer from 2 to 4096"),
    ({"bins": 1}, ValueError, "bins is 1; it must be an integer from 2 to 4096"),
    ({"bins": 4097}, ValueError, "bins is 4097; it must be an integer from 2 to 4096"),
]

BOOL = "allowed are bool"

OF_MASK = [
    ({"mask": None}, TypeError, "mask is a NoneType; it must be a tensor [N, H, W] of bool"),
    (
        {"mask": OtsuMask(MASK, ATTENTION)},
        TypeError,
        "mask is a OtsuMask; it must be a tensor [N, H, W] of bool: pass its .mask",
    ),
    ({"mask": MASK.float()}, TypeError, f"mask has dtype float32; {BOOL}"),
    ({"mask": MASK.byte()}, TypeError, f"mask has dtype uint8; {BOOL}"),
    ({"mask": MASK[0]}, ValueError, "mask has shape [4, 5]; it must be [N, H, W] of bool"),
    (
        {"mask": MASK[:, None]},
        ValueError,
        "mask has shape [2, 1, 4, 5]; it must be [N, H, W] of bool",
    ),
    (
        {"mask": MASK[:, :0]},
        ValueError,
        "mask has shape [2, 0, 5]; H and W must be at least 1 (N may be 0)",
    ),
]


def of_mask_and(argument, shape):
    """The mask beside another tensor of that shape."""
    return [
        *OF_MASK,
        *(
            (
                {"mask": mask},
                ValueError,
                f"mask has shape {list(mask.shape)} and {argument} {shape}; it must be [2, 4, 5]",
            )
            for mask in (MASK[:1], MASK.mT, MASK[..., 1:])
        ),
        ({"mask": MASK.to("meta")}, ValueError, f"mask is on meta and {argument} on cpu; {ONE_DEVICE}"),
    ]


OF_ACTIVATIONS = (
    "[N, L + 1, H, W] must have at least 2 classes, the last being the background, and at least 1 pixel "
    "(N may be 0)"
)
LOCAL_LEVEL_LOSS = [
    (
        {"activations": LocalActivations(ACTIVATIONS, ATTENTION)},
        TypeError,
        "activations is a LocalActivations; it must be a tensor [N, L + 1, H, W]: pass its .activations",
    ),
    ({"activations": ACTIVATIONS.int()}, TypeError, f"activations has dtype int32; {FLOATS}"),
    (
        {"activations": ATTENTION},
        ValueError,
        "activations has shape [2, 4, 5]; it must be [N, L + 1, H, W]",
    ),
    *(
        (
            {"activations": activations},
            ValueError,
            f"activations has shape {list(activations.shape)}; {OF_ACTIVATIONS}",
        )
        for activations in (ACTIVATIONS[:, :1], ACTIVATIONS[:, :0], ACTIVATIONS[..., :0])
    ),
    *of_mask_and("activations", [2, 4, 4, 5]),
    ({"target": [0, 1]}, TypeError, "target is a list; it must be a tensor [N]"),
    ({"target": TARGET.float()}, TypeError, "target has dtype float32; allowed are int64, int32"),
    ({"target": TARGET.bool()}, TypeError, "target has dtype bool; allowed are int64, int32"),
    ({"target": TARGET[:, None]}, ValueError, "target has shape [2, 1]; it must be [N]"),
    ({"target": TARGET[:1]}, ValueError, "target has 1 images and activations 2; they must be equal"),
    ({"target": TARGET.to("meta")}, ValueError, f"target is on meta and activations on cpu; {ONE_DEVICE}"),
    *(
        (
            {"target": torch.tensor([0, label])},
            IndexError,
            f"target holds class {label}; activations has 3 classes beside the background, "
            "so it must be in [0, 3) or the ignore_index -100",
        )
        for label in (-1, 3)
    ),
    (
        {"ignore_index": None},
        TypeError,
        "ignore_index is a NoneType; it must be an integer that fits into 64 bits",
    ),
]


def box(*numbers, dtype=torch.float32):
    return torch.tensor([[0.0, 0.0, 1.0, 1.0], numbers], dtype=dtype)


CROP_AND_ZOOM = [
    ({"images": None}, TypeError, "images is a NoneType; it must be a tensor [N, D, H0, W0]"),
    ({"images": IMAGES.byte()}, TypeError, f"images has dtype uint8; {FLOATS}"),
    ({"images": IMAGES[0]}, ValueError, "images has shape [3, 8, 9]; it must be [N, D, H0, W0]"),
    (
        {"images": IMAGES[:, :, :0]},
        ValueError,
        "images has shape [2, 3, 0, 9]; D, H0 and W0 must be at least 1 (N may be 0)",
    ),
    ({"boxes": [[0, 0, 1, 1]] * 2}, TypeError, "boxes is a list; it must be a tensor [N, 4]"),
    ({"boxes": BOXES.int()}, TypeError, f"boxes has dtype int32; {FLOATS}"),
    ({"boxes": BOXES[0]}, ValueError, "boxes has shape [4]; it must be [N, 4]"),
    *(
        (
            {"boxes": boxes},
            ValueError,
            f"boxes has shape {list(boxes.shape)} and images [2, 3, 8, 9]; it must be [2, 4]",
        )
        for boxes in (BOXES[:1], BOXES[:, :2], torch.ones(4, 2))
    ),
    ({"boxes": BOXES.to("meta")}, ValueError, f"boxes is on meta and images on cpu; {ONE_DEVICE}"),
    *(
        (
            {"boxes": box(*numbers)},
            ValueError,
            f"boxes holds {list(numbers)} for image 1; it must be finite (x0, y0, x1, y1) "
            "with x0 < x1 and y0 < y1",
        )
        for numbers in (
            (0.5, 0.0, 0.5, 1.0),
            (0.75, 0.0, 0.5, 1.0),
            (0.0, 1.0, 1.0, 1.0),
            (0.0, 1.0, 1.0, 0.5),
            (NAN, 0.0, 1.0, 1.0),
            (0.0, 0.0, 1.0, NAN),
            (-INF, 0.0, 1.0, 1.0),
            (0.0, 0.0, 1.0, INF),
        )
    ),
    (  # none once it is float32, as images are
        {"boxes": box(0.5, 0.0, 0.5 + 1e-10, 1.0, dtype=torch.float64)},
        ValueError,
        "boxes holds [0.5, 0.0, 0.5, 1.0] for image 1; it must be finite (x0, y0, x1, y1) "
        "with x0 < x1 and y0 < y1",
    ),
    *(
        (
            {"boxes": box(*numbers)},
            ValueError,
            f"boxes holds {list(numbers)} for image 1, which lies outside the image or is over 4 times its "
            "size; boxes are fractions of the sides: divide pixels by these",
        )
        for numbers in (
            (10.0, 20.0, 50.0, 60.0),
            (1.0, 0.0, 1.5, 1.0),
            (0.0, 1.0, 1.0, 1.5),
            (-0.5, 0.0, 0.0, 1.0),
            (0.0, -0.5, 1.0, 0.0),
            (0.0, 0.0, 112.0, 112.0),
            (0.0, 0.0, 1.0, 7.0),
        )
    ),
    ({"size": 4.0}, TypeError, "size is a float; it must be an integer of at least 1"),
    ({"size": None}, TypeError, "size is a NoneType; it must be an integer of at least 1"),
    ({"size": True}, TypeError, "size is a bool; it must be an integer of at least 1"),
    ({"size": torch.tensor(4)}, TypeError, "size is a Tensor; it must be an integer of at least 1"),
    ({"size": (4, 4.0)}, TypeError, "size is a float; it must be an integer of at least 1"),
    ({"size": 0}, ValueError, "size is 0; it must be an integer of at least 1"),
    ({"size": (4, -1)}, ValueError, "size is -1; it must be an integer of at least 1"),
    *(
        (
            {"size": size},
            ValueError,
            f"size is {size!r}; it must be (height, width) or one integer for both",
        )
        for size in ((), (4,), (4, 5, 6))
    ),
    ({"size": "44"}, TypeError, "size is a str; it must be an integer of at least 1"),
]

CALLS = [
    (fused_local_activations, {"features": FEATURES, "weight": WEIGHT, "bias": BIAS}, LOCAL_ACTIVATIONS),
    (otsu_mask, {"maps": ATTENTION}, OTSU_MASK),
    (
        local_level_loss,
        {"activations": ACTIVATIONS, "mask": MASK, "target": TARGET},
        LOCAL_LEVEL_LOSS,
    ),
    (
        masked_max_pool,
        {"features": FEATURES, "mask": MASK},
        OF_FEATURES + of_mask_and("features", [2, 3, 4, 5]),
    ),
    (attention_boxes, {"mask": MASK}, OF_MASK),
    (crop_and_zoom, {"images": IMAGES, "boxes": BOXES, "size": 4}, CROP_AND_ZOOM),
]


ROWS = [(function, good, *row) for function, good, rows in CALLS for row in rows]


@pytest.mark.parametrize(
    "function, good, changed, error, message",
    [pytest.param(*row, id=f"{row[0].__name__}-{row[-1].split(';')[0]}") for row in ROWS],
)
def test_messages(function, good, changed, error, message):
    for backend in ("reference", "cpu"):
        with camkernels.use_backend(backend), pytest.raises(error) as raised:
            function(**{**good, **changed})
        assert str(raised.value) == f"{function.__name__}: {message}"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_good_input(backend):
    """What the rows above change a part of."""
    with camkernels.use_backend(backend):
        for function, good, _ in CALLS:
            function(**good)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_image_has_no_wrong_box_or_class(backend):
    with camkernels.use_backend(backend):
        assert crop_and_zoom(IMAGES[:0], BOXES[:0], 4).shape == (0, 3, 4, 4)
        assert local_level_loss(ACTIVATIONS[:0], MASK[:0], TARGET[:0]).item() == 0
