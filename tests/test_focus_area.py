"""focus_area against the words of PCL §3."""

import pytest
import torch

from camkernels import focus_area


def test_mask_is_where_the_channel_mean_exceeds_its_own_mean():
    features = torch.zeros(2, 4, 2, 3)
    features[0, :, 0, 0] = 1.0  # one pixel of six
    features[1, 2, 1] = torch.tensor([4.0, 4.0, -100.0])  # a channel mean of 1, 1, -25
    mask, coverage = focus_area(features)
    assert mask.dtype == torch.bool
    assert mask[0].tolist() == [[True, False, False], [False, False, False]]
    assert mask[1].tolist() == [[True, True, True], [True, True, False]]
    assert coverage.tolist() == pytest.approx([1 / 6, 5 / 6])


def test_constant_and_empty():
    mask, coverage = focus_area(torch.ones(1, 2, 3, 3))
    assert not mask.any()
    assert coverage.tolist() == [0.0]
    mask, coverage = focus_area(torch.ones(0, 2, 3, 3))
    assert mask.shape == (0, 3, 3)
    assert coverage.shape == (0,)


def test_half_types_average_in_float32():
    features = torch.full((1, 4096, 2, 2), 1.0, dtype=torch.float16)
    features[0, :, 0, 0] = 1.001
    mask, coverage = focus_area(features)
    assert mask[0].tolist() == [[True, False], [False, False]]
    assert coverage.dtype == torch.float32


def test_no_gradient():
    _, coverage = focus_area(torch.rand(1, 2, 3, 3, requires_grad=True))
    assert not coverage.requires_grad
