"""Argument checks: every message names the function, the argument, what came and what is allowed."""

from collections.abc import Sequence
from math import inf
from numbers import Integral, Real

import torch
from torch import Tensor

from camkernels.reference.cam import accumulate_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
        and torch._C._len_torch_dispatch_stack() == 0  # as under make_fx, which makes numbers constants
    )


def tensor(function: str, argument: str, value: object, shape: str, dims: Sequence[int]) -> Tensor:
    """A float tensor whose number of dimensions is one of ``dims``."""
    if not isinstance(value, Tensor):
        # A layer in place of its weight, the result of fused_cam_seeds in place of its vectors.
        names = HELD.get(argument, (argument, "vectors"))
        held = next((name for name in names if isinstance(getattr(value, name, 0), Tensor)), None)
        hint = "" if held is None else f": pass its .{held}"
        raise TypeError(
            f"{function}: {argument} is a {type(value).__name__}; it must be a tensor {shape}{hint}"
        )
    if value.dtype not in FLOATS:
        allowed = ", ".join(map(dtype_name, FLOATS))
        raise TypeError(f"{function}: {argument} has dtype {dtype_name(value.dtype)}; allowed are {allowed}")
    if value.dim() not in dims:
        raise ValueError(f"{function}: {argument} has shape {list(value.shape)}; it must be {shape}")
    return value


def features(function: str, value: object, argument: str = "features") -> Tensor:
    value = tensor(function, argument, value, "[N, C, H, W]", (4,))
    if 0 in value.shape[1:]:
        raise ValueError(
            f"{function}: {argument} has shape {list(value.shape)}; "
            "C, H and W must be at least 1 (N may be 0)"
        )
    return value


def weight(function: str, value: object, features: Tensor) -> Tensor:
    value = tensor(function, "weight", value, "[L, C] or [L, C, 1, 1]", (2, 4))
    if value.dim() == 4 and value.shape[2:] != (1, 1):
        raise ValueError(
            f"{function}: weight has shape {list(value.shape)}; it must be [L, C] or [L, C, 1, 1]"
        )
    if value.shape[0] == 0:
        raise ValueError(f"{function}: weight has shape {list(value.shape)}; L must be at least 1")
    if value.shape[1] != features.shape[1]:
        raise ValueError(
            f"{function}: weight has {value.shape[1]} channels and features {features.shape[1]}, being "
            f"{list(features.shape)}; they must be equal"
        )
    return same_device(function, "weight", value, features)


def local_weight(function: str, value: object, features: Tensor) -> Tensor:
    """Of n linear classifiers that share their classes, the last of which is the background."""
    if isinstance(value, Tensor) and value.dim() in (2, 4):
        raise ValueError(
            f"{function}: weight has shape {list(value.shape)}; it must be [n, L + 1, C]: of a linear layer "
            "or a 1 x 1 convolution pass weight.view(n, L + 1, C)"
        )
    value = tensor(function, "weight", value, "[n, L + 1, C]", (3,))
    if value.shape[1] < 2 or not 1 <= value.shape[0] <= 256:
        raise ValueError(
            f"{function}: weight has shape {list(value.shape)}; [n, L + 1, C] must have 1 to 256 classifiers "
            "and at least 2 classes, the last being the background"
        )
    if value.shape[2] != features.shape[1]:
        raise ValueError(
            f"{function}: weight has {value.shape[2]} channels and features {features.shape[1]}, being "
            f"{list(features.shape)}; they must be equal"
        )
    return same_device(function, "weight", value, features)


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
    if not isinstance(value, Tensor):
        held = isinstance(getattr(value, "mask", None), Tensor)
        raise TypeError(
            f"{function}: mask is a {type(value).__name__}; it must be a bool tensor [N, H, W]"
            + (": pass its .mask" if held else "")
        )
    if value.dtype != torch.bool:
        raise TypeError(
            f"{function}: mask has dtype {dtype_name(value.dtype)}; it must be bool, as otsu_mask "
            "makes it of an attention map"
        )
    if value.dim() != 3 or 0 in value.shape[1:]:
        raise ValueError(
            f"{function}: mask has shape {list(value.shape)}; it must be [N, H, W], H and W at least 1"
        )
    if like is None:
        return value
    if value.shape != (like.shape[0], *like.shape[-2:]):
        raise ValueError(
            f"{function}: mask has shape {list(value.shape)} and {argument} {list(like.shape)}; it must be "
            f"{[like.shape[0], *like.shape[-2:]]}"
        )
    return same_device(function, "mask", value, like, argument)


