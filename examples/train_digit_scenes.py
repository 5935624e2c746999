"""Train a small network with and without a CAM loss on real images, and see what changed.

    python examples/train_digit_scenes.py                     digit scenes, cross-entropy against PCL
    python examples/train_digit_scenes.py --method vac        several classes in each scene, VAC
    python examples/train_digit_scenes.py --method i2c        one object in each scene, found by I2C
    python examples/train_digit_scenes.py --method hnc        one class in each scene, then several; HNC
    python examples/train_digit_scenes.py --method dla        one small digit in each scene, at several scales
    python examples/train_digit_scenes.py --data photos/      one subfolder of images per class
    python examples/train_digit_scenes.py --device cuda --epochs 20
    torchrun --nproc-per-node 2 examples/train_digit_scenes.py --method i2c

Runs start from the same weights, but for those that go on from another, and see the same batches; several
processes share each batch. Tables are printed; the picture ``scenes.png`` and all numbers, ``results.json``,
go to the folder ``demo``, those of another method to a folder of its own such as ``demo-vac``, those of hnc
to one for each of its two kinds of scenes in ``demo-hnc``.
"""

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import sklearn
import torch
from dla import DlaExperiment
from experiment import Evaluation, Experiment
from findings import op_sentence, op_table
from hnc import MultiLabelHnc, SingleLabelHnc
from i2c import I2cExperiment
from network import Network
from option_types import device, positive
from pcl import PclExperiment
from processes import joined, own_share, started, world
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from training import Stage, Standardise, batch_schedule, time_backends, time_steps, train
from vac import VacExperiment

import camkernels
from camkernels import fused_cam

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
# Done one after the other; the first of a method's experiments speaks for its options.
EXPERIMENTS: dict[str, Sequence[type[Experiment[Any]]]] = {
    "dla": (DlaExperiment,),
    "hnc": (SingleLabelHnc, MultiLabelHnc),
    "i2c": (I2cExperiment,),
    "pcl": (PclExperiment,),
    "vac": (VacExperiment,),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="Each method has options and defaults of its own: see --method i2c --help, for one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--method", choices=sorted(EXPERIMENTS), default="pcl", help="what is compared with its baseline")
    add("--data", type=Path, metavar="DIR", help="train on this folder, one subfolder of images per class")
    add("--train-scenes", type=positive, help="digit scenes to train on")
    add("--test-scenes", type=positive, default=1000, help="digit scenes to test on")
    add("--epochs", type=positive, help="passes over the training images")
    add("--batch-size", type=positive, default=64, help="images per step, at least 2")
    add("--learning-rate", type=float, help="at the start; it falls to 0 along a cosine")
    add("--weight-decay", type=float, help="that of the method unless given")
    add("--seed", type=int, default=0, help="of scenes, weights and batches")
    add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, xpu")
    add(
        "--backend",
        choices=BACKENDS,
        default=os.environ.get("CAMKERNELS_BACKEND", "auto"),
        help="of camkernels; CAMKERNELS_BACKEND where it is set",
    )
    add(
        "--repeats",
        type=positive,
        default=20,
        help="timed steps of each method, and calls of the op (at least 20)",
    )
    add("--output", type=Path, default=Path("demo"), metavar="DIR", help="for scenes.png and results.json")
    # The method decides about its own options, about defaults and about what --help says of both.
    method = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    method.add_argument("--method", default="pcl")
    name = method.parse_known_args(arguments)[0].method
    chosen = EXPERIMENTS.get(name, EXPERIMENTS["pcl"])[0]
    chosen.add_options(parser)
    parser.set_defaults(**chosen.defaults)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = f"those of --method {options.method} are in its --help"
        parser.error(f"unrecognized arguments: {' '.join(unknown)} ({known})")
    if options.batch_size < 2 * started():
        parser.error(
            f"argument --batch-size: {options.batch_size} is not at least {2 * started()}: batch "
            "normalisation needs 2 images in every process"
        )
    fewest = max(chosen.fewest_scenes, 2 * started())
    if options.train_scenes < fewest:
        parser.error(f"argument --train-scenes: {options.train_scenes} is not at least {fewest}")
    try:
        with camkernels.use_backend(options.backend):
            small = torch.zeros(1, 1, 1, 1, device=options.device)
            fused_cam(small, small)
    except (RuntimeError, ValueError) as error:
        parser.error(f"argument --backend: {error}")
    if options.data is not None and chosen.no_folder:
        parser.error(f"argument --data: {chosen.no_folder}")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"argument --data: {options.data} is not a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with camkernels.use_backend(options.backend), joined(options.device) as options.device:
        console = Console(quiet=world().rank > 0)
        for experiment in EXPERIMENTS[options.method]:
            compare(experiment(options), options, console)


