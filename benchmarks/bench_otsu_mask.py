"""otsu_mask: ``python -m pytest benchmarks/bench_otsu_mask.py --rows all``."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import harness
import maps
import measure
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from camkernels import otsu_mask
from camkernels.reference import otsu_mask as reference_otsu_mask
from camkernels.reference.otsu_mask import histogram

VARIANTS = ("attention",)
TINY = {"id": "tiny", "N": 2, "HW": [2, 2], "bins": 4}


def make(
    row: Mapping[str, Any], variant: str, dtype: torch.dtype, generator: torch.Generator
) -> harness.Inputs:
    """Maps of an object and what is around it, whose values overlap."""
    shape = row["N"], *row["HW"]
    noise = torch.randn(shape, generator=generator, device=generator.device)
    attention = (maps.regions(*shape, generator) + 0.3 * noise).to(dtype)
    return harness.Inputs(args=(attention,), options={"bins": row["bins"]}, differentiable=(), grads=())


def eager(attention: Tensor, *, bins: int) -> tuple[Tensor, Tensor]:
    """As a careful user would write it: histograms of all maps at once, and their running sums. Rounded in
    another way than scikit-image's, so that a threshold may be another of those that are as good."""
    values = attention.flatten(1).to(torch.promote_types(attention.dtype, torch.float32))  # [N, P]
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    bin_of = ((values - low) * (bins / (high - low))).long().clamp_max(bins - 1)
    counts = values.new_zeros(len(values), bins).scatter_add_(1, bin_of, torch.ones_like(values))
    places = (torch.arange(bins, device=values.device, dtype=values.dtype) + 0.5) / bins
    centers = low + places * (high - low)  # [N, bins]
    threshold = centers.gather(1, between(counts, centers).argmax(1, keepdim=True))
    threshold = threshold.to(attention.dtype)[..., None]  # [N, 1, 1]
    return attention > threshold, threshold.flatten()


def between(counts: Tensor, centers: Tensor) -> Tensor:
    """Variance between the two classes for a cut after each bin but the last, [N, bins - 1]."""
    below, sums = counts.cumsum(1), (counts * centers).cumsum(1)
    above = below[:, -1:] - below
    difference = sums / below - (sums[:, -1:] - sums) / above
    return (below * above * difference.square())[:, :-1]


def skimage_loop(attention: Tensor, *, bins: int) -> tuple[Tensor, Tensor]:
    from skimage.filters import threshold_otsu

    wide = attention.to(torch.promote_types(attention.dtype, torch.float32))
    threshold = torch.tensor([threshold_otsu(each, nbins=bins) for each in wide.cpu().numpy()])
    threshold = threshold.to(attention.device, attention.dtype)
    return attention > threshold[:, None, None], threshold


def others(row: Mapping[str, Any], variant: str) -> dict[str, harness.Function]:
    return {"exact": reference_otsu_mask, **({"skimage": skimage_loop} if find_spec("skimage") else {})}


def cost(row: Mapping[str, Any], variant: str, dtype: torch.dtype, direction: str) -> measure.Cost:
    pixels = row["N"] * row["HW"][0] * row["HW"][1]
    # Place in the histogram of each pixel; per bin two counts, two sums and means, and a product of four.
    operations = 4 * pixels + 14 * row["N"] * row["bins"]
    return measure.Cost(bytes=pixels * (dtype.itemsize + 1) + row["N"] * dtype.itemsize, flops=operations)


def check(
    inputs: harness.Inputs,
    results: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
) -> None:
    mask, threshold = results
    (attention,) = inputs.args
    assert torch.equal(mask, attention > threshold[:, None, None]), "mask: not what exceeds the threshold"
    # Cuts that are equally good but for rounding are all right here; the tests ask for scikit-image's bits.
    wide = attention.flatten(1).to(torch.promote_types(attention.dtype, torch.float32))
    counts, edges = (each.double() for each in histogram(wide, inputs.options["bins"]))
    centers = (edges[:, :-1] + edges[:, 1:]) / 2
    variance = between(counts, centers).nan_to_num(-1)
    away, cut = (centers - threshold[:, None].double()).abs().min(1)
    scale = wide.abs().amax(1)
    rounding = 4 * torch.finfo(threshold.dtype).eps
    assert (away <= rounding * scale).all(), "threshold: not the centre of a bin"
    if threshold.dtype == torch.float32:  # half types cannot tell the bins apart
        found = variance.gather(1, cut[:, None].clamp_max(variance.shape[1] - 1))[:, 0]
        assert (found >= (1 - maps.BAND) * variance.amax(1)).all(), "threshold: another cut is better"


OP = harness.Op(
    name="otsu_mask",
    variants=lambda row: VARIANTS,
    tiny=lambda variant: TINY,
    reference=reference_otsu_mask,
    eager=eager,
    fused=otsu_mask,
    make=make,
    cost=cost,
    check=check,
    others=others,
    directions=("forward",),
)


def test_otsu_mask(benchmark: BenchmarkFixture, case: harness.Case, direction: str) -> None:
    harness.run_case(benchmark, case, direction)
