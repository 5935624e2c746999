"""Bad input raises before any kernel starts, in words that name function, argument, what came, what goes."""

import pytest
import torch

import camkernels
from camkernels import (
    focus_area,
    fused_cam,
    fused_cam_erase,
    fused_cam_seeds,
    fused_cam_transform_mse,
    fused_negative_cam_loss,
    stochastic_consistency,
)
from camkernels.transforms import Affine, HorizontalFlip, Rotate90, Scale, Translate

FEATURES = torch.randn(2, 3, 4, 4)
WEIGHT = torch.randn(5, 3)
TARGET = torch.tensor([0, 4])
IMAGES = torch.randn(2, 3, 8, 8)
BIAS = torch.randn(5)

SEED_FEATURES = torch.randn(2, 6, 4, 4)
NOISE = torch.rand(2, 16)
VECTORS = torch.randn(2, 3, 6)

HOT = torch.zeros(2, 5, dtype=torch.bool)
LOGITS = torch.randn(2, 5)

FEATURES_T = torch.randn(2, 3, 4, 4)
WIDE = torch.randn(2, 3, 4, 6)

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
    (
        {"weight": WEIGHT[:, :2]},
        ValueError,
        "weight has 2 channels and features 3, being [2, 3, 4, 4]; they must be equal",
    ),
    (
        {"weight": torch.nn.Linear(3, 5)},
        TypeError,
        "weight is a Linear; it must be a tensor [L, C] or [L, C, 1, 1]: pass its .weight",
    ),
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
    ({"normalize": 1}, TypeError, "normalize is a int; it must be True or False"),
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


TRANSFORM = [
    ({"features_t": None}, TypeError, "features_t is a NoneType; it must be a tensor [N, C, H, W]"),
    (
        {"features_t": FEATURES_T.int()},
        TypeError,
        "features_t has dtype int32; allowed are float32, float16, bfloat16, float64",
    ),
    ({"features_t": FEATURES_T[0]}, ValueError, "features_t has shape [3, 4, 4]; it must be [N, C, H, W]"),
    (
        {"features_t": FEATURES_T[..., :0]},
        ValueError,
        "features_t has shape [2, 3, 4, 0]; C, H and W must be at least 1 (N may be 0)",
    ),
    (
        {"features_t": FEATURES_T.half()},
        TypeError,
        "features_t has dtype float16 and features float32; they must be equal",
    ),
    (
        {"features_t": FEATURES_T[:1]},
        ValueError,
        "features_t has 1 images and features 2; they must be equal",
    ),
    (
        {"features_t": FEATURES_T[:, :2]},
        ValueError,
        "features_t has 2 channels and features 3; they must be equal",
    ),
    (
        {"features_t": FEATURES_T.to("meta")},
        ValueError,
        "features_t is on meta and features on cpu; they must be on one device",
    ),
    (
        {"features_t": WIDE},
        ValueError,
        "features_t has maps of 4 x 6; HorizontalFlip makes 4 x 4 of the 4 x 4 of features",
    ),
    (
        {"features": WIDE, "features_t": WIDE, "transform": Rotate90(1)},
        ValueError,
        "features_t has maps of 4 x 6; Rotate90 makes 6 x 4 of the 4 x 6 of features",
    ),
    (
        {"features_t": WIDE, "transform": Affine([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])},
        ValueError,
        "features_t has maps of 4 x 6; Affine makes 4 x 4 of the 4 x 4 of features",
    ),
    (
        {"transform": Affine(torch.eye(2, 3).expand(3, 2, 3))},
        ValueError,
        "the matrix of transform has 3 images and features 2; they must be equal",
    ),
    (
        {"transform": Affine(torch.eye(2, 3, device="meta"))},
        ValueError,
        "the matrix of transform is on meta and features on cpu; they must be on one device",
    ),
    (
        {"transform": "flip"},
        TypeError,
        "transform is a str; it must be one of camkernels.transforms",
    ),
    ({"transform": torch.flip}, TypeError, "transform is a builtin_function_or_method; it must be one of"),
    ({"detach_weight": 1}, TypeError, "detach_weight is a int; it must be True or False"),
    ({"reduction": None}, TypeError, "reduction is a NoneType; allowed are none, mean, sum"),
    ({"reduction": "max"}, ValueError, "reduction is 'max'; allowed are none, mean, sum"),
]

