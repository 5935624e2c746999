"""``--method dla``: attention from the activations of local classifiers, on scenes of one small digit, at two
or more scales."""

import argparse
import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from digit_scenes import SIZE, Box, Scenes, fine_grained_pictures, fine_grained_scenes
from experiment import Evaluation, Experiment, Pairs, TimedOp
from findings import compare_right, percent
from network import Network
from option_types import above_zero, at_least, positive
from pictures import Column, save_grid
from rich.table import Table
from torch import Tensor, nn
from training import Method, Stage, Standardise

from camkernels import attention_boxes, crop_and_zoom, fused_local_activations, masked_max_pool, otsu_mask
from camkernels.losses import LocalLevelLoss
from camkernels.metrics import box_iou

LAST_WIDTH = 128
PICTURE_RATE = 0.05
# Of the usual start of a linear layer: features after the last ReLU are large, and their maxima larger.
SMALL = 0.1
MARGIN = 0.1  # around an attended box, in units of its longer side
PAPER_IOU = 0.54
PICTURE_IMAGES = 4
OVER_SCALES = "_over_scales"  # ends the keys of what several scales say together
PER_PASS = 200  # images


class Pictures(Method):
    """What the start of all learns: digits alone, from the mean of the features."""

    title = "digits alone (all)"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(LAST_WIDTH, num_classes)

    def loss(self, network: Network, images: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(network.activations(images).pooled), target)


class Predictions(NamedTuple):
    """What one network says of images at one scale."""

    local: Tensor | None  # [N, L] probabilities from the means of the activations; None where not trained
    of_object: Tensor | None  # [N, L] probabilities from the pooled features; the same
    attention: Tensor | None = None  # [N, H, W]
    mask: Tensor | None = None  # [N, H, W] bool

    def averaged(self) -> Tensor:
        """[N, L], §4.4.3 for one scale."""
        return torch.stack([x for x in (self.local, self.of_object) if x is not None]).mean(0)


class Recognition(Method):
    """A way to name the object, at one scale."""

    scale: int = 1
    leads: bool = False  # to another scale, which sees what this one attends to

    @abstractmethod
    def predict(self, network: Network, images: Tensor) -> Predictions:
        """Of images as the network takes them."""


