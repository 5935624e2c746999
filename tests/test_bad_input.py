"""Bad input raises before any kernel starts, in words that name function, argument, what came, what goes."""

import pytest
import torch

import camkernels
from camkernels import focus_area, fused_cam, fused_cam_erase

FEATURES = torch.randn(2, 3, 4, 4)
WEIGHT = torch.randn(5, 3)
TARGET = torch.tensor([0, 4])
IMAGES = torch.randn(2, 3, 8, 8)
BIAS = torch.randn(5)

SHARED = [
    # changed arguments, error, message after the function's name
    ({"features": [1.0]}, TypeError, "features is a list; it must be a tensor [N, C, H, W]"),
    (
        {"features": FEATURES.int()},
        TypeError,
        "features has dtype int32; allowed are float32, float16, bfloat16, float64",
    ),
    ({"features": FEATURES[0]}, ValueError, "features has shape [3, 4, 4]; it must be [N, C, H, W]"),
    (
        {"features": FEATURES[:, :0]},
        ValueError,
        "features has shape [2, 0, 4, 4]; C, H and W must be at least 1 (N may be 0)",
    ),
    ({"weight": None}, TypeError, "weight is a NoneType; it must be a tensor [L, C] or [L, C, 1, 1]"),
    (
        {"weight": WEIGHT.long()},
        TypeError,
        "weight has dtype int64; allowed are float32, float16, bfloat16, float64",
    ),
    ({"weight": WEIGHT[0]}, ValueError, "weight has shape [3]; it must be [L, C] or [L, C, 1, 1]"),
    (
        {"weight": torch.randn(5, 3, 3, 3)},
        ValueError,
        "weight has shape [5, 3, 3, 3]; it must be [L, C] or [L, C, 1, 1]",
    ),
    ({"weight": WEIGHT[:0]}, ValueError, "weight has shape [0, 3]; L must be at least 1"),
    ({"weight": WEIGHT[:, :2]}, ValueError, "weight has 2 channels and features 3; they must be equal"),
    (
        {"weight": WEIGHT.to("meta")},
        ValueError,
        "weight is on meta and features on cpu; they must be on one device",
    ),
    ({"target": [0, 4]}, TypeError, "target is a list; it must be a tensor [N]"),
    ({"target": TARGET.float()}, TypeError, "target has dtype float32; allowed are int64, int32"),
    ({"target": TARGET[:1]}, ValueError, "target has 1 images and features 2; they must be equal"),
    (
        {"target": TARGET.to("meta")},
        ValueError,
        "target is on meta and features on cpu; they must be on one device",
    ),
    ({"eps": "small"}, TypeError, "eps is a str; it must be a number of at least 0"),
    ({"eps": -1.0}, ValueError, "eps is -1.0; it must be a finite number of at least 0"),
    ({"eps": float("nan")}, ValueError, "eps is nan; it must be a finite number of at least 0"),
    ({"eps": float("inf")}, ValueError, "eps is inf; it must be a finite number of at least 0"),
]

CAM = [
    (
        {"target": TARGET[:, None, None]},
        ValueError,
        "target has shape [2, 1, 1]; it must be [N] or [N, K], or None",
    ),
    ({"target": TARGET[:, None][:, :0]}, ValueError, "target has shape [2, 0]; K must be at least 1"),
    ({"bias": 1.0}, TypeError, "bias is a float; it must be a tensor [L]"),
    (
        {"bias": BIAS.int()},
        TypeError,
        "bias has dtype int32; allowed are float32, float16, bfloat16, float64",
    ),
    ({"bias": BIAS[:, None]}, ValueError, "bias has shape [5, 1]; it must be [L]"),
    ({"bias": BIAS[:4]}, ValueError, "bias has 4 classes and weight 5; they must be equal"),
    ({"bias": BIAS.to("meta")}, ValueError, "bias is on meta and weight on cpu; they must be on one device"),
    ({"normalize": 1}, TypeError, "normalize is 1; it must be True or False"),
]

