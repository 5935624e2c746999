"""Global consistency: objects of one class look alike throughout the training set."""

from math import nan

import torch
import torch.distributed as dist
from torch import Tensor, nn

from camkernels import _checks
from camkernels.losses import _distributed


@torch.library.custom_op("camkernels::snapshot", mutates_args=())
def _opaque_clone(tensor: Tensor) -> Tensor:
    return tensor.clone()


@_opaque_clone.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def _snapshot(tensor: Tensor) -> Tensor:
    """The tensor as it is now, for a graph that goes on to change it in place.

    A compiled backward may read an input of its forward again, rather than keep what was made of it, even
    though forward has changed that input since (pytorch/pytorch#197039): the gradient would be wrong. The
    result of an op that the compiler cannot look into is kept.
    """
    return _opaque_clone(tensor) if torch.compiler.is_compiling() else tensor


class GlobalConsistencyLoss(nn.Module):
    """Global consistency: the seed vectors of a class must be close to its centre, which follows them.

        a_y = mean of all seed vectors of all images of class y in the batch
        loss = mean over classes y in the batch of ||a_y - w_y||**2
        w_y = (1 - eta) * w_y + eta * a_y,  eta = exp(-decay * t_y),  t_y = t_y + 1

    The loss uses the centres ``w`` as they were, and is 0 for an empty batch. In training mode they then
    move, without gradient, those of the classes in the batch. ``t_y`` counts how often class y has moved: at
    first eta is 1 and the centre becomes ``a_y``; the more steps, the steadier it is.

        criterion = GlobalConsistencyLoss(num_classes=200, dim=768, preset="official")
        seeds = fused_cam_seeds(features, classifier.weight, target, num_seeds=3)
        loss = classification_loss + 0.001 * criterion(seeds.vectors, target)

    That weight is the released code's, for plain distances; squared ones want a smaller one. Make the module
    a part of the model: then ``model.eval()`` stops the centres and the model's state holds them.

    Args:
        num_classes: Y.
        dim: D, the length of a seed vector.
        decay: in (0, 1); the released code has 0.002.
        preset: ``"paper"`` or ``"official"``, the released code; see below.
        process_group: ranks that share the centres where ``torch.distributed`` is initialised; by default
            all. A module that holds one can be neither copied nor pickled.

    Call with:
        vectors: seed vectors, ``[N, K, D]``, as ``fused_cam_seeds`` returns them.
        target: class of each image, ``[N]``, int64 or int32.

    Returns:
        A scalar. It is float32 for half types, as under autocast; float64 if ``vectors`` or the centres are.

    State: the buffers ``centres``, ``[Y, D]`` float32, and ``counters``, ``[Y]`` int64. Centres begin as
        standard normal numbers, always the same ones, so that ranks agree and PyTorch's own generator is
        left alone; the first time that a class comes its loss is the distance to these.
        ``reset_parameters()`` goes back to them, or fills what ``to_empty()`` made. Every forward in
        training mode moves centres, under ``torch.no_grad()`` as well: keep the module out of checkpointed
        regions, which run it twice. In evaluation mode nothing moves. ``half()`` of the whole model rounds
        the centres. A class whose mean is not finite, as in a step that a ``GradScaler`` skips, keeps centre
        and counter, and the loss shows it.
    Gradients: ``vectors``; that of a plain distance of 0 is 0.
    Numerics: float32 inside for half types. Deterministic on the CPU, and on a GPU where
        ``torch.use_deterministic_algorithms(True)`` is on; else its sums take any order.

    With several ranks the sums and counts of all are added, in one collective: ``a_y`` is the mean over the
    whole batch, and every rank ends with the loss and the centres that one process would have. Ranks may
    bring batches of different size, also empty ones, but each must take part, in evaluation mode too. The
    gradient reaches the rank's own vectors, multiplied by the number of ranks: so the average of
    ``DistributedDataParallel`` is the gradient that one process would have with the whole batch.

    Where paper and released code (github.com/xiaomengyc/I2C) differ:

    ==================  ============================  ====================================================
    what                ``preset="paper"``            ``preset="official"``
    ==================  ============================  ====================================================
    distance to centre  squared (eq. 5)               plain
    ==================  ============================  ====================================================

    What neither preset does. The released code forms the mean of each adjacent pair of images, not of a
    class: a class that is drawn twice counts twice in the loss and, in the update, keeps the pair that was
    written last; here, as in eq. 2, all images of the class are averaged. Its ``F.pairwise_distance`` adds
    1e-6 to every difference. It keeps centres and counters as parameters without gradient; here they are
    buffers.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or option.
        IndexError: a class index outside [0, Y) on the CPU, on the rank that has it, while others wait for
            it. On a GPU, where looking would mean waiting, and in a compiled graph the loss is NaN instead;
            no centre moves by that image, and the first or last class keeps its own.

    Source: Zhang et al., ECCV 2020, eq. 2-5.
    """

    centres: Tensor  # [Y, D]
    counters: Tensor  # [Y]

    def __init__(
        self,
        num_classes: int,
        dim: int,
        decay: float = 0.002,
        *,
        preset: str = "paper",
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        num_classes = _checks.positive_int(name, "num_classes", num_classes)
        dim = _checks.positive_int(name, "dim", dim)
        self.decay = _checks.in_open_interval(name, "decay", decay, 0, 1, "in (0, 1)")
        self.preset = _checks.choice(name, "preset", preset, ("paper", "official"))
        self.process_group = _distributed.process_group(name, process_group)
        self.register_buffer("centres", torch.empty(num_classes, dim, dtype=torch.float32))
        self.register_buffer("counters", torch.empty(num_classes, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Put centres and counters back to the beginning; fill them after ``to_empty()``."""
        generator = torch.Generator("cpu").manual_seed(0)
        shape, dtype = self.centres.shape, torch.float32
        self.centres.copy_(torch.randn(shape, generator=generator, dtype=dtype, device="cpu"))
        self.counters.zero_()

    def forward(self, vectors: Tensor, target: Tensor) -> Tensor:
        vectors, target = self._checked(vectors, target)
        classes, place, means, present = self._class_means(vectors, target)
        centres = _snapshot(self.centres.index_select(0, classes))
        # An absent class may have a centre that is not finite: it is left out before it is squared.
        difference = torch.where(present, means - centres, 0)  # [S, D]
        if self.preset == "paper":
            distance = difference.square().sum(1)  # [S]
        else:
            distance = torch.linalg.vector_norm(difference, dim=1)  # [S]; its subgradient at 0 is 0
        if self.training:
            self._update(classes, place, means.detach(), present)
        return distance.sum() / present.sum().clamp_min(1)

    def _checked(self, vectors: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        classes, dim = self.centres.shape
        vectors = _checks.vectors(name, vectors)
        if vectors.shape[2] != dim:
            raise ValueError(
                f"{name}: vectors has shape {list(vectors.shape)}; it must be [N, K, D] with D = dim = {dim}"
            )
        _checks.same_device(name, "vectors", vectors, self.centres, "centres")
        target = _checks.target(name, target, vectors, "[N]", (1,), "vectors")
        _checks.classes_in_range(name, target, classes, "num_classes is {}")
        return vectors, target.long()

    def _class_means(self, vectors: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean seed vector of every class in the batches of all ranks.

        A table of S places, so that no shape depends on data: one for each image, in the order of classes,
        where a class has its mean at the place of its first image; with several ranks one for each class.

        Returns:
            The class of each place and the place that has its mean, both [S]; means [S, D]; at which places
            there is one [S, 1].
        """
        count, dim = self.centres.shape
        dtype = torch.promote_types(vectors.dtype, self.centres.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        sums = vectors.sum(1, dtype=dtype)  # [N, D]
        # Seeds are counted beside what they add up to, which makes one collective of two. A class out of
        # range counts NaN seeds for the class nearest to it, whose mean is then NaN: nothing out of bounds.
        nearest = target.clamp(0, count - 1)
        seeds = torch.full_like(sums[:, :1], vectors.shape[1]).masked_fill((nearest != target)[:, None], nan)
        rows = torch.cat([sums, seeds], 1)  # [N, D + 1]
        if _distributed.world_size(self.process_group) > 1:
            classes = place = torch.arange(count, device=target.device)
            joined = nearest
        else:
            classes, order = nearest.sort(stable=True)
            joined = place = torch.searchsorted(classes, classes)
            rows = rows[order]
        own = rows.new_zeros(classes.shape[0], dim + 1).index_add(0, joined, rows)
        total = _distributed.all_reduce(own, self.process_group)
        seeds = total[:, dim:].detach()  # [S, 1]
        return classes, place, total[:, :dim] / seeds.clamp_min(1), seeds != 0

    @torch.no_grad()
    def _update(self, classes: Tensor, place: Tensor, means: Tensor, present: Tensor) -> None:
        centres, counters = self.centres[classes], self.counters[classes, None]
        exponent = -self.decay * counters.to(means.dtype)  # [S, 1]
        # 1 - eta as expm1: eta is close to 1 for hundreds of steps, and the difference would lose digits.
        moved = -exponent.expm1() * centres + exponent.exp() * means
        # The first visit overwrites whatever the centre is, also where 0 times it would be NaN.
        moved = torch.where(counters == 0, means, moved).to(centres.dtype)
        moves = present & moved.isfinite().all(1, keepdim=True)
        # All places of a class write the same, that of its mean: the order of writing does not matter.
        self.centres.index_copy_(0, classes, torch.where(moves, moved, centres)[place])
        self.counters.index_copy_(0, classes, (counters + moves)[place, 0])

    def extra_repr(self) -> str:
        classes, dim = self.centres.shape
        return f"num_classes={classes}, dim={dim}, decay={self.decay:g}, preset={self.preset!r}"
