"""``--method pcl``: cross-entropy against pairwise consistency learning, on scenes of one class."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from digit_scenes import SIZE, Scenes, digit_scenes, image_folder
from experiment import Evaluation, Experiment, Pairs, TimedOp
from findings import paired, verdict
from network import WIDTHS, Activations, Network
from option_types import share
from pictures import Column, save_grid
from rich.table import Table
from torch import Tensor, nn
from training import Method, Standardise

from camkernels import focus_area, fused_cam, fused_cam_erase
from camkernels.losses import PairwiseConsistencyLoss

PICTURE_ROWS = 5
ROWS = {
    "top1": "top-1",
    "top1_peak_erased": "top-1 with the peak of its own CAM erased",
    "coverage_mean": "focus-area coverage, mean",
    "coverage_median": "focus-area coverage, median",
    "digits_in_focus": "digits inside the focus area",
    "erased_fraction": "erased from an image by training, mean",
}


class CamSource(NamedTuple):
    """What a class activation map is made of."""

    features: Tensor  # [N, C, H, W]
    weight: Tensor  # [L, C]


class CrossEntropy(Method):
    """The baseline."""

    title = "cross-entropy"

    def loss(self, network: Network, images: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(network(images), target)


class PairwiseConsistency(Method):
    """Pairwise consistency learning (PCL): Chen et al., NeurIPS 2021, eq. 1-3."""

    title = "PCL"

    def __init__(self, num_classes: int, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        # The CAM module: 1x1 convolution, global average pooling, linear classifier.
        self.cam_features = nn.Conv2d(WIDTHS[2], WIDTHS[2], 1)
        self.cam_classifier = nn.Linear(WIDTHS[2], num_classes)
        self.erased_classifier = nn.Linear(WIDTHS[3], num_classes)
        self.criterion = PairwiseConsistencyLoss()

    def cam_source(self, activations: Activations) -> CamSource:
        return CamSource(self.cam_features(activations.middle), self.cam_classifier.weight)

    def loss(self, network: Network, images: Tensor, target: Tensor) -> Tensor:
        activations = network.activations(images)
        logits = network.classifier(activations.pooled)  # p
        features, weight = self.cam_source(activations)
        side_logits = self.cam_classifier(features.mean((-2, -1)))  # r
        with torch.no_grad():  # a hard mask has no gradient, and nobody asks for that of the images
            # The class is the network's own choice. Erased pixels become 0, the mean colour: the images
            # come standardised.
            erased, _ = fused_cam_erase(features, weight, logits.argmax(1), images, threshold=self.threshold)
        erased_logits = self.erased_classifier(network.activations(erased).pooled)  # q
        loss: Tensor = self.criterion(logits, erased_logits, side_logits, target)
        return loss


@dataclass(frozen=True)
class PclEvaluation(Evaluation):
    """One number per image."""

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


class PclExperiment(Experiment[PclEvaluation]):
    title = "PCL"
    defaults: ClassVar = {"train_scenes": 8000, "epochs": 5, "learning_rate": 0.01, "weight_decay": 5e-4}

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        help_ = "erase where the normalised CAM is above this"
        parser.add_argument("--threshold", type=share, default=0.7, help=help_)

    def scenes(self) -> tuple[Scenes, Scenes]:
        options = self.options
        if options.data is not None:
            return image_folder(options.data, options.seed)
        return digit_scenes(options.train_scenes, options.test_scenes, options.seed)

    def methods(self, scenes: Scenes) -> dict[str, Method]:
        pcl = PairwiseConsistency(len(scenes.classes), self.options.threshold)
        return {"baseline": CrossEntropy(), "pcl": pcl}

    @torch.no_grad()
    def evaluate(
        self, network: Network, method: Method, scenes: Scenes, standardise: Standardise
    ) -> PclEvaluation:
        network.eval()
        method.eval()
        threshold = self.options.threshold
        predictions, correct_erased, masks, coverages, erased = [], [], [], [], []
        for pixels, labels in zip(
            torch.split(scenes.images, 256), torch.split(scenes.labels, 256), strict=True
        ):
            images = standardise(pixels)
            activations = network.activations(images)
            prediction = network.classifier(activations.pooled).argmax(1)
            focus = focus_area(activations.last)
            # The network's own peak, at the same resolution for every method.
            peak = fused_cam_erase(
                activations.last, network.classifier.weight, prediction, images, threshold=threshold
            )
            predictions.append(prediction.cpu())
            correct_erased.append(network(peak.erased).argmax(1).cpu() == labels)
            masks.append(focus.mask.cpu())
            coverages.append(focus.coverage.cpu())
            ones = torch.ones_like(images[:, :1])  # erased where training would erase the image
            if isinstance(method, PairwiseConsistency):
                source = method.cam_source(activations)
                kept = fused_cam_erase(*source, prediction, ones, threshold=threshold).erased
                erased.append(1 - kept.mean((1, 2, 3)).cpu())
        prediction = torch.cat(predictions)
        return PclEvaluation(
            prediction=prediction,
            correct=prediction == scenes.labels,
            correct_erased=torch.cat(correct_erased),
            coverage=torch.cat(coverages),
            digits_in_focus=share_of_digits(torch.cat(masks), scenes),
            erased=torch.cat(erased) if erased else None,
        )

    @torch.no_grad()
    def timed_op(self, pairs: Pairs, images: Tensor) -> TimedOp:
        network, method = pairs["pcl"]
        assert isinstance(method, PairwiseConsistency)
        activations = network.activations(images)
        source = method.cam_source(activations)
        prediction = network.classifier(activations.pooled).argmax(1)

        def erase() -> None:
            with torch.no_grad():
                fused_cam_erase(*source, prediction, images, threshold=self.options.threshold)

        shapes = f"features {list(source.features.shape)}, images {list(images.shape)}"
        return TimedOp("fused_cam_erase", erase, shapes)

    def table(self, runs: Mapping[str, Mapping[str, Any]]) -> Table:
        table = Table(title="On test images")
        table.add_column("%")
        for run in runs.values():
            table.add_column(run["title"], justify="right")
        for key, row in ROWS.items():
            shares = [run[key] for run in runs.values()]
            table.add_row(row, *("-" if share is None else f"{100 * share:.1f}" for share in shares))
        table.add_section()
        times = (f"{run['ms_per_step']:.0f}" for run in runs.values())
        table.add_row("milliseconds, forward + backward", *times)
        return table

    def sentences(self, evaluations: Mapping[str, PclEvaluation], step_ms: Mapping[str, float]) -> list[str]:
        baseline, pcl = evaluations["baseline"], evaluations["pcl"]
        coverage = compare("Focus-area coverage", baseline.coverage, pcl.coverage)
        top1 = compare("Top-1", baseline.correct, pcl.correct)
        robust = compare(
            "With the peak of its own CAM erased, top-1", baseline.correct_erased, pcl.correct_erased
        )
        return [
            "The paper's claim for scenes is that PCL raises both focus-area coverage and top-1.",
            ": ".join(coverage) + ".",
            ": ".join(top1) + ".",
            f"{robust[0]}.",
            f"One run from one seed; the uncertainty is one standard error over {len(baseline.correct)} test "
            "images and leaves out that of training.",
            f"Both saw the same batches, but a step of PCL took {step_ms['pcl'] / step_ms['baseline']:.1f} "
            "times as long.",
        ]

    def save_picture(
        self,
        path: Path,
        pairs: Pairs,
        evaluations: Mapping[str, PclEvaluation],
        scenes: Scenes,
        standardise: Standardise,
    ) -> None:
        shown = standardise(scenes.images[:PICTURE_ROWS])
        save_grid(path, scenes, picture_columns(pairs, shown, standardise, self.options.threshold))


def compare(what: str, before: Tensor, after: Tensor) -> tuple[str, str]:
    """The change of a share in words, and whether it is the rise that the paper claims."""
    change, error = paired(before, after)
    before_mean, after_mean = (100 * x.double().mean().item() for x in (before, after))
    sentence = (
        f"{what} went from {before_mean:.1f} % to {after_mean:.1f} % "
        f"({100 * change:+.1f} ± {100 * error:.1f} points)"
    )
    return sentence, verdict(change, error)


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
def picture_columns(pairs: Pairs, images: Tensor, standardise: Standardise, threshold: float) -> list[Column]:
    """What each network looks at, then what the last method erases in training."""
    columns, erasing = [], []
    for network, method in pairs.values():
        activations = network.activations(images)
        prediction = network.classifier(activations.pooled).argmax(1)
        heat = fused_cam(activations.last, network.classifier.weight, prediction)
        columns.append(Column(f"{method.title}:\nCAM", heat=heat.cpu(), prediction=prediction.cpu()))
        if isinstance(method, PairwiseConsistency):
            source = method.cam_source(activations)
            erased, cam = fused_cam_erase(*source, prediction, images, threshold=threshold)
            ones = torch.ones_like(images[:, :1])
            kept = fused_cam_erase(*source, prediction, ones, threshold=threshold).erased
            erasing += [
                Column(f"{method.title} training:\nside branch's CAM", heat=cam.cpu()),
                Column("mask\n(black: erased)", pixels=kept[:, 0].cpu()),
                Column("erased image", pixels=standardise.back(erased)),
            ]
    return columns + erasing