TRANSFORMS = [
    (lambda: Rotate90(1.0), TypeError, "Rotate90: k is a float; it must be a whole number of turns"),
    (lambda: Rotate90(True), TypeError, "Rotate90: k is a bool; it must be a whole number of turns"),
    (lambda: Translate("0.1", 0), TypeError, "Translate: dx is a str; it must be a number in (-1, 1)"),
    (lambda: Translate(0, True), TypeError, "Translate: dy is a bool; it must be a number in (-1, 1)"),
    (lambda: Translate(0, 1.0), ValueError, "Translate: dy is 1.0; it must be a number in (-1, 1)"),
    (lambda: Translate(float("nan"), 0), ValueError, "Translate: dx is nan; it must be a number in (-1, 1)"),
    (
        lambda: Scale(192.0),
        TypeError,
        "Scale: size is 192.0; it must be a whole number of pixels, or (height, width)",
    ),
    (
        lambda: Scale((192, 3, 4)),
        TypeError,
        "Scale: size is (192, 3, 4); it must be a whole number of pixels, or (height, width)",
    ),
    (
        lambda: Scale((192, 0)),
        ValueError,
        "Scale: size is (192, 0); it must be a whole number of pixels, or (height, width), at least 1",
    ),
    (lambda: Scale(192, "bicubic"), ValueError, "Scale: mode is 'bicubic'; allowed are nearest, bilinear"),
    (lambda: Scale(192, 1), TypeError, "Scale: mode is a int; allowed are nearest, bilinear"),
    (
        lambda: Affine("eye"),
        TypeError,
        "Affine: matrix is a str; it must be a tensor [2, 3] or [N, 2, 3], or numbers in that form",
    ),
    (
        lambda: Affine(torch.eye(2, 3).int()),
        TypeError,
        "Affine: matrix has dtype int32; allowed are float64, float32, float16, bfloat16",
    ),
    (
        lambda: Affine(torch.eye(3)),
        ValueError,
        "Affine: matrix has shape [3, 3]; it must be [2, 3] or [N, 2, 3]",
    ),
    (
        lambda: Affine(torch.eye(2, 3, requires_grad=True)),
        ValueError,
        "Affine: matrix requires a gradient, and there is none; pass matrix.detach()",
    ),
    (
        lambda: HorizontalFlip()(IMAGES[0]),
        ValueError,
        "HorizontalFlip: images has shape [3, 8, 8]; it must be [N, D, H0, W0]",
    ),
    (
        lambda: Scale(8)(IMAGES.byte()),
        TypeError,
        "Scale: images has dtype uint8; it must be a float type",
    ),
    (
        lambda: Translate(0.1, 0)([1.0]),
        TypeError,
        "Translate: images is a list; it must be a tensor [N, D, H0, W0]",
    ),
    (
        lambda: Affine(torch.eye(2, 3).expand(3, 2, 3))(IMAGES),
        ValueError,
        "Affine: matrix has 3 images and images 2; they must be equal",
    ),
]