class MaxPooling(Recognition):
    """The baseline: the strongest response of each channel in the whole image, §5.3."""

    def __init__(self, title: str, classifier: nn.Linear) -> None:
        super().__init__()
        self.title = title
        self.classifier = classifier

    def logits(self, network: Network, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(network.activations(images).last.amax((-2, -1)))
        return logits

    def loss(self, network: Network, images: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(network, images), target)

    def predict(self, network: Network, images: Tensor) -> Predictions:
        return Predictions(None, self.logits(network, images).softmax(1))


class Attended(NamedTuple):
    """One pass of a network and its classifiers."""

    activations: Tensor  # [N, L + 1, H, W], background last
    attention: Tensor  # [N, H, W]
    mask: Tensor  # [N, H, W] bool
    logits: Tensor  # [N, L], of the object


class LocalClassifiers(nn.Module):
    """n linear classifiers of L classes and background for each pixel of the features."""

    def __init__(self, count: int, num_classes: int) -> None:
        super().__init__()
        bound = SMALL / LAST_WIDTH**0.5
        self.weight = nn.Parameter(torch.empty(count, num_classes + 1, LAST_WIDTH).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(count, num_classes + 1))


class ClassifierActivations(Recognition):
    """Local classifiers, whose attention gives their own mask, and a classifier of what lies in it: Shen and
    Liu, eq. 6. A factor of 0 leaves out one of the two losses."""

    def __init__(
        self,
        title: str,
        local: LocalClassifiers,
        classifier: nn.Linear,
        *,
        scale: int = 1,
        leads: bool = False,
        local_factor: float = 1.0,
        object_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.title = title
        self.local = local
        self.classifier = classifier
        self.scale, self.leads = scale, leads
        self.local_factor, self.object_factor = local_factor, object_factor
        self.local_loss = LocalLevelLoss()

    def attend(self, network: Network, images: Tensor) -> Attended:
        features = network.activations(images).last
        activations, attention = fused_local_activations(features, self.local.weight, self.local.bias)
        mask = otsu_mask(attention).mask
        logits = self.classifier(masked_max_pool(features, mask))
        return Attended(activations, attention, mask, logits)

    def loss(self, network: Network, images: Tensor, target: Tensor) -> Tensor:
        activations, _, mask, logits = self.attend(network, images)
        loss: Tensor = self.local_factor * self.local_loss(activations, mask, target)
        return loss + self.object_factor * F.cross_entropy(logits, target)

    def predict(self, network: Network, images: Tensor) -> Predictions:
        activations, attention, mask, logits = self.attend(network, images)
        means = activations[:, :-1].mean((-2, -1))  # [N, L], background left out
        return Predictions(
            means.softmax(1) if self.local_factor else None,
            logits.softmax(1) if self.object_factor else None,
            attention,
            mask,
        )


@torch.no_grad()
def predict(network: Network, method: Recognition, scenes: Scenes, standardise: Standardise) -> Predictions:
    """All images, on the CPU."""
    network.eval()
    parts = [method.predict(network, standardise(pixels)) for pixels in scenes.images.split(PER_PASS)]
    return Predictions(
        *(None if column[0] is None else torch.cat(column).cpu() for column in zip(*parts, strict=True))
    )


def inside(outer: Tensor, inner: Tensor) -> Tensor:
    """Boxes [N, 4] given as fractions of other boxes, as fractions of what those are fractions of."""
    corner, size = outer[:, :2], outer[:, 2:] - outer[:, :2]
    return torch.cat([corner + inner[:, :2] * size, corner + inner[:, 2:] * size], 1)


def within(outer: Tensor, boxes: Tensor) -> Tensor:
    """The other way round: boxes as fractions of ``outer``, what lies outside cut off."""
    corner, size = outer[:, :2], outer[:, 2:] - outer[:, :2]
    return torch.cat([(boxes[:, :2] - corner) / size, (boxes[:, 2:] - corner) / size], 1).clamp(0, 1)


def in_pixels(boxes: Tensor) -> list[Box]:
    """Of images of SIZE x SIZE."""
    return [(left, top, right, bottom) for left, top, right, bottom in (SIZE * boxes).round().int().tolist()]


def normalised(maps: Tensor) -> Tensor:
    """[N, H, W], each from 0 to 1."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-6)


def squared(boxes: Tensor) -> Tensor:
    """The smallest square around each box and its margin, moved or cut to lie in the image: [N, 4]. A box as
    it is would be stretched, and a digit with it."""
    low, high = boxes[:, :2], boxes[:, 2:]
    side = ((1 + 2 * MARGIN) * (high - low).amax(1, keepdim=True)).clamp_max(1)
    corner = ((low + high - side) / 2).clamp_min(0)
    corner = torch.minimum(corner, 1 - side)
    return torch.cat([corner, corner + side], 1)


def whole(images: Tensor) -> Tensor:
    """[N, 4]"""
    return torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(images), 1)


def true_boxes(scenes: Scenes) -> Tensor:
    """[N, 4], fractions of the image."""
    assert scenes.boxes is not None
    return torch.tensor([box for (box,) in scenes.boxes]) / scenes.images.shape[-1]


@dataclass(frozen=True)
class View:
    """What one scale sees of the scenes."""

    original: Scenes  # of higher resolution than any scale sees whole
    boxes: Tensor  # [N, 4], fractions of the original
    device: torch.device

    def seen(self) -> Scenes:
        """The boxes, each as an image of SIZE x SIZE."""
        parts = zip(self.original.images.split(PER_PASS), self.boxes.split(PER_PASS), strict=True)
        zoomed = [
            crop_and_zoom(pixels.to(self.device).float(), boxes.to(self.device), SIZE).round().byte().cpu()
            for pixels, boxes in parts
        ]
        return Scenes(torch.cat(zoomed), self.original.labels, self.original.classes)

    def first(self, count: int) -> "View":
        """Of the first images only."""
        images, labels = self.original.images[:count], self.original.labels[:count]
        original = replace(self.original, images=images, labels=labels)
        return replace(self, original=original, boxes=self.boxes[:count])

    def attended(self, mask: Tensor) -> Tensor:
        """The boxes of masks of what is seen: [N, 4], fractions of the original."""
        return inside(self.boxes, attention_boxes(mask.to(self.device)).cpu())

    def closer(self, mask: Tensor) -> "View":
        """What the next scale sees."""
        return replace(self, boxes=squared(self.attended(mask)))


@dataclass(frozen=True)
class DlaEvaluation(Evaluation):
    target: Tensor  # [N]
    scales: Sequence[Predictions]  # of this network, after those of the scales before
    boxes: Tensor | None  # [N, 4] attended, as fractions of the image; the baseline has none
    truth: Tensor  # [N, 4]

    def right(self, kind: str, over_scales: bool = False) -> Tensor | None:
        """[N] bool, of "local", "object" or "averaged" predictions: of this scale, or by the mean of the
        probabilities of all so far. Nothing where there are none."""
        told = []
        for scale in self.scales if over_scales else self.scales[-1:]:
            given = {"local": scale.local, "object": scale.of_object, "averaged": scale.averaged()}[kind]
            if given is None:
                return None
            told.append(given)
        return torch.stack(told).mean(0).argmax(1) == self.target

    def iou(self) -> float | None:
        return None if self.boxes is None else box_iou(self.boxes, self.truth).mean().item()

    def summary(self) -> dict[str, float | None]:
        numbers = {}
        for ending in ("", OVER_SCALES):
            for kind in ("local", "object", "averaged"):
                right = self.right(kind, over_scales=bool(ending))
                numbers[kind + ending] = None if right is None else right.double().mean().item()
        return {**numbers, "iou": self.iou()}


class DlaExperiment(Experiment[DlaEvaluation]):
    title = "DLA"
    defaults: ClassVar = {
        "train_scenes": 1600,
        "epochs": 3,
        "batch_size": 16,
        "learning_rate": 0.003,
        "weight_decay": 5e-4,
        "repeats": 5,
        "output": Path("demo-dla"),
    }
    no_folder = "a folder has no boxes to compare the attention with; use --method pcl"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        # One of each for every scale that is known so far.
        self.train_views: list[View] = []
        self.test_views: list[View] = []
        self.predictions: list[Predictions] = []  # of test scenes, for scales that lead to another
        self.before: dict[Method, Method] = {}  # of those that go on from another's network and classifiers
        self.networks: dict[Method, Network] = {}  # trained so far

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--pictures", type=at_least(20), default=2500, help="of single digits, learnt before the scenes")
        add("--picture-epochs", type=positive, default=5, help="on these")
        add("--classifiers", type=positive, default=16, help="local ones, n of the paper")
        add("--scales", type=at_least(2), default=2, help="trained one after the other, at least 2")
        add("--local", type=above_zero, default=4.0, help="weight of the local loss; 1 in eq. 6")

    def scenes(self) -> tuple[Scenes, Scenes]:
        options = self.options
        parts = fine_grained_scenes(options.train_scenes, options.test_scenes, options.seed)
        train, test = (View(part, whole(part.images), options.device) for part in parts)
        self.train_views, self.test_views = [train], [test]
        return train.seen(), test.seen()

    def network(self, num_classes: int) -> Network:
        """With features of 12 x 12. What classifies them comes with the method."""
        network = Network(num_classes, LAST_WIDTH, last_stride=1)
        network.classifier.requires_grad_(False)
        return network

    def methods(self, scenes: Scenes) -> dict[str, Method]:
        options = self.options
        num_classes = len(scenes.classes)
        local = LocalClassifiers(options.classifiers, num_classes)
        classifier = nn.Linear(LAST_WIDTH, num_classes)
        with torch.no_grad():
            classifier.weight.mul_(SMALL)

        def attentive(title: str, **settings: Any) -> ClassifierActivations:
            settings = {"local_factor": options.local, **settings}
            return ClassifierActivations(title, copy.deepcopy(local), copy.deepcopy(classifier), **settings)

        baseline, longer = (MaxPooling(x, copy.deepcopy(classifier)) for x in ("max-pool", "longer"))
        methods: dict[str, Method] = {"baseline": baseline, "longer": longer}
        self.before = {longer: baseline}
        for scale in range(1, options.scales + 1):
            leads = scale < options.scales
            methods[f"scale_{scale}"] = attentive(f"scale {scale}", scale=scale, leads=leads)
            if scale > 1:
                self.before[methods[f"scale_{scale}"]] = methods[f"scale_{scale - 1}"]
        methods["local_only"] = attentive("local only", object_factor=0.0)
        methods["object_only"] = attentive("object only", local_factor=0.0)
        return methods

    def pretraining(self, scenes: Scenes) -> Sequence[Stage]:
        """Pictures of digits, as the paper's start knows ImageNet."""
        options = self.options
        pictures = fine_grained_pictures(options.pictures, options.seed)
        return [Stage(Pictures(len(scenes.classes)), pictures, options.picture_epochs, PICTURE_RATE)]

    def stage(self, method: Method, scenes: Scenes) -> Stage:
        assert isinstance(method, Recognition)
        seen = scenes if method.scale == 1 else self.train_views[method.scale - 1].seen()
        stage = super().stage(method, seen)
        if isinstance(self.before.get(method), MaxPooling):  # for as long as all scales together
            return stage._replace(epochs=stage.epochs * (self.options.scales - 1))
        return stage

    def start(self, method: Method, start: Network) -> Network:
        """A later scale goes on from the one before: few scenes teach little more to a fresh start."""
        former = self.before.get(method)
        if former is None:
            return start
        method.load_state_dict(former.state_dict())
        return self.networks[former]

    def trained(self, network: Network, stage: Stage, standardise: Standardise) -> None:
        method = stage.method
        self.networks[method] = network
        if isinstance(method, Recognition) and method.leads:
            mask = predict(network, method, stage.scenes, standardise).mask
            assert mask is not None
            self.train_views.append(self.train_views[-1].closer(mask))

    def evaluate(
        self, network: Network, method: Method, scenes: Scenes, standardise: Standardise
    ) -> DlaEvaluation:
        assert isinstance(method, Recognition)
        view = self.test_views[method.scale - 1]
        seen = scenes if method.scale == 1 else view.seen()
        told = predict(network, method, seen, standardise)
        if method.leads:
            assert told.mask is not None
            self.test_views.append(view.closer(told.mask))
            self.predictions.append(told)
        return DlaEvaluation(
            target=scenes.labels,
            scales=[*self.predictions[: method.scale - 1], told],
            boxes=None if told.mask is None else view.attended(told.mask),
            truth=true_boxes(view.original),
        )

    @torch.no_grad()
    def timed_op(self, pairs: Pairs, images: Tensor) -> TimedOp:
        network, method = pairs["scale_1"]
        assert isinstance(method, ClassifierActivations)
        features = network.activations(images).last.requires_grad_()
        weight, bias = method.local.weight, method.local.bias

        def forward_and_backward() -> None:
            with torch.enable_grad():
                activations, attention = fused_local_activations(features, weight, bias)
                loss = activations.mean() + attention.mean()
                torch.autograd.grad(loss, (features, weight, bias))

        shapes = f"features {list(features.shape)}, weight {list(weight.shape)}, forward + backward"
        return TimedOp("fused_local_activations", forward_and_backward, shapes)

    def table(self, runs: Mapping[str, Mapping[str, Any]]) -> Table:
        table = Table(
            title="Accuracy on test images, %",
            caption="longer: max-pool, trained for as long as all scales together;\n"
            "all but later scales see the whole scene;\n"
            f"IoU of attended and true box, {PAPER_IOU} in the paper (CUB, scale 1)",
        )
        table.add_column()
        last = runs[f"scale_{self.options.scales}"]
        columns = [(run["title"], run, "") for run in runs.values()]
        columns.insert(2 + self.options.scales, ("all scales", last, OVER_SCALES))  # after the last scale
        for title, _, _ in columns:
            table.add_column(title.replace(" ", "\n").replace("-", "-\n"), justify="right")

        def row(label: str, key: str, form: Callable[[float], str], over_scales: bool) -> None:
            cells = []
            for _, run, ending in columns:
                value = None if ending and not over_scales else run[key + ending]
                cells.append("-" if value is None else form(value))
            table.add_row(label, *cells)

        for kind in ("local", "object", "averaged"):
            row(kind, kind, percent, over_scales=True)
        table.add_section()
        row("mean IoU", "iou", "{:.2f}".format, over_scales=False)
        row("ms per step", "ms_per_step", "{:.0f}".format, over_scales=False)
        return table

    def sentences(self, evaluations: Mapping[str, DlaEvaluation], step_ms: Mapping[str, float]) -> list[str]:
        options = self.options
        baseline, first = evaluations["baseline"], evaluations["scale_1"]
        scales = [evaluations[f"scale_{scale}"] for scale in range(1, options.scales + 1)]
        over_scales = scales[-1].right("averaged", over_scales=True)
        single = first.right("averaged")
        told = [
            "The paper's claims are that several scales are better than one and than max-pooling, both "
            "predictions better than the object's alone, and both losses better than either (tables 2-6).",
        ]

        def claim(words: str, before: Tensor | None, after: Tensor | None) -> None:
            assert before is not None
            assert after is not None
            told.append(f"{words}: {compare_right(before, after)}.")

        claim("Scale 1 against max-pooling", baseline.right("object"), single)
        longer = evaluations["longer"].right("object")
        claim("All scales against max-pooling trained for as long as they", longer, over_scales)
        last = len(scales)
        claim(
            f"All scales, an average of {last} networks, against scale {last}, one that trained for as long",
            scales[-1].right("averaged"),
            over_scales,
        )
        accuracies = (single, over_scales, baseline.right("object"), longer)
        old, new, short, long = (
            "-" if right is None else percent(right.double().mean().item()) for right in accuracies
        )
        told.append(
            f"Scale 1 alone comes to {old} % and all scales to {new} %, after {last} times its training; by "
            f"longer training alone max-pooling went from {short} % to {long} %. Max-pooling on the crops of "
            "later scales, the paper's other baseline, was not trained."
        )
        for number, scale in enumerate(scales, 1):
            averaged = scale.right("averaged")
            claim(f"Scale {number}, averaged against the object's", scale.right("object"), averaged)
        for kind in ("local", "object"):
            alone = evaluations[f"{kind}_only"].right(kind)
            claim(f"Scale 1 with both losses against the {kind} loss only", alone, single)
        iou, of_whole = first.iou(), box_iou(whole(first.truth), first.truth).mean().item()
        told += [
            f"The first scale's attended box and the true one have a mean IoU of {iou:.2f}; the whole image "
            f"would have {of_whole:.2f}. The paper has {PAPER_IOU}, on photographs of birds.",
            f"One run from one seed; uncertainties are one standard error over {len(baseline.target)} test "
            "images and leave out that of training.",
            f"{options.classifiers} local classifiers; the local loss had the weight {options.local:g}, that "
            "of eq. 6 is 1.",
            "All started from one network, trained on single digits; later scales went on from the one "
            "before them, as max-pooling did to train for longer. A step of the first scale took "
            f"{step_ms['scale_1'] / step_ms['baseline']:.2f} times as long as the baseline's.",
        ]
        return told

    def save_picture(
        self,
        path: Path,
        pairs: Pairs,
        evaluations: Mapping[str, DlaEvaluation],
        scenes: Scenes,
        standardise: Standardise,
    ) -> None:
        """For each scale its attention over what it sees, and its mask with its box and the true one."""
        truth = evaluations["scale_1"].truth[:PICTURE_IMAGES]
        predictions = evaluations[f"scale_{self.options.scales}"].scales
        columns = []
        for number, (view, told) in enumerate(zip(self.test_views, predictions, strict=True), 1):
            view = view.first(PICTURE_IMAGES)
            assert told.attention is not None
            assert told.mask is not None
            attention, mask = told.attention[:PICTURE_IMAGES], told.mask[:PICTURE_IMAGES]
            seen = view.seen().images / 255
            if number > 1:
                columns.append(Column(f"scale {number}", pixels=seen))
            columns += [
                Column(
                    "attention",
                    heat=normalised(attention),
                    pixels=seen,
                    prediction=told.averaged()[:PICTURE_IMAGES].argmax(1),
                ),
                Column(
                    "mask, its box",
                    pixels=F.interpolate(mask[:, None].float(), (SIZE, SIZE))[:, 0],
                    true_boxes=in_pixels(within(view.boxes, truth)),
                    boxes=in_pixels(attention_boxes(mask)),
                ),
            ]
        true = tuple((box,) for box in in_pixels(truth))
        save_grid(path, replace(scenes, boxes=true), columns)
