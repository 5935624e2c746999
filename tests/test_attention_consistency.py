"""AttentionConsistencyLoss against VAC eq. 5 and 7 in plain PyTorch."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import camkernels
from camkernels.losses import AttentionConsistencyLoss
from camkernels.transforms import HorizontalFlip, Rotate90, Scale, Translate

FLIP, SCALE = HorizontalFlip(), Scale((96, 96))
IMAGES, CHANNELS, LABELS = 3, 5, 4


def batch(dtype: torch.dtype = torch.float64, images: int = IMAGES, seed: int = 0) -> tuple[Tensor, ...]:
    """Features of images, of flipped ones and of scaled ones, and the classifier's weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (images, CHANNELS, 4, 4),
        (images, CHANNELS, 4, 4),
        (images, CHANNELS, 3, 3),
        (LABELS, CHANNELS),
    )
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def maps(features: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("lc,nchw->nlhw", weight, features)


def flip_part(features: Tensor, flipped: Tensor, weight: Tensor) -> Tensor:
    return F.mse_loss(maps(features, weight).flip(-1), maps(flipped, weight))


def scale_part(features: Tensor, scaled: Tensor, weight: Tensor, mode: str = "nearest") -> Tensor:
    large, small = (F.interpolate(maps(x, weight), (12, 12), mode=mode) for x in (features, scaled))
    return F.mse_loss(large, small)


def test_one_transform():
    features, flipped, _, weight = batch()
    criterion = AttentionConsistencyLoss(FLIP)
    total, parts = criterion(features, flipped, weight)
    assert total.shape == ()
    assert total.dtype == torch.float64
    assert len(parts) == 1
    assert torch.equal(total, parts[0])
    assert total.item() == pytest.approx(flip_part(features, flipped, weight).item(), rel=1e-12)
    assert torch.equal(total, criterion(features, [flipped], weight).total)


@pytest.mark.parametrize("factors", [None, (0.6, 0.8), (0, 2)])
def test_parts_add_with_their_factors(factors):
    features, flipped, scaled, weight = batch()
    found = AttentionConsistencyLoss([FLIP, SCALE], factors=factors)(features, [flipped, scaled], weight)
    expected = [flip_part(features, flipped, weight).item(), scale_part(features, scaled, weight).item()]
    assert [part.item() for part in found.parts] == pytest.approx(expected, rel=1e-12)
    of_flip, of_scale = factors or (1, 1)
    assert found.total.item() == pytest.approx(of_flip * expected[0] + of_scale * expected[1], rel=1e-12)


def test_the_paper_takes_the_mode_of_scale():
    features, _, scaled, weight = batch()
    total = AttentionConsistencyLoss(Scale((96, 96), mode="bilinear"))(features, scaled, weight).total
    assert total.item() == pytest.approx(scale_part(features, scaled, weight, "bilinear").item(), rel=1e-12)


def test_only_valid_cells_count():
    features, moved, _, weight = batch()
    total = AttentionConsistencyLoss(Translate(0.25, 0))(features, moved, weight).total
    expected = F.mse_loss(maps(features, weight)[..., :-1], maps(moved, weight)[..., 1:])
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_heatmaps_that_follow_cost_nothing():
    features, _, _, weight = batch()
    leaves = [x.requires_grad_() for x in (features, weight)]
    turn = Rotate90(1)
    total = AttentionConsistencyLoss([FLIP, turn])(
        features, [FLIP(features.detach()), turn(features.detach())], weight
    ).total
    total.backward()
    assert total.item() == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def test_the_paper_moves_the_weight_and_the_released_code_does_not():
    values, grads = [], []
    for preset in ("paper", "official"):
        leaves = [x.requires_grad_() for x in batch()]
        features, flipped, scaled, weight = leaves
        total = AttentionConsistencyLoss([FLIP, SCALE], preset=preset)(
            features, [flipped, scaled], weight
        ).total
        total.backward()
        values.append(total.detach())
        grads.append([x.grad for x in leaves])
    assert torch.equal(*values)
    paper, official = grads
    assert paper[3].abs().sum() > 0
    assert official[3] is None
    torch.testing.assert_close(paper[:3], official[:3])
    assert all(grad.abs().sum() > 0 for grad in paper[:3])


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_gradcheck(preset):
    features, flipped, scaled, weight = batch()
    inputs = [x.requires_grad_() for x in (features, flipped, scaled)]
    if preset == "paper":
        weight.requires_grad_()
    criterion = AttentionConsistencyLoss([FLIP, SCALE], factors=[0.5, 2], preset=preset)

    def loss(features: Tensor, flipped: Tensor, scaled: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        found = criterion(features, [flipped, scaled], weight)
        return found.total, *found.parts

    assert torch.autograd.gradcheck(loss, (*inputs, weight))


def test_each_part_has_its_own_gradient():
    features, flipped, scaled, weight = (x.requires_grad_() for x in batch())
    _, parts = AttentionConsistencyLoss([FLIP, SCALE])(features, [flipped, scaled], weight)
    of_flip = torch.autograd.grad(parts[0], (flipped, scaled), allow_unused=True, retain_graph=True)
    of_scale = torch.autograd.grad(parts[1], (flipped, scaled), allow_unused=True)
    assert of_flip[0].abs().sum() > 0
    assert of_scale[1].abs().sum() > 0
    assert of_flip[1] is None
    assert of_scale[0] is None


def test_without_any_gradient():
    features, flipped, _, weight = batch()
    assert not AttentionConsistencyLoss(FLIP)(features, flipped, weight).total.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_give_float32(dtype):
    features, flipped, scaled, weight = (x.requires_grad_() for x in batch(dtype))
    criterion = AttentionConsistencyLoss([FLIP, SCALE])
    found = criterion(features, [flipped, scaled], weight)
    wide = criterion(
        *(x.detach().float() for x in (features,)), [flipped.float(), scaled.float()], weight.float()
    )
    assert found.total.dtype == torch.float32
    assert found.parts[1].dtype == torch.float32
    torch.testing.assert_close(found.total, wide.total.detach(), rtol=1e-5, atol=0)
    found.total.backward()
    assert all(x.grad.dtype == dtype for x in (features, flipped, scaled, weight))


def test_large_maps_in_half_stay_finite():
    # The square of 1e4 is beyond float16, whose largest number is 65504.
    features = torch.full((1, 1, 2, 2), 1e4, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(1, 1, dtype=torch.float16, requires_grad=True)
    total = AttentionConsistencyLoss(FLIP)(features, torch.zeros_like(features), weight).total
    (total / 1e4).backward()
    assert total.item() == pytest.approx(1e8)
    assert features.grad.isfinite().all()
    assert weight.grad.item() == pytest.approx(2e4)


def test_weight_of_a_convolution():
    features, flipped, _, weight = batch()
    criterion = AttentionConsistencyLoss(FLIP)
    assert torch.equal(
        criterion(features, flipped, weight[..., None, None]).total,
        criterion(features, flipped, weight).total,
    )


def test_under_autocast():
    features, flipped, scaled, weight = batch(torch.float32)
    criterion = AttentionConsistencyLoss([FLIP, SCALE])
    with torch.autocast("cpu", torch.bfloat16):
        inside = criterion(features, [flipped, scaled], weight).total
    assert torch.equal(inside, criterion(features, [flipped, scaled], weight).total)


def test_empty_batch():
    features, flipped, scaled, weight = (x.requires_grad_() for x in batch(images=0))
    total, parts = AttentionConsistencyLoss([FLIP, SCALE])(features, [flipped, scaled], weight)
    total.backward()
    assert [part.item() for part in parts] == [0, 0]
    assert total.item() == 0
    assert features.grad.shape == features.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_compiles_to_one_graph():
    criterion = AttentionConsistencyLoss([FLIP, SCALE], factors=(0.5, 2))
    results = []
    for function in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        leaves = [x.requires_grad_() for x in batch(torch.float32)]
        features, flipped, scaled, weight = leaves
        total, parts = function(features, [flipped, scaled], weight)
        total.backward()
        results.append([total.detach(), *(part.detach() for part in parts), *(x.grad for x in leaves)])
    torch.testing.assert_close(*results)


def test_follows_use_backend():
    features, flipped, scaled, weight = batch(torch.float32)
    criterion = AttentionConsistencyLoss([FLIP, SCALE])
    with camkernels.use_backend("reference"):
        reference = criterion(features, [flipped, scaled], weight).total
    torch.testing.assert_close(criterion(features, [flipped, scaled], weight).total, reference)


def test_keeps_no_state():
    criterion = AttentionConsistencyLoss([FLIP, SCALE])
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []


def test_repr_shows_the_options():
    assert repr(AttentionConsistencyLoss([FLIP, SCALE], factors=(0.6, 0.8), preset="official")) == (
        "AttentionConsistencyLoss([HorizontalFlip(), Scale(size=(96, 96), mode='nearest')], "
        "factors=[0.6, 0.8], preset='official')"
    )


SEVERAL = "one of camkernels.transforms, or a sequence of them"


@pytest.mark.parametrize(
    ("transform", "options", "error", "message"),
    [
        ("flip", {}, TypeError, f"transform is a str; it must be {SEVERAL}"),
        (HorizontalFlip, {}, TypeError, f"transform is a ABCMeta; it must be {SEVERAL}"),
        (
            [FLIP, torch.flip],
            {},
            TypeError,
            f"transform holds a builtin_function_or_method; it must be {SEVERAL}",
        ),
        ([], {}, ValueError, f"transform is empty; it must be {SEVERAL}"),
        (FLIP, {"factors": 2}, TypeError, "factors is a int; it must be 1 numbers, one for each transform"),
        (
            FLIP,
            {"factors": [1, 2]},
            ValueError,
            "factors has 2 numbers; it must be 1 numbers, one for each transform",
        ),
        (
            [FLIP, SCALE],
            {"factors": [1, "2"]},
            TypeError,
            "factors[1] is a str; it must be a number of at least 0",
        ),
        (FLIP, {"factors": [-1]}, ValueError, "factors[0] is -1.0; it must be a finite number of at least 0"),
        (FLIP, {"preset": "released"}, ValueError, "preset is 'released'; allowed are paper, official"),
        (FLIP, {"preset": None}, TypeError, "preset is a NoneType; allowed are paper, official"),
        (
            [FLIP, Scale(96, mode="bilinear")],
            {"preset": "official"},
            ValueError,
            "transform has a Scale of mode 'bilinear'; preset='official' allows 'nearest'",
        ),
    ],
)
def test_bad_options(transform, options, error, message):
    with pytest.raises(error, match=f"^AttentionConsistencyLoss: {re.escape(message)}$"):
        AttentionConsistencyLoss(transform, **options)


X, W = torch.zeros(2, CHANNELS, 4, 4), torch.zeros(LABELS, CHANNELS)


@pytest.mark.parametrize(
    ("features_t", "error", "message"),
    [
        (X, TypeError, "features_t is a Tensor; it must be a sequence of 2 tensors, one for each transform"),
        (
            None,
            TypeError,
            "features_t is a NoneType; it must be a sequence of 2 tensors, one for each transform",
        ),
        (
            [X],
            ValueError,
            "features_t has 1 tensors; it must be a sequence of 2 tensors, one for each transform",
        ),
        ([X, 0], TypeError, "features_t is a int; it must be a tensor [N, C, H, W]"),
        ([X[:1], X], ValueError, "features_t has 1 images and features 2; they must be equal"),
    ],
)
def test_bad_features_t(features_t, error, message):
    with pytest.raises(error, match=f"^AttentionConsistencyLoss: {re.escape(message)}$"):
        AttentionConsistencyLoss([FLIP, SCALE])(X, features_t, W)


@pytest.mark.parametrize(
    ("features", "weight", "error", "message"),
    [
        ([X], W, TypeError, "features is a list; it must be a tensor [N, C, H, W]"),
        (
            X,
            W[:, 1:],
            ValueError,
            f"weight has 4 channels and features 5, being {list(X.shape)}; they must be equal",
        ),
        (X[0], W, ValueError, "features has shape [5, 4, 4]; it must be [N, C, H, W]"),
    ],
)
def test_bad_features_and_weight(features, weight, error, message):
    with pytest.raises(error, match=f"^AttentionConsistencyLoss: {re.escape(message)}$"):
        AttentionConsistencyLoss(FLIP)(features, X, weight)
