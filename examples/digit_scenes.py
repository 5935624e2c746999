"""Digit scenes: handwritten digits scattered over a real photograph.

Digits and photographs are those that scikit-learn ships, so nothing is downloaded. A scene has no centre: its
digits are written in various sizes, colours and places, among pieces of other digits. ``digit_scenes`` have
one class each, written three to five times; ``multi_label_scenes`` two to four, written once or twice;
``object_scenes`` a single large digit among more clutter; ``fine_grained_scenes`` a single small one, where a
digit in bold and in thin strokes are two classes. ``image_folder`` gives one's own images the same form.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

SIZE = 96
CLASSES_PER_SCENE = (2, 4)  # where there are several
CONTRAST = (100.0, 170.0)  # of a digit to what lies below it, in grey levels
TEST_SHARE = 0.25
# Photographs are split between training and test by their columns, as the digits are by instance.
TEST_COLUMNS = 0.3
HELD_OUT_COLUMNS = 0.15
# Ink is where a digit's 8 x 8 values, enlarged, are above this share of the darkest.
STROKES = {"bold": 0.3, "thin": 0.6}
STROKE_SIDE = 64  # pixels of a digit written so
STROKE_EDGE = 0.25  # of the values, over which ink fades
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are the first pixel outside


@dataclass(frozen=True)
class Style:
    """What scenes of one kind look like; each pair is the least and the most."""

    instances: tuple[int, int]  # digits of each class that is there
    digit_size: tuple[int, int] = (20, 32)
    fragments: tuple[int, int] = (1, 3)  # pieces of digits of other classes
    mirrored: bool = False  # every other digit
    chalk: bool = False  # light ink on a dark photograph, else lighter or darker than what lies below
    strokes: bool = False  # each digit in all STROKES, every one of them a class
    size: int = SIZE  # of the image


SCATTERED = Style(instances=(3, 5))
SEVERAL_CLASSES = Style(instances=(1, 2), mirrored=True)
ONE_OBJECT = Style(instances=(1, 1), digit_size=(28, 44), fragments=(2, 4), chalk=True)
ALONE = Style(instances=(1, 1), digit_size=(28, 44), fragments=(0, 0), chalk=True, size=56)
FINE_GRAINED = Style(
    instances=(1, 1), digit_size=(48, 80), fragments=(1, 2), chalk=True, strokes=True, size=2 * SIZE
)
FINE_ALONE = replace(FINE_GRAINED, digit_size=(24, 52), fragments=(0, 0), size=64)


@dataclass(frozen=True)
class Scenes:
    """Labelled images; what follows ``classes`` only where the scenes were composed here."""

    images: Tensor  # [N, 3, S, S] uint8
    labels: Tensor  # int64: [N] class indices, or [N, L] of 0 and 1
    classes: tuple[str, ...]
    boxes: tuple[tuple[Box, ...], ...] | None = None
    written: tuple[tuple[int, ...], ...] | None = None  # the class in each box
    sources: tuple[tuple[int, ...], ...] | None = None  # which digits of load_digits, fragments included


class Digits(NamedTuple):
    """What is written in scenes."""

    pixels: NDArray[np.float32]  # [M, 8, 8] or enlarged, in [0, 1]
    labels: NDArray[np.int64]  # [M]
    names: tuple[str, ...]  # of the classes
    sources: NDArray[np.int64]  # [M], which of load_digits


class Scene(NamedTuple):
    image: NDArray[np.uint8]  # [S, S, 3]
    ink: NDArray[np.float32]  # [S, S], opacity of the instances, 0 where there is none
    boxes: tuple[Box, ...]


def digit_scenes(train: int, test: int, seed: int) -> tuple[Scenes, Scenes]:
    """Scenes of one class each; training and test share neither a digit nor a part of a photograph."""

    one, two = _single_label_scenes((train, test), SCATTERED, seed)
    return one, two


def object_scenes(train: int, held_out: int, test: int, seed: int) -> tuple[Scenes, Scenes, Scenes]:
    """Scenes of one large digit each, among and over pieces of others. Its box is where the object is.

    Training, held-out and test scenes share neither a digit nor a part of a photograph.
    """
    one, two, three = _single_label_scenes((train, held_out, test), ONE_OBJECT, seed)
    return one, two, three


def object_pictures(count: int, seed: int) -> Scenes:
    """Small pictures, each filled by one digit alone, of the digits and photographs of the training scenes of
    ``object_scenes`` with that seed."""
    return _single_label_scenes((count, 0, 0), ALONE, seed)[0]


def fine_grained_scenes(train: int, test: int, seed: int) -> tuple[Scenes, Scenes]:
    """Scenes of one small digit each, among and over pieces of others. A digit in bold strokes and the same
    in thin ones are two classes.

    Images have twice the usual side: who looks closer sees more. Training and test scenes share neither a
    digit nor a part of a photograph.
    """
    one, two = _single_label_scenes((train, test), FINE_GRAINED, seed)
    return one, two


def fine_grained_pictures(count: int, seed: int) -> Scenes:
    """Small pictures, each filled by one digit alone, of the digits and photographs of the training scenes of
    ``fine_grained_scenes`` with that seed."""
    return _single_label_scenes((count, 0), FINE_ALONE, seed)[0]


def multi_label_scenes(train: int, test: int, seed: int) -> tuple[Scenes, Scenes]:
    """The same with several classes in each scene.

    About every other digit is turned round, so that a mirrored scene is as likely as the scene itself. That
    holds for photographs of people and things, and not for handwriting as it is.
    """

    def choose(count: int, classes: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        present = np.zeros((count, classes), bool)
        for row in present:
            row[rng.choice(classes, rng.integers(*CLASSES_PER_SCENE, endpoint=True), replace=False)] = True
        return present

    one, two = _scenes((train, test), choose, SEVERAL_CLASSES, seed)
    return one, two


def _single_label_scenes(counts: Sequence[int], style: Style, seed: int) -> list[Scenes]:
    """Each class in equally many scenes."""

    def choose(count: int, classes: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        labels = rng.permutation(np.arange(count) % classes)
        return np.arange(classes) == labels[:, None]

    return [replace(part, labels=part.labels.argmax(1)) for part in _scenes(counts, choose, style, seed)]


def _scenes(
    counts: Sequence[int],
    choose: Callable[[int, int, np.random.Generator], NDArray[np.bool_]],
    style: Style,
    seed: int,
) -> list[Scenes]:
    """Scenes for training and test; with three counts held-out scenes between them. ``choose`` says which
    classes are in each, ``[count, classes]``."""
    digits = _digits()
    photographs = load_sample_images().images
    rng = np.random.default_rng(seed)
    allowed = [*_split(digits.labels, rng)]
    cuts = [0, 1 - TEST_COLUMNS, 1]
    if len(counts) == 3:
        rest, held_out = _split(digits.labels[allowed[0]], rng)
        allowed = [allowed[0][rest], allowed[0][held_out], allowed[1]]
        cuts.insert(1, 1 - TEST_COLUMNS - HELD_OUT_COLUMNS)
    if style.strokes:
        # In all its strokes a digit is on the same side of the split.
        allowed = [
            np.concatenate([part + k * len(digits.labels) for k in range(len(STROKES))]) for part in allowed
        ]
        digits = _in_strokes(digits)
    parts = []
    for part, (count, generator) in enumerate(zip(counts, rng.spawn(len(counts)), strict=True)):
        present = choose(count, len(digits.names), generator)
        photos = [_columns(photo, *cuts[part : part + 2]) for photo in photographs]
        parts.append(_compose(present, digits, allowed[part], photos, style, generator))
    return parts


def _digits() -> Digits:
    given = load_digits()
    pixels = (given.images / given.images.max()).astype(np.float32)
    return Digits(
        pixels, given.target, tuple(str(name) for name in given.target_names), np.arange(len(pixels))
    )


def _in_strokes(digits: Digits) -> Digits:
    """All digits in the first of STROKES, then all in the next, with as many classes."""
    side = (STROKE_SIDE, STROKE_SIDE)
    enlarged = np.stack(
        [np.asarray(Image.fromarray(digit).resize(side, Image.Resampling.BICUBIC)) for digit in digits.pixels]
    )
    return Digits(
        np.concatenate([((enlarged - x) / STROKE_EDGE + 0.5).clip(0, 1) for x in STROKES.values()]),
        np.concatenate([digits.labels + k * len(digits.names) for k in range(len(STROKES))]),
        tuple(f"{name} {stroke}" for stroke in STROKES for name in digits.names),
        np.tile(digits.sources, len(STROKES)),
    )


def _columns(photograph: NDArray[np.uint8], start: float, end: float) -> NDArray[np.uint8]:
    """From one share of its width to another."""
    width = photograph.shape[1]
    return photograph[:, round(start * width) : round(end * width)]


def _split(
    labels: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices for training and for test, the same share of every class in both."""
    train, test = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(len(members) * TEST_SHARE))
        test.append(members[:count])
        train.append(members[count:])
    return np.concatenate(train), np.concatenate(test)


