"""Class activation maps: PCL eq. 1, I2C §3.1, VAC eq. 1."""

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(table: Tensor, target: Tensor) -> Tensor:
    """``table[target]`` where a negative index counts as out of range, as in the kernels."""
    index = target.flatten().long()
    if table.device.type == "cpu":
        rows = table.index_select(0, index)  # raises IndexError by itself
    else:  # a check would synchronise; NaN shows in the loss instead
        valid = (index >= 0) & (index < table.shape[0])
        rows = table.index_select(0, torch.where(valid, index, 0))
        valid = valid.view(-1, *[1] * (table.dim() - 1))
        rows = torch.where(valid, rows, torch.nan)
    return rows.view(*target.shape, *table.shape[1:])


def min_max(maps: Tensor, eps: float) -> Tensor:
    low = maps.amin((-2, -1), keepdim=True)  # [..., 1, 1]
    span = maps.amax((-2, -1), keepdim=True) - low
    # span <= eps rather than not (span > eps): a NaN span must reach the division and stay NaN.
    flat = span <= eps
    return torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, span))


def raw_maps(features: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
    accumulate = accumulate_dtype(features.dtype)
    features = features.to(accumulate)  # [N, C, H, W]
    weight = weight.flatten(1).to(accumulate)  # [L, C]
    bias = None if bias is None else bias.to(accumulate)  # [L]
    with torch.autocast(features.device.type, enabled=False):
        if target is None:
            maps = torch.einsum("lc,nchw->nlhw", weight, features)
            return maps if bias is None else maps + bias[:, None, None]
        equation = "nc,nchw->nhw" if target.dim() == 1 else "nkc,nchw->nkhw"
        maps = torch.einsum(equation, rows_of(weight, target), features)
        return maps if bias is None else maps + rows_of(bias, target)[..., None, None]


def varying(features: Tensor) -> Tensor:
    """``features`` with 0 for every channel that is equal at all pixels of its image. Such a channel adds a
    constant to a map, but PyTorch sums some pixels in another order than others: the rounding of the constant
    would differ from pixel to pixel, and min-max would stretch the difference to 0 .. 1."""
    first = features[..., :1, :1]
    equal = (features == first).all(-1, keepdim=True).all(-2, keepdim=True)  # [N, C, 1, 1]
    # Detached: the gradient of a constant that min-max takes away is 0 but for rounding.
    return features - torch.where(equal, first, 0).detach()


def normalised_maps(features: Tensor, weight: Tensor, target: Tensor | None, eps: float) -> Tensor:
    # A constant per map cancels in min-max: no bias.
    return min_max(raw_maps(varying(features), weight, target, None), eps)


def cam(
    features: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    if not normalize:
        return raw_maps(features, weight, target, bias).to(features.dtype)
    maps = normalised_maps(features, weight, target, eps)
    if bias is not None:  # it has a gradient all the same: exactly 0
        never = torch.zeros((), dtype=torch.bool, device=maps.device)
        maps = torch.where(never, bias.to(maps.dtype).sum(), maps)
    return maps.to(features.dtype)
