"""What all experiments share: the training loop and fair timing."""

import argparse
import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from digit_scenes import Scenes
from network import Network
from processes import own_share, world
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import camkernels

FUSED_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}
WARM_UP = 3
FEWEST_CALLS = 20  # of an op that is timed


class Method(nn.Module, ABC):
    """A way to train the network, with what it adds to it."""

    title: str

    @abstractmethod
    def loss(self, network: Network, images: Tensor, target: Tensor) -> Tensor:
        """The scalar to minimise for images [N, 3, S, S] and their labels, [N] or [N, L]."""


Batches = Callable[[Tensor, int, torch.Generator], Sequence[Tensor]]


def shuffled_batches(labels: Tensor, batch_size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Indices of all images in random order, a batch at a time."""
    return torch.split(torch.randperm(len(labels), generator=generator), batch_size)


def paired_batches(labels: Tensor, batch_size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Batches that hold every class equally often, two images of a class beside each other.

    Classes are drawn without replacement, two images for each, until all had their turn; then anew. No image
    comes twice; one of a class with an odd number of images is left over.
    """
    pairs = []  # of each class, [P, 2]
    for label in labels.unique():
        members = torch.nonzero(labels == label)[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator)]
        pairs.append(list(shuffled[: len(members) // 2 * 2].view(-1, 2)))
    drawn = []
    while waiting := [of_class for of_class in pairs if of_class]:
        drawn += [waiting[place].pop() for place in torch.randperm(len(waiting), generator=generator)]
    return torch.split(torch.cat(drawn), batch_size // 2 * 2)


class Stage(NamedTuple):
    """One training of one network."""

    method: Method
    scenes: Scenes
    epochs: int
    learning_rate: float
    batches: Batches = shuffled_batches  # of one epoch


class Step(nn.Module):
    """The loss as a module's forward pass, which is what ``DistributedDataParallel`` wraps."""

    def __init__(self, network: Network, method: Method) -> None:
        super().__init__()
        self.network = network
        self.method = method

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return self.method.loss(self.network, images, target)


class Standardise:
    """Images of 0 to 255 to float, with mean 0 and deviation 1 for each colour of the training images."""

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


def train(
    network: Network,
    stage: Stage,
    standardise: Standardise,
    options: argparse.Namespace,
    advance: Callable[[str], None],
) -> dict[str, float]:
    """SGD with momentum and cosine annealing; ``advance`` is told of every step."""
    method, scenes = stage.method, stage.scenes
    step: nn.Module = Step(network, method)
    optimizer = torch.optim.SGD(
        step.parameters(), stage.learning_rate, momentum=0.9, weight_decay=options.weight_decay
    )
    schedule = batch_schedule(stage, options)
    steps = sum(map(len, schedule))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step.train()
    if world().size > 1:
        step = DistributedDataParallel(step)
    mean_loss = 0.0
    for epoch, parts in enumerate(schedule):
        losses = []
        for part in parts:
            images = standardise(scenes.images[part])  # [B, 3, SIZE, SIZE]
            loss = step(images, scenes.labels[part].to(options.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
            advance(f"{method.title}, epoch {epoch + 1} of {stage.epochs}")
        mean_loss = torch.stack(losses).mean().item()
    return {"steps": steps, "final_loss": mean_loss}


def batch_schedule(stage: Stage, options: argparse.Namespace) -> list[list[Tensor]]:
    """This process's indices, epoch by epoch, the same for every method; a last batch of one image is left
    out, for batch normalisation cannot take it."""
    generator = torch.Generator().manual_seed(options.seed)
    epochs = []
    for _ in range(stage.epochs):
        parts = map(own_share, stage.batches(stage.scenes.labels, options.batch_size, generator))
        epochs.append([part for part in parts if len(part) > 1])
    return epochs


def time_steps(
    pairs: Mapping[str, tuple[Network, Method]], images: Tensor, target: Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds of one forward and backward pass for each way to train.

    Times taken while training would compare two stretches of time as much as two methods.
    """

    def step(network: Network, method: Method) -> Callable[[], None]:
        network.train()
        method.train()
        return lambda: method.loss(network, images, target).backward()

    # On copies, for batch statistics move.
    calls = {name: step(*copy.deepcopy(pair)) for name, pair in pairs.items()}
    return time_in_turns(calls, options.repeats, options.device)


def time_backends(call: Callable[[], None], options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the call with each backend that serves here, the reference first."""

    def within(backend: str) -> Callable[[], None]:
        def run() -> None:
            with camkernels.use_backend(backend):
                call()

        return run

    wanted = FUSED_BACKENDS.get(options.device.type, ()) if options.backend == "auto" else (options.backend,)
    calls = {"reference": within("reference")}
    for backend in wanted:
        try:
            within(backend)()
        except RuntimeError:  # not built or not for this device: `python -m camkernels doctor` says why
            continue
        calls.setdefault(backend, within(backend))
    # A call takes milliseconds, where a step takes a second: a few of them would tell little.
    return time_in_turns(calls, max(options.repeats, FEWEST_CALLS), options.device)


def time_in_turns(
    calls: Mapping[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + repeats):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values[WARM_UP:]) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
