"""Argument checks: every message names the function, the argument, what came and what is allowed.

A message that tells sizes is made only where it is raised: torch.compile fixes a size that a text is made of.
"""

from collections.abc import Sequence
from math import inf
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from camkernels._pass import accumulate_dtype, is_its_bytes, is_watched

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDICES = (torch.int64, torch.int32)

# The fields of results that are meant where an argument is given the whole.
HELD = {"maps": ("attention",), "attention": ("attention", "mask")}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor outlives the call: no wrapper of ``torch.func``, nothing of a subclass, as the fake
    tensors of a trace are."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and not torch._C._are_functorch_transforms_active()


def values_are_readable(tensor: Tensor) -> bool:
    """Whether Python may look at the numbers: on the CPU, where it need not wait, and not in a trace."""
    return (
        not torch.compiler.is_compiling()  # first: Dynamo need not trace the rest
        and tensor.device.type == "cpu"
        and is_plain(tensor)
        and is_its_bytes(tensor)
        and not is_watched()  # as by make_fx, which makes numbers constants
    )


def wrong_type(function: str, argument: str, value: object, allowed: str) -> TypeError:
    return TypeError(f"{function}: {argument} is a {type(value).__name__}; {allowed}")


def wrong_shape(function: str, argument: str, value: Tensor, allowed: str) -> ValueError:
    return ValueError(f"{function}: {argument} has shape {list(value.shape)}; {allowed}")


def wrong_layout(function: str, argument: str, value: Tensor) -> TypeError:
    layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").lstrip("_")
    return TypeError(
        f"{function}: {argument} is {layout}; it must be a dense tensor, as .to_dense() makes it"
    )


def tensor(
    function: str,
    argument: str,
    value: object,
    shape: str,
    dims: Sequence[int],
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> Tensor:
    """A dense tensor of one of the ``dtypes``, whose number of dimensions is one of ``dims``."""
    if not isinstance(value, Tensor):
        # A layer in place of its weight, the result of fused_cam_seeds in place of its vectors.
        names = HELD.get(argument, (argument, "vectors"))
        held = next((name for name in names if isinstance(getattr(value, name, 0), Tensor)), None)
        hint = "" if held is None else f": pass its .{held}"
        raise wrong_type(function, argument, value, f"it must be a tensor {shape}{hint}")
    if value.layout is not torch.strided or value.is_nested:
        raise wrong_layout(function, argument, value)
    if value.dtype not in dtypes:
        allowed = ", ".join(map(dtype_name, dtypes))
        raise TypeError(f"{function}: {argument} has dtype {dtype_name(value.dtype)}; allowed are {allowed}")
    if value.dim() not in dims:
        raise wrong_shape(function, argument, value, f"it must be {shape}")
    return value


def not_empty(function: str, argument: str, value: Tensor, sizes: str) -> Tensor:
    """All but the number of images must be at least 1."""
    if 0 in value.shape[1:]:
        raise wrong_shape(function, argument, value, f"{sizes} must be at least 1 (N may be 0)")
    return value


def same_device(
    function: str, argument: str, value: Tensor, other: Tensor, other_argument: str = "features"
) -> Tensor:
    if value.device != other.device:
        raise ValueError(
            f"{function}: {argument} is on {value.device} and {other_argument} on {other.device}; "
            "they must be on one device"
        )
    return value


def same_images(function: str, argument: str, value: Tensor, other: Tensor, other_argument: str) -> Tensor:
    if value.shape[0] != other.shape[0]:
        raise ValueError(
            f"{function}: {argument} has {value.shape[0]} images and {other_argument} {other.shape[0]}; "
            "they must be equal"
        )
    return same_device(function, argument, value, other, other_argument)


def same_channels(function: str, value: Tensor, features: Tensor) -> Tensor:
    """Of a weight, in its last dimension."""
    if value.shape[-1] != features.shape[1]:
        raise ValueError(
            f"{function}: weight has {value.shape[-1]} channels and features {features.shape[1]}, being "
            f"{list(features.shape)}; they must be equal"
        )
    return same_device(function, "weight", value, features)


def features(function: str, value: object, argument: str = "features") -> Tensor:
    value = tensor(function, argument, value, "[N, C, H, W]", (4,))
    return not_empty(function, argument, value, "C, H and W")


def weight(function: str, value: object, features: Tensor) -> Tensor:
    """As [L, C]."""
    allowed = "[L, C] or [L, C, 1, 1]"
    value = tensor(function, "weight", value, allowed, (2, 4))
    if value.dim() == 4:
        if value.shape[2:] != (1, 1):
            raise wrong_shape(function, "weight", value, f"it must be {allowed}")
        value = value.flatten(1)
    if value.shape[0] == 0:
        raise wrong_shape(function, "weight", value, "L must be at least 1")
    return same_channels(function, value, features)


def local_weight(function: str, value: object, features: Tensor) -> Tensor:
    """Of n linear classifiers that share their classes, the last of which is the background."""
    if isinstance(value, Tensor) and value.dim() in (2, 4):
        allowed = (
            "it must be [n, L + 1, C]: of a linear layer or a 1 x 1 convolution pass weight.view(n, L + 1, C)"
        )
        raise wrong_shape(function, "weight", value, allowed)
    value = tensor(function, "weight", value, "[n, L + 1, C]", (3,))
    if value.shape[1] < 2 or not 1 <= value.shape[0] <= 256:
        allowed = (
            "[n, L + 1, C] must have 1 to 256 classifiers and at least 2 classes, the last being the "
            "background"
        )
        raise wrong_shape(function, "weight", value, allowed)
    return same_channels(function, value, features)


def bias(function: str, value: object, weight: Tensor) -> Tensor | None:
    if value is None:
        return None
    value = tensor(function, "bias", value, "[L]", (1,))
    if value.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{function}: bias has {value.shape[0]} classes and weight {weight.shape[0]}; they must be equal"
        )
    return same_device(function, "bias", value, weight, "weight")


