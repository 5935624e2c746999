"""Homogeneous negative CAMs: heatmaps of classes that an image does not show have no peaks."""

import torch
from torch import Tensor, nn

from camkernels import _checks
from camkernels.losses import _inputs
from camkernels.ops.negative_cam_loss import KINDS, loss_and_counts, positive_share


class HomogeneousNegativeCAMLoss(nn.Module):
    """Homogeneous negative CAM: the heatmaps of an image's most likely wrong classes must have no peaks.

        mse:     mean over images of the mean over negatives and pixels of (M - level)**2
        uniform: mean over images of the sum over negatives of KL(uniform || softmax(M / temperature)),
                 the softmax over pixels

    times ``weight``. ``M`` are the raw heatmaps, bias included, of an image's negatives: the
    ``num_negatives`` classes of largest logit among those that it does not show. 0 for an empty batch.

        criterion = HomogeneousNegativeCAMLoss(weight=0.07)
        logits = classifier(features.mean((-2, -1)))
        negative = criterion(features, classifier.weight, target, bias=classifier.bias, logits=logits)
        loss = F.cross_entropy(logits, target) + negative

    Args:
        weight: factor of the loss, not the classifier's weight; neither preset sets it. The released scripts
            for ImageNet have 0.07 for the mse kind; for the uniform kind, which adds up all negatives, 0.0065
            (ResNet-101) and 0.0048 (ResNet-152).
        num_negatives: at most so many per image; fewer where fewer are left, and an image with none adds 0.
            The released code has 100, of 1000 classes.
        kind: ``"mse"`` or ``"uniform"``. By default as ``preset`` says.
        level: what a map should be everywhere, for the mse kind only. The mean of a map is its logit on
            average-pooled features, so this is where the logits of negatives are drawn, too.
        temperature: of the softmax, for the uniform kind only; above 0.
        preset: ``"paper"`` or ``"official"``, the released code; see below.

    Call with:
        features: last feature maps, ``[N, C, H, W]``.
        weight: classifier weights, ``[L, C]`` or ``[L, C, 1, 1]``.
        target: class of each image, ``[N]``, int64 or int32; or ``[N, L]``, bool, integer or float, where a
            class whose entry is not 0 is no negative: 1 present, and -1 unknown. Soft labels, as of mixup or
            label smoothing, leave none: pass ``soft > 0.5``.
        bias: classifier bias, ``[L]``; give it where the classifier has one.
        logits: ``[N, L]``, whatever ranks the classes; None takes the mean of each map, which is the logit of
            a classifier on average-pooled features.

    Returns:
        A scalar. It is float32 for half types: raw heatmaps have squares that float16 cannot hold.

    Attributes:
        positive_share: a scalar tensor, for monitoring: the share, from 0 to 1, of pixels above 0 in the
            chosen heatmaps of the last call; None before the first, and after one inside a transform of
            ``torch.func`` or with fake tensors, which leave no numbers. It has no gradient, stays on the
            device, where only turning it into a number waits, and is not in the state dict; nor is it in an
            exported graph, which has no attributes.

    Gradients: ``features``, ``weight`` and ``bias``, that of the bias being 0 for the uniform kind; none to
        ``logits``.
    Numerics: as ``fused_negative_cam_loss``, which does the work.

    Where the presets differ:

    =======  ===================================  ==========================================================
    what     ``preset="paper"``                   ``preset="official"``
    =======  ===================================  ==========================================================
    kind     mse: peaks of the negative CAMs are  uniform, the kd of the released code
             to be small, as the abstract has it  (github.com/GuoleiSun/HNC_loss)
    =======  ===================================  ==========================================================

    The released training script has the mse kind too, at level 0: to train as it does, choose ``kind`` and
    ``weight``. The paper's formulas have not been compared, only its abstract.

    What neither preset does: the released uniform kind contains a constant, log(H * W) for each negative. The
    released code computes the heatmaps of all classes, takes 100 negatives or fails, knows one class per
    image only, and builds its index on the host at each step. It monitors how many pixels are above 0 in the
    heatmaps of all classes but the target, per image.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or option.
        IndexError: a class index outside [0, L) on the CPU; on a GPU the loss is NaN instead.

    Source: Sun et al., "Fixing Localization Errors to Improve Image Classification", ECCV 2020.
    """

    positive_share: Tensor | None

    def __init__(
        self,
        *,
        weight: float = 1.0,
        num_negatives: int = 100,
        kind: str | None = None,
        level: float = 0.0,
        temperature: float = 1.0,
        preset: str = "paper",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.preset = _checks.choice(name, "preset", preset, ("paper", "official"))
        default = "mse" if preset == "paper" else "uniform"
        self.kind = _checks.choice(name, "kind", default if kind is None else kind, KINDS)
        self.weight = _inputs.factor(name, "weight", weight)
        self.num_negatives = _checks.positive_int(name, "num_negatives", num_negatives)
        self.level = _checks.finite(name, "level", level)
        self.temperature = _checks.in_open_interval(
            name, "temperature", temperature, 0, torch.inf, "above 0 and finite"
        )
        self.positive_share = None

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        name = type(self).__name__
        features = _checks.features(name, features)
        weight = _checks.weight(name, weight, features)
        target = _checks.classes_or_multi_hot(name, target, features, weight)
        if target.dim() == 1:  # here, as kernels would name the function
            _checks.classes_in_range(name, target, weight.shape[0])
        loss, positive, counts = loss_and_counts(
            name,
            features,
            weight,
            target,
            bias,
            logits,
            self.num_negatives,
            self.kind,
            self.level,
            self.temperature,
        )
        if not torch.compiler.is_exporting():  # torch.export refuses a graph that sets an attribute
            share = positive_share(features, positive, counts)
            # A wrapper is dead after the call, and no module that holds one can be copied or saved.
            self.positive_share = share if _checks.is_plain(share) else None
        return self.weight * loss

    def extra_repr(self) -> str:
        of_kind = f"level={self.level:g}" if self.kind == "mse" else f"temperature={self.temperature:g}"
        return (
            f"weight={self.weight:g}, num_negatives={self.num_negatives}, kind={self.kind!r}, {of_kind}, "
            f"preset={self.preset!r}"
        )
