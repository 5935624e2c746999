"""Pairwise consistency learning."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkernels.losses import _inputs
from camkernels.ops import _checks

# A class index that no user passes: F.nll_loss would otherwise skip -100 in silence.
_NO_IGNORED_CLASS = torch.iinfo(torch.int64).min


class PairwiseConsistencyLoss(nn.Module):
    """Pairwise consistency learning: image and erased image must be classified alike.

        loss = CE(p, target) + CE(r, target) + alpha * CE(q, target) + beta * KL(q || p)

    ``p`` is predicted from the original image, ``q`` from the erased one by its own linear classifier, ``r``
    by the CAM module of the side branch; all three by softmax of the logits given. Each term is a mean over
    the batch, and 0 for an empty one.

        criterion = PairwiseConsistencyLoss()
        loss = criterion(logits, erased_logits, side_logits, target)

    Args:
        alpha: weight of the cross-entropy of the erased image; the paper uses 1.
        beta: weight of the divergence; the paper uses 2.

    Call with:
        logits: of the original image, ``[N, L]``.
        erased_logits: of the erased image, ``[N, L]``.
        side_logits: of the CAM module, ``[N, L]``.
        target: ground truth, ``[N]``, int64 or int32.

    Returns:
        A scalar. It is float32 for half types, as under autocast: a ``GradScaler`` multiplies it by numbers
        that float16 cannot hold. float64 if any of the logits is.

    Gradients: all three logits; the divergence moves ``p`` and ``q`` both.
    Numerics: log-softmax in float32 (float64 for float64); a probability that underflows to 0 adds 0 to the
        divergence, not NaN.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        IndexError: a class index outside [0, L) on the CPU; on a GPU a device assertion.

    Source: Chen et al., NeurIPS 2021, eq. 3. Its last term is printed ``-q log(q / p)``, which is minus
    KL(q || p), unbounded below and largest in agreement; text and experiments say that the divergence is
    minimised, so the sign is a misprint. There is no ``preset``: the authors published no code (their
    checklist, item 3a), so there is nothing to differ from the paper.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 2.0) -> None:
        super().__init__()
        self.alpha = _inputs.factor(type(self).__name__, "alpha", alpha)
        self.beta = _inputs.factor(type(self).__name__, "beta", beta)

    def forward(self, logits: Tensor, erased_logits: Tensor, side_logits: Tensor, target: Tensor) -> Tensor:
        name = type(self).__name__
        logits = _inputs.logits(name, "logits", logits)
        erased_logits = _inputs.logits(name, "erased_logits", erased_logits, logits)
        side_logits = _inputs.logits(name, "side_logits", side_logits, logits)
        target = _class_indices(name, target, logits)

        log_p = _log_softmax(logits)  # [N, L]
        log_q = _log_softmax(erased_logits)  # [N, L]
        log_r = _log_softmax(side_logits)  # [N, L]
        divergence = _divergence(log_q, log_p)
        total = (
            _negative_log_likelihood(log_p, target)
            + _negative_log_likelihood(log_r, target)
            + self.alpha * _negative_log_likelihood(log_q, target)
            + self.beta * divergence
        )
        return total / max(target.shape[0], 1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}"


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p), summed over the batch. A class that q rules out, its logit -inf, adds 0 whatever p is."""
    ruled_out = log_q == -torch.inf
    # Both sides of the difference are replaced, or the gradient of -inf - (-inf) would be NaN times 0.
    log_q, log_p = log_q.masked_fill(ruled_out, 0), log_p.masked_fill(ruled_out, 0)
    return torch.where(ruled_out, 0, log_q.exp() * (log_q - log_p)).sum()


def _negative_log_likelihood(log_probability: Tensor, target: Tensor) -> Tensor:
    """Summed over the batch."""
    return F.nll_loss(log_probability, target, reduction="sum", ignore_index=_NO_IGNORED_CLASS)


def _class_indices(function: str, value: object, logits: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: target is a {type(value).__name__}; it must be a tensor [N]")
    if value.dtype not in (torch.int64, torch.int32):
        dtype = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{function}: target has dtype {dtype}; allowed are int64, int32")
    if value.dim() != 1:
        raise ValueError(f"{function}: target has shape {list(value.shape)}; it must be [N]")
    if value.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{function}: target has {value.shape[0]} images and logits {logits.shape[0]}; they must be equal"
        )
    return _checks.same_device(function, "target", value.long(), logits, "logits")
