"""What the benchmarks draw their inputs from: maps that leave no decision to rounding, layouts, regions."""

import torch
from torch import Tensor

from camkernels.reference import cam

# Half-width of the band around a threshold, in units of the map, in which float32 may decide either way.
BAND = 64 * torch.finfo(torch.float32).eps
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def set_extrema_apart(features: Tensor, weight: Tensor, target: Tensor) -> None:
    """Lift each map's maximum and lower its minimum a little, in place.

    Where two pixels of a random map tie but for rounding, float32 and float64 would send the extremum's
    gradient to different ones, and both would be right.
    """
    flat = features.flatten(2)  # [N, C, H * W], shares memory
    rows = weight[target]  # [N, C]
    maps = cam(features, weight, target, normalize=False).flatten(1)  # [N, H * W]
    for pixel, sign in ((maps.argmax(1), 0.1), (maps.argmin(1), -0.1)):
        index = pixel[:, None, None].expand(-1, flat.shape[1], 1)  # [N, C, 1]
        flat.scatter_add_(2, index, (sign * rows).relu_()[..., None])


def keep_off_threshold(features: Tensor, weight: Tensor, target: Tensor, threshold: float) -> None:
    """Dim the pixels whose normalised map lies about the threshold, in place.

    The map is taken in float32 itself, hence a band of twice the width.
    """
    heat = cam(features.float(), weight, target)  # [N, H, W]
    image, row, column = torch.nonzero((heat - threshold).abs() < 2 * BAND, as_tuple=True)
    features[image, :, row, column] *= 0.95


def regions(images: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Masks of a rectangle half as high and as wide as the map, anywhere inside, ``[N, H, W]``."""

    def inside(size: int) -> Tensor:
        half = (size + 1) // 2
        start = torch.randint(size - half + 1, (images, 1), generator=generator, device=generator.device)
        place = torch.arange(size, device=generator.device)
        return (place >= start) & (place < start + half)  # [N, size]

    return inside(height)[:, :, None] & inside(width)[:, None]
