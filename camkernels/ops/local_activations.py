"""``fused_local_activations``: the best of several classifiers for each class and pixel."""

from typing import NamedTuple

import torch
from torch import Tensor

from camkernels import _checks, reference
from camkernels._op import Op
from camkernels._pass import Arguments, like, per_class


class LocalActivations(NamedTuple):
    """What ``fused_local_activations`` returns."""

    activations: Tensor  # [N, L + 1, H, W]
    attention: Tensor  # [N, H, W]


def fused_local_activations(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> LocalActivations:
    """Several linear classifiers at every pixel, the greatest of them for each class, and the greatest class.

        activations[n, l] = max_k (sum_c weight[k, l, c] * features[n, c] + bias[k, l])
        attention[n]      = max_{l < L} activations[n, l]

        activations, attention = fused_local_activations(features, weight, bias)

    The volume of all classifiers, ``[N, n * (L + 1), H, W]``, is never made: of each class and pixel only the
    winning activation and which classifier won, one byte, leave the kernel.

    Args:
        features: last feature maps, ``[N, C, H, W]``; NCHW or channels_last, read in place.
        weight: n classifiers, ``[n, L + 1, C]``, n from 1 to 256; the last class is the background. May have
            another float dtype. That of a 1 x 1 convolution is ``conv.weight.view(n, L + 1, C)``.
        bias: ``[n, L + 1]``.

    Returns:
        ``LocalActivations(activations, attention)``: ``[N, L + 1, H, W]`` and ``[N, H, W]``, contiguous, in
        the dtype of ``features``. ``attention`` is what ``otsu_mask`` splits into object and background.

    Gradients: ``features``, ``weight`` and ``bias``, of the winning classifier at each pixel and class; equal
        activations give it to the lowest classifier, equal classes of ``attention`` to the lowest class. No
        double backward but with backend ``"reference"``.
    Numerics: float32 inside (float64 for float64); a NaN wins; deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape or device.

    Source: Shen and Liu, "Generating Attention from Classifier Activations for Fine-grained Recognition",
    §4.2-4.3, eq. 1.
    """
    name = "fused_local_activations"
    features = _checks.features(name, features)
    weight = _checks.local_weight(name, weight, features)
    bias = _checks.local_bias(name, bias, weight)
    return LocalActivations(*LOCAL_ACTIVATIONS(name, features, weight, bias))


def _allocate(a: Arguments) -> None:
    """``winner`` [N, L + 1, H, W] is the classifier of each activation, ``attention_class`` [N, H, W] the
    class of each attention."""
    images, _, height, width = a.features.shape
    activations, attention = (images, a.weight.shape[1], height, width), (images, height, width)
    a.activations = a.features.new_empty(activations)
    a.attention = a.features.new_empty(attention)
    a.winner = a.features.new_empty(activations if a.keep else 0, dtype=torch.uint8)
    a.attention_class = a.features.new_empty(attention if a.keep else 0, dtype=torch.int32)


LOCAL_ACTIVATIONS = Op(
    "local_activations",
    "Tensor features, Tensor weight, Tensor? bias, bool keep",
    function="fused_local_activations",
    outputs="activations attention",
    kept="winner attention_class",
    allocate=_allocate,
    reference=reference.local_activations,
    backward="Tensor features, Tensor weight, Tensor? grad_activations, Tensor? grad_attention, "
    "Tensor winner, Tensor attention_class",
    gradients={"features": like("features"), "weight": like("weight"), "bias": per_class},
    backends=("reference", "cpu", "triton"),
)
