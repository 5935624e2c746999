"""Cross-entropy of multi-label images, each label weighted by how rare it is."""

from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkernels.losses import _inputs
from camkernels.ops import _checks


class WeightedBCEWithLogits(nn.Module):
    """Weighted sigmoid cross-entropy of multi-label images, from logits.

        loss = mean over images of the sum over labels of
               exp(1 - p) * -log sigmoid(x)    where the label is present
               exp(p) * -log sigmoid(-x)       where it is absent

    with ``x`` the logit and ``p`` the share of training images that have the label; 0 for an empty batch.

        criterion = WeightedBCEWithLogits(train_labels.float().mean(0))
        loss = criterion(logits, labels)

    Args:
        positive_ratio: ``p`` of each label, ``[L]``, a tensor or a sequence of numbers in [0, 1]. Kept, as a
            copy, in the buffer ``positive_ratio`` and so in the state dict.

    Call with:
        logits: ``[N, L]``.
        target: ``[N, L]`` of 0 and 1; bool, integer or float. Its values are not looked at, for that would
            wait for a GPU. A float between the two mixes both terms in that proportion; the paper has no
            such target.

    Returns:
        A scalar. It is float32 for half types, as under autocast: a ``GradScaler`` multiplies it by numbers
        that float16 cannot hold.

    Gradients: logits only, also for a float ``target`` that asks for one.
    Numerics: log-sigmoid in float32 (float64 for float64), which neither overflows nor cancels; a logit of
        plus or minus infinity adds 0 where the target agrees with it.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or ratio.

    Source: Guo et al., CVPR 2019, eq. 2-3.
    """

    positive_ratio: Tensor  # [L]

    def __init__(self, positive_ratio: Tensor | Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("positive_ratio", _ratios(type(self).__name__, positive_ratio))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        name = type(self).__name__
        logits = _inputs.logits(name, "logits", logits)
        labels = len(self.positive_ratio)
        if logits.shape[1] != labels:
            raise ValueError(
                f"{name}: logits has {logits.shape[1]} labels and positive_ratio {labels}; they must be equal"
            )
        _checks.same_device(name, "logits", logits, self.positive_ratio, "positive_ratio")
        target = _labels(name, target, logits)

        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits, present = logits.to(dtype), target.to(dtype)  # [N, L]
        absent = 1 - present
        ratio = self.positive_ratio.to(dtype)  # [L]
        # Not 0 * infinity: a term that does not count must not make an infinite logit a NaN.
        if_present = torch.where(present == 0, 0, present * -F.logsigmoid(logits))
        if_absent = torch.where(absent == 0, 0, absent * -F.logsigmoid(-logits))
        total = ((1 - ratio).exp() * if_present + ratio.exp() * if_absent).sum()
        return total / max(logits.shape[0], 1)

    def extra_repr(self) -> str:
        return f"labels={len(self.positive_ratio)}"


def _ratios(function: str, value: object) -> Tensor:
    allowed = "a tensor [L] or a sequence of L numbers"
    if isinstance(value, Tensor):
        ratios = _checks.tensor(function, "positive_ratio", value, "[L]", (1,)).detach().clone()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            if isinstance(item, bool) or not isinstance(item, Real):
                raise TypeError(
                    f"{function}: positive_ratio holds a {type(item).__name__}; it must be {allowed}"
                )
        ratios = torch.tensor([float(item) for item in value], dtype=torch.get_default_dtype())
    else:
        raise TypeError(f"{function}: positive_ratio is a {type(value).__name__}; it must be {allowed}")
    if len(ratios) == 0:
        raise ValueError(f"{function}: positive_ratio is empty; L must be at least 1")
    if not ratios.is_meta:
        wrong = ratios[~((ratios >= 0) & (ratios <= 1))]  # a NaN fails as well
        if len(wrong) > 0:
            raise ValueError(f"{function}: positive_ratio holds {wrong[0].item():g}; allowed is [0, 1]")
    return ratios


def _labels(function: str, value: object, logits: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: target is a {type(value).__name__}; it must be a tensor [N, L]")
    if value.is_complex():
        dtype = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{function}: target has dtype {dtype}; allowed are bool, integers and floats")
    if value.shape != logits.shape:
        raise ValueError(
            f"{function}: target has shape {list(value.shape)} and logits {list(logits.shape)}; "
            "they must be equal"
        )
    return _checks.same_device(function, "target", value.detach(), logits, "logits")