def local_bias(function: str, value: object, weight: Tensor) -> Tensor | None:
    if value is None:
        return None
    value = tensor(function, "bias", value, "[n, L + 1]", (1, 2))
    if value.shape != weight.shape[:2]:
        raise ValueError(
            f"{function}: bias has shape {list(value.shape)} and weight {list(weight.shape)}; it must be "
            f"{list(weight.shape[:2])}" + (": pass bias.view(n, L + 1)" if value.dim() == 1 else "")
        )
    return same_device(function, "bias", value, weight, "weight")


def mask(function: str, value: object, like: Tensor | None = None, argument: str = "features") -> Tensor:
    """Bool [N, H, W], of the images and pixels of ``like``, the [N, ..., H, W] that is named ``argument``."""
    value = tensor(function, "mask", value, "[N, H, W] of bool", (3,), (torch.bool,))
    if like is None:
        return not_empty(function, "mask", value, "H and W")
    images, height, width = value.shape
    shape = like.shape
    if width != shape[-1] or height != shape[-2] or images != shape[0]:
        not_empty(function, "mask", value, "H and W")
        raise ValueError(
            f"{function}: mask has shape {list(value.shape)} and {argument} {list(like.shape)}; it must be "
            f"{[like.shape[0], *like.shape[-2:]]}"
        )
    return same_device(function, "mask", value, like, argument)


def maps(function: str, value: object) -> Tensor:
    dims = max(value.dim(), 2) if isinstance(value, Tensor) else 2
    value = tensor(function, "maps", value, "[..., H, W]", (dims,))
    if 0 in value.shape[-2:]:
        raise wrong_shape(function, "maps", value, "H and W must be at least 1")
    return value


def local_activations(function: str, value: object) -> Tensor:
    value = tensor(function, "activations", value, "[N, L + 1, H, W]", (4,))
    if value.shape[1] < 2 or 0 in value.shape[2:]:
        allowed = (
            "[N, L + 1, H, W] must have at least 2 classes, the last being the background, and at least 1 "
            "pixel (N may be 0)"
        )
        raise wrong_shape(function, "activations", value, allowed)
    return value


def pictures(function: str, value: object) -> Tensor:
    value = tensor(function, "images", value, "[N, D, H0, W0]", (4,))
    return not_empty(function, "images", value, "D, H0 and W0")


def images(function: str, value: object, features: Tensor) -> Tensor:
    return same_images(function, "images", pictures(function, value), features, "features")


def seed_features(function: str, value: object, features: Tensor) -> Tensor:
    value = tensor(function, "seed_features", value, "[N, D, H, W] or None", (4,))
    images, _, height, width = features.shape
    if value.shape[2:] != features.shape[2:] or value.shape[0] != images:
        raise ValueError(
            f"{function}: seed_features has shape {list(value.shape)} and features {list(features.shape)}; "
            f"it must be [{images}, D, {height}, {width}]"
        )
    not_empty(function, "seed_features", value, "D")
    return same_device(function, "seed_features", value, features)


