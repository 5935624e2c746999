"""``--method hnc``: training with and without homogeneous negative CAMs, on scenes of one class, then of
several, under attack and with wrong labels."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from digit_scenes import Scenes, digit_crops, digit_scenes, multi_label_scenes
from experiment import Evaluation, Experiment, Pairs, TimedOp
from findings import (
    compare_map,
    compare_right,
    mean_average_precision,
    paired,
    percent,
    resampled_error,
    verdict,
)
from network import Network
from option_types import above_zero, positive
from pictures import HeatRow, save_heat_rows
from rich.table import Table
from torch import Tensor
from training import Method, Stage, Standardise
from vac import CropClassification

from camkernels import fused_cam, fused_negative_cam_loss
from camkernels.losses import HomogeneousNegativeCAMLoss

CROP = 32
DIGIT_RATE = 0.1
ATTACKS = (2, 4)  # of 255 grey levels
RANDOM_LABELS = (20, 40)  # in % of the training images
PICTURE_IMAGES = 4
STRONGEST = 3
PER_PASS = 200  # images


class Classification(Method):
    """Cross-entropy, binary where a scene has several classes, and with a ``criterion`` homogeneous negative
    CAMs: Sun et al., ECCV 2020. ``random_labels`` % of the labels that it sees are drawn anew."""

    def __init__(
        self, title: str, criterion: HomogeneousNegativeCAMLoss | None = None, random_labels: int = 0
    ) -> None:
        super().__init__()
        self.title = f"{title}, {random_labels} % random labels" if random_labels else title
        self.criterion = criterion
        self.random_labels = random_labels

    def loss(self, network: Network, images: Tensor, target: Tensor) -> Tensor:
        activations = network.activations(images)
        classifier = network.classifier
        logits = classifier(activations.pooled)
        loss = classification_loss(logits, target)
        if self.criterion is not None:
            # The logits are the means of the maps, so nothing has to be summed to choose the negatives.
            loss = loss + self.criterion(
                activations.last, classifier.weight, target, bias=classifier.bias, logits=logits
            )
        return loss


def classification_loss(logits: Tensor, target: Tensor) -> Tensor:
    """``target`` is [N], one class each, or [N, L] of 0 and 1."""
    if target.dim() == 1:
        return F.cross_entropy(logits, target)
    return F.binary_cross_entropy_with_logits(logits, target.float())


def randomised(labels: Tensor, percentage: int, num_classes: int, seed: int) -> Tensor:
    """Labels [N], that share of them replaced by any class with equal chance, the true one included."""
    generator = torch.Generator().manual_seed(seed)
    hit = torch.randperm(len(labels), generator=generator)[: round(percentage * len(labels) / 100)]
    changed = labels.clone()
    changed[hit] = torch.randint(num_classes, (len(hit),), generator=generator)
    return changed


def fgsm(
    network: Network, pixels: Tensor, target: Tensor, standardise: Standardise, levels: Sequence[int]
) -> list[Tensor]:
    """The images [N, 3, S, S] as an attacker who knows the network sends them (fast gradient sign method,
    Goodfellow et al., ICLR 2015): every value moved by so many grey levels, float within 0 and 255, to where
    the classification loss rises. A value whose gradient is 0 stays."""
    given = pixels.float().requires_grad_()
    loss = classification_loss(network(standardise(given)), target)
    (gradient,) = torch.autograd.grad(loss, given)
    return [(pixels + level * gradient.sign()).clamp(0, 255) for level in levels]


@dataclass(frozen=True)
class HncEvaluation(Evaluation):
    """One network on the test images; the maps are raw, with the classifier's bias."""

    target: Tensor  # [N], or [N, L] of 0 and 1
    logits: Tensor  # [N, L]
    peaks: Tensor  # [N, L], the largest value of each map
    positive_share: float  # pixels above 0 in the negatives that the loss would choose
    attacked: Mapping[int, Tensor]  # logits for each of ATTACKS; nothing where none was made

    def present(self) -> Tensor:
        """[N, L] bool."""
        if self.target.dim() == 2:
            return self.target > 0
        return F.one_hot(self.target, self.logits.shape[1]) > 0

    def negative_peaks(self) -> Tensor:
        """[N], the mean over an image's negative classes."""
        return masked_mean(self.peaks, ~self.present())

    def positive_peaks(self) -> Tensor:
        """[N], the mean over an image's own classes."""
        return masked_mean(self.peaks, self.present())

    def peak_share(self, images: Tensor | None = None) -> float:
        """The mean peak of negative maps to that of positive ones, over these images or all."""
        chosen = slice(None) if images is None else images
        return (self.negative_peaks()[chosen].mean() / self.positive_peaks()[chosen].mean()).item()

    def summary(self) -> dict[str, float | None]:
        attacked = {
            f"score_fgsm_{level}": score(self.attacked[level], self.target) if self.attacked else None
            for level in ATTACKS
        }
        return {
            "score": score(self.logits, self.target),
            **attacked,
            "negative_peak": self.negative_peaks().mean().item(),
            "positive_peak": self.positive_peaks().mean().item(),
            "peak_share": self.peak_share(),
            "positive_share": self.positive_share,
        }


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[N] of [N, L]."""
    return (values * mask).sum(1) / mask.sum(1)


def score(logits: Tensor, target: Tensor) -> float:
    """Top-1, or where scenes have several classes mean average precision."""
    if target.dim() == 2:
        return mean_average_precision(logits.sigmoid(), target)
    return (logits.argmax(1) == target).double().mean().item()


def chance(target: Tensor, num_classes: int) -> float:
    """The score to expect of guesses."""
    if target.dim() == 2:
        return target[:, target.any(0)].double().mean().item()
    return 1 / num_classes


def score_change(before: Tensor, after: Tensor, target: Tensor) -> str:
    """From logits to logits [N, L] of the same images: the change in words, and whether it is the claimed
    rise."""
    if target.dim() == 2:
        return compare_map(before.sigmoid(), after.sigmoid(), target)
    return compare_right(before.argmax(1) == target, after.argmax(1) == target)


def peak_changes(before: HncEvaluation, after: HncEvaluation) -> list[str]:
    """The change of the peaks in words, and whether it is the claimed fall."""
    old, new = before.negative_peaks(), after.negative_peaks()
    change, error = paired(old, new)

    def change_of_share(images: Tensor | None = None) -> float:
        return after.peak_share(images) - before.peak_share(images)

    of_share, share_error = change_of_share(), resampled_error(change_of_share, len(old))
    distance = "beyond" if abs(of_share) > 2 * share_error else "within"
    positive_before, positive_after = (x.positive_peaks().mean().item() for x in (before, after))
    return [
        f"Mean peak of negative CAMs: from {old.mean().item():.2f} to {new.mean().item():.2f} "
        f"({change:+.2f} ± {error:.2f}): {verdict(-change, error)}.",
        f"Mean peak of positive CAMs: from {positive_before:.2f} to {positive_after:.2f}. The negative ones "
        f"in % of it: from {percent(before.peak_share())} to {percent(after.peak_share())} "
        f"({100 * of_share:+.1f} ± {100 * share_error:.2g} points, {distance} two standard errors).",
    ]


class HncExperiment(Experiment[HncEvaluation]):
    """What both kinds of scenes share; there is one start for each."""

    defaults: ClassVar = {
        "train_scenes": 1400,
        "epochs": 3,
        "learning_rate": 0.05,
        "weight_decay": 5e-4,
        "repeats": 3,
        "output": Path("demo-hnc"),
    }
    no_folder = "digits are cut from the scenes to learn first, and a folder has no boxes; use --method pcl"
    scene: ClassVar[str]  # what the test images show
    measure: ClassVar[str]
    baseline: ClassVar[str]  # title of training without the loss
    random_labels: ClassVar[Sequence[int]] = ()  # in %: both ways to train once more for each

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--digit-epochs", type=positive, default=4, help="on single digits, before all methods")
        add("--negatives", type=positive, default=3, help="classes per image whose maps are evened out")
        add("--kind", choices=("mse", "uniform"), default="mse", help="of the loss")
        add("--homogeneity", type=above_zero, default=0.01, help="weight of the loss")

    def criterion(self) -> HomogeneousNegativeCAMLoss:
        options = self.options
        return HomogeneousNegativeCAMLoss(
            weight=options.homogeneity, num_negatives=options.negatives, kind=options.kind
        )

    def methods(self, scenes: Scenes) -> dict[str, Method]:
        methods: dict[str, Method] = {}
        for percentage in (0, *self.random_labels):
            ending = f"_{percentage}" if percentage else ""
            methods[f"baseline{ending}"] = Classification(self.baseline, None, percentage)
            methods[f"hnc{ending}"] = Classification(f"{self.baseline} + HNC", self.criterion(), percentage)
        return methods

    def pretraining(self, scenes: Scenes) -> Sequence[Stage]:
        """Scenes are too hard for a start that has never seen a digit alone."""
        return [Stage(CropClassification(), digit_crops(scenes, CROP), self.options.digit_epochs, DIGIT_RATE)]

    def stage(self, method: Method, scenes: Scenes) -> Stage:
        assert isinstance(method, Classification)
        stage = super().stage(method, scenes)
        if not method.random_labels:
            return stage
        labels = randomised(scenes.labels, method.random_labels, len(scenes.classes), self.options.seed)
        return stage._replace(scenes=replace(scenes, labels=labels))

    def evaluate(
        self, network: Network, method: Method, scenes: Scenes, standardise: Standardise
    ) -> HncEvaluation:
        assert isinstance(method, Classification)
        network.eval()
        weight, bias = network.classifier.weight, network.classifier.bias
        features, logits = [], []
        attacked: dict[int, list[Tensor]] = {level: [] for level in ATTACKS if not method.random_labels}
        for pixels, labels in zip(scenes.images.split(PER_PASS), scenes.labels.split(PER_PASS), strict=True):
            pixels, labels = pixels.to(weight.device), labels.to(weight.device)
            with torch.no_grad():
                activations = network.activations(standardise(pixels))
                features.append(activations.last)
                logits.append(network.classifier(activations.pooled))
            if attacked:
                for level, images in zip(
                    ATTACKS, fgsm(network, pixels, labels, standardise, ATTACKS), strict=True
                ):
                    with torch.no_grad():
                        attacked[level].append(network(standardise(images)).cpu())
        with torch.no_grad():
            # In one call, so that the share is that of all images.
            all_features, all_logits = torch.cat(features), torch.cat(logits)
            maps = fused_cam(all_features, weight, bias=bias, normalize=False)  # [N, L, H, W]
            monitor = self.criterion()
            target = scenes.labels.to(weight.device)
            monitor(all_features, weight, target, bias=bias, logits=all_logits)
            assert monitor.positive_share is not None
        return HncEvaluation(
            target=scenes.labels,
            logits=all_logits.cpu(),
            peaks=maps.amax((2, 3)).cpu(),
            positive_share=monitor.positive_share.item(),
            attacked={level: torch.cat(parts) for level, parts in attacked.items()},
        )

    @torch.no_grad()
    def timed_op(self, pairs: Pairs, images: Tensor) -> TimedOp:
        options = self.options
        network, _ = pairs["hnc"]
        activations = network.activations(images)
        logits = network.classifier(activations.pooled)
        target = logits.argmax(1)
        features = activations.last.requires_grad_()
        weight, bias = network.classifier.weight, network.classifier.bias

        def forward_and_backward() -> None:
            with torch.enable_grad():
                loss = fused_negative_cam_loss(
                    features,
                    weight,
                    target,
                    bias=bias,
                    logits=logits,
                    num_negatives=options.negatives,
                    kind=options.kind,
                )
                torch.autograd.grad(loss, (features, weight))

        shapes = (
            f"features {list(features.shape)}, weight {list(weight.shape)}, {options.negatives} negatives, "
            f"{options.kind}, forward + backward"
        )
        return TimedOp("fused_negative_cam_loss", forward_and_backward, shapes)

    def table(self, runs: Mapping[str, Mapping[str, Any]]) -> Table:
        table = Table(
            title=f"On test images of {self.scene}",
            caption="peak: largest value of a raw CAM, bias included;\nmean over classes, then images",
        )
        table.add_column()
        pair = ("baseline", "hnc")
        for name in pair:
            table.add_column(runs[name]["title"], justify="right")

        def row(label: str, key: str, form: Callable[[float], str], ending: str = "") -> None:
            table.add_row(label, *(form(runs[f"{name}{ending}"][key]) for name in pair))

        row(f"{self.measure}, %", "score", percent)
        table.add_section()
        row("peak of negative CAMs", "negative_peak", "{:.2f}".format)
        row("  in % of that of positive CAMs", "peak_share", percent)
        row(
            f"pixels above 0 in the {self.options.negatives} likeliest negatives, %",
            "positive_share",
            percent,
        )
        table.add_section()
        for level in ATTACKS:
            row(f"{self.measure} under FGSM, {level}/255, %", f"score_fgsm_{level}", percent)
        if self.random_labels:
            table.add_section()
        for percentage in self.random_labels:
            row(f"{self.measure}, {percentage} % random labels, %", "score", percent, f"_{percentage}")
        table.add_section()
        row("ms per step", "ms_per_step", "{:.0f}".format)
        return table

    def sentences(self, evaluations: Mapping[str, HncEvaluation], step_ms: Mapping[str, float]) -> list[str]:
        options = self.options
        baseline, hnc = evaluations["baseline"], evaluations["hnc"]
        target = baseline.target
        told = [
            "The paper's claims are that HNC lowers the peaks of negative CAMs and raises accuracy, under "
            "attack and with wrong labels too. With HNC against without:",
            *peak_changes(baseline, hnc),
            f"{self.measure}: {score_change(baseline.logits, hnc.logits, target)}.",
        ]
        for level in ATTACKS:
            change = score_change(baseline.attacked[level], hnc.attacked[level], target)
            told.append(f"{self.measure} under FGSM of {level}/255: {change}.")
        for percentage in self.random_labels:
            before, after = (evaluations[f"{name}_{percentage}"].logits for name in ("baseline", "hnc"))
            change = score_change(before, after, target)
            told.append(f"{self.measure} after {percentage} % random labels: {change}.")
        told.append(
            f"Guessing would come to {percent(chance(target, baseline.logits.shape[1]))} %: what lies below "
            "says little."
        )
        if self.random_labels:
            told.append(
                "Random labels are drawn from all classes, the true one included, and are the same for both; "
                "the start had seen single digits with right labels."
            )
        told += [
            f"One run from one seed; uncertainties are one standard error over {len(target)} test images, "
            "that of mAP and of the share of peaks by resampling them, and leave out that of training.",
            f"The loss had the kind {options.kind}, {options.negatives} negatives and the weight "
            f"{options.homogeneity:g}.",
            "All started from one network, trained on single digits, and saw the same batches; a step with "
            f"HNC took {step_ms['hnc'] / step_ms['baseline']:.2f} times as long as one without.",
        ]
        return told

    @torch.no_grad()
    def save_picture(
        self,
        path: Path,
        pairs: Pairs,
        evaluations: Mapping[str, HncEvaluation],
        scenes: Scenes,
        standardise: Standardise,
    ) -> None:
        """Each network's own strongest negative CAMs; one colour scale per image, from 0 or less to the
        highest peak shown."""
        images = standardise(scenes.images[:PICTURE_IMAGES])
        image = torch.arange(len(images))[:, None]
        strongest, maps = {}, {}
        for name in ("baseline", "hnc"):
            network = pairs[name][0].eval()
            classifier = network.classifier
            all_maps = fused_cam(
                network.activations(images).last, classifier.weight, bias=classifier.bias, normalize=False
            ).cpu()  # [R, L, H, W]
            evaluation = evaluations[name]
            negative = ~evaluation.present()[: len(images)]
            peaks = evaluation.peaks[: len(images)].where(negative, -torch.inf)
            strongest[name] = peaks.topk(STRONGEST)  # [R, 3]
            maps[name] = all_maps[image, strongest[name].indices]  # [R, 3, H, W]
        highest = torch.cat([x.values for x in strongest.values()], 1).amax(1).clamp_min(1e-6)  # [R]
        rows = [
            HeatRow(
                pairs[name][1].title,
                (maps[name] / highest[:, None, None, None]).clamp(0, 1).unbind(1),
                [
                    [f"{scenes.classes[k]}: {peak:.1f}" for k, peak in zip(*column, strict=True)]
                    for column in zip(
                        strongest[name].indices.T.tolist(), strongest[name].values.T.tolist(), strict=True
                    )
                ],
            )
            for name in maps
        ]
        labels = [
            row.nonzero().flatten().tolist() for row in evaluations["baseline"].present()[: len(images)]
        ]
        notes = [
            "\n".join(
                [
                    "mean peak of its",
                    "labels' CAMs:",
                    *(
                        f"{pairs[name][1].title}: {evaluations[name].positive_peaks()[i].item():.1f}"
                        for name in maps
                    ),
                ]
            )
            for i in range(len(images))
        ]
        headings = ["strongest negative: its peak", "second", "third"]
        save_heat_rows(path, scenes, labels, headings, rows, notes)


class SingleLabelHnc(HncExperiment):
    title = "HNC"
    folder = "single-label"
    scene = "one class each"
    measure = "top-1"
    baseline = "CE"
    random_labels = RANDOM_LABELS

    def scenes(self) -> tuple[Scenes, Scenes]:
        options = self.options
        return digit_scenes(options.train_scenes, options.test_scenes, options.seed)


class MultiLabelHnc(HncExperiment):
    title = "HNC"
    folder = "multi-label"
    scene = "several classes each"
    measure = "mAP"
    baseline = "BCE"

    def scenes(self) -> tuple[Scenes, Scenes]:
        options = self.options
        return multi_label_scenes(options.train_scenes, options.test_scenes, options.seed)
