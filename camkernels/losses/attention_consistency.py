"""Visual attention consistency: heatmaps follow the transform of their image."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from camkernels import _checks
from camkernels.losses import _inputs
from camkernels.ops.cam_transform_mse import mean_squares
from camkernels.transforms import Scale, Transform


class AttentionConsistency(NamedTuple):
    """What ``AttentionConsistencyLoss`` returns."""

    total: Tensor  # scalar
    parts: tuple[Tensor, ...]  # one scalar for each transform, before its factor


class AttentionConsistencyLoss(nn.Module):
    """Visual attention consistency: heatmaps of all labels must follow the transform of their image.

        total = sum over transforms of factor * mean((T(M) - M')**2)

    ``M`` are the heatmaps of the images and ``M'`` those of the transformed images, by the weight of the
    linear classifier; the mean is over images, labels and valid cells, and 0 for an empty batch.

        flip, scale = HorizontalFlip(), Scale((192, 192))
        criterion = AttentionConsistencyLoss([flip, scale])
        features, features_t = backbone(images), [backbone(flip(images)), backbone(scale(images))]
        consistency = criterion(features, features_t, classifier.weight)
        loss = classification_loss + consistency.total

    Args:
        transform: one of ``camkernels.transforms``, or a sequence of them.
        factors: weight of each part, one number for each transform; 1 if not given. The released script for
            MS-COCO has 0.6 for a flip and 0.8 for scaling. Raw heatmaps have no bound: where they are
            large, a network trained from scratch needs less.
        preset: ``"paper"`` or ``"official"``, the released code; see below.

    Call with:
        features: last feature maps of the images, ``[N, C, H, W]``.
        features_t: those of the transformed images: a tensor, or a sequence with one for each transform.
        weight: classifier weights, ``[L, C]`` or ``[L, C, 1, 1]``.

    Returns:
        ``AttentionConsistency(total, parts)``: scalars, the parts in the order of the transforms. They are
        float32 for half types: raw heatmaps have squares that float16 cannot hold.

    Gradients: ``features`` and ``features_t``; ``weight`` with ``preset="paper"``.
    Numerics: as ``fused_cam_transform_mse``, which does the work.

    Where paper and released code (github.com/hguosc/visual_attention_consistency) differ:

    =====================  ====================================  ==========================================
    what                   ``preset="paper"``                    ``preset="official"``
    =====================  ====================================  ==========================================
    gradient to weight     yes: eq. 1 and 5 make no exception    no: heatmaps use the detached weight
    maps on common grid    by the ``mode`` of ``Scale``; the     nearest; another ``mode`` is an error
                           text only says upscaled
    =====================  ====================================  ==========================================

    What neither preset does, because it is a misprint, an accident or not this loss's part: eq. 5 prints a
    norm without its square, though the text says mean square and the code takes ``F.mse_loss``. The released
    flip samples a grid that reaches from the first to the last cell's centre, which is a flip only with
    ``align_corners=True``, no longer the default of ``grid_sample``; flips are exact here. The released
    script also flips the scaled images: it compares them with the scaled ones, and scaling for the flipped
    images too. Its classification loss is over all versions of the images; eq. 2 names the images.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device, number of tensors or option.

    Source: Guo et al., CVPR 2019, eq. 5 and 7, §3.3.
    """

    def __init__(
        self,
        transform: Transform | Sequence[Transform],
        *,
        factors: Sequence[float] | None = None,
        preset: str = "paper",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.preset = _checks.choice(name, "preset", preset, ("paper", "official"))
        self.transforms = _transforms(name, transform)
        self.factors = _factors(name, factors, len(self.transforms))
        for item in self.transforms:
            if preset == "official" and isinstance(item, Scale) and item.mode != "nearest":
                raise ValueError(
                    f"{name}: transform has a Scale of mode {item.mode!r}; preset='official' allows 'nearest'"
                )

    def forward(
        self, features: Tensor, features_t: Tensor | Sequence[Tensor], weight: Tensor
    ) -> AttentionConsistency:
        name = type(self).__name__
        parts = []
        for transform, moved in zip(self.transforms, self._pairs(features_t), strict=True):
            detach_weight = self.preset == "official"
            means = mean_squares(name, features, moved, weight, transform, detach_weight)  # [N, L]
            parts.append(means.sum() / max(means.numel(), 1))
        total = sum(factor * part for factor, part in zip(self.factors, parts, strict=True))
        assert isinstance(total, Tensor)  # there is at least one part
        return AttentionConsistency(total, tuple(parts))

    def _pairs(self, features_t: object) -> Sequence[Tensor]:
        """One tensor for each transform."""
        name, count = type(self).__name__, len(self.transforms)
        allowed = "a tensor" if count == 1 else f"a sequence of {count} tensors, one for each transform"
        if isinstance(features_t, Tensor):
            if count != 1:
                raise TypeError(f"{name}: features_t is a Tensor; it must be {allowed}")
            return (features_t,)
        if not isinstance(features_t, Sequence) or isinstance(features_t, str):
            raise TypeError(f"{name}: features_t is a {type(features_t).__name__}; it must be {allowed}")
        if len(features_t) != count:
            raise ValueError(f"{name}: features_t has {len(features_t)} tensors; it must be {allowed}")
        return features_t

    def extra_repr(self) -> str:
        transforms = ", ".join(map(repr, self.transforms))
        factors = ", ".join(f"{factor:g}" for factor in self.factors)
        return f"[{transforms}], factors=[{factors}], preset={self.preset!r}"


def _transforms(function: str, value: object) -> tuple[Transform, ...]:
    allowed = "one of camkernels.transforms, or a sequence of them"
    if isinstance(value, Transform):
        return (value,)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{function}: transform is a {type(value).__name__}; it must be {allowed}")
    if len(value) == 0:
        raise ValueError(f"{function}: transform is empty; it must be {allowed}")
    for item in value:
        if not isinstance(item, Transform):
            raise TypeError(f"{function}: transform holds a {type(item).__name__}; it must be {allowed}")
    return tuple(value)


def _factors(function: str, value: object, count: int) -> tuple[float, ...]:
    allowed = f"{count} numbers, one for each transform"
    if value is None:
        return (1.0,) * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{function}: factors is a {type(value).__name__}; it must be {allowed}")
    if len(value) != count:
        raise ValueError(f"{function}: factors has {len(value)} numbers; it must be {allowed}")
    return tuple(_inputs.factor(function, f"factors[{i}]", item) for i, item in enumerate(value))