def noise(function: str, value: object, features: Tensor) -> Tensor:
    value = tensor(function, "noise", value, "[N, H * W]", (2,), (torch.float32,))
    images, _, height, width = features.shape
    if value.shape[1] != height * width or value.shape[0] != images:
        raise wrong_shape(
            function, "noise", value, f"it must be [N, H * W], here [{images}, {height * width}]"
        )
    return same_device(function, "noise", value, features)


def vectors(function: str, value: object) -> Tensor:
    return not_empty(function, "vectors", tensor(function, "vectors", value, "[N, K, D]", (3,)), "K and D")


def boxes(function: str, value: object, images: Tensor) -> Tensor:
    """In the type that ``images`` are resampled in, without gradient."""
    value = tensor(function, "boxes", value, "[N, 4]", (2,))
    if value.shape[1] != 4 or value.shape[0] != images.shape[0]:
        raise ValueError(
            f"{function}: boxes has shape {list(value.shape)} and images {list(images.shape)}; it must be "
            f"[{images.shape[0]}, 4]"
        )
    same_device(function, "boxes", value, images, "images")
    # As kernels see them: rounded, a thin box may be none.
    value = value.detach().to(accumulate_dtype(images.dtype))
    for index, box in enumerate(value.tolist() if values_are_readable(value) else ()):
        x0, y0, x1, y1 = box
        if not (-inf < x0 < x1 < inf and -inf < y0 < y1 < inf):  # a NaN fails as well
            raise ValueError(
                f"{function}: boxes holds {box} for image {index}; it must be finite (x0, y0, x1, y1) with "
                "x0 < x1 and y0 < y1"
            )
        if x0 >= 1 or y0 >= 1 or x1 <= 0 or y1 <= 0 or max(x1 - x0, y1 - y0) > LARGEST_BOX:
            raise ValueError(
                f"{function}: boxes holds {box} for image {index}, which lies outside the image or is over "
                f"{LARGEST_BOX} times its size; boxes are fractions of the sides: divide pixels by these"
            )
    return value


# In fractions of the image. A box in pixels, such as [0, 0, 112, 112], is larger.
LARGEST_BOX = 4


def target(
    function: str,
    value: object,
    features: Tensor,
    shape: str,
    dims: Sequence[int],
    argument: str = "features",
) -> Tensor:
    """``argument`` names the tensor that ``target`` holds the classes of."""
    value = tensor(function, "target", value, shape, dims, INDICES)
    if value.dim() == 2 and value.shape[1] == 0:
        raise wrong_shape(function, "target", value, "K must be at least 1")
    return same_images(function, "target", value, features, argument)


def classes_or_multi_hot(function: str, value: object, features: Tensor, weight: Tensor) -> Tensor:
    """The class of each image, or for each class whether an image shows it."""
    shape = "[N], int64 or int32, or [N, L], bool, integer or float"
    if not isinstance(value, Tensor) or value.is_nested or value.dim() != 2:
        return target(function, value, features, shape, (1,))
    if value.dtype.is_complex:
        raise TypeError(
            f"{function}: target has dtype {dtype_name(value.dtype)}; [N, L] may be bool, integer or float"
        )
    if value.layout is not torch.strided:
        raise wrong_layout(function, "target", value)
    return per_class(function, "target", value, features, weight)


def class_scores(
    function: str, argument: str, value: object, features: Tensor, weight: Tensor
) -> Tensor | None:
    if value is None:
        return None
    value = tensor(function, argument, value, "[N, L] or None", (2,))
    return per_class(function, argument, value, features, weight)


def per_class(function: str, argument: str, value: Tensor, features: Tensor, weight: Tensor) -> Tensor:
    images, classes = features.shape[0], weight.shape[0]
    if value.shape[1] != classes or value.shape[0] != images:
        otherwise = f"[{images}] or " if argument == "target" else ""
        raise ValueError(
            f"{function}: {argument} has shape {list(value.shape)}; with features {list(features.shape)} and "
            f"weight {list(weight.shape)} it must be {otherwise}[{images}, {classes}]"
        )
    return same_device(function, argument, value, features)


