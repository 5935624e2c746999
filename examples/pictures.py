"""Pictures of scenes and of what networks look at in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch.nn.functional as F
from digit_scenes import SIZE, Box, Scenes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

PANEL = 2 * SIZE  # pixels; two for each of the image's, so that none is resampled


@dataclass(frozen=True)
class Column:
    """One column of the picture: a heatmap over the image, an image in its place, or a heatmap over that."""

    heading: str
    heat: Tensor | None = None  # [R, H, W] in [0, 1]
    pixels: Tensor | None = None  # [R, 3, SIZE, SIZE] in [0, 1], or [R, SIZE, SIZE] for black and white
    prediction: Tensor | None = None  # [R]
    true_boxes: Sequence[Box] = ()  # one for each row, red
    boxes: Sequence[Box] = ()  # what was found, green


def save_grid(path: Path, scenes: Scenes, columns: Sequence[Column]) -> None:
    """The first rows of ``scenes``, each with its columns."""
    rows = next(len(x) for x in (columns[0].heat, columns[0].pixels) if x is not None)
    panel, margin, gap, top = PANEL, 34, 8, 46
    width = margin + (len(columns) + 1) * (panel + gap)
    height = top + rows * (panel + gap)
    figure = Figure((width / 100, height / 100), dpi=100)
    for row in range(rows):
        image = scenes.images[row].permute(1, 2, 0).numpy() / 255  # [SIZE, SIZE, 3]
        label = int(scenes.labels[row])
        for place in range(len(columns) + 1):
            left, bottom = margin + place * (panel + gap), height - top - (row + 1) * panel - row * gap
            axes = figure.add_axes((left / width, bottom / height, panel / width, panel / height))
            axes.set(xticks=[], yticks=[])
            if place == 0:
                axes.imshow(image, interpolation="nearest")
                _draw_boxes(axes, scenes, row)
                name = scenes.classes[label]
                axes.set_ylabel(f"class {name}" if len(name) < 3 else name, fontsize=13)
            else:
                _draw(axes, columns[place - 1], row, image, label, scenes.classes)
            if row == 0:
                heading = "image" if place == 0 else columns[place - 1].heading
                axes.set_title(heading, fontsize=12, pad=5, linespacing=1.05)
    _save(figure, path)


class HeatRow(NamedTuple):
    """What one network looks at, for one label of each image."""

    title: str
    heat: Sequence[Tensor]  # one [R, H, W] in [0, 1] for each column
    captions: Sequence[Sequence[str]] = ()  # on each column's R heatmaps; nothing leaves them bare


def save_heat_rows(
    path: Path,
    scenes: Scenes,
    labels: Sequence[Sequence[int]],
    headings: Sequence[str],
    rows: Sequence[HeatRow],
    notes: Sequence[str] = (),
) -> None:
    """Two images beside each other, the digits of their ``labels`` in boxes: each with its columns to the
    right, the networks one above the other, and its note below."""
    panel, gap, top, label_width = PANEL, 8, 26, 22
    block_width = gap + (len(headings) + 1) * (panel + gap) + label_width
    block_height = top + len(rows) * (panel + gap)
    width, height = 2 * block_width, (len(labels) + 1) // 2 * block_height
    figure = Figure((width / 100, height / 100), dpi=100)

    def axes_at(block: int, row: int, column: int) -> Axes:
        left = block % 2 * block_width + gap + column * (panel + gap) + (label_width if column else 0)
        bottom = height - block // 2 * block_height - top - row * (panel + gap) - panel
        axes = figure.add_axes((left / width, bottom / height, panel / width, panel / height))
        axes.set(xticks=[], yticks=[])
        return axes

    for block, names in enumerate(labels):
        image = scenes.images[block].permute(1, 2, 0).numpy() / 255  # [SIZE, SIZE, 3]
        axes = axes_at(block, 0, 0)
        axes.imshow(image, interpolation="nearest")
        _draw_boxes(axes, scenes, block, names)
        title = ", ".join(scenes.classes[name] for name in names)
        axes.set_title(f"label{'s' if len(names) > 1 else ''} {title}", fontsize=12, pad=4)
        if notes:
            below = axes_at(block, 1, 0)
            below.axis("off")
            below.text(
                0, 0.96, notes[block], transform=below.transAxes, va="top", fontsize=12, linespacing=1.4
            )
        for place, row in enumerate(rows):
            for column, (heading, heat) in enumerate(zip(headings, row.heat, strict=True), 1):
                axes = axes_at(block, place, column)
                _draw_heat(axes, image, heat[block])
                if row.captions:
                    _write_on(axes, row.captions[column - 1][block], "#202020")
                if place == 0:
                    axes.set_title(heading, fontsize=11, pad=4)
                if column == 1:
                    axes.set_ylabel(row.title, fontsize=12, labelpad=3)
    _save(figure, path)


class BoxRow(NamedTuple):
    """Where one network finds the object of each image."""

    title: str
    heat: Tensor  # [R, H, W] in [0, 1]
    boxes: Sequence[Box]


def save_boxes(path: Path, scenes: Scenes, rows: Sequence[BoxRow]) -> None:
    """The first images side by side, below each what the networks find: true boxes red, theirs green."""
    assert scenes.boxes is not None
    panel, gap, top, left = PANEL, 6, 24, 26
    columns = len(rows[0].boxes)
    width, height = left + columns * (panel + gap), top + (1 + len(rows)) * (panel + gap)
    figure = Figure((width / 100, height / 100), dpi=100)
    for column in range(columns):
        image = scenes.images[column].permute(1, 2, 0).numpy() / 255  # [SIZE, SIZE, 3]
        for place, row in enumerate((None, *rows)):
            x, y = left + column * (panel + gap), height - top - (place + 1) * panel - place * gap
            axes = figure.add_axes((x / width, y / height, panel / width, panel / height))
            axes.set(xticks=[], yticks=[])
            if row is None:
                axes.imshow(image, interpolation="nearest")
                axes.set_title(f"class {scenes.classes[scenes.labels[column]]}", fontsize=12, pad=4)
            else:
                _draw_heat(axes, image, row.heat[column])
            for box in scenes.boxes[column]:
                _draw_box(axes, box, "#ff3030", 2)
            if row is not None:
                _draw_box(axes, row.boxes[column], "#30ff30", 2)
            if column == 0:
                axes.set_ylabel("image" if row is None else row.title, fontsize=13)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    # A palette of 256 colours is a third of the size, and the eye sees no difference.
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_boxes(axes: Axes, scenes: Scenes, row: int, labels: Sequence[int] | None = None) -> None:
    """Around the digits, or around those of some classes."""
    boxes = scenes.boxes[row] if scenes.boxes else ()
    if labels is not None and scenes.written is not None:
        boxes = tuple(box for box, name in zip(boxes, scenes.written[row], strict=True) if name in labels)
    for box in boxes:
        _draw_box(axes, box, "white")


def _draw_box(axes: Axes, box: Box, inner: str, inner_width: float = 1.2) -> None:
    left, top, right, bottom = box
    corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
    for colour, width in (("black", inner_width + 1.4), (inner, inner_width)):  # seen on any background
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width))


def _draw(
    axes: Axes, column: Column, row: int, image: np.ndarray[Any, Any], label: int, classes: Sequence[str]
) -> None:
    if column.pixels is not None:
        pixels = column.pixels[row]
        image = pixels.permute(1, 2, 0).numpy() if pixels.dim() == 3 else pixels.numpy()
    if column.heat is not None:
        _draw_heat(axes, image, column.heat[row])
    elif column.pixels is not None:
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for boxes, colour in ((column.true_boxes, "#ff3030"), (column.boxes, "#30ff30")):
        if boxes:
            _draw_box(axes, boxes[row], colour, 2)
    if column.prediction is not None:
        predicted = int(column.prediction[row])
        right = predicted == label
        _write_on(axes, classes[predicted] + (" ✓" if right else " ✗"), "#1a7f37" if right else "#b3261e")


def _write_on(axes: Axes, text: str, background: str) -> None:
    """In the upper left corner."""
    axes.text(
        0.03,
        0.96,
        text,
        transform=axes.transAxes,
        va="top",
        fontsize=12,
        color="white",
        bbox={"facecolor": background, "edgecolor": "none", "pad": 2.5},
    )


def _draw_heat(axes: Axes, image: np.ndarray[Any, Any], heat: Tensor) -> None:
    full = F.interpolate(heat[None, None].float(), (SIZE, SIZE), mode="bilinear")[0, 0]
    colours = matplotlib.colormaps["turbo"](full.numpy())[..., :3]
    axes.imshow(0.5 * image + 0.5 * colours, interpolation="nearest")
