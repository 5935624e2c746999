"""Pairwise consistency learning."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkernels import _checks
from camkernels.losses import _inputs

_NO_CLASS = -100  # what F.nll_loss skips


class PairwiseConsistencyLoss(nn.Module):
    """Pairwise consistency learning: image and erased image must be classified alike.

        loss = CE(p, target) + CE(r, target) + alpha * CE(q, target) + beta * KL(q || p)

    ``p`` is predicted from the original image, ``q`` from the erased one by its own linear classifier, ``r``
    by the CAM module of the side branch; all three by softmax of the logits given. Each term is a mean over
    the images that are not ignored, and 0 where there is none.

        criterion = PairwiseConsistencyLoss()
        loss = criterion(logits, erased_logits, side_logits, target)

    Args:
        alpha: weight of the cross-entropy of the erased image; the paper uses 1.
        beta: weight of the divergence; the paper uses 2.
        ignore_index: an image of this class adds nothing to loss and gradient, whatever its logits are.

    Call with:
        logits: of the original image, ``[N, L]``.
        erased_logits: of the erased image, ``[N, L]``.
        side_logits: of the CAM module, ``[N, L]``.
        target: ground truth, ``[N]``, int64 or int32, in [0, L) or ``ignore_index``.

    Returns:
        A scalar. It is float32 for half types, as under autocast: a ``GradScaler`` multiplies it by numbers
        that float16 cannot hold. float64 if any of the logits is.

    Gradients: all three logits; the divergence moves ``p`` and ``q`` both.
    Numerics: log-softmax in float32 (float64 for float64); a probability that underflows to 0 adds 0 to the
        divergence, not NaN.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        IndexError: a class index outside [0, L) that is not ``ignore_index``, on the CPU; on a GPU the loss
            is NaN instead.

    Source: Chen et al., NeurIPS 2021, eq. 3. Its last term is printed ``-q log(q / p)``, which is minus
    KL(q || p), unbounded below and largest in agreement; text and experiments say that the divergence is
    minimised, so the sign is a misprint. There is no ``preset``: the authors published no code (their
    checklist, item 3a), so there is nothing to differ from the paper.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 2.0, *, ignore_index: int = -100) -> None:
        super().__init__()
        name = type(self).__name__
        self.alpha = _inputs.factor(name, "alpha", alpha)
        self.beta = _inputs.factor(name, "beta", beta)
        self.ignore_index = _checks.class_index(name, "ignore_index", ignore_index)

    def forward(self, logits: Tensor, erased_logits: Tensor, side_logits: Tensor, target: Tensor) -> Tensor:
        name = type(self).__name__
        logits = _inputs.logits(name, "logits", logits)
        erased_logits = _inputs.logits(name, "erased_logits", erased_logits, logits)
        side_logits = _inputs.logits(name, "side_logits", side_logits, logits)
        target = _checks.target(name, target, logits, "[N]", (1,), "logits").long()
        classes = logits.shape[1]
        _checks.classes_in_range(name, target, classes, "logits has {} classes", self.ignore_index)

        counts = target != self.ignore_index  # [N]
        exists = (target >= 0) & (target < classes)
        label = torch.where(counts & exists, target, _NO_CLASS)
        # Left out before the softmax: the logits of an ignored image may hold inf or NaN.
        log_p, log_q, log_r = (  # [N, L]
            _log_softmax(torch.where(counts[:, None], x, 0)) for x in (logits, erased_logits, side_logits)
        )
        total = (
            _negative_log_likelihood(log_p, label)
            + _negative_log_likelihood(log_r, label)
            + self.alpha * _negative_log_likelihood(log_q, label)
            + self.beta * _divergence(log_q, log_p)
        )
        # NaN shows where a class does not exist, on a device that cannot raise.
        total = total * torch.where((exists | ~counts).all(), 1.0, torch.nan)
        return total / counts.sum().clamp_min(1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}, ignore_index={self.ignore_index}"


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p), summed over the batch. A class that q rules out, its logit -inf, adds 0 whatever p is."""
    ruled_out = log_q == -torch.inf
    # Both sides of the difference are replaced, or the gradient of -inf - (-inf) would be NaN times 0.
    log_q, log_p = log_q.masked_fill(ruled_out, 0), log_p.masked_fill(ruled_out, 0)
    return torch.where(ruled_out, 0, log_q.exp() * (log_q - log_p)).sum()


def _negative_log_likelihood(log_probability: Tensor, label: Tensor) -> Tensor:
    """Summed over the batch."""
    return F.nll_loss(log_probability, label, reduction="sum", ignore_index=_NO_CLASS)
