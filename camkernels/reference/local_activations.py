"""Dense local activations and the attention they give: DLA §4.2-4.3, eq. 1."""

import torch
from torch import Tensor

from camkernels.reference.cam import accumulate_dtype


def local_activations(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    accumulate = accumulate_dtype(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        volume = torch.einsum("nchw,klc->nklhw", features.to(accumulate), weight.to(accumulate))
        if bias is not None:
            volume = volume + bias.to(accumulate)[..., None, None]
    # max and not amax: of equal values the lowest index has the whole gradient.
    activations = volume.max(1).values  # [N, L + 1, H, W]
    attention = activations[:, :-1].max(1).values  # [N, H, W]
    return activations.to(features.dtype), attention.to(features.dtype)
