"""Train a small network with and without a CAM loss on real images, and see what changed.

    python examples/train_digit_scenes.py                     digit scenes, cross-entropy against PCL
    python examples/train_digit_scenes.py --data photos/      one subfolder of images per class
    python examples/train_digit_scenes.py --device cuda --epochs 20

Both runs start from the same weights and see the same batches. Tables are printed; the picture
``scenes.png`` and all numbers, ``results.json``, go to the folder ``demo``.
"""

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import sklearn
import torch
from digit_scenes import SIZE, Scenes, digit_scenes, image_folder
from findings import Column, Evaluation, erase_table, results_table, save_grid, sentences
from methods import METHODS, CamSource, CrossEntropy, Method
from network import Network
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor

import camkernels
from camkernels import focus_area, fused_cam, fused_cam_erase

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
FUSED_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}
PICTURE_ROWS = 5
WARM_UP = 3


class Standardise:
    """uint8 images to float, with mean 0 and deviation 1 for each colour of the training images."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for part in torch.split(images, 256):  # in parts: all of them in float64 would take gigabytes
            values = part.double() / 255
            total += values.sum((0, 2, 3))
            squares += values.square().sum((0, 2, 3))
        count = images.numel() // 3
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(1e-6).sqrt()
        self.mean = mean.float().view(3, 1, 1).to(device)
        self.deviation = deviation.float().view(3, 1, 1).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        scaled = images.to(self.mean.device).float() / 255
        return ((scaled - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)

    def back(self, images: Tensor) -> Tensor:
        """To [0, 1], on the CPU."""
        return (images * self.deviation + self.mean).clamp(0, 1).cpu()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def batches(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffled indices; a last batch of one image is left out, batch normalisation cannot take it."""
    parts = torch.split(torch.randperm(count, generator=generator), size)
    return [part for part in parts if len(part) > 1]


