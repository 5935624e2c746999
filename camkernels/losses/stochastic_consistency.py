"""Stochastic consistency: objects of one class look alike within a batch."""

import torch.distributed as dist
from torch import Tensor, nn

from camkernels import _checks
from camkernels.losses import _distributed
from camkernels.ops.stochastic_consistency import PAIRS, mean_distance


class StochasticConsistencyLoss(nn.Module):
    """Stochastic consistency: seed vectors of two images of one class must be close.

        loss = mean over pairs (i, j) of one class, and over seeds k, of ||v[i, k] - v[j, k]||**2

    and 0 where the batch holds no pair: draw batches with two or more images of a class, for adjacent pairs
    side by side.

        criterion = StochasticConsistencyLoss(preset="official")
        seeds = fused_cam_seeds(features, classifier.weight, target, num_seeds=3)
        loss = classification_loss + 0.008 * criterion(seeds.vectors, target)

    That weight is the released code's, for plain distances. Squared ones grow with D and with the features:
    begin where the term is a tenth of the classification loss.

    Args:
        pairs: ``"all"`` pairs of images of one class, or ``"adjacent"``: images 0 and 1, 2 and 3, ..., where
            they are of one class. By default as ``preset`` says.
        squared: the squared distance, or the plain one. By default as ``preset`` says.
        gather: form pairs across ranks, too, where ``torch.distributed`` is initialised; see below.
        preset: ``"paper"`` or ``"official"``, the released code; see below.
        process_group: the ranks of ``gather``; by default all. A module that holds one can be neither copied
            nor pickled.

    Call with:
        vectors: seed vectors, ``[N, K, D]``, as ``fused_cam_seeds`` returns them.
        target: class of each image, ``[N]``, int64 or int32; any numbers, only equality counts: there is no
            label to be ignored.

    Returns:
        A scalar. It is float32 for half types, as under autocast: squared distances soon exceed what float16
        can hold.

    Gradients: ``vectors``; that of a plain distance of 0 is 0.
    Numerics: as ``stochastic_consistency``, which does the work.

    With ``gather=True`` every rank receives the vectors and classes of all ranks and returns the loss of the
    whole batch; adjacent are images in the order of ranks. The gradient reaches the rank's own vectors only,
    multiplied by the number of ranks: so the average of ``DistributedDataParallel`` is the gradient that one
    process would have with the whole batch. Ranks must bring vectors of one shape and dtype. On the CPU
    unequal ones are a ``ValueError`` on every rank; on a GPU, where looking would mean waiting, and in a
    compiled graph they are not checked, and the ranks may hang. Without a process group, or with one rank,
    ``gather`` changes nothing.

    Where paper and released code (github.com/xiaomengyc/I2C) differ:

    =========  =====================================  ====================================================
    what       ``preset="paper"``                     ``preset="official"``
    =========  =====================================  ====================================================
    pairs      any two images of a batch that share   adjacent ones: batches are drawn as pairs of one
               their class (§3.2)                     class
    distance   squared (eq. 1)                        plain
    =========  =====================================  ====================================================

    What neither preset does: the released code takes ``F.pairwise_distance``, which adds 1e-6 to every
    difference, and pairs adjacent images of different classes, should a batch hold any.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or option.

    Source: Zhang et al., ECCV 2020, eq. 1.
    """

    def __init__(
        self,
        *,
        pairs: str | None = None,
        squared: bool | None = None,
        gather: bool = False,
        preset: str = "paper",
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.preset = _checks.choice(name, "preset", preset, ("paper", "official"))
        paper = preset == "paper"
        default = "all" if paper else "adjacent"
        self.pairs = _checks.choice(name, "pairs", default if pairs is None else pairs, PAIRS)
        self.squared = _checks.flag(name, "squared", paper if squared is None else squared)
        self.gather = _checks.flag(name, "gather", gather)
        self.process_group = _distributed.process_group(name, process_group)

    def forward(self, vectors: Tensor, target: Tensor) -> Tensor:
        name = type(self).__name__
        if self.gather:
            vectors = _checks.vectors(name, vectors)
            target = _checks.target(name, target, vectors, "[N]", (1,), "vectors")
            _distributed.check_alike(name, "vectors", vectors, self.process_group)
            vectors = _distributed.all_gather(vectors, self.process_group)
            target = _distributed.all_gather(target.long(), self.process_group)
        return mean_distance(name, vectors, target, self.pairs, self.squared)

    def extra_repr(self) -> str:
        return f"pairs={self.pairs!r}, squared={self.squared}, gather={self.gather}, preset={self.preset!r}"
