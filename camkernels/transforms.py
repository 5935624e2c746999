"""Spatial transforms of images and of the heatmaps that belong to them, with one geometry for both.

flip = HorizontalFlip()
features_t = backbone(flip(images))
loss = fused_cam_transform_mse(features, features_t, weight, flip)
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, lcm
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Affine",
    "HorizontalFlip",
    "Rotate90",
    "Scale",
    "Transform",
    "Translate",
    "VerticalFlip",
]


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Axis(NamedTuple):
    """Output index ``i`` reads the input at ``step * i + offset + fraction``; it is valid in [begin, end)."""

    step: int  # 1 or -1
    offset: int
    fraction: float  # [0, 1), of the way to the next cell
    begin: int
    end: int


class Resampling(NamedTuple):
    """Where each cell of a transformed map comes from, axis by axis."""

    size: tuple[int, int]  # of the transformed map
    transposed: bool  # the input's row is found from the output's column, and the other way round
    rows: Axis  # finds the input's row
    columns: Axis

    def flat(self) -> tuple[list[int], list[float]]:
        """As the ops take it: whole numbers, fractions."""
        rows, columns = self.rows, self.columns
        whole = [int(self.transposed), rows.step, rows.offset, rows.begin, rows.end]
        whole += [columns.step, columns.offset, columns.begin, columns.end]
        return whole, [rows.fraction, columns.fraction]


def _straight(size: int) -> Axis:
    return Axis(1, 0, 0.0, 0, size)


def _mirrored(size: int) -> Axis:
    return Axis(-1, size - 1, 0.0, 0, size)


def _shifted(size: int, share: float) -> Axis:
    """Moved by ``share`` of the size towards the end; valid is what is read from inside the input."""
    distance = round(share * size * 2**32) / 2**32  # whole cells stay whole: 0.29 * 100 is not 29
    offset = floor(-distance)
    begin = min(max(ceil(distance - 0.5), 0), size)
    end = min(max(floor(distance - 0.5) + size + 1, 0), size)
    return Axis(1, offset, -distance - offset, begin, max(begin, end))


class Transform(ABC):
    """What ``fused_cam_transform_mse`` accepts as its ``transform``.

    One of one's own needs ``__call__`` and works with the backend ``reference``.
    """

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Transformed images (or heatmaps) ``[N, D, H0, W0]``, in their dtype; differentiable in them."""

    def valid(self, images: Tensor) -> Tensor | None:
        """Which pixels of ``self(images)`` come from inside them, ``[1 or N, 1, H', W']``; None: all."""
        return None

    def compared(self, maps: Tensor, maps_t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The heatmaps of images, transformed, and those of the transformed images, on one grid; and which of
        its cells count, ``[1 or N, 1, H', W']``, or None for all."""
        return self(maps), maps_t, self.valid(maps)

    def mapped_size(self, height: int, width: int) -> tuple[int, int]:
        """That of the heatmaps of ``self(images)``, where those of ``images`` are of this size."""
        return height, width

    def resampling(self, height: int, width: int) -> Resampling | None:
        """The geometry on a map of that size, where it is the same for all images and goes axis by axis."""
        return None


@dataclass(frozen=True)
class HorizontalFlip(Transform):
    """Left and right change places."""

    def __call__(self, images: Tensor) -> Tensor:
        return _images("HorizontalFlip", images).flip(-1)

    def resampling(self, height: int, width: int) -> Resampling:
        return Resampling((height, width), False, _straight(height), _mirrored(width))


@dataclass(frozen=True)
class VerticalFlip(Transform):
    """Top and bottom change places."""

    def __call__(self, images: Tensor) -> Tensor:
        return _images("VerticalFlip", images).flip(-2)

    def resampling(self, height: int, width: int) -> Resampling:
        return Resampling((height, width), False, _mirrored(height), _straight(width))


@dataclass(frozen=True)
class Rotate90(Transform):
    """``k`` quarter turns counter-clockwise, as ``torch.rot90(x, k, (-2, -1))``."""

    k: int = 1

    def __post_init__(self) -> None:
        if not _is_whole(self.k):
            raise TypeError(f"Rotate90: k is a {type(self.k).__name__}; it must be a whole number of turns")

    def __call__(self, images: Tensor) -> Tensor:
        return _images("Rotate90", images).rot90(self.k, (-2, -1))

    def mapped_size(self, height: int, width: int) -> tuple[int, int]:
        return (height, width) if self.k % 2 == 0 else (width, height)

    def resampling(self, height: int, width: int) -> Resampling:
        turns = self.k % 4
        rows = (_straight if turns in (0, 1) else _mirrored)(height)
        columns = (_straight if turns in (0, 3) else _mirrored)(width)
        return Resampling(self.mapped_size(height, width), turns in (1, 3), rows, columns)


@dataclass(frozen=True)
class Translate(Transform):
    """Moved by ``dx`` of the width to the right and ``dy`` of the height down; each in (-1, 1).

    Fractions of a pixel or cell interpolate bilinearly; the input's border extends by half a cell. What comes
    from farther outside is 0 in an image and does not count in a heatmap.
    """

    dx: float
    dy: float

    def __post_init__(self) -> None:
        values: dict[str, object] = {"dx": self.dx, "dy": self.dy}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(
                    f"Translate: {name} is a {type(value).__name__}; it must be a number in (-1, 1)"
                )
            if not -1 < float(value) < 1:
                raise ValueError(f"Translate: {name} is {value}; it must be a number in (-1, 1)")

    def __call__(self, images: Tensor) -> Tensor:
        moved = _images("Translate", images).to(_accumulate_dtype(images.dtype))
        found = self.resampling(*images.shape[-2:])
        for dim, axis in ((-2, found.rows), (-1, found.columns)):
            last = images.shape[dim] - 1
            low = torch.arange(images.shape[dim], device=images.device) + axis.offset
            moved = _interpolate(
                moved.index_select(dim, low.clamp(0, last)),
                moved.index_select(dim, (low + 1).clamp(0, last)),
                axis.fraction,
            )
        return torch.where(self.valid(images), moved, 0).to(images.dtype)

    def valid(self, images: Tensor) -> Tensor:
        found = self.resampling(*images.shape[-2:])
        rows, columns = (
            (torch.arange(size, device=images.device) >= axis.begin)
            & (torch.arange(size, device=images.device) < axis.end)
            for size, axis in zip(images.shape[-2:], (found.rows, found.columns), strict=True)
        )
        return (rows[:, None] & columns)[None, None]

    def resampling(self, height: int, width: int) -> Resampling:
        return Resampling((height, width), False, _shifted(height, self.dy), _shifted(width, self.dx))


@dataclass(frozen=True)
class Scale(Transform):
    """Images resized to ``size``; their heatmaps, then of another size, are compared on a common grid.

    That grid is as high and as wide as the least common multiples of both maps' heights and widths, as in the
    paper: 7 x 7 against 6 x 6 on 42 x 42.

    Args:
        size: (height, width) of the resized images, or one number for both. Images are resampled
            bilinearly, with antialiasing.
        mode: how both heatmaps reach the common grid: ``"nearest"`` (as released) or ``"bilinear"``
            (align_corners=False).
    """

    size: tuple[int, int] | int
    mode: str = "nearest"

    def __post_init__(self) -> None:
        given: object = self.size
        size = (given, given) if _is_whole(given) else given
        allowed = "a whole number of pixels, or (height, width)"
        if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
            raise TypeError(f"Scale: size is {self.size!r}; it must be {allowed}")
        if not all(map(_is_whole, size)):
            raise TypeError(f"Scale: size is {self.size!r}; it must be {allowed}")
        if min(size) < 1:
            raise ValueError(f"Scale: size is {self.size!r}; it must be {allowed}, at least 1")
        mode: object = self.mode
        if not isinstance(mode, str):
            raise TypeError(f"Scale: mode is a {type(mode).__name__}; allowed are nearest, bilinear")
        if mode not in ("nearest", "bilinear"):
            raise ValueError(f"Scale: mode is {mode!r}; allowed are nearest, bilinear")
        object.__setattr__(self, "size", (int(size[0]), int(size[1])))

    def __call__(self, images: Tensor) -> Tensor:
        wide = _images("Scale", images).to(_accumulate_dtype(images.dtype))
        resized = F.interpolate(wide, self.size, mode="bilinear", align_corners=False, antialias=True)
        return resized.to(images.dtype)

    def compared(self, maps: Tensor, maps_t: Tensor) -> tuple[Tensor, Tensor, None]:
        common = [lcm(int(a), int(b)) for a, b in zip(maps.shape[-2:], maps_t.shape[-2:], strict=True)]
        moved, still = (_resize(x, common, self.mode) for x in (maps, maps_t))
        return moved, still, None


@dataclass(frozen=True, eq=False, init=False)
class Affine(Transform):
    """Each output position reads the input at ``matrix @ (x, y, 1)``.

    Coordinates are those of ``F.affine_grid(..., align_corners=False)``: -1 and 1 are the outer edges of the
    first and last pixel or cell. Bilinear; the border extends by half a cell. Where the position read lies
    outside [-1, 1]² an image becomes 0 and a heatmap's cell does not count.

    Args:
        matrix: ``[2, 3]`` for all images or ``[N, 2, 3]``, one for each; a float tensor on the device of the
            images, or nested numbers for images on the CPU. It gets no gradient, and a module that holds the
            transform does not move it.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor | Sequence[Any]) -> None:
        given: object = matrix
        if not isinstance(given, Tensor):
            try:
                given = torch.tensor(given, dtype=torch.float64)
            except (TypeError, ValueError):
                kind = type(given).__name__
                raise TypeError(
                    f"Affine: matrix is a {kind}; it must be a tensor [2, 3] or [N, 2, 3], "
                    "or numbers in that form"
                ) from None
        _check_matrix(given)
        object.__setattr__(self, "matrix", given)

    def __call__(self, images: Tensor) -> Tensor:
        wide = _images("Affine", images).to(_accumulate_dtype(images.dtype))
        grid = self._grid(images)
        moved = F.grid_sample(
            wide, grid.to(wide.dtype), mode="bilinear", padding_mode="border", align_corners=False
        )
        return torch.where(_inside(grid), moved, 0).to(images.dtype)

    def valid(self, images: Tensor) -> Tensor:
        return _inside(self._grid(images))

    def _grid(self, images: Tensor) -> Tensor:
        """Positions read, ``[N, H, W, 2]`` as (x, y).

        In float64 whatever the images are: float32 would decide otherwise about positions on the border.
        """
        if self.matrix.device != images.device:
            raise ValueError(
                f"Affine: matrix is on {self.matrix.device} and images on {images.device}; "
                "they must be on one device"
            )
        if self.matrix.dim() == 3 and self.matrix.shape[0] != images.shape[0]:
            raise ValueError(
                f"Affine: matrix has {self.matrix.shape[0]} images and images {images.shape[0]}; "
                "they must be equal"
            )
        count = images.shape[0]
        matrix = self.matrix.double().expand(count, 2, 3)
        if count == 0:  # affine_grid refuses an empty batch
            return matrix.new_empty((0, *images.shape[-2:], 2))
        return F.affine_grid(matrix, [count, 1, *images.shape[-2:]], align_corners=False)