def classes_in_range(
    function: str,
    target: Tensor | None,
    classes: int,
    source: str = "weight has {} classes",
    ignore_index: int | None = None,
) -> None:
    """Where values are readable; kernels check by themselves, this is for the reference and for modules.
    ``source`` says where the number of classes is from."""
    if target is None or not values_are_readable(target):
        return
    for index in target.flatten().tolist():
        if not 0 <= index < classes and index != ignore_index:
            ignored = "" if ignore_index is None else f" or the ignore_index {ignore_index}"
            raise IndexError(
                f"{function}: target holds class {index}; {source.format(classes)}, "
                f"so it must be in [0, {classes}){ignored}"
            )


def generator(function: str, value: object, features: Tensor) -> torch.Generator:
    if not isinstance(value, torch.Generator):
        raise wrong_type(function, "generator", value, "it must be a torch.Generator")
    if value.device.type != features.device.type:
        raise ValueError(
            f"{function}: generator is on {value.device} and features on {features.device}; "
            "they must be on devices of one type"
        )
    return value


def integer(function: str, argument: str, value: object, low: int, high: int | None, allowed: str) -> int:
    """A symbolic one stays symbolic: torch.compile does not fix it."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise wrong_type(function, argument, value, f"it must be {allowed}")
    number: Any = value
    if number < low or (high is not None and number > high):
        raise ValueError(f"{function}: {argument} is {value}; it must be {allowed}")
    return value if isinstance(value, torch.SymInt) else int(value)  # type: ignore[return-value]


def positive_int(function: str, argument: str, value: object) -> int:
    return integer(function, argument, value, 1, None, "an integer of at least 1")


def bins(function: str, value: object) -> int:
    return integer(function, "bins", value, 2, 4096, "an integer from 2 to 4096")


def class_index(function: str, argument: str, value: object) -> int:
    """Of a class that need not exist."""
    return integer(function, argument, value, -(2**63), 2**63 - 1, "an integer that fits into 64 bits")


def size(function: str, value: object) -> tuple[int, int]:
    """Height and width; one number for both."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{function}: size is {value!r}; it must be (height, width) or one integer for both")
    return positive_int(function, "size", value[0]), positive_int(function, "size", value[1])


def flag(function: str, argument: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(function, argument, value, "it must be True or False")
    return value


def is_number(value: object) -> bool:
    return isinstance(value, (Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def as_float(value: Any) -> float:
    """A symbolic number stays one: torch.compile does not fix it."""
    return value if isinstance(value, torch.SymFloat) else float(value)  # type: ignore[return-value]


def number(function: str, argument: str, value: object, allowed: str) -> float:
    if not is_number(value):
        raise wrong_type(function, argument, value, f"it must be a number {allowed}")
    return as_float(value)


def in_open_interval(
    function: str, argument: str, value: object, low: float, high: float, allowed: str
) -> float:
    result = number(function, argument, value, allowed)
    if not low < result < high:  # a NaN fails as well
        raise ValueError(f"{function}: {argument} is {result}; it must be a number {allowed}")
    return result


def finite(function: str, argument: str, value: object) -> float:
    return in_open_interval(function, argument, value, -inf, inf, "that is finite")


def eps(function: str, value: object) -> float:
    result = number(function, "eps", value, "of at least 0")
    if not 0 <= result < inf:
        raise ValueError(f"{function}: eps is {result}; it must be a finite number of at least 0")
    return result


def fill(function: str, value: object, channels: int) -> list[float]:
    """One number for every channel, or one for each."""
    if is_number(value):
        return [as_float(value)]
    wrong = None
    if not isinstance(value, Sequence) or isinstance(value, str):
        wrong = f"is a {type(value).__name__}"
    elif not all(is_number(item) for item in value):
        other = next(item for item in value if not is_number(item))
        wrong = f"holds a {type(other).__name__}"
    elif len(value) == channels:
        return [as_float(item) for item in value]
    error = ValueError if wrong is None else TypeError
    count = len(value) if isinstance(value, Sequence) else 0
    raise error(
        f"{function}: fill {wrong or f'has {count} numbers'}; it must be a number or {channels} "
        "numbers, one for each channel of images"
    )


def choice(function: str, argument: str, value: object, allowed: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise wrong_type(function, argument, value, f"allowed are {', '.join(allowed)}")
    if value not in allowed:
        raise ValueError(f"{function}: {argument} is {value!r}; allowed are {', '.join(allowed)}")
    return value