SEEDS = [
    ({"target": None}, TypeError, "target is a NoneType; it must be a tensor [N]"),
    ({"target": TARGET[:, None]}, ValueError, "target has shape [2, 1]; it must be [N]"),
    ({"num_seeds": 2.0}, TypeError, "num_seeds is a float; it must be an integer of at least 1"),
    ({"num_seeds": True}, TypeError, "num_seeds is a bool; it must be an integer of at least 1"),
    (
        {"num_seeds": torch.tensor(3)},
        TypeError,
        "num_seeds is a Tensor; it must be an integer of at least 1",
    ),
    ({"num_seeds": 0}, ValueError, "num_seeds is 0; it must be an integer of at least 1"),
    ({"num_seeds": -3}, ValueError, "num_seeds is -3; it must be an integer of at least 1"),
    (
        {"seed_features": [1.0]},
        TypeError,
        "seed_features is a list; it must be a tensor [N, D, H, W] or None",
    ),
    (
        {"seed_features": SEED_FEATURES.int()},
        TypeError,
        "seed_features has dtype int32; allowed are float32, float16, bfloat16, float64",
    ),
    (
        {"seed_features": SEED_FEATURES[0]},
        ValueError,
        "seed_features has shape [6, 4, 4]; it must be [N, D, H, W] or None",
    ),
    (
        {"seed_features": SEED_FEATURES[:, :0]},
        ValueError,
        "seed_features has shape [2, 0, 4, 4]; D must be at least 1 (N may be 0)",
    ),
    *(
        (
            {"seed_features": torch.randn(shape)},
            ValueError,
            f"seed_features has shape {shape} and features [2, 3, 4, 4]; it must be [2, D, 4, 4]",
        )
        for shape in ([1, 6, 4, 4], [2, 6, 5, 4], [2, 6, 4, 3])
    ),
    (
        {"seed_features": SEED_FEATURES.to("meta")},
        ValueError,
        "seed_features is on meta and features on cpu; they must be on one device",
    ),
    ({"threshold": "0.7"}, TypeError, "threshold is a str; it must be a number in (0, 1)"),
    ({"threshold": 0}, ValueError, "threshold is 0.0; it must be a number in (0, 1)"),
    ({"threshold": 1}, ValueError, "threshold is 1.0; it must be a number in (0, 1)"),
    ({"threshold": float("nan")}, ValueError, "threshold is nan; it must be a number in (0, 1)"),
    ({"sampling": None}, TypeError, "sampling is a NoneType; allowed are random, first"),
    ({"sampling": "last"}, ValueError, "sampling is 'last'; allowed are random, first"),
    ({"noise": 0.5}, TypeError, "noise is a float; it must be a tensor [N, H * W]"),
    ({"noise": NOISE.double()}, TypeError, "noise has dtype float64; allowed are float32"),
    ({"noise": NOISE.half()}, TypeError, "noise has dtype float16; allowed are float32"),
    (
        {"noise": NOISE.view(2, 4, 4)},
        ValueError,
        "noise has shape [2, 4, 4]; it must be [N, H * W]",
    ),
    ({"noise": NOISE[:1]}, ValueError, "noise has shape [1, 16]; it must be [N, H * W], here [2, 16]"),
    ({"noise": NOISE[:, :9]}, ValueError, "noise has shape [2, 9]; it must be [N, H * W], here [2, 16]"),
    (
        {"noise": NOISE.to("meta")},
        ValueError,
        "noise is on meta and features on cpu; they must be on one device",
    ),
    (
        {"noise": NOISE, "sampling": "first"},
        ValueError,
        "noise is given and sampling is 'first', which draws nothing; leave noise out or sample 'random'",
    ),
    (
        {"generator": torch.Generator(), "sampling": "first"},
        ValueError,
        "generator is given and sampling is 'first', which draws nothing; "
        "leave generator out or sample 'random'",
    ),
    (
        {"noise": NOISE, "generator": torch.Generator()},
        ValueError,
        "noise and generator are both given; the generator would draw nothing: leave one out",
    ),
    ({"generator": 7}, TypeError, "generator is a int; it must be a torch.Generator"),
]

CONSISTENCY = [
    ({"vectors": None}, TypeError, "vectors is a NoneType; it must be a tensor [N, K, D]"),
    (
        {"vectors": VECTORS.long()},
        TypeError,
        "vectors has dtype int64; allowed are float32, float16, bfloat16, float64",
    ),
    ({"vectors": VECTORS[0]}, ValueError, "vectors has shape [3, 6]; it must be [N, K, D]"),
    ({"vectors": VECTORS[None]}, ValueError, "vectors has shape [1, 2, 3, 6]; it must be [N, K, D]"),
    *(
        (
            {"vectors": vectors},
            ValueError,
            f"vectors has shape {list(vectors.shape)}; K and D must be at least 1 (N may be 0)",
        )
        for vectors in (VECTORS[:, :0], VECTORS[..., :0])
    ),
    ({"target": [0, 0]}, TypeError, "target is a list; it must be a tensor [N]"),
    ({"target": TARGET.float()}, TypeError, "target has dtype float32; allowed are int64, int32"),
    ({"target": TARGET[:, None]}, ValueError, "target has shape [2, 1]; it must be [N]"),
    ({"target": TARGET[:1]}, ValueError, "target has 1 images and vectors 2; they must be equal"),
    (
        {"target": TARGET.to("meta")},
        ValueError,
        "target is on meta and vectors on cpu; they must be on one device",
    ),
    ({"pairs": None}, TypeError, "pairs is a NoneType; allowed are all, adjacent"),
    ({"pairs": "some"}, ValueError, "pairs is 'some'; allowed are all, adjacent"),
    ({"squared": 1}, TypeError, "squared is a int; it must be True or False"),
]


