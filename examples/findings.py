"""What the runs are said to have shown: tables, sentences and a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch.nn.functional as F
from digit_scenes import SIZE, Scenes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """One trained network on the test images, one number per image."""

    prediction: Tensor  # [N]
    correct: Tensor  # [N] bool
    correct_erased: Tensor  # [N] bool, with the peak of the network's own CAM erased
    coverage: Tensor  # [N], focus-area coverage of the last feature maps
    digits_in_focus: float | None  # share of digit centres inside the focus area; None without boxes
    erased: Tensor | None  # [N], share of the image that training would erase; None if it erases nothing

    def summary(self) -> dict[str, float | None]:
        return {
            "top1": self.correct.double().mean().item(),
            "top1_peak_erased": self.correct_erased.double().mean().item(),
            "coverage_mean": self.coverage.mean().item(),
            "coverage_median": self.coverage.median().item(),
            "digits_in_focus": self.digits_in_focus,
            "erased_fraction": None if self.erased is None else self.erased.mean().item(),
        }


def results_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="On test images")
    table.add_column("%")
    for run in runs.values():
        table.add_column(run["title"], justify="right")
    rows = {
        "top1": "top-1",
        "top1_peak_erased": "top-1 with the peak of its own CAM erased",
        "coverage_mean": "focus-area coverage, mean",
        "coverage_median": "focus-area coverage, median",
        "digits_in_focus": "digits inside the focus area",
        "erased_fraction": "erased from an image by training, mean",
    }
    for key, row in rows.items():
        shares = [run[key] for run in runs.values()]
        table.add_row(row, *("-" if share is None else f"{100 * share:.1f}" for share in shares))
    table.add_section()
    table.add_row("milliseconds, forward + backward", *(f"{run['ms_per_step']:.0f}" for run in runs.values()))
    return table


def erase_table(milliseconds: Mapping[str, float]) -> Table:
    table = Table(title="fused_cam_erase of one batch")
    table.add_column("backend")
    table.add_column("milliseconds", justify="right")
    table.add_column("speed", justify="right")
    eager = milliseconds["reference"]
    for backend, value in milliseconds.items():
        name = "reference (eager PyTorch)" if backend == "reference" else backend
        table.add_row(name, f"{value:.2f}", f"{eager / value:.1f} x")
    return table


def sentences(
    title: str,
    baseline: Evaluation,
    other: Evaluation,
    step_ratio: float,
    erase_ms: Mapping[str, float],
) -> list[str]:
    """Plain sentences; each verdict follows from the numbers in it."""
    coverage, coverage_verdict = _compare("Focus-area coverage", baseline.coverage, other.coverage)
    top1, top1_verdict = _compare("Top-1", baseline.correct.double(), other.correct.double())
    robust, _ = _compare(
        "With the peak of its own CAM erased, top-1",
        baseline.correct_erased.double(),
        other.correct_erased.double(),
    )
    return [
        f"The paper's claim for scenes is that {title} raises both focus-area coverage and top-1.",
        f"{coverage}: {coverage_verdict}.",
        f"{top1}: {top1_verdict}.",
        f"{robust}.",
        f"One run from one seed; the uncertainty is one standard error over {len(baseline.correct)} test "
        "images and leaves out that of training.",
        f"Both saw the same batches, but a step of {title} took {step_ratio:.1f} times as long.",
        *_speed(erase_ms),
    ]


def _speed(erase_ms: Mapping[str, float]) -> list[str]:
    if not erase_ms:
        return []
    eager = erase_ms["reference"]
    fused = {backend: value for backend, value in erase_ms.items() if backend != "reference"}
    if not fused:
        return [f"One erase took {eager:.2f} ms in eager PyTorch; no fused backend was measured here."]
    best = min(fused, key=lambda backend: fused[backend])
    return [
        f"One erase took {eager:.2f} ms in eager PyTorch and {fused[best]:.2f} ms on the {best} backend, "
        f"{eager / fused[best]:.1f} times the speed."
    ]


def _compare(what: str, before: Tensor, after: Tensor) -> tuple[str, str]:
    """The change in words, and whether it is the rise that the paper claims."""
    difference = 100 * (after.double() - before.double())  # paired: the same images
    change = difference.mean().item()
    error = difference.std().item() / len(difference) ** 0.5 if len(difference) > 1 else float("inf")
    sentence = (
        f"{what} went from {100 * before.double().mean().item():.1f} % to "
        f"{100 * after.double().mean().item():.1f} % ({change:+.1f} ± {error:.1f} points)"
    )
    if change > 2 * error:
        return sentence, "the claim shows here"
    if change < -2 * error:
        return sentence, "the claim did NOT show here, the opposite did"
    return sentence, "the claim did NOT show here, the change is within two standard errors"


@dataclass(frozen=True)
class Column:
    """One column of the picture: a heatmap over the image, or an image in its place."""

    heading: str
    heat: Tensor | None = None  # [R, H, W] in [0, 1]
    pixels: Tensor | None = None  # [R, 3, SIZE, SIZE] in [0, 1], or [R, SIZE, SIZE] for black and white
    prediction: Tensor | None = None  # [R]


def save_grid(path: Path, scenes: Scenes, columns: Sequence[Column]) -> None:
    """The first rows of ``scenes``, each with its columns."""
    rows = next(len(x) for x in (columns[0].heat, columns[0].pixels) if x is not None)
    panel, margin, gap, top = 2 * SIZE, 34, 8, 46  # pixels; two for each of the image's, so none is resampled
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
    figure.savefig(path)
    # A palette of 256 colours is a third of the size, and the eye sees no difference.
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_boxes(axes: Axes, scenes: Scenes, row: int) -> None:
    for left, top, right, bottom in scenes.boxes[row] if scenes.boxes else ():
        corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
        for colour, width in (("black", 2.6), ("white", 1.2)):  # seen on any background
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width))


def _draw(
    axes: Axes, column: Column, row: int, image: np.ndarray[Any, Any], label: int, classes: Sequence[str]
) -> None:
    if column.heat is not None:
        heat = F.interpolate(column.heat[row][None, None].float(), (SIZE, SIZE), mode="bilinear")[0, 0]
        colours = matplotlib.colormaps["turbo"](heat.numpy())[..., :3]
        axes.imshow(0.5 * image + 0.5 * colours, interpolation="nearest")
    elif column.pixels is not None:
        pixels = column.pixels[row]
        shown = pixels.permute(1, 2, 0).numpy() if pixels.dim() == 3 else pixels.numpy()
        axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    if column.prediction is not None:
        predicted = int(column.prediction[row])
        right = predicted == label
        axes.text(
            0.03,
            0.96,
            classes[predicted] + (" ✓" if right else " ✗"),
            transform=axes.transAxes,
            va="top",
            fontsize=12,
            color="white",
            bbox={"facecolor": "#1a7f37" if right else "#b3261e", "edgecolor": "none", "pad": 2.5},
        )