def _resize(maps: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """To a multiple of the maps' size."""
    if mode == "bilinear":
        return F.interpolate(maps, list(size), mode=mode, align_corners=False)
    # Not F.interpolate(mode="nearest"), which rounds in float32 and hits a neighbour at some sizes.
    for dim in (-2, -1):
        maps = maps.repeat_interleave(size[dim] // maps.shape[dim], dim)
    return maps


def _check_matrix(matrix: Tensor) -> None:
    if matrix.dtype not in _FLOATS:
        dtype = str(matrix.dtype).removeprefix("torch.")
        raise TypeError(f"Affine: matrix has dtype {dtype}; allowed are float64, float32, float16, bfloat16")
    if matrix.dim() not in (2, 3) or matrix.shape[-2:] != (2, 3):
        raise ValueError(f"Affine: matrix has shape {list(matrix.shape)}; it must be [2, 3] or [N, 2, 3]")
    if matrix.requires_grad:
        raise ValueError("Affine: matrix requires a gradient, and there is none; pass matrix.detach()")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _inside(grid: Tensor) -> Tensor:
    # Positions on the border, which no two ways of computing them agree on to the last bit, are inside.
    return (grid.abs() <= 1 + 1e-9).all(-1)[:, None]  # [N, 1, H, W]


def _interpolate(low: Tensor, high: Tensor, fraction: float) -> Tensor:
    return low + fraction * (high - low) if fraction else low


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _images(transform: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{transform}: images is a {type(value).__name__}; it must be a tensor [N, D, H0, W0]"
        )
    if not value.is_floating_point():
        dtype = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{transform}: images has dtype {dtype}; it must be a float type")
    if value.dim() != 4:
        raise ValueError(f"{transform}: images has shape {list(value.shape)}; it must be [N, D, H0, W0]")
    return value