PER_CLASS = "with features [2, 3, 4, 4] and weight [5, 3] it must be [2, 5]"
PER_IMAGE_OR_CLASS = PER_CLASS.replace("be [2", "be [2] or [2")
EITHER = "[N], int64 or int32, or [N, L], bool, integer or float"

NEGATIVES = [
    ({"target": None}, TypeError, f"target is a NoneType; it must be a tensor {EITHER}"),
    ({"target": [0, 4]}, TypeError, f"target is a list; it must be a tensor {EITHER}"),
    ({"target": TARGET.bool()}, TypeError, "target has dtype bool; allowed are int64, int32"),
    ({"target": TARGET[0]}, ValueError, f"target has shape []; it must be {EITHER}"),
    ({"target": HOT.long()[None]}, ValueError, f"target has shape [1, 2, 5]; it must be {EITHER}"),
    ({"target": TARGET[:, None]}, ValueError, f"target has shape [2, 1]; {PER_IMAGE_OR_CLASS}"),
    ({"target": torch.zeros(2, 6)}, ValueError, f"target has shape [2, 6]; {PER_IMAGE_OR_CLASS}"),
    ({"target": HOT[:1]}, ValueError, f"target has shape [1, 5]; {PER_IMAGE_OR_CLASS}"),
    ({"target": HOT.T}, ValueError, f"target has shape [5, 2]; {PER_IMAGE_OR_CLASS}"),
    (
        {"target": HOT.to(torch.complex64)},
        TypeError,
        "target has dtype complex64; [N, L] may be bool, integer or float",
    ),
    (
        {"target": HOT.to("meta")},
        ValueError,
        "target is on meta and features on cpu; they must be on one device",
    ),
    ({"bias": 1.0}, TypeError, "bias is a float; it must be a tensor [L]"),
    (
        {"bias": BIAS.int()},
        TypeError,
        "bias has dtype int32; allowed are float32, float16, bfloat16, float64",
    ),
    ({"bias": BIAS[:, None]}, ValueError, "bias has shape [5, 1]; it must be [L]"),
    ({"bias": BIAS[:4]}, ValueError, "bias has 4 classes and weight 5; they must be equal"),
    ({"bias": BIAS.to("meta")}, ValueError, "bias is on meta and weight on cpu; they must be on one device"),
    ({"logits": [0.0]}, TypeError, "logits is a list; it must be a tensor [N, L] or None"),
    (
        {"logits": LOGITS.int()},
        TypeError,
        "logits has dtype int32; allowed are float32, float16, bfloat16, float64",
    ),
    ({"logits": LOGITS[0]}, ValueError, "logits has shape [5]; it must be [N, L] or None"),
    ({"logits": LOGITS[:, 1:]}, ValueError, f"logits has shape [2, 4]; {PER_CLASS}"),
    ({"logits": LOGITS[:1]}, ValueError, f"logits has shape [1, 5]; {PER_CLASS}"),
    (
        {"logits": LOGITS.to("meta")},
        ValueError,
        "logits is on meta and features on cpu; they must be on one device",
    ),
    ({"num_negatives": 2.0}, TypeError, "num_negatives is a float; it must be an integer of at least 1"),
    ({"num_negatives": True}, TypeError, "num_negatives is a bool; it must be an integer of at least 1"),
    ({"num_negatives": None}, TypeError, "num_negatives is a NoneType; it must be an integer of at least 1"),
    (
        {"num_negatives": torch.tensor(3)},
        TypeError,
        "num_negatives is a Tensor; it must be an integer of at least 1",
    ),
    ({"num_negatives": 0}, ValueError, "num_negatives is 0; it must be an integer of at least 1"),
    ({"num_negatives": -1}, ValueError, "num_negatives is -1; it must be an integer of at least 1"),
    ({"kind": None}, TypeError, "kind is a NoneType; allowed are mse, uniform"),
    ({"kind": "kd"}, ValueError, "kind is 'kd'; allowed are mse, uniform"),
    ({"level": "0"}, TypeError, "level is a str; it must be a number that is finite"),
    ({"level": False}, TypeError, "level is a bool; it must be a number that is finite"),
    ({"level": None}, TypeError, "level is a NoneType; it must be a number that is finite"),
    ({"level": float("nan")}, ValueError, "level is nan; it must be a number that is finite"),
    ({"level": float("inf")}, ValueError, "level is inf; it must be a number that is finite"),
    ({"level": -float("inf")}, ValueError, "level is -inf; it must be a number that is finite"),
    ({"temperature": "1"}, TypeError, "temperature is a str; it must be a number above 0 and finite"),
    ({"temperature": True}, TypeError, "temperature is a bool; it must be a number above 0 and finite"),
    ({"temperature": 0}, ValueError, "temperature is 0.0; it must be a number above 0 and finite"),
    ({"temperature": -1}, ValueError, "temperature is -1.0; it must be a number above 0 and finite"),
    ({"temperature": float("nan")}, ValueError, "temperature is nan; it must be a number above 0 and finite"),
    ({"temperature": float("inf")}, ValueError, "temperature is inf; it must be a number above 0 and finite"),
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


@pytest.mark.parametrize("changed, error, message", SHARED + SEEDS)
def test_fused_cam_seeds(changed, error, message):
    arguments = {"features": FEATURES, "weight": WEIGHT, "target": TARGET, "num_seeds": 3, **changed}
    with pytest.raises(error) as raised:
        fused_cam_seeds(**arguments)
    assert str(raised.value) == f"fused_cam_seeds: {message}"


@pytest.mark.parametrize("changed, error, message", CONSISTENCY)
def test_stochastic_consistency(changed, error, message):
    with pytest.raises(error) as raised:
        stochastic_consistency(**{"vectors": VECTORS, "target": TARGET, **changed})
    assert str(raised.value) == f"stochastic_consistency: {message}"


@pytest.mark.parametrize(
    "changed, error, message",
    [row for row in SHARED if not {"target", "eps"} & set(row[0])] + TRANSFORM,
)
def test_fused_cam_transform_mse(changed, error, message):
    arguments = {
        "features": FEATURES,
        "features_t": FEATURES_T,
        "weight": WEIGHT,
        "transform": HorizontalFlip(),
        **changed,
    }
    with pytest.raises(error) as raised:
        fused_cam_transform_mse(**arguments)
    assert str(raised.value).startswith(f"fused_cam_transform_mse: {message}")


@pytest.mark.parametrize("kind", ["mse", "uniform"])
@pytest.mark.parametrize(
    "changed, error, message",
    [row for row in SHARED if not ("eps" in row[0] or isinstance(row[0].get("target"), list))] + NEGATIVES,
)
def test_fused_negative_cam_loss(kind, changed, error, message):
    """Options of the other kind are looked at as well."""
    arguments = {"features": FEATURES, "weight": WEIGHT, "target": TARGET, "kind": kind, **changed}
    with pytest.raises(error) as raised:
        fused_negative_cam_loss(**arguments)
    assert str(raised.value) == f"fused_negative_cam_loss: {message}"


@pytest.mark.parametrize("make, error, message", TRANSFORMS)
def test_transforms(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


@pytest.mark.parametrize("changed, error, message", [row for row in SHARED if "features" in row[0]])
def test_focus_area(changed, error, message):
    with pytest.raises(error) as raised:
        focus_area(**changed)
    assert str(raised.value) == f"focus_area: {message}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("target", [-1, 5])
@pytest.mark.parametrize(
    "function, others",
    [(fused_cam_erase, (IMAGES,)), (fused_cam_seeds, (3,)), (fused_negative_cam_loss, ())],
)
def test_index_out_of_range_names_it(backend, target, function, others):
    message = rf"^{function.__name__}: target holds class {target}; weight has 5 classes"
    with camkernels.use_backend(backend), pytest.raises(IndexError, match=message):
        function(FEATURES, WEIGHT, torch.tensor([0, target]), *others)
