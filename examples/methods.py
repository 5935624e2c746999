"""Ways to train the network: each is a module with its own parameters and one ``loss``."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from network import WIDTHS, Activations, Network
from torch import Tensor, nn

from camkernels import fused_cam_erase
from camkernels.losses import PairwiseConsistencyLoss


class CamSource(NamedTuple):
    """What a class activation map is made of."""

    features: Tensor  # [N, C, H, W]
    weight: Tensor  # [L, C]


class Method(nn.Module, ABC):
    """What training adds to the network. Inference never needs it."""

    title: str

    def __init__(self, num_classes: int, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    @abstractmethod
    def loss(self, network: Network, images: Tensor, target: Tensor) -> Tensor:
        """The scalar to minimise for images [N, 3, S, S] and classes [N]."""

    def cam_source(self, activations: Activations) -> CamSource | None:
        """Where training takes its maps from, or None if it draws none."""
        return None


class CrossEntropy(Method):
    """The baseline."""

    title = "cross-entropy"

    def loss(self, network: Network, images: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(network(images), target)


class PairwiseConsistency(Method):
    """Pairwise consistency learning (PCL): Chen et al., NeurIPS 2021, eq. 1-3."""

    title = "PCL"

    def __init__(self, num_classes: int, threshold: float) -> None:
        super().__init__(num_classes, threshold)
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


METHODS: dict[str, type[Method]] = {"pcl": PairwiseConsistency}
