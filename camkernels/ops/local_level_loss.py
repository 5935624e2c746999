"""``local_level_loss``: the class of the image inside a mask, background outside."""

from torch import Tensor

from camkernels import _checks
from camkernels._op import Op
from camkernels._pass import Arguments, accumulate_dtype, like
from camkernels.reference.local_level_loss import mean_loss

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
    source = "activations has {} classes beside the background"
    _checks.classes_in_range(function, target, activations.shape[1] - 1, source, ignore_index)
    loss: Tensor = LOCAL_LEVEL_LOSS(function, activations, mask, target, ignore_index)
    return loss


def _allocate(a: Arguments) -> None:
    """``losses`` [N, ceil(H * W / TILE)], what each run of TILE pixels adds to the loss."""
    tiles = (a.mask.shape[1] * a.mask.shape[2] + TILE - 1) // TILE
    accumulate = accumulate_dtype(a.activations.dtype)
    a.losses = a.activations.new_empty(a.activations.shape[0], tiles, dtype=accumulate)


def _finish(a: Arguments) -> None:
    a.loss = a.losses.sum()


LOCAL_LEVEL_LOSS = Op(
    "local_level_loss",
    "Tensor activations, Tensor mask, Tensor target, int ignore_index",
    outputs="loss",
    scratch="losses",
    allocate=_allocate,
    finish=_finish,
    reference=mean_loss,
    backward="Tensor activations, Tensor mask, Tensor target, Tensor grad_loss, int ignore_index",
    gradients={"activations": like("activations")},
    channels_last="",
    backends=("reference", "cpu", "triton"),
)
