"""``local_level_loss``: the class of the image inside a mask, background outside."""

from typing import Any

import torch
from torch import Tensor

from camkernels import _backend
from camkernels._library import define_op
from camkernels.ops import _checks
from camkernels.ops._autograd import first_order
from camkernels.reference.cam import accumulate_dtype
from camkernels.reference.local_level_loss import mean_loss as reference_mean_loss

BACKENDS = ("reference", "cpu", "triton")
TILE = 64  # pixels whose losses are added up in one number


def local_level_loss(
    activations: Tensor, mask: Tensor, target: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Cross entropy at every pixel: with the image's class inside the mask, with the background outside.

        w    = mean over pixels of the mask
        l1   = sum over pixels in the mask of -log softmax(activations)[target]
        l0   = sum over the other pixels of -log softmax(activations)[L]
        loss = mean over images that are not ignored of ((1 - w) * l1 + w * l0) / (H * W)

        local = fused_local_activations(features, weight, bias)
        loss = local_level_loss(local.activations, otsu_mask(local.attention).mask, target)

    Args:
        activations: ``[N, L + 1, H, W]``, the last class being the background; contiguous is read in place.
        mask: ``[N, H, W]``, bool. An empty or a full one makes the loss of its image 0.
        target: class of each image, ``[N]``, int64 or int32, from 0 to L - 1 or ``ignore_index``.
        ignore_index: an image of this class adds nothing to loss and gradient, whatever its activations are.

    Returns:
        A scalar in the dtype of ``activations``; ``losses.LocalLevelLoss`` returns float32 for half types. 0
        for an empty batch and for one whose images are all ignored.

    Gradients: ``activations``. Nothing but the arguments is kept for backward. No double backward but with
        backend ``"reference"``.
    Numerics: float32 inside (float64 for float64); deterministic.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape or device.
        IndexError: a class outside [0, L) that is not ``ignore_index``, on the CPU; on a GPU the loss is NaN
            instead.

    Source: Shen and Liu, "Generating Attention from Classifier Activations for Fine-grained Recognition",
    eq. 2-4.
    """
    return loss_of("local_level_loss", activations, mask, target, ignore_index).to(activations.dtype)


def loss_of(
    function: str, activations: Tensor, mask: Tensor, target: Tensor, ignore_index: int = -100
) -> Tensor:
    """The loss in the accumulation type; ``function`` is whom errors name."""
    activations = _checks.local_activations(function, activations)
    mask = _checks.mask(function, mask, activations, "activations")
    target = _checks.target(function, target, activations, "[N]", (1,), "activations")
    ignore_index = _checks.class_index(function, "ignore_index", ignore_index)
    classes = activations.shape[1] - 1
    _checks.classes_in_range(
        function,
        target,
        classes,
        f"activations has {{}} classes beside the background, being {list(activations.shape)}",
        ignore_index,
    )
    requested = _backend.setting()
    backend = _backend.resolve(function, requested, activations.device.type, activations.dtype, BACKENDS)
    if backend == "reference":
        return reference_mean_loss(activations, mask, target, ignore_index)
    loss: Tensor = _LocalLevelLoss.apply(activations, mask, target, ignore_index, requested)
    return loss


class _LocalLevelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, activations: Tensor, mask: Tensor, target: Tensor, ignore_index: int, requested: str
    ) -> Tensor:
        losses = torch.ops.camkernels.local_level_loss_fwd(activations, mask, target, ignore_index, requested)
        ctx.save_for_backward(activations, mask, target)
        ctx.options = ignore_index, requested
        return losses.sum()

    @staticmethod
    @first_order("local_level_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        activations, mask, target = ctx.saved_tensors
        grad_activations = torch.ops.camkernels.local_level_loss_bwd(
            activations, mask, target, grad, *ctx.options
        )
        return grad_activations, *(None,) * 4


def _prepare(*args: Any) -> tuple[Any, ...]:
    return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)


def _allocate_fwd(activations: Tensor, mask: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """``losses`` [N, ceil(H * W / TILE)], what each run of TILE pixels adds to the loss."""
    tiles = (mask.shape[1] * mask.shape[2] + TILE - 1) // TILE
    return (activations.new_empty((activations.shape[0], tiles), dtype=accumulate_dtype(activations.dtype)),)


def _allocate_bwd(activations: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (torch.empty_like(activations),)


define_op(
    "local_level_loss_fwd",
    "Tensor activations, Tensor mask, Tensor target, int ignore_index",
    ("losses",),
    allocate=_allocate_fwd,
    prepare=_prepare,
    backends=BACKENDS,
)
define_op(
    "local_level_loss_bwd",
    "Tensor activations, Tensor mask, Tensor target, Tensor grad, int ignore_index",
    ("grad_activations",),
    allocate=_allocate_bwd,
    prepare=_prepare,
    backends=BACKENDS,
)
