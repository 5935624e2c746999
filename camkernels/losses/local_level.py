"""Local-level loss: inside the attended region each pixel is the image's class, outside it background."""

import torch
from torch import Tensor, nn

from camkernels import _checks
from camkernels.losses import _inputs
from camkernels.ops.local_level_loss import loss_of
from camkernels.ops.otsu_mask import otsu_mask


class LocalLevelLoss(nn.Module):
    """Local-level loss: dense local classifiers must name the object where they attend, background elsewhere.

        mask = attention > Otsu's threshold of the image's attention
        w    = mean of the mask
        l1   = sum over pixels of the mask of -log softmax(activations)[target]
        l0   = sum over all others of -log softmax(activations)[background]
        loss = mean over images that are not ignored of ((1 - w) * l1 + w * l0) / (H * W)

    times ``weight``; the softmax is over the L + 1 classes of a pixel, the last of which is background. An
    image whose mask is empty or full adds 0, and so does an empty batch.

        criterion = LocalLevelLoss()
        activations, attention = fused_local_activations(features, weight, bias)
        loss = criterion(activations, attention, target)

    To pool features under the same mask, make it once and pass it in place of the attention:

        mask, _ = otsu_mask(attention)
        objects = classifier(masked_max_pool(features, mask))
        loss = criterion(activations, mask, target) + F.cross_entropy(objects, target)

    which is the whole loss of one scale, eq. 6. The mask rises with the attention, and the loss does not say
    how large it should be: attention that is the same everywhere has an empty mask and no gradient.

    Args:
        weight: factor of the loss; the paper has 1.
        bins: of the histogram that Otsu's threshold is sought in, 2 to 4096.
        ignore_index: an image of this class adds nothing to loss and gradient, whatever its activations are;
            a batch of nothing else has the loss 0.

    Call with:
        activations: ``[N, L + 1, H, W]``, the last class background.
        attention: ``[N, H, W]``, as ``fused_local_activations`` returns it, in any float dtype; or a bool
            mask, which is used as it is.
        target: class of each image, ``[N]``, int64 or int32, in [0, L) or ``ignore_index``.

    Returns:
        A scalar. It is float32 for half types (float64 for float64).

    Gradients: ``activations``; none through the mask.
    Numerics: as ``otsu_mask`` and ``local_level_loss``, which do the work. Attention that holds a NaN has an
        empty mask.

    No code of the paper's authors is known to us, so there is no preset.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a wrong shape, device or option.
        IndexError: a class index outside [0, L) that is not ``ignore_index``, on the CPU; on a GPU the loss
            is NaN instead.

    Source: Shen and Liu, "Generating Attention from Classifier Activations for Fine-grained Recognition",
    eq. 2-4.
    """

    def __init__(self, *, weight: float = 1.0, bins: int = 256, ignore_index: int = -100) -> None:
        super().__init__()
        name = type(self).__name__
        self.weight = _inputs.factor(name, "weight", weight)
        self.bins = _checks.bins(name, bins)
        self.ignore_index = _checks.class_index(name, "ignore_index", ignore_index)

    def forward(self, activations: Tensor, attention: Tensor, target: Tensor) -> Tensor:
        name = type(self).__name__
        activations = _checks.local_activations(name, activations)
        attention = _attention(name, attention, activations)
        mask = attention if attention.dtype == torch.bool else otsu_mask(attention, bins=self.bins).mask
        return self.weight * loss_of(name, activations, mask, target, self.ignore_index)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, bins={self.bins}, ignore_index={self.ignore_index}"


def _attention(function: str, value: object, activations: Tensor) -> Tensor:
    if isinstance(value, Tensor) and value.dtype not in (torch.bool, *_checks.FLOATS):
        allowed = ", ".join(map(_checks.dtype_name, (torch.bool, *_checks.FLOATS)))
        raise TypeError(
            f"{function}: attention has dtype {_checks.dtype_name(value.dtype)}; allowed are {allowed}"
        )
    if not isinstance(value, Tensor):
        value = _checks.tensor(function, "attention", value, "[N, H, W]", (3,))
    wanted = [activations.shape[0], *activations.shape[2:]]
    if list(value.shape) != wanted:
        raise ValueError(
            f"{function}: attention has shape {list(value.shape)} and activations {list(activations.shape)}; "
            f"it must be {wanted}"
        )
    return _checks.same_device(function, "attention", value, activations, "activations")