ERASE = [
    ({"target": None}, TypeError, "target is a NoneType; it must be a tensor [N]"),
    ({"target": TARGET[:, None]}, ValueError, "target has shape [2, 1]; it must be [N]"),
    ({"images": None}, TypeError, "images is a NoneType; it must be a tensor [N, D, H0, W0]"),
    (
        {"images": IMAGES.byte()},
        TypeError,
        "images has dtype uint8; allowed are float32, float16, bfloat16, float64",
    ),
    ({"images": IMAGES[0]}, ValueError, "images has shape [3, 8, 8]; it must be [N, D, H0, W0]"),
    (
        {"images": IMAGES[..., :0]},
        ValueError,
        "images has shape [2, 3, 8, 0]; D, H0 and W0 must be at least 1 (N may be 0)",
    ),
    ({"images": IMAGES[:1]}, ValueError, "images has 1 images and features 2; they must be equal"),
    (
        {"images": IMAGES.to("meta")},
        ValueError,
        "images is on meta and features on cpu; they must be on one device",
    ),
    ({"threshold": "0.7"}, TypeError, "threshold is a str; it must be a number in (0, 1)"),
    ({"threshold": True}, TypeError, "threshold is a bool; it must be a number in (0, 1)"),
    ({"threshold": 0}, ValueError, "threshold is 0.0; it must be a number in (0, 1)"),
    ({"threshold": 1.0}, ValueError, "threshold is 1.0; it must be a number in (0, 1)"),
    ({"threshold": float("nan")}, ValueError, "threshold is nan; it must be a number in (0, 1)"),
    ({"sharpness": "soft"}, TypeError, "sharpness is a str; it must be a number above 0 and finite, or None"),
    ({"sharpness": 0}, ValueError, "sharpness is 0.0; it must be a number above 0 and finite, or None"),
    (
        {"sharpness": float("inf")},
        ValueError,
        "sharpness is inf; it must be a number above 0 and finite, or None",
    ),
    (
        {"fill": "black"},
        TypeError,
        "fill is a str; it must be a number or 3 numbers, one for each channel of images",
    ),
    (
        {"fill": (1, 2)},
        ValueError,
        "fill has 2 numbers; it must be a number or 3 numbers, one for each channel of images",
    ),
    (
        {"fill": (1, 2, "3")},
        TypeError,
        "fill holds a str; it must be a number or 3 numbers, one for each channel of images",
    ),
    ({"mode": 1}, TypeError, "mode is a int; allowed are bilinear, nearest"),
    ({"mode": "bicubic"}, ValueError, "mode is 'bicubic'; allowed are bilinear, nearest"),
]


@pytest.mark.parametrize("changed, error, message", SHARED + CAM)
def test_fused_cam(changed, error, message):
    arguments = {"features": FEATURES, "weight": WEIGHT, "target": TARGET, **changed}
    with pytest.raises(error) as raised:
        fused_cam(**arguments)
    assert str(raised.value).startswith(f"fused_cam: {message}")


@pytest.mark.parametrize("changed, error, message", SHARED + ERASE)
def test_fused_cam_erase(changed, error, message):
    arguments = {"features": FEATURES, "weight": WEIGHT, "target": TARGET, "images": IMAGES, **changed}
    with pytest.raises(error) as raised:
        fused_cam_erase(**arguments)
    assert str(raised.value) == f"fused_cam_erase: {message}"


@pytest.mark.parametrize("value", [None, FEATURES.int(), FEATURES[0], FEATURES[..., :0]])
def test_focus_area(value):
    with pytest.raises((TypeError, ValueError), match=r"^focus_area: features "):
        focus_area(value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_index_out_of_range_names_it(backend):
    with (
        camkernels.use_backend(backend),
        pytest.raises(IndexError, match=r"^fused_cam_erase: target holds class 5; weight has 5 classes"),
    ):
        fused_cam_erase(FEATURES, WEIGHT, torch.tensor([0, 5]), IMAGES)