def _compose(
    present: NDArray[np.bool_],  # [N, classes]
    digits: Digits,
    allowed: NDArray[np.int64],
    photographs: Sequence[NDArray[np.uint8]],
    style: Style,
    rng: np.random.Generator,
) -> Scenes:
    classes, labels = np.arange(len(digits.names)), digits.labels
    scenes, written, sources = [], [], []
    for row in present:
        chosen = np.concatenate(
            [
                rng.choice(
                    allowed[labels[allowed] == label],
                    rng.integers(*style.instances, endpoint=True),
                    replace=False,
                )
                for label in classes[row]
            ]
        )
        other = allowed[np.isin(labels[allowed], classes[~row])]
        fragments = rng.choice(other, rng.integers(*style.fragments, endpoint=True), replace=False)
        background = crop_background(photographs[int(rng.integers(len(photographs)))], rng, style.size)
        if style.chalk:
            background //= 2
        instances = digits.pixels[chosen]
        if style.mirrored:
            turn = rng.random(len(instances)) < 0.5
            instances = np.where(turn[:, None, None], instances[..., ::-1], instances)
        scenes.append(draw_scene(background, instances, digits.pixels[fragments], rng, style))
        written.append(tuple(int(labels[i]) for i in chosen))
        sources.append(tuple(int(digits.sources[i]) for i in (*chosen, *fragments)))
    images = np.array([scene.image for scene in scenes], np.uint8).reshape(-1, style.size, style.size, 3)
    return Scenes(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(present.astype(np.int64)),
        classes=digits.names,
        boxes=tuple(scene.boxes for scene in scenes),
        written=tuple(written),
        sources=tuple(sources),
    )