def boxes(function: str, value: object, images: Tensor) -> Tensor:
    """In the type that ``images`` are resampled in, without gradient."""
    value = tensor(function, "boxes", value, "[N, 4]", (2,))
    if value.shape != (images.shape[0], 4):
        raise ValueError(
            f"{function}: boxes has shape {list(value.shape)} and images {list(images.shape)}; it must be "
            f"[{images.shape[0]}, 4]"
        )
    same_device(function, "boxes", value, images, "images")
    # As kernels see them: rounded, a thin box may be none.
    value = value.detach().to(accumulate_dtype(images.dtype))
    if values_are_readable(value):
        x0, y0, x1, y1 = value.unbind(1)
        for index in (~(value.isfinite().all(1) & (x0 < x1) & (y0 < y1))).nonzero()[:1].flatten().tolist():
            raise ValueError(
                f"{function}: boxes holds {value[index].tolist()} for image {index}; it must be finite "
                "(x0, y0, x1, y1) with x0 < x1 and y0 < y1"
            )
        outside = (x0 >= 1) | (y0 >= 1) | (x1 <= 0) | (y1 <= 0)
        for index in outside.nonzero()[:1].flatten().tolist():
            raise ValueError(
                f"{function}: boxes holds {value[index].tolist()} for image {index}, which lies outside the "
                "image; boxes are fractions of width and height: divide pixels by them"
            )
    return value


def bins(function: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{function}: bins is a {type(value).__name__}; it must be an integer from 2 to 4096")
    result = int(value)
    if not 2 <= result <= 4096:
        raise ValueError(f"{function}: bins is {result}; it must be an integer from 2 to 4096")
    return result


def size(function: str, value: object) -> tuple[int, int]:
    """Height and width; one number for both."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 2:
            return positive_int(function, "size", value[0]), positive_int(function, "size", value[1])
        raise ValueError(f"{function}: size is {value!r}; it must be (height, width) or one integer for both")
    both = positive_int(function, "size", value)
    return both, both


def bias(function: str, value: object, weight: Tensor) -> Tensor | None:
    if value is None:
        return None
    value = tensor(function, "bias", value, "[L]", (1,))
    if value.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{function}: bias has {value.shape[0]} classes and weight {weight.shape[0]}; they must be equal"
        )
    return same_device(function, "bias", value, weight, "weight")


def target(
    function: str,
    value: object,
    features: Tensor,
    shape: str,
    dims: Sequence[int],
    argument: str = "features",
) -> Tensor:
    """``argument`` names the tensor that ``target`` holds the classes of."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: target is a {type(value).__name__}; it must be a tensor {shape}")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{function}: target has dtype {dtype_name(value.dtype)}; allowed are int64, int32")
    if value.dim() not in dims:
        raise ValueError(f"{function}: target has shape {list(value.shape)}; it must be {shape}")
    if value.shape[0] != features.shape[0]:
        raise ValueError(
            f"{function}: target has {value.shape[0]} images and {argument} {features.shape[0]}; "
            "they must be equal"
        )
    if value.dim() == 2 and value.shape[1] == 0:
        raise ValueError(f"{function}: target has shape {list(value.shape)}; K must be at least 1")
    return same_device(function, "target", value, features, argument)


def classes_or_multi_hot(function: str, value: object, features: Tensor, weight: Tensor) -> Tensor:
    """The class of each image, or for each class whether an image shows it."""
    shape = "[N], int64 or int32, or [N, L], bool, integer or float"
    if not isinstance(value, Tensor) or value.dim() != 2:
        return target(function, value, features, shape, (1,))
    if value.dtype.is_complex:
        raise TypeError(
            f"{function}: target has dtype {dtype_name(value.dtype)}; [N, L] may be bool, integer or float"
        )
    return per_class(function, "target", value, features, weight, f"[{features.shape[0]}] or ")


def class_scores(
    function: str, argument: str, value: object, features: Tensor, weight: Tensor
) -> Tensor | None:
    if value is None:
        return None
    return per_class(
        function,
        argument,
        tensor(function, argument, value, "[N, L] or None", (2,)),
        features,
        weight,
    )


def per_class(
    function: str, argument: str, value: Tensor, features: Tensor, weight: Tensor, otherwise: str = ""
) -> Tensor:
    images, classes = features.shape[0], weight.shape[0]
    if value.shape != (images, classes):
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
    if target is None or target.numel() == 0 or not values_are_readable(target):
        return
    low, high = (int(index) for index in target.aminmax())
    if low >= 0 and high < classes:
        return
    for index in target.flatten().tolist():
        if not 0 <= index < classes and index != ignore_index:
            ignored = "" if ignore_index is None else f" or the ignore_index {ignore_index}"
            raise IndexError(
                f"{function}: target holds class {index}; {source.format(classes)}, "
                f"so it must be in [0, {classes}){ignored}"
            )


def maps(function: str, value: object) -> Tensor:
    dims = max(value.dim(), 2) if isinstance(value, Tensor) else 2
    value = tensor(function, "maps", value, "[..., H, W]", (dims,))
    if 0 in value.shape[-2:]:
        raise ValueError(f"{function}: maps has shape {list(value.shape)}; H and W must be at least 1")
    return value


def local_activations(function: str, value: object) -> Tensor:
    value = tensor(function, "activations", value, "[N, L + 1, H, W]", (4,))
    if value.shape[1] < 2 or 0 in value.shape[2:]:
        raise ValueError(
            f"{function}: activations has shape {list(value.shape)}; [N, L + 1, H, W] must have at least 2 "
            "classes, the last being the background, and at least 1 pixel (N may be 0)"
        )
    return value