def train(
    network: Network,
    method: Method,
    scenes: Scenes,
    standardise: Standardise,
    options: argparse.Namespace,
    advance: Callable[[str], None],
) -> dict[str, float]:
    """SGD with momentum and cosine annealing, as in the PCL paper."""
    parameters = [*network.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(
        parameters, options.learning_rate, momentum=0.9, weight_decay=options.weight_decay
    )
    generator = torch.Generator().manual_seed(options.seed)
    schedule = [batches(len(scenes.labels), options.batch_size, generator) for _ in range(options.epochs)]
    steps = sum(map(len, schedule))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    method.train()
    mean_loss = 0.0
    for epoch, parts in enumerate(schedule):
        losses = []
        for part in parts:
            images = standardise(scenes.images[part])  # [B, 3, SIZE, SIZE]
            loss = method.loss(network, images, scenes.labels[part].to(options.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
            advance(f"{method.title}, epoch {epoch + 1} of {options.epochs}")
        mean_loss = torch.stack(losses).mean().item()
    return {"steps": steps, "final_loss": mean_loss}


@torch.no_grad()
def evaluate(
    network: Network, method: Method, scenes: Scenes, standardise: Standardise, options: argparse.Namespace
) -> Evaluation:
    network.eval()
    method.eval()
    predictions, correct_erased, masks, coverages, erased = [], [], [], [], []
    for pixels, labels in zip(torch.split(scenes.images, 256), torch.split(scenes.labels, 256), strict=True):
        images = standardise(pixels)
        activations = network.activations(images)
        prediction = network.classifier(activations.pooled).argmax(1)
        focus = focus_area(activations.last)
        # The network's own peak, at the same resolution for every method.
        peak = fused_cam_erase(
            activations.last, network.classifier.weight, prediction, images, threshold=options.threshold
        )
        predictions.append(prediction.cpu())
        correct_erased.append(network(peak.erased).argmax(1).cpu() == labels)
        masks.append(focus.mask.cpu())
        coverages.append(focus.coverage.cpu())
        ones = torch.ones_like(images[:, :1])  # erased where training would erase the image
        source = method.cam_source(activations)
        if source is not None:
            kept = fused_cam_erase(*source, prediction, ones, threshold=options.threshold).erased
            erased.append(1 - kept.mean((1, 2, 3)).cpu())
    prediction = torch.cat(predictions)
    return Evaluation(
        prediction=prediction,
        correct=prediction == scenes.labels,
        correct_erased=torch.cat(correct_erased),
        coverage=torch.cat(coverages),
        digits_in_focus=share_of_digits(torch.cat(masks), scenes),
        erased=torch.cat(erased) if erased else None,
    )


def share_of_digits(masks: Tensor, scenes: Scenes) -> float | None:
    """How many digits have their centre in the focus area; ``masks`` is [N, H, W] bool."""
    if scenes.boxes is None:
        return None
    height, width = masks.shape[1:]
    hits = [
        bool(mask[(top + bottom) * height // (2 * SIZE), (left + right) * width // (2 * SIZE)])
        for mask, boxes in zip(masks, scenes.boxes, strict=True)
        for left, top, right, bottom in boxes
    ]
    return sum(hits) / len(hits)


@torch.no_grad()
def picture_columns(
    pairs: Mapping[str, tuple[Network, Method]], images: Tensor, standardise: Standardise, threshold: float
) -> list[Column]:
    """What each network looks at, then what the last method erases in training."""
    columns, erasing = [], []
    for network, method in pairs.values():
        activations = network.activations(images)
        prediction = network.classifier(activations.pooled).argmax(1)
        heat = fused_cam(activations.last, network.classifier.weight, prediction)
        columns.append(Column(f"{method.title}:\nCAM", heat=heat.cpu(), prediction=prediction.cpu()))
        source = method.cam_source(activations)
        if source is not None:
            erased, cam = fused_cam_erase(*source, prediction, images, threshold=threshold)
            ones = torch.ones_like(images[:, :1])
            kept = fused_cam_erase(*source, prediction, ones, threshold=threshold).erased
            erasing += [
                Column(f"{method.title} training:\nside branch's CAM", heat=cam.cpu()),
                Column("mask\n(black: erased)", pixels=kept[:, 0].cpu()),
                Column("erased image", pixels=standardise.back(erased)),
            ]
    return columns + erasing


@torch.no_grad()
def time_erase(
    source: CamSource, prediction: Tensor, images: Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds of one erase by each backend that serves here, on the same tensors, in turns."""

    def erase() -> None:
        fused_cam_erase(*source, prediction, images, threshold=options.threshold)

    wanted = FUSED_BACKENDS.get(options.device.type, ()) if options.backend == "auto" else (options.backend,)
    times: dict[str, list[float]] = {"reference": []}
    for backend in wanted:
        try:
            with camkernels.use_backend(backend):
                erase()
        except RuntimeError:  # not built or not for this device: `python -m camkernels doctor` says why
            continue
        times.setdefault(backend, [])
    for _ in range(WARM_UP + options.repeats):
        for backend, values in times.items():
            with camkernels.use_backend(backend):
                values.append(milliseconds(erase, options.device))
    return {backend: median(values[WARM_UP:]) for backend, values in times.items()}


def time_step(
    pairs: Mapping[str, tuple[Network, Method]], images: Tensor, target: Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds of one forward and backward pass for each way to train, in turns.

    Times taken while training would compare two stretches of time as much as two methods.
    """
    copies = {name: copy.deepcopy(pair) for name, pair in pairs.items()}  # batch statistics move
    times: dict[str, list[float]] = {name: [] for name in copies}
    for network, method in copies.values():
        network.train()
        method.train()
    for _ in range(WARM_UP + options.repeats):
        for name, (network, method) in copies.items():

            def step(network: Network = network, method: Method = method) -> None:
                method.loss(network, images, target).backward()

            times[name].append(milliseconds(step, options.device))
    return {name: median(values[WARM_UP:]) for name, values in times.items()}


def milliseconds(call: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def device(text: str) -> torch.device:
    try:
        chosen = torch.device(text)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    return chosen


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--method", choices=sorted(METHODS), default="pcl", help="what is compared with cross-entropy")
    add("--data", type=Path, metavar="DIR", help="train on this folder, one subfolder of images per class")
    add("--train-scenes", type=positive, default=8000, help="digit scenes to train on")
    add("--test-scenes", type=positive, default=1000, help="digit scenes to test on")
    add("--epochs", type=positive, default=5, help="passes over the training images")
    add("--batch-size", type=positive, default=64, help="images per step, at least 2")
    add("--learning-rate", type=float, default=0.01, help="at the start; it falls to 0 along a cosine")
    add("--weight-decay", type=float, default=5e-4, help="the paper's for its small training set")
    add("--threshold", type=share, default=0.7, help="erase where the normalised CAM is above this")
    add("--seed", type=int, default=0, help="of scenes, weights and batches")
    add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, xpu")
    add(
        "--backend",
        choices=BACKENDS,
        default=os.environ.get("CAMKERNELS_BACKEND", "auto"),
        help="of camkernels; CAMKERNELS_BACKEND where it is set",
    )
    add("--repeats", type=positive, default=20, help="timed calls of each thing that is timed")
    add("--output", type=Path, default=Path("demo"), metavar="DIR", help="for scenes.png and results.json")
    options = parser.parse_args(arguments)
    if options.batch_size < 2:
        parser.error("argument --batch-size: 1 is not at least 2, which batch normalisation needs")
    try:
        with camkernels.use_backend(options.backend):
            small = torch.zeros(1, 1, 1, 1, device=options.device)
            fused_cam(small, small)
    except (RuntimeError, ValueError) as error:
        parser.error(f"argument --backend: {error}")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"argument --data: {options.data} is not a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with camkernels.use_backend(options.backend):
        compare(options, Console())


def compare(options: argparse.Namespace, console: Console) -> None:
    """Train both ways, then measure, print and write what came of it."""
    began, began_cpu = time.perf_counter(), time.process_time()
    if options.data is None:
        with console.status("Composing digit scenes"):
            train_scenes, test_scenes = digit_scenes(options.train_scenes, options.test_scenes, options.seed)
    else:
        try:
            train_scenes, test_scenes = image_folder(options.data, options.seed)
        except ValueError as error:
            raise SystemExit(f"--data: {error}") from None
    num_classes = len(train_scenes.classes)
    console.print(
        f"{len(train_scenes.labels)} training and {len(test_scenes.labels)} test images of {num_classes} "
        f"classes; {options.epochs} epochs each of {CrossEntropy.title} and {METHODS[options.method].title} "
        f"on {options.device}"
    )
    standardise = Standardise(train_scenes.images, options.device)

    torch.manual_seed(options.seed)
    start = Network(num_classes)
    kinds: dict[str, type[Method]] = {"baseline": CrossEntropy, options.method: METHODS[options.method]}
    methods = {name: kind(num_classes, options.threshold) for name, kind in kinds.items()}
    networks = {name: copy.deepcopy(start) for name in methods}
    for module in (*networks.values(), *methods.values()):
        # channels_last: on the CPU a step is faster by a third, and camkernels reads it in place.
        module.to(options.device).to(memory_format=torch.channels_last)

    runs: dict[str, dict[str, Any]] = {}
    evaluations: dict[str, Evaluation] = {}
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console) as progress:
        total = options.epochs * len(batches(len(train_scenes.labels), options.batch_size, torch.Generator()))
        for name, method in methods.items():
            task = progress.add_task(method.title, total=total)

            def advance(description: str, task: TaskID = task) -> None:
                progress.update(task, advance=1, description=description)

            record = train(networks[name], method, train_scenes, standardise, options, advance)
            evaluations[name] = evaluate(networks[name], method, test_scenes, standardise, options)
            runs[name] = {"title": method.title, **evaluations[name].summary(), **record}

    pairs = {name: (networks[name], methods[name]) for name in methods}
    images = standardise(train_scenes.images[: options.batch_size])
    target = train_scenes.labels[: options.batch_size].to(options.device)
    step_ms = time_step(pairs, images, target, options)
    for name, run in runs.items():
        run["ms_per_step"] = step_ms[name]

    erase_ms: dict[str, float] = {}
    shapes = ""
    network, method = networks[options.method], methods[options.method]
    with torch.no_grad():
        activations = network.activations(images)
        source = method.cam_source(activations)
        if source is not None:
            prediction = network.classifier(activations.pooled).argmax(1)
            erase_ms = time_erase(source, prediction, images, options)
            shapes = f"features {list(source.features.shape)}, images {list(images.shape)}"

    step_ratio = step_ms[options.method] / step_ms["baseline"]
    findings = sentences(
        method.title, evaluations["baseline"], evaluations[options.method], step_ratio, erase_ms
    )
    console.print(results_table(runs))
    if erase_ms:
        console.print(erase_table(erase_ms))
    for sentence in findings:
        console.print(sentence, highlight=False)

    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "scenes.png"
    shown = standardise(test_scenes.images[:PICTURE_ROWS])
    columns = picture_columns(pairs, shown, standardise, options.threshold)
    save_grid(picture, test_scenes, columns)
    results = {
        "runs": runs,
        "erase_ms": erase_ms,
        "erase_shapes": shapes,
        "findings": findings,
        "images": {"train": len(train_scenes.labels), "test": len(test_scenes.labels)},
        "classes": list(train_scenes.classes),
        "parameters": sum(p.numel() for p in start.parameters()),
        "settings": {
            key: str(v) if isinstance(v, Path | torch.device) else v for key, v in vars(options).items()
        },
        "versions": versions(options.device),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - began_cpu,
    }
    numbers = options.output / "results.json"
    numbers.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"{picture} and {numbers} written after {results['seconds']:.0f} s")


def versions(device: torch.device) -> dict[str, Any]:
    return {
        "camkernels": camkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "matplotlib": matplotlib.__version__,
        "scikit-learn": sklearn.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


if __name__ == "__main__":
    main()