def compare(experiment: Experiment[Any], options: argparse.Namespace, console: Console) -> None:
    """Train in all ways, then measure, print and write what came of it."""
    began, began_cpu = time.perf_counter(), time.process_time()
    try:
        with console.status("Preparing the images"):
            train_scenes, test_scenes = experiment.scenes()
    except ValueError as error:
        raise SystemExit(f"--data: {error}") from None
    standardise = Standardise(train_scenes.images, options.device)
    torch.manual_seed(options.seed)
    start = experiment.network(len(train_scenes.classes))
    methods = experiment.methods(train_scenes)
    pretraining = experiment.pretraining(train_scenes)
    for module in (start, *methods.values()):
        # channels_last: on the CPU a step is faster by a third, and camkernels reads it in place.
        module.to(options.device).to(memory_format=torch.channels_last)
    console.print(
        f"{len(train_scenes.labels)} training and {len(test_scenes.labels)} test images of "
        f"{len(train_scenes.classes)} classes; {options.epochs} epochs at a time of "
        f"{'; '.join(method.title for method in methods.values())}; on {options.device}"
        + (f", {world().size} processes" if world().size > 1 else "")
    )

    networks: dict[str, Network] = {}
    runs: dict[str, dict[str, Any]] = {}
    evaluations: dict[str, Evaluation] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def run(network: Network, stage: Stage) -> dict[str, float]:
            total = sum(map(len, batch_schedule(stage, options)))
            task = progress.add_task(stage.method.title, total=total)

            def advance(description: str) -> None:
                progress.update(task, advance=1, description=description)

            torch.manual_seed(options.seed + world().rank)  # what a method draws is the same for all methods
            return train(network, stage, standardise, options, advance)

        for stage in pretraining:
            run(start, stage)
        for name, method in methods.items():
            networks[name] = copy.deepcopy(experiment.start(method, start))
            stage = experiment.stage(method, train_scenes)
            record = run(networks[name], stage)
            experiment.trained(networks[name], stage, standardise)
            if world().rank > 0:
                continue  # the first process looks at what they trained together
            evaluations[name] = experiment.evaluate(networks[name], method, test_scenes, standardise)
            runs[name] = {"title": method.title, **evaluations[name].summary(), **record}

    pairs = {name: (networks[name], methods[name]) for name in methods}
    part = own_share(torch.arange(min(options.batch_size, len(train_scenes.labels))))
    images, labels = standardise(train_scenes.images[part]), train_scenes.labels[part].to(options.device)
    step_ms = time_steps(pairs, images, labels, options)  # in all processes: losses may need the others
    if world().rank > 0:
        return
    for name, record in runs.items():
        record["ms_per_step"] = step_ms[name]
    op = experiment.timed_op(pairs, images)
    op_ms = time_backends(op.call, options)
    findings = [*experiment.sentences(evaluations, step_ms), op_sentence(op.name, op_ms)]

    console.print(experiment.table(runs))
    console.print(op_table(op.name, op_ms))
    for sentence in findings:
        console.print(sentence, highlight=False)

    folder = options.output / experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "scenes.png"
    experiment.save_picture(picture, pairs, evaluations, test_scenes, standardise)
    results = {
        "runs": runs,
        "op": op.name,
        "op_ms": op_ms,
        "op_shapes": op.shapes,
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
    numbers = folder / "results.json"
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
        "processes": world().size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


if __name__ == "__main__":
    main()