def pictures(function: str, value: object) -> Tensor:
    value = tensor(function, "images", value, "[N, D, H0, W0]", (4,))
    if 0 in value.shape[1:]:
        raise ValueError(
            f"{function}: images has shape {list(value.shape)}; D, H0 and W0 must be at least 1 (N may be 0)"
        )
    return value


def images(function: str, value: object, features: Tensor) -> Tensor:
    value = pictures(function, value)
    if value.shape[0] != features.shape[0]:
        raise ValueError(
            f"{function}: images has {value.shape[0]} images and features {features.shape[0]}; "
            "they must be equal"
        )
    return same_device(function, "images", value, features)


def seed_features(function: str, value: object, features: Tensor) -> Tensor:
    value = tensor(function, "seed_features", value, "[N, D, H, W] or None", (4,))
    if value.shape[1] == 0:
        raise ValueError(f"{function}: seed_features has shape {list(value.shape)}; D must be at least 1")
    images, _, height, width = features.shape
    if (value.shape[0], *value.shape[2:]) != (images, height, width):
        raise ValueError(
            f"{function}: seed_features has shape {list(value.shape)} and features {list(features.shape)}; "
            f"it must be [{images}, D, {height}, {width}]"
        )
    return same_device(function, "seed_features", value, features)


def noise(function: str, value: object, features: Tensor) -> Tensor:
    images, _, height, width = features.shape
    allowed = f"[N, H * W], here [{images}, {height * width}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: noise is a {type(value).__name__}; it must be a tensor {allowed}")
    if value.dtype != torch.float32:
        raise TypeError(f"{function}: noise has dtype {dtype_name(value.dtype)}; it must be float32")
    if value.shape != (images, height * width):
        raise ValueError(f"{function}: noise has shape {list(value.shape)}; it must be {allowed}")
    return same_device(function, "noise", value, features)


def generator(function: str, value: object, features: Tensor) -> torch.Generator:
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{function}: generator is a {type(value).__name__}; it must be a torch.Generator")
    if value.device.type != features.device.type:
        raise ValueError(
            f"{function}: generator is on {value.device} and features on {features.device}; "
            "they must be on devices of one type"
        )
    return value


def vectors(function: str, value: object) -> Tensor:
    value = tensor(function, "vectors", value, "[N, K, D]", (3,))
    if 0 in value.shape[1:]:
        raise ValueError(
            f"{function}: vectors has shape {list(value.shape)}; K and D must be at least 1 (N may be 0)"
        )
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


def number(function: str, argument: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{function}: {argument} is a {type(value).__name__}; it must be a number {allowed}")
    return float(value)


def positive_int(function: str, argument: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(
            f"{function}: {argument} is a {type(value).__name__}; it must be an integer of at least 1"
        )
    if value < 1:
        raise ValueError(f"{function}: {argument} is {value}; it must be an integer of at least 1")
    # A SymInt stays one, for torch.compile with dynamic shapes.
    return value if isinstance(value, torch.SymInt) else int(value)  # type: ignore[return-value]


def class_index(function: str, argument: str, value: object) -> int:
    """Of a class that need not exist."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{function}: {argument} is a {type(value).__name__}; it must be an integer")
    result = int(value)
    if not -(2**63) <= result < 2**63:
        raise ValueError(f"{function}: {argument} is {result}; it must fit into 64 bits")
    return result


def flag(function: str, argument: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {argument} is a {type(value).__name__}; it must be True or False")
    return value


def finite(function: str, argument: str, value: object) -> float:
    result = number(function, argument, value, "that is finite")
    if not -inf < result < inf:  # a NaN fails as well
        raise ValueError(f"{function}: {argument} is {result}; it must be a number that is finite")
    return result


def in_open_interval(
    function: str, argument: str, value: object, low: float, high: float, allowed: str
) -> float:
    result = number(function, argument, value, allowed)
    if not low < result < high:  # a NaN fails as well
        raise ValueError(f"{function}: {argument} is {result}; it must be a number {allowed}")
    return result


def eps(function: str, value: object) -> float:
    result = number(function, "eps", value, "of at least 0")
    if not 0 <= result < inf:
        raise ValueError(f"{function}: eps is {result}; it must be a finite number of at least 0")
    return result


def fill(function: str, value: object, channels: int) -> list[float]:
    """One number for every channel, or one for each."""
    allowed = f"a number or {channels} numbers, one for each channel of images"
    if not isinstance(value, bool) and isinstance(value, Real):
        return [float(value)]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{function}: fill is a {type(value).__name__}; it must be {allowed}")
    if len(value) != channels:
        raise ValueError(f"{function}: fill has {len(value)} numbers; it must be {allowed}")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, Real):
            raise TypeError(f"{function}: fill holds a {type(item).__name__}; it must be {allowed}")
    return [float(item) for item in value]


def choice(function: str, argument: str, value: object, allowed: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(
            f"{function}: {argument} is a {type(value).__name__}; allowed are {', '.join(allowed)}"
        )
    if value not in allowed:
        raise ValueError(f"{function}: {argument} is {value!r}; allowed are {', '.join(allowed)}")
    return value
