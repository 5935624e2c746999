"""What one ``--method`` of ``train_digit_scenes.py`` has to say about itself."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from digit_scenes import Scenes
from network import Network
from rich.table import Table
from torch import Tensor
from training import Method, Stage, Standardise

Pairs = Mapping[str, tuple[Network, Method]]


class TimedOp(NamedTuple):
    """One call of the fused op that training rests on."""

    name: str
    call: Callable[[], None]
    shapes: str


class Evaluation(ABC):
    """One trained network on the test images."""

    @abstractmethod
    def summary(self) -> dict[str, float | None]:
        """The numbers that the table shows, each under its key in results.json."""


E = TypeVar("E", bound=Evaluation)


class Experiment(ABC, Generic[E]):
    """Ways to train that start from the same weights, or go on from one another, and see the same batches;
    the first is the baseline."""

    title: str
    defaults: ClassVar[dict[str, Any]]  # of the options that all experiments have
    fewest_scenes: ClassVar[int] = 2  # to train on
    no_folder: ClassVar[str] = ""  # why a folder of images will not do
    folder: ClassVar[str] = ""  # of its results, in that of a method with several experiments

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @staticmethod
    @abstractmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Options of this experiment only."""

    @abstractmethod
    def scenes(self) -> tuple[Scenes, Scenes]:
        """Training and test images.

        Raises:
            ValueError: the folder of images cannot be used; the message says why.
        """

    def network(self, num_classes: int) -> Network:
        """What is trained."""
        return Network(num_classes)

    @abstractmethod
    def methods(self, scenes: Scenes) -> dict[str, Method]:
        """The ways to train, for these training images."""

    def pretraining(self, scenes: Scenes) -> Sequence[Stage]:
        """What the start of all of them is trained on, one after the other; nothing leaves it random."""
        return ()

    def stage(self, method: Method, scenes: Scenes) -> Stage:
        """How one of the methods is trained; asked for when those before it have been."""
        return Stage(method, scenes, self.options.epochs, self.options.learning_rate)

    def start(self, method: Method, start: Network) -> Network:
        """The network that the method is trained from, on a copy; asked for as its stage is."""
        return start

    def trained(self, network: Network, stage: Stage, standardise: Standardise) -> None:
        """Told of each network in every process, before the next stage is asked for."""

    @abstractmethod
    def evaluate(self, network: Network, method: Method, scenes: Scenes, standardise: Standardise) -> E:
        """The network on test images."""

    @abstractmethod
    def timed_op(self, pairs: Pairs, images: Tensor) -> TimedOp:
        """The op on the features of one batch of images."""

    @abstractmethod
    def table(self, runs: Mapping[str, Mapping[str, Any]]) -> Table:
        """What was measured; a run is its title, its evaluation's summary and its time."""

    @abstractmethod
    def sentences(self, evaluations: Mapping[str, E], step_ms: Mapping[str, float]) -> list[str]:
        """Plain sentences; each verdict follows from the numbers in it."""

    @abstractmethod
    def save_picture(
        self,
        path: Path,
        pairs: Pairs,
        evaluations: Mapping[str, E],
        scenes: Scenes,
        standardise: Standardise,
    ) -> None:
        """What the networks look at."""
