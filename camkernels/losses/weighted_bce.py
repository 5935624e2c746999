"""Cross-entropy of multi-label images, each label weighted by how rare it is."""

from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkernels import _checks
from camkernels.losses import _inputs


class WeightedBCEWithLogits(nn.Module):
    """Weighted sigmoid cross-entropy of multi-label images, from logits.

        loss = mean over images of the sum over labels of
               exp(1 - p) * -log sigmoid(x)    where the label is present
               exp(p) * -log sigmoid(-x)       where it is absent

    with ``x`` the logit and ``p`` the share of training images that have the label; 0 for an empty batch. A
    label of which it is unknown whether it is present adds nothing.

        criterion = WeightedBCEWithLogits(train_labels.float().mean(0))
        loss = criterion(logits, labels)

    Args:
        positive_ratio: ``p`` of each label, ``[L]``, a tensor or a sequence of numbers in [0, 1]. Kept, as a
            copy, in the buffer ``positive_ratio`` and so in the state dict. ``reset_parameters()`` fills the
            buffer with them again, after ``to_empty()`` for one.

    Call with:
        logits: ``[N, L]``.
        target: ``[N, L]`` of 1 present, 0 absent and -1 unknown; bool, integer or float. An unknown label
            adds nothing to loss and gradient, whatever its logit is. A float from 0 to 1 mixes both terms in
            that proportion; the paper has no such target.

    Returns:
        A scalar. It is float32 for half types, as under autocast: a ``GradScaler`` multiplies it by numbers
        that float16 cannot hold.

    Gradients: logits only, also for a float ``target`` that asks for one.
    Numerics: log-sigmoid in float32 (float64 for float64), which neither overflows nor cancels; a logit of
        plus or minus infinity adds 0 where the target agrees with it.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or ratio; a label that is neither -1 nor in [0, 1], on the CPU. On a
            GPU, where looking would mean waiting, the loss is NaN instead.

    Source: Guo et al., CVPR 2019, eq. 2-3.
    """

    positive_ratio: Tensor  # [L]

    def __init__(self, positive_ratio: Tensor | Sequence[float]) -> None:
        super().__init__()
        ratios, self._given = _ratios(type(self).__name__, positive_ratio)
        self.register_buffer("positive_ratio", ratios)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the buffer with the ratios that the module was made with."""
        if self._given is None:
            raise RuntimeError(
                f"{type(self).__name__}: positive_ratio was given without values, as on the meta device; "
                "load a state dict instead"
            )
        self.positive_ratio.copy_(torch.tensor(self._given, dtype=torch.float64, device="cpu"))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        name = type(self).__name__
        logits = _inputs.logits(name, "logits", logits)
        labels = len(self.positive_ratio)
        if logits.shape[1] != labels:
            raise ValueError(
                f"{name}: logits has {logits.shape[1]} labels and positive_ratio {labels}; they must be equal"
            )
        _checks.same_device(name, "logits", logits, self.positive_ratio, "positive_ratio")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        present, unknown = _labels(name, target, logits, dtype)
        absent = 1 - present
        # Left out before the sigmoid: the logit of an unknown label may be inf or NaN.
        logits = torch.where(unknown, 0, logits.to(dtype))
        ratio = self.positive_ratio.to(dtype)  # [L]
        # Not 0 * infinity: a term that does not count must not make an infinite logit a NaN.
        if_present = torch.where((present == 0) | unknown, 0, present * -F.logsigmoid(logits))
        if_absent = torch.where((absent == 0) | unknown, 0, absent * -F.logsigmoid(-logits))
        total = ((1 - ratio).exp() * if_present + ratio.exp() * if_absent).sum()
        return total / max(logits.shape[0], 1)

    def extra_repr(self) -> str:
        return f"labels={len(self.positive_ratio)}"


def _ratios(function: str, value: object) -> tuple[Tensor, list[float] | None]:
    """For the buffer, and as numbers where they are known."""
    allowed = "a tensor [L] or a sequence of L numbers"
    numbers: list[float] | None = None
    if isinstance(value, Tensor):
        ratios = _checks.tensor(function, "positive_ratio", value, "[L]", (1,)).detach().clone()
        if not ratios.is_meta and _checks.values_are_readable(host := ratios.cpu()):
            numbers = host.tolist()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            if isinstance(item, bool) or not isinstance(item, Real):
                raise TypeError(
                    f"{function}: positive_ratio holds a {type(item).__name__}; it must be {allowed}"
                )
        numbers = [float(item) for item in value]
        ratios = torch.tensor(numbers, dtype=torch.get_default_dtype())
    else:
        raise TypeError(f"{function}: positive_ratio is a {type(value).__name__}; it must be {allowed}")
    if len(ratios) == 0:
        raise ValueError(f"{function}: positive_ratio is empty; L must be at least 1")
    for number in numbers or ():
        if not 0 <= number <= 1:  # a NaN fails as well
            raise ValueError(f"{function}: positive_ratio holds {number:g}; allowed is [0, 1]")
    return ratios, numbers


def _labels(function: str, value: object, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How far each label is present, NaN where the target makes no sense; and which ones are unknown."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: target is a {type(value).__name__}; it must be a tensor [N, L]")
    if value.is_complex():
        kind = _checks.dtype_name(value.dtype)
        raise TypeError(f"{function}: target has dtype {kind}; allowed are bool, integers and floats")
    if value.shape != logits.shape:
        raise ValueError(
            f"{function}: target has shape {list(value.shape)} and logits {list(logits.shape)}; "
            "they must be equal"
        )
    target = _checks.same_device(function, "target", value.detach(), logits, "logits")
    present = target.to(dtype)  # [N, L]; a -1 of uint8, which is 255, is none here
    unknown = present == -1
    valid = unknown | ((present >= 0) & (present <= 1))
    if _checks.values_are_readable(target) and not valid.all():
        wrong = target[~valid][0].item()
        raise ValueError(f"{function}: target holds {wrong:g}; it must be in [0, 1], or -1 for unknown")
    return torch.where(valid, present, torch.nan), unknown
