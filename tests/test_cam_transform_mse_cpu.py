"""How the CPU kernels of fused_cam_transform_mse cut their work up must not show."""

import numpy as np
import pytest
import torch
from cases import Case, run
from test_cam_transform_mse import assert_matches_reference, inputs_of, transform_of

import camkernels
from camkernels import fused_cam_transform_mse
from camkernels.transforms import HorizontalFlip


@pytest.mark.parametrize("kind", ["flip", "nearest"])
@pytest.mark.parametrize("classes", [97, 257, 300, 1100])
def test_blocks_of_classes(kind, classes):
    case = Case(images=2, channels=70, classes=classes, shape=(4, 6))
    transform = transform_of(kind, case.shape)
    assert_matches_reference("cpu", inputs_of(case, transform), transform)


@pytest.mark.parametrize("kind", ["flip", "affine", "nearest", "bilinear"])
def test_any_number_of_threads_gives_the_same_bits(kind):
    case = Case(images=3 if kind == "affine" else 9, channels=150, classes=70, shape=(7, 7))
    transform = transform_of(kind, case.shape)
    inputs = inputs_of(case, transform)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run("cpu", fused_cam_transform_mse, inputs, transform, reduction="none"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        pairs = zip(results[0].values + results[0].grads, other.values + other.grads, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(
    np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps,
    reason="this platform has no float wider than float64 to judge it by",
)
@pytest.mark.parametrize("maps", ["constant", "signed"])
def test_large_sums_in_float64(maps):
    """Here PyTorch's own float64 is no yardstick: its weight gradient is off by 25 times as much."""
    case = Case(dtype=torch.float64, shape=(33, 40), maps=maps)
    features, features_t, weight = inputs_of(case, HorizontalFlip())
    grad = torch.randn(case.images, case.classes, dtype=torch.float64, generator=case.generator())
    with camkernels.use_backend("cpu"):
        weight.requires_grad_()
        means = fused_cam_transform_mse(features, features_t, weight, HorizontalFlip(), reduction="none")
        (found,) = torch.autograd.grad(means, weight, grad)
    wide, wide_t, wide_weight, wide_grad = (
        x.detach().numpy().astype(np.longdouble) for x in (features, features_t, weight, grad)
    )
    difference = wide[..., ::-1] - wide_t  # [N, C, H, W]
    error = np.einsum("lc,nchw->nlhw", wide_weight, difference)
    exact = np.einsum("nlhw,nchw,nl->lc", error, difference, wide_grad) * 2 / (33 * 40)
    terms = np.einsum("nlhw,nchw,nl->lc", abs(error), abs(difference), abs(wide_grad)) * 2 / (33 * 40)
    distance = abs(found.numpy().astype(np.longdouble) - exact)
    assert (distance <= 16 * np.finfo(np.float64).eps * terms).all()
