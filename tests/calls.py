"""One table of calls of every public function, for what must hold of each; and a look inside a call.

for call in CALLS:
    inputs = call.inputs(case)  # tensors by name; those in ``call.leaves`` require a gradient
    outputs = call.outputs(case, inputs)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from cases import KERNEL_BACKENDS, Case
from torch import Tensor

import camkernels
from camkernels import _op, _pass
from camkernels.transforms import Affine, HorizontalFlip, Rotate90, Scale, Translate

Make = Callable[[Case], Any]


def drawn(case: Case, *shape: int) -> Tensor:
    return torch.randn(shape, generator=case.generator()).to(case.device)


def present(case: Case) -> Tensor:
    """Which classes an image shows: the first image all, so that it has no negative; the others one."""
    shown = torch.zeros((case.images, case.classes), dtype=torch.bool, device=case.device)
    shown.scatter_(1, case.target()[:, None], True)
    shown[:1] = True
    return shown


def signs(case: Case) -> Tensor:
    """The same as numbers: 1, and -1 for every second class."""
    return present(case) * (1 - 2 * (torch.arange(case.classes, device=case.device) % 2))


def pair(kind: str, case: Case) -> Tensor:
    """Maps of the size that the transform makes of those of ``features``; for a scale of another."""
    height, width = case.shape[::-1] if kind == "quarter turn" else case.shape
    more = int(kind in ("nearest", "bilinear"))
    return replace(case, shape=(height + more, width + 2 * more), seed=case.seed + 1).features()


BOXES = torch.tensor([[0.25, 0.1, 0.9, 0.6], [0.0, 0.0, 1.0, 1.0], [-0.2, 0.5, 0.3, 1.3]])  # one sticks out
MAKE: dict[str, Make] = {
    "features": Case.features,
    "weight": Case.weight,
    "bias": Case.bias,
    "target": Case.target,
    "images": Case.pictures,
    "seed_features": lambda case: replace(case, channels=3 * case.channels, seed=case.seed + 1).features(),
    "noise": lambda case: drawn(case, case.images, case.shape[0] * case.shape[1]).sigmoid(),
    "logits": lambda case: drawn(case, case.images, case.classes),
    "maps": lambda case: case.features()[:, 0].contiguous(),
    "mask": lambda case: drawn(case, case.images, *case.shape) < -0.25,
    "activations": lambda case: replace(case, channels=case.classes, layout="contiguous").features(),
    "boxes": lambda case: BOXES[torch.arange(case.images) % 3].to(case.device),
    "vectors": lambda case: drawn(case, case.images, 2, case.channels).to(case.dtype),
}

# Options that follow the sizes of a case.
SIZED: dict[str, Callable[[Case], dict[str, Any]]] = {
    "fused_cam_seeds": lambda case: {"num_seeds": max(case.shape[0] * case.shape[1] // 8, 2)},
    "fused_negative_cam_loss": lambda case: {"num_negatives": max(case.classes // 2, 1)},
    "otsu_mask": lambda case: {"bins": 2 * case.classes},
    "crop_and_zoom": lambda case: {"size": case.shape},
}


@dataclass(frozen=True)
class Call:
    """A public function with one choice of options."""

    name: str
    variant: str
    leaves: tuple[str, ...]  # the tensors that have a gradient
    make: Mapping[str, Make]  # of all tensors
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return "-".join((self.name, *self.variant.split()))

    @property
    def op(self) -> _op.Op:
        return next(op for op in _op.OPS.values() if op.function == self.name)

    def inputs(self, case: Case) -> dict[str, Tensor]:
        made = {name: make(case) for name, make in self.make.items()}
        return {name: x.requires_grad_(name in self.leaves) for name, x in made.items()}

    def bound(self, case: Case) -> Callable[..., Any]:
        """The function, of tensors by name alone."""
        options = {**self.options, **SIZED.get(self.name, lambda _: {})(case)}
        if self.variant == "affine":
            options["transform"] = Affine(options["transform"].matrix.to(case.device))
        return partial(getattr(camkernels, self.name), **options)

    def outputs(self, case: Case, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return as_tuple(self.bound(case)(**inputs))


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    return tuple(found) if isinstance(found, tuple) else (found,)


def call(name: str, variant: str, leaves: str, others: str, make: Any = MAKE, **options: Any) -> Call:
    makers = {n: make.get(n) or MAKE[n] for n in f"{leaves} {others}".split()}
    return Call(name, variant, tuple(leaves.split()), makers, options)


TRANSFORMS = {
    "flip": HorizontalFlip(),
    "quarter turn": Rotate90(1),
    "shift": Translate(0.3, -0.2),
    "affine": Affine([[0.9, 0.3, 0.1], [-0.2, 1.1, 0.0]]),
    "nearest": Scale(64),
    "bilinear": Scale(64, "bilinear"),
}
# What makes some tensors in another way.
PAIR = {kind: {"features_t": partial(pair, kind)} for kind in TRANSFORMS}
SEVERAL = {"target": lambda case: case.target(2)}
PAIRS = {"target": lambda case: case.target() % 2}
FOREGROUND = {"target": lambda case: case.target() % (case.classes - 1)}  # the last class is the background
CLASSIFIERS: dict[str, Make] = {  # three
    "weight": lambda case: drawn(case, 3, case.classes, case.channels).to(case.weight_dtype or case.dtype),
    "bias": lambda case: drawn(case, 3, case.classes).to(case.weight_dtype or case.dtype),
}
DETACHED = {"transform": HorizontalFlip(), "detach_weight": True, "reduction": "none"}
BIASED = "features weight bias"
CALLS = [
    call("fused_cam", "one class", "features weight", "target"),
    call("fused_cam", "several classes", "features weight", "target", SEVERAL),
    call("fused_cam", "all classes", "features weight", ""),
    call("fused_cam", "raw", BIASED, "target", SEVERAL, normalize=False),
    call("fused_cam", "raw of all", BIASED, "", normalize=False),
    call("fused_cam_erase", "hard", "features weight images", "target", fill=(0.1, 0.2, 0.3)),
    call("fused_cam_erase", "soft", "features weight images", "target", sharpness=5.0),
    call("fused_cam_erase", "nearest", "features weight images", "target", sharpness=5.0, mode="nearest"),
    call("fused_cam_seeds", "own", "features weight", "target noise"),
    call("fused_cam_seeds", "other", "features weight seed_features", "target noise"),
    call("fused_cam_seeds", "first", "features weight", "target", sampling="first"),
    *(
        call("fused_cam_transform_mse", kind, "features features_t weight", "", PAIR[kind], transform=move)
        for kind, move in TRANSFORMS.items()
    ),
    call("fused_cam_transform_mse", "detached", "features features_t", "weight", PAIR["flip"], **DETACHED),
    call("fused_negative_cam_loss", "mse", BIASED, "target", level=0.3),
    call("fused_negative_cam_loss", "uniform", BIASED, "target", kind="uniform", temperature=1.5),
    call("fused_negative_cam_loss", "shown", BIASED, "target logits", {"target": present}),
    call("fused_negative_cam_loss", "signs", BIASED, "target logits", {"target": signs}, kind="uniform"),
    call("focus_area", "", "", "features"),
    call("fused_local_activations", "", BIASED, "", CLASSIFIERS),
    call("fused_local_activations", "no bias", "features weight", "", CLASSIFIERS),
    call("otsu_mask", "", "", "maps"),
    call("local_level_loss", "", "activations", "mask target", FOREGROUND),
    call("masked_max_pool", "", "features", "mask"),
    call("attention_boxes", "", "", "mask"),
    call("crop_and_zoom", "", "images", "boxes"),
    call("stochastic_consistency", "all", "vectors", "target", PAIRS),
    call("stochastic_consistency", "plain", "vectors", "target", PAIRS, squared=False),
    call("stochastic_consistency", "adjacent", "vectors", "target", PAIRS, pairs="adjacent"),
]
DIFFERENTIABLE = [each for each in CALLS if each.leaves]


def placed(calls: Sequence[Call], backends: Sequence[tuple[str, str]] = KERNEL_BACKENDS) -> list[Any]:
    """Each call with each backend that serves it, and a device for it, as parameters of a test."""
    found = ((each, *place) for each in calls for place in backends if place[0] in each.op.backends)
    return [pytest.param(*one, id=f"{one[0]}-{one[1]}") for one in found]


def each(calls: Iterable[Call]) -> pytest.MarkDecorator:
    """A test for each call."""
    return pytest.mark.parametrize("call", calls, ids=str)


def loss_of(call: Call, case: Case, **tensors: Tensor) -> Tensor:
    """One number that depends on every differentiable output."""
    outputs = as_tuple(call.bound(case)(**tensors))
    return torch.stack([(x.float() ** 2).sum() for x in outputs if x.is_floating_point()]).sum()


@contextmanager
def passes() -> Iterator[list[SimpleNamespace]]:
    """What runs meanwhile: each pass as ``op``, its ``args``, and as ``values`` what it reads and makes."""
    seen: list[SimpleNamespace] = []
    fill = _pass.Pass.fill

    def noted(op: _pass.Pass, args: tuple[Any, ...], backend: str) -> SimpleNamespace:
        seen.append(SimpleNamespace(op=op, args=args, values=fill(op, args, backend)))
        return seen[-1].values

    with mock.patch.object(_pass.Pass, "fill", noted):
        yield seen


def run_pass(op: _pass.Pass, **arguments: Any) -> SimpleNamespace:
    """The ``values`` of a pass, for arguments by name that no public function would let through."""
    arguments = {"numbers": None, **arguments}
    assert set(arguments) == set(op.names), sorted(set(arguments) ^ set(op.names))
    with passes() as seen:
        op.run(*[arguments[name] for name in op.names])
    return seen[0].values