def crop_background(photograph: NDArray[np.uint8], rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """A square piece of the photograph, mirrored or not, lighter or darker: [size, size, 3]."""
    side = rng.integers(size, 2 * size, endpoint=True)
    side = min(side, *photograph.shape[:2])
    top = rng.integers(photograph.shape[0] - side, endpoint=True)
    left = rng.integers(photograph.shape[1] - side, endpoint=True)
    piece = photograph[top : top + side, left : left + side]
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    resized = np.asarray(
        Image.fromarray(np.ascontiguousarray(piece)).resize((size, size), Image.Resampling.BOX)
    )
    scaled = rng.uniform(0.6, 1.0) * (resized - 127.5) + 127.5 + rng.uniform(-30, 30)
    return scaled.clip(0, 255).astype(np.uint8)


def draw_scene(
    background: NDArray[np.uint8],
    instances: NDArray[np.float32],
    fragments: NDArray[np.float32],
    rng: np.random.Generator,
    style: Style = SCATTERED,
) -> Scene:
    """Write ``instances`` [K, 8, 8] apart from one another, over ``fragments`` [F, 8, 8] cut from digits;
    both may be larger."""
    canvas = background.astype(np.float32)  # [S, S, 3]
    size = len(canvas)
    for digit in fragments:
        piece = _cut(_shape(digit, style.digit_size, rng, scale=1.0), rng)
        height, width = piece.shape
        left, top = rng.integers(size - width, endpoint=True), rng.integers(size - height, endpoint=True)
        _write(canvas, piece, left, top, style.chalk, rng)
    ink = np.zeros((size, size), np.float32)
    boxes: list[Box] = []
    for digit in instances:
        shape, left, top = _place(digit, style.digit_size, boxes, size, rng)
        height, width = shape.shape
        _write(canvas, shape, left, top, style.chalk, rng)
        ink[top : top + height, left : left + width] += shape
        boxes.append((left, top, left + width, top + height))
    noisy = canvas + rng.normal(0, 4, canvas.shape)
    return Scene(noisy.round().clip(0, 255).astype(np.uint8), ink, tuple(boxes))


def _shape(
    digit: NDArray[np.float32], digit_size: tuple[int, int], rng: np.random.Generator, scale: float
) -> NDArray[np.float32]:
    """The digit's opacity at a random size and slant, cut to its ink: [height, width]."""
    side = max(8, round(rng.integers(*digit_size, endpoint=True) * scale))
    image = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    opacity = np.asarray(image).clip(0, 1)
    opacity = np.where(opacity > 0.1, opacity, 0).astype(np.float32)  # bicubic leaves a faint rim
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _cut(shape: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """The half of a digit on one of its four sides."""
    height, width = shape.shape
    halves = (shape[: height // 2], shape[height // 2 :], shape[:, : width // 2], shape[:, width // 2 :])
    possible = [half for half in halves if half.size]
    return possible[rng.integers(len(possible))]


def _place(
    digit: NDArray[np.float32],
    digit_size: tuple[int, int],
    taken: Sequence[Box],
    size: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], int, int]:
    """The digit's opacity, left and top, clear of the boxes already taken."""
    scale = 1.0
    while True:
        shape = _shape(digit, digit_size, rng, scale)
        height, width = shape.shape
        for _ in range(20):
            left = int(rng.integers(size - width, endpoint=True))
            top = int(rng.integers(size - height, endpoint=True))
            if all(
                left + width <= x0 or left >= x1 or top + height <= y0 or top >= y1
                for x0, y0, x1, y1 in taken
            ):
                return shape, left, top
        scale *= 0.9  # a smaller digit finds room sooner or later


def _write(
    canvas: NDArray[np.float32],
    shape: NDArray[np.float32],
    left: int,
    top: int,
    chalk: bool,
    rng: np.random.Generator,
) -> None:
    """Blend a random colour into the canvas, at least somewhat lighter or darker than what lies below."""
    height, width = shape.shape
    below = canvas[top : top + height, left : left + width]  # a view: the canvas itself is written to
    brightness = below.mean()
    lighter = chalk or brightness < 90 or (brightness < 165 and rng.random() < 0.5)
    difference = rng.uniform(*CONTRAST) * (1 if lighter else -1)
    colour = brightness + difference + rng.uniform(-45, 45, 3)
    opacity = shape[..., None] * rng.uniform(0.7, 1.0)
    below += opacity * (colour.clip(0, 255).astype(np.float32) - below)


def digit_crops(scenes: Scenes, side: int) -> Scenes:
    """A square piece of ``side`` pixels around each digit of the scenes, of the digit's class."""
    assert scenes.boxes is not None
    assert scenes.written is not None
    crops, labels = [], []
    for image, boxes, written in zip(scenes.images, scenes.boxes, scenes.written, strict=True):
        for (left, top, right, bottom), label in zip(boxes, written, strict=True):
            x = min(max((left + right - side) // 2, 0), SIZE - side)
            y = min(max((top + bottom - side) // 2, 0), SIZE - side)
            crops.append(image[:, y : y + side, x : x + side])
            labels.append(label)
    return Scenes(torch.stack(crops), torch.tensor(labels), scenes.classes)


def image_folder(root: Path, seed: int) -> tuple[Scenes, Scenes]:
    """Training and test images from a folder with one subfolder of images per class.

    Each image is scaled and its middle cut to SIZE x SIZE; a quarter of every class is kept for the test.

    Raises:
        ValueError: the folder lacks classes or images, or a file is no image; the message says which.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    if len(folders) < 2:
        raise ValueError(f"{root} has {len(folders)} class folders; at least 2 are needed")
    images, labels = [], []
    for label, folder in enumerate(folders):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if len(files) < 2:
            raise ValueError(
                f"{folder} has {len(files)} images ({', '.join(SUFFIXES)}); at least 2 are needed"
            )
        images += [_read(path) for path in files]
        labels += [label] * len(files)
    pixels, targets = np.stack(images), np.array(labels)
    parts = _split(targets, np.random.default_rng(seed))
    train, test = (
        Scenes(
            images=torch.from_numpy(pixels[part]).permute(0, 3, 1, 2).contiguous(),
            labels=torch.from_numpy(targets[part]),
            classes=tuple(folder.name for folder in folders),
        )
        for part in parts
    )
    return train, test


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (SIZE, SIZE))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return np.asarray(fitted)
