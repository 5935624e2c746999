"""What is Triton's own: how many kernels start, on which device, and shapes that cut blocks unevenly.

Values and gradients of every op on this backend are compared in the op's own file, test_cam.py and so on.
"""

import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from calls import CALLS, passes, run_pass
from cases import Case, may_hold_infinities
from closeness import assert_as_close_as

import camkernels
from camkernels import _backend, reference
from camkernels._op import Op
from camkernels.ops.local_activations import LOCAL_ACTIVATIONS
from camkernels.ops.local_level_loss import LOCAL_LEVEL_LOSS
from camkernels.ops.negative_cam_loss import NEGATIVE_CAM_LOSS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if reason := _backend.why_not("triton", DEVICE):
    pytest.skip(f"Triton cannot serve {DEVICE}: {reason}", allow_module_level=True)

import triton  # noqa: E402  (it may be absent)
import triton.language as tl  # noqa: E402

from camkernels.transforms import Affine, HorizontalFlip, Scale, Translate  # noqa: E402
from camkernels.triton import (  # noqa: E402
    cam,
    cam_erase,
    cam_seeds,
    crop_and_zoom,
    front,
    local_level_loss,
    negative_cam_loss,
    otsu_mask,
    transform,
)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that start, in order."""
    names: list[str] = []
    kind = type(cam.cam_fwd_kernel)
    run = kind.run

    def recording(kernel, *args, **kwargs):
        names.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(kind, "run", recording)
    with camkernels.use_backend("triton"):
        yield names


def inputs(
    shape: tuple[int, ...] = (2, 12, 7, 7), classes: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=draw)
    weight = torch.randn((classes, shape[1]), generator=draw)
    target = torch.randint(0, classes, shape[:1], generator=draw)
    return features.to(DEVICE, dtype), weight.to(DEVICE, dtype), target.to(DEVICE)


@pytest.mark.parametrize("size", [7, 17], ids=["one block", "several blocks"])
@pytest.mark.parametrize("sharpness", [None, 10.0], ids=["hard", "soft"])
def test_erase_forward_is_two_launches(started, size, sharpness):
    features, weight, target = inputs((2, 12, size, size))
    images = torch.randn((2, 3, 20, 30), device=DEVICE)
    camkernels.fused_cam_erase(features, weight, target, images, sharpness=sharpness)
    assert started == ["cam_fwd_kernel", "erase_kernel"]


def test_map_of_one_class_is_one_launch(started):
    camkernels.fused_cam(*inputs((2, 12, 17, 19)))
    assert started == ["cam_fwd_kernel"]


def test_all_maps_of_one_block_are_one_launch(started):
    features, weight, _ = inputs(classes=cam.MANY_MAPS)
    camkernels.fused_cam(features, weight)
    assert started == ["cam_product_fwd_kernel"]


def test_only_wanted_gradients_are_computed(started):
    features, weight, target = inputs()
    images = torch.randn((2, 3, 20, 30), device=DEVICE, requires_grad=True)
    camkernels.fused_cam_erase(features, weight, target, images).erased.sum().backward()
    assert started == ["cam_fwd_kernel", "erase_kernel", "erase_kernel"]


@pytest.mark.parametrize("size", [7, 17], ids=["one block", "several blocks"])
def test_seeds_take_three_launches_and_their_gradient_one(started, size):
    features, weight, target = inputs((2, 12, size, size))
    features.requires_grad_()
    seeds = camkernels.fused_cam_seeds(features, weight, target, 3)
    assert started == ["cam_fwd_kernel", "select_seeds_kernel", "gather_seeds_kernel"]
    started.clear()
    seeds.vectors.sum().backward()
    assert started == ["cam_seeds_bwd_kernel"]


@pytest.mark.parametrize("squared", [True, False])
def test_consistency_is_one_launch(started, squared):
    vectors = torch.randn((4, 2, 6), device=DEVICE, requires_grad=True)
    target = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    loss = camkernels.stochastic_consistency(vectors, target, squared=squared)
    name = "squared_distances" if squared else "distances"
    assert started == [f"{name}_kernel"]
    started.clear()
    loss.backward()
    assert started == [f"{name}_bwd_kernel"]


PRODUCTS = "cam_transform_mse_features_bwd_kernel", "cam_transform_mse_weight_bwd_kernel"


@pytest.mark.parametrize(
    "transform, size_t, shape, forward, backward",
    [
        (HorizontalFlip(), 7, (2, 12, 7, 7), [], [*PRODUCTS, "sum_parts_kernel"]),
        (HorizontalFlip(), 7, (1, 12, 7, 7), [], [*PRODUCTS]),
        (HorizontalFlip(), 7, (1, 256, 7, 7), ["mean_squares_kernel"], [*PRODUCTS]),
        (HorizontalFlip(), 17, (1, 2, 17, 17), ["mean_squares_kernel"], [*PRODUCTS]),
        (Translate(0.1, 0.2), 7, (1, 12, 7, 7), [], [PRODUCTS[0], *PRODUCTS]),
        (
            Affine([[0.9, 0.1, 0.0], [0.0, 0.9, 0.1]]),
            7,
            (1, 12, 7, 7),
            [],
            [
                "valid_cells_kernel",
                PRODUCTS[0],
                "affine_adjoint_kernel",
                "cam_product_features_bwd_kernel",
                PRODUCTS[1],
            ],
        ),
    ],
    ids=["flip", "one image", "few programs", "several blocks", "shift", "affine"],
)
def test_heatmaps_of_one_grid_take_one_product(started, transform, size_t, shape, forward, backward):
    """And one for the gradients of both features, where a flip moves the one to the other."""
    features, weight, _ = inputs(shape)
    features_t = torch.randn((*shape[:2], size_t, size_t), device=DEVICE)
    leaves = [x.requires_grad_() for x in (features, features_t, weight)]
    transform = Affine(transform.matrix.to(DEVICE)) if isinstance(transform, Affine) else transform
    loss = camkernels.fused_cam_transform_mse(*leaves, transform)
    assert started == ["cam_transform_mse_fwd_kernel", *forward]
    started.clear()
    loss.backward()
    assert started == backward


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_heatmaps_of_two_sizes_are_made_once_each(started, mode):
    features, weight, _ = inputs((1, 12, 4, 4))
    features_t = torch.randn((1, 12, 3, 3), device=DEVICE)
    leaves = [x.requires_grad_() for x in (features, features_t, weight)]
    loss = camkernels.fused_cam_transform_mse(*leaves, Scale(64, mode))
    assert started == ["cam_fwd_kernel", "cam_fwd_kernel", "common_grid_fwd_kernel"]
    started.clear()
    loss.backward()
    # The larger map was kept, the smaller one is made again.
    of_a_map = [f"{mode}_bwd_kernel"]
    if mode == "bilinear":
        of_a_map = ["axis_products_kernel"] * 2 + of_a_map
    products = ["cam_product_features_bwd_kernel"] * 2 + ["cam_product_weight_bwd_kernel"] * 2
    assert started == ["cam_fwd_kernel", *of_a_map * 2, *products]
    started.clear()
    camkernels.fused_cam_transform_mse(
        features, features_t.detach(), weight.detach(), Scale(64, mode)
    ).backward()
    assert started[-1:] == products[:1]
    assert started.count(f"{mode}_bwd_kernel") == 1


def test_maps_of_half_types_are_compared_in_float32():
    """E is a small difference of large sums, which half types would swallow."""
    draw = torch.Generator().manual_seed(0)
    features = (100 + torch.randn((1, 64, 5, 5), generator=draw)).to(DEVICE, torch.bfloat16)
    features_t = features.flip(-1).clone()
    features_t[0, 0, 0, 0] += 1
    weight = (1 + torch.rand((3, 64), generator=draw)).to(DEVICE, torch.bfloat16)
    with camkernels.use_backend("triton"):
        found = camkernels.fused_cam_transform_mse(
            features, features_t, weight, HorizontalFlip(), reduction="none"
        )
    change = features_t[0, 0, 0, 0].float() - features[0, 0, 0, -1].float()
    expected = (weight[:, 0].float() * change) ** 2 / 25
    assert torch.equal(found[0], expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize(
    "shape, maps, classes",
    [((2, 35, 5, 9), None, 37), ((1, 70, 17, 19), None, 33), ((2, 35, 7, 7), 18, 5)],
    ids=["whole maps", "several blocks", "chosen classes"],
)
def test_products_match_reference(shape, maps, classes, normalize, dtype):
    """As many maps as make a matrix product, in blocks that classes, channels and pixels do not fill."""
    draw = torch.Generator().manual_seed(1)
    features, weight, _ = inputs(shape, classes, dtype)
    target = None if maps is None else torch.randint(0, classes, (shape[0], maps), generator=draw).to(DEVICE)
    bias = torch.randn(classes, generator=draw).to(DEVICE, dtype)
    grad = torch.randn((shape[0], maps or classes, *shape[2:]), generator=draw).to(DEVICE, dtype)

    def run(function, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        value = function(*leaves[:2], target, bias=leaves[2], normalize=normalize)
        grads = torch.autograd.grad(value, leaves[: 2 if normalize else 3], grad.to(value.dtype))
        return [value.detach(), *grads]

    tensors = features, weight, bias
    with camkernels.use_backend("triton"):
        ours = run(camkernels.fused_cam, *tensors)
    theirs = run(reference.cam, *tensors)
    truth = run(reference.cam, *(x.double() for x in tensors))
    for name, a, b, c in zip(("cam", "features", "weight", "bias"), ours, theirs, truth, strict=False):
        assert_as_close_as(a, b, c, what=name)


@pytest.mark.parametrize("target", [-1, 99])
def test_kernel_makes_the_map_of_no_class_nan(target):
    """The launcher itself, which checks nothing."""
    features, weight, classes = inputs()
    classes[0] = target
    value = features.new_empty((2, 1, 7, 7))
    extent = features.new_empty((2, 1, 2))
    nothing = features.new_empty(0)
    columns = classes[:, None].contiguous()
    cam.cam_fwd(features, weight, columns, None, True, 1e-8, value, nothing, extent)
    grad_features, grad_weight = torch.empty_like(features), torch.empty_like(weight)
    cam.cam_bwd(
        *(torch.ones_like(value), features, weight, columns, value, extent, True, 1e-8),
        *(True, True, False, grad_features, grad_weight, nothing),
    )
    for result in (value, grad_features):
        assert result[0].isnan().all()
        assert result[1].isfinite().all()
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("target", [-1, 99])
def test_kernel_takes_the_first_pixel_where_there_is_no_class(target):
    """The launcher itself, which checks nothing."""
    features, weight, classes = inputs()
    classes[0] = target
    indices = torch.full((2, 3), -1, device=DEVICE)
    count = torch.full((2,), -1, device=DEVICE)
    vectors, value = features.new_empty((2, 3, 12)), features.new_empty((2, 1, 7, 7))
    extent, nothing = features.new_empty((2, 1, 2)), features.new_empty(0)
    columns, noise = classes[:, None].contiguous(), torch.rand(2, 49, device=DEVICE)
    cam_seeds.cam_seeds_fwd(
        *(features, weight, columns, features, noise, 3, 0.7, 1e-8),
        *(vectors, indices, count, value, nothing, extent),
    )
    assert indices[0].tolist() == [0, 0, 0]
    assert count[0].item() == 0
    assert torch.equal(vectors[0], features[0, :, 0, 0].expand(3, 12))
    assert count[1].item() > 0


@pytest.mark.parametrize("add", [False, True], ids=["written", "added"])
def test_a_seed_outside_the_map_has_no_gradient(add):
    """The launcher itself: such a seed is passed over, and nothing is written past the gradient."""
    guarded = torch.ones(3, 2, 3, 4, device=DEVICE)
    indices = torch.tensor([[12, -1, 5, 2**40]], device=DEVICE)
    cam_seeds.cam_seeds_bwd(guarded[1:2], torch.ones(1, 4, 2, device=DEVICE), indices, add)
    expected = torch.full((2, 12), float(add), device=DEVICE)
    expected[:, 5] += 1
    assert torch.equal(guarded[1].flatten(1), expected)
    assert (guarded[::2] == 1).all()


@pytest.mark.parametrize("size", [7, 17], ids=["one block", "several blocks"])
def test_focus_area_is_one_launch(started, size):
    camkernels.focus_area(inputs((2, 12, size, size))[0])
    assert started == ["focus_area_kernel"]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("given", [True, False], ids=["logits", "no logits"])
@pytest.mark.parametrize(
    "shape, maps, parts",
    [
        ((2, 12, 7, 7), ["negative_cam_loss_fwd_kernel"], []),
        ((2, 12, 17, 16), ["cam_product_fwd_kernel", "map_losses_kernel"], ["sum_parts_kernel"]),
    ],
    ids=["one block", "several blocks"],
)
def test_negative_maps_are_made_once(started, shape, maps, parts, given, bias):
    features, weight, target = inputs(shape)
    leaves = [x.requires_grad_() for x in (features, weight, torch.zeros(5, device=DEVICE))]
    logits = torch.randn((2, 5), device=DEVICE) if given else None
    loss = camkernels.fused_negative_cam_loss(
        *leaves[:2], target, bias=leaves[2] if bias else None, logits=logits, num_negatives=2
    )
    keys = [] if given else ["pixel_sums_kernel", "cam_product_fwd_kernel"]
    assert started == [*keys, "choose_negatives_kernel", *maps]
    started.clear()
    loss.backward()
    # The gradient of the bias is made beside that of the weight. Parts of a batch are added up where they
    # take little memory.
    products = ["cam_product_features_bwd_kernel", "negative_cam_weight_bwd_kernel"]
    assert started == ["owners_kernel", *products, *parts * (2 if bias else 1)]


def test_only_wanted_gradients_of_negative_maps_are_computed(started):
    features, weight, target = inputs((1, 12, 3, 3))
    leaves = [features, weight, torch.zeros(5, device=DEVICE)]
    for place, name in enumerate(
        (
            "cam_product_features_bwd_kernel",
            "negative_cam_weight_bwd_kernel",
            "negative_cam_weight_bwd_kernel",
        )
    ):
        wanted = [x.detach().requires_grad_(i == place) for i, x in enumerate(leaves)]
        loss = camkernels.fused_negative_cam_loss(*wanted[:2], target, bias=wanted[2], num_negatives=2)
        started.clear()
        loss.backward()
        assert started == ["owners_kernel", name]


def chosen_negatives(logits: torch.Tensor, target: torch.Tensor, num_negatives: int) -> torch.Tensor:
    """[N, K] by the kernel."""
    chosen = torch.full((len(logits), num_negatives), 99, dtype=torch.int32, device=DEVICE)
    counts = chosen.new_empty(len(logits))
    negative_cam_loss.choose_negatives(logits.to(DEVICE), None, target.to(DEVICE), 1, chosen, counts)
    assert torch.equal(counts, (chosen >= 0).sum(1, dtype=torch.int32))
    return chosen.cpu()


def expected_negatives(logits: torch.Tensor, shown: torch.Tensor, num_negatives: int) -> torch.Tensor:
    """By torch's stable sort; ``shown`` [N, L] bool."""
    rows = []
    for image in range(len(logits)):
        order = logits[image].float().sort(descending=True, stable=True).indices
        rising = order[~shown[image, order]][:num_negatives].sort().values
        rows.append(torch.nn.functional.pad(rising, (0, num_negatives - len(rising)), value=-1))
    return torch.stack(rows).int()


HARD = torch.tensor([0.0, -0.0, 1.0, 1.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, -1.0])


@pytest.mark.parametrize(
    "classes, dtype",
    [(1, torch.float32), (2, torch.float32), (7, torch.float32), (33, torch.bfloat16), (1100, torch.float32)],
    ids=str,
)
def test_choice_of_negatives_is_that_of_a_stable_sort(classes, dtype):
    """NaN, infinities, zeros of both signs and ties, in one block of classes and in several."""
    draw = torch.Generator().manual_seed(classes)
    logits = torch.stack(
        [
            torch.randn(classes, generator=draw),
            HARD[torch.randint(len(HARD), (classes,), generator=draw)],
            torch.randint(-2, 3, (classes,), generator=draw).float(),
            torch.full((classes,), -torch.inf),
            torch.full((classes,), torch.nan),
            torch.zeros(classes),
        ]
    ).to(dtype)
    label = torch.randint(classes, (len(logits),), generator=draw)
    shown = torch.arange(classes) == label[:, None]
    several = torch.rand(logits.shape, generator=draw) < 0.3
    several[0], several[1], several[1, -1] = False, True, False
    for num_negatives in (max(classes // 3, 1), classes):
        found = chosen_negatives(logits, several, num_negatives)
        assert torch.equal(found, expected_negatives(logits, several, num_negatives))
    found = chosen_negatives(logits, label.int(), num_negatives - 1 or 1)
    assert torch.equal(found, expected_negatives(logits, shown, num_negatives - 1 or 1))


def test_negatives_of_equal_logits_next_to_each_other():
    """Logits that differ in the last bit only, on either side of 0, of 1 and of the largest number."""
    values = torch.tensor([0.0, 1.0, 3.4028234663852886e38, -1.0])
    values = torch.cat([values, values.nextafter(torch.tensor(torch.inf)), values.nextafter(-torch.ones(()))])
    logits = values.repeat(3)[torch.randperm(36, generator=torch.Generator().manual_seed(0))][None]
    shown = torch.zeros((1, 36), dtype=torch.bool)
    for num_negatives in range(1, 37, 5):
        found = chosen_negatives(logits, shown, num_negatives)
        assert torch.equal(found, expected_negatives(logits, shown, num_negatives))


def negatives(
    features: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    logits: torch.Tensor | None,
    uniform: bool,
) -> SimpleNamespace:
    """What the forward pass reads and fills; it checks nothing."""
    tensors = {"features": features, "weight": weight, "target": target, "bias": None, "logits": logits}
    options = {"num_negatives": 3, "uniform": uniform, "level": 0.0, "temperature": 1.0, "keep": True}
    return run_pass(NEGATIVE_CAM_LOSS.forward, **tensors, **options, backend="triton")


def gradients_of_negatives(found: SimpleNamespace, grad: float) -> SimpleNamespace:
    op = NEGATIVE_CAM_LOSS.backward
    needs = {"need_features": True, "need_weight": True, "need_bias": True}
    known = {**vars(found), **needs, "grad_loss": torch.tensor(grad, device=DEVICE)}
    return run_pass(op, **{name: known[name] for name in op.names})


@pytest.mark.parametrize("target", [-1, 99])
@pytest.mark.parametrize("size", [7, 17], ids=["one block", "several blocks"])
@pytest.mark.parametrize("uniform", [False, True], ids=["mse", "uniform"])
def test_kernels_make_the_loss_of_no_class_nan(target, size, uniform):
    """The ops themselves, which check nothing."""
    features, weight, label = inputs((2, 12, size, size))
    label[0] = target
    found = negatives(features, weight, label, None, uniform)
    assert found.losses[0].isnan().all()
    assert found.kept[0].isnan().all()
    assert found.losses[1].isfinite().all()
    assert found.kept[1].isfinite().all()
    assert found.chosen[0].tolist() == [5, 5, 5]
    assert found.counts.tolist() == [3, 3]
    assert found.positive[0].tolist() == [0, 0, 0]
    grads = gradients_of_negatives(found, 1.0)
    assert grads.grad_features[0].isnan().all()
    assert grads.grad_features[1].isfinite().all()
    assert grads.grad_weight.isfinite().all()
    assert grads.grad_bias.isfinite().all()


@pytest.mark.parametrize("programs", [1, 128], ids=["few programs", "many programs"])
@pytest.mark.parametrize("num_negatives", [3, 260], ids=["few", "all"])
def test_rows_of_the_weight_add_up_their_own_images(num_negatives, programs, monkeypatch):
    """Classes of several owners, more slots of an owner than a product takes; a NaN stays with its class."""
    monkeypatch.setattr(negative_cam_loss, "PROGRAMS", programs)
    draw = torch.Generator().manual_seed(2)
    features = torch.randn((3, 20, 2, 3), generator=draw)
    weight, bias = torch.randn((261, 20), generator=draw), torch.randn(261, generator=draw)
    logits, grad = torch.randn((3, 261), generator=draw), torch.randn((), generator=draw)
    bias[140] = torch.nan
    logits[:, 140] = torch.tensor([9.0, -9.0, 9.0])
    target = torch.tensor([260, 140, 0])

    def run(function, dtype):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (features, weight, bias)]
        loss = function(
            *leaves[:2],
            target.to(DEVICE),
            bias=leaves[2],
            logits=logits.to(DEVICE, dtype),
            num_negatives=num_negatives,
            level=0.5,
        )
        return [loss.detach(), *torch.autograd.grad(loss, leaves, grad.to(DEVICE, dtype))]

    with camkernels.use_backend("triton"):
        ours = run(camkernels.fused_negative_cam_loss, torch.float32)
    theirs = run(reference.negative_cam_loss, torch.float32)
    truth = run(reference.negative_cam_loss, torch.float64)
    assert truth[2].isnan().any(1).nonzero().flatten().tolist() == [140]
    for name, a, b, c in zip(("loss", "features", "weight", "bias"), ours, theirs, truth, strict=True):
        assert_as_close_as(a, b, c, what=name)


@pytest.mark.parametrize("size", [5, 17], ids=["one block", "several blocks"])
def test_means_are_over_the_negatives_of_each_image(size):
    """Counts differ from image to image; one part of the batch is shorter than the other."""
    features = torch.randn((5, 16, size, size), generator=torch.Generator().manual_seed(3))
    weight, bias = torch.linspace(-1, 1, 48).view(3, 16), torch.tensor([0.5, -1.0, 0.1])
    several = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1], [0, 0, 1]])
    # Parts of 3 and 2 images, or of one each.
    assert negative_cam_loss.weight_plan(features, 3)[2] == (2 if size == 5 else 5)

    def run(function, dtype):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (features, weight, bias)]
        loss = function(*leaves[:2], several.to(DEVICE), bias=leaves[2], num_negatives=3, level=0.5)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    with camkernels.use_backend("triton"):
        ours = run(camkernels.fused_negative_cam_loss, torch.float32)
    theirs = run(reference.negative_cam_loss, torch.float32)
    truth = run(reference.negative_cam_loss, torch.float64)
    for name, a, b, c in zip(("loss", "features", "weight", "bias"), ours, theirs, truth, strict=True):
        assert_as_close_as(a, b, c, what=name)


def test_slots_without_a_class_add_nothing():
    """Whatever the features and the weight hold there, and whatever the gradient."""
    features = torch.full((2, 3, 2, 2), torch.nan, device=DEVICE)
    features[1] = 1.0
    weight = torch.tensor([[torch.inf] * 3, [2.0] * 3, [torch.nan] * 3], device=DEVICE)
    target = torch.tensor([[True, True, True], [True, False, True]], device=DEVICE)
    logits = torch.zeros((2, 3), device=DEVICE)
    for uniform in (False, True):
        found = negatives(features, weight, target, logits, uniform)
        assert found.chosen.tolist() == [[-1, -1, -1], [1, -1, -1]]
        assert found.counts.tolist() == [0, 1]
        assert found.positive.tolist() == [[0, 0, 0], [4, 0, 0]]
        assert found.losses.tolist() == [[0, 0, 0], [0.0 if uniform else 18.0, 0, 0]]
        assert not found.kept[0].any()
        assert not found.kept[1, 1:].any()
        for value in (1.0, torch.nan):
            grads = gradients_of_negatives(found, value)
            assert not grads.grad_features[0].any()
            assert not grads.grad_weight[::2].any()
            assert not grads.grad_bias[::2].any()
            assert grads.grad_weight[1].isnan().all() == (value != value)


@pytest.mark.parametrize(
    "images, classifiers, parts", [(2, 3, []), (5, 2, ["sum_parts_kernel"])], ids=["whole", "parts"]
)
def test_local_activations_are_one_launch(started, images, classifiers, parts):
    """And each wanted gradient one, but for parts of the batch, of 2, 2 and 1 images, to be added up."""
    draw = torch.Generator().manual_seed(4)
    drawn = [
        torch.randn(shape, generator=draw)
        for shape in ((images, 12, 7, 7), (classifiers, 2, 12), (classifiers, 2))
    ]
    grad = torch.randn((images, 2, 7, 7), generator=draw)

    def run(function, dtype):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in drawn]
        activations, attention = function(*leaves)
        forward = started.copy()
        started.clear()
        return forward, torch.autograd.grad(
            [activations, attention], leaves, [grad.to(DEVICE, dtype), grad[:, 0].to(DEVICE, dtype)]
        )

    forward, ours = run(camkernels.fused_local_activations, torch.float32)
    backward = ["local_features_bwd_kernel", "local_weight_bwd_kernel", *parts, "local_bias_bwd_kernel"]
    assert (forward, started) == (["local_activations_fwd_kernel"], backward)
    _, theirs = run(reference.local_activations, torch.float32)
    _, truth = run(reference.local_activations, torch.float64)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert_as_close_as(a, b, c)
    for place, name in enumerate(backward[:2] + backward[-1:]):
        leaves = [x.to(DEVICE).requires_grad_(i == place) for i, x in enumerate(drawn)]
        attention = camkernels.fused_local_activations(*leaves).attention
        started.clear()
        attention.sum().backward()
        assert [kernel for kernel in started if kernel != "sum_parts_kernel"] == [name]


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_equal_activations_of_several_products(value):
    """More classifiers than one product takes, and more classes: of equal ones the first still wins."""
    weight = torch.zeros((18, 20, 2), device=DEVICE)
    weight[1:, 3:] = value
    with camkernels.use_backend("triton"), passes() as seen:
        camkernels.fused_local_activations(
            torch.ones((1, 2, 1, 3), device=DEVICE, requires_grad=True), weight
        )
    assert seen[0].values.winner[0, :, 0, 0].tolist() == [0] * 3 + [1] * 17
    assert seen[0].values.attention_class.tolist() == [[[3, 3, 3]]]


@may_hold_infinities
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_did_not_win_adds_nothing(dtype):
    """Not even where it is no number; all else are small integers, whose sums are exact."""
    draw = torch.Generator().manual_seed(5)
    shapes = (2, 20, 3, 7), (3, 2, 20), (2, 2, 3, 7)
    features, weight, grad = (torch.randint(1, 4, shape, generator=draw).double() for shape in shapes)
    winner = torch.randint(3, shapes[2], generator=draw)
    features[0, 4, 1, 2], features[1, 7, 2, 6], features[1, 9, 0, 0] = torch.nan, torch.inf, -torch.inf
    weight[2, 1] = torch.nan
    winner[:, 1].clamp_(max=1)
    winner[1, 1, 0, 3] = 2
    won = torch.nn.functional.one_hot(winner, 3).bool()  # [N, L + 1, H, W, n]
    rows = torch.stack([weight[winner[:, label], label] for label in range(2)], 1)  # [N, L + 1, H, W, C]
    products = torch.where(won[:, :, None], (grad[:, :, None] * features[:, None])[..., None], 0.0)
    expected = [
        (grad[..., None] * rows).sum(1).movedim(-1, 1),
        products.sum((0, 3, 4)).movedim(-1, 0),
        torch.where(won, grad[..., None], 0.0).sum((0, 2, 3)).T,
    ]
    assert 0 < expected[1].isnan().sum() <= 2
    floats = {"features": features, "weight": weight, "grad_activations": grad}
    found = run_pass(
        LOCAL_ACTIVATIONS.backward,
        **{name: x.to(DEVICE, dtype) for name, x in floats.items()},
        grad_attention=None,
        winner=winner.to(DEVICE, torch.uint8),
        attention_class=torch.zeros((2, 3, 7), dtype=torch.int32, device=DEVICE),
        need_features=True,
        need_weight=True,
        need_bias=True,
        backend="triton",
    )
    for value, exact in zip((found.grad_features, found.grad_weight, found.grad_bias), expected, strict=True):
        torch.testing.assert_close(value.cpu().double(), exact, rtol=0, atol=0, equal_nan=True)


def has_one_kernel(op: Op) -> bool:
    return hasattr(importlib.import_module(f"camkernels.triton.{op.name}"), f"{op.name}_kernel")


@pytest.mark.parametrize("call", [call for call in CALLS if has_one_kernel(call.op)], ids=str)
def test_ops_of_one_kernel_are_one_launch_each_way(started, call):
    case = Case(images=2, channels=5, classes=3, shape=(6, 7), device=DEVICE)
    inputs = call.inputs(case)
    for leaf in call.leaves:
        inputs[leaf].requires_grad_()
    outputs = call.outputs(case, inputs)
    assert started == [f"{call.op.name}_kernel"]
    started.clear()
    if call.leaves:
        sum(x.sum() for x in outputs).backward()
        assert started == [f"{call.op.name}_bwd_kernel"]


def test_otsu_takes_map_after_map_and_bins_in_several_blocks(monkeypatch):
    """Programs are fewer than maps, and what the last map left in memory is not this one's."""
    monkeypatch.setattr(otsu_mask, "PROGRAMS", 2)
    monkeypatch.setattr(otsu_mask, "MOST_BINS", 128)
    maps = torch.randn((6, 1, 150), generator=torch.Generator().manual_seed(0))
    maps[2], maps[3, 0, 149], maps[4:] = 2.0, torch.nan, maps[4:].round()
    maps[1] = (maps[1] > 0).float()  # bins of all blocks are equally good: the first counts
    with camkernels.use_backend("triton"):
        ours = camkernels.otsu_mask(maps.to(DEVICE), bins=260)
    mask, threshold = reference.otsu_mask(maps, bins=260)
    assert torch.equal(ours.threshold.cpu().nan_to_num(9), threshold.nan_to_num(9))
    assert torch.equal(ours.mask.cpu(), mask)


@triton.jit
def bins_kernel(values_ptr, bin_ptr, low, high, bins, number, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.arange(0, BLOCK)
    low, high = tl.full([], 0.0, tl.float32) + low, tl.full([], 0.0, tl.float32) + high
    values = tl.load(values_ptr + place, mask=place < number, other=0.0)
    found = otsu_mask.bin_of(tl.where(place < number, values, low), low, high, bins)
    tl.store(bin_ptr + place, found, mask=place < number)


@pytest.mark.parametrize("low, high, bins", [(0.0, 1.0, 37), (-0.3, 0.1, 100), (1.0, 1.001, 120)])
def test_a_value_next_to_an_edge_is_in_its_bin(low, high, bins):
    index = torch.arange(bins + 1, dtype=torch.float32)
    low, high = torch.tensor([low, high])
    edges = index * ((high - low) / bins) + low
    edges[-1] = high
    near = [edges, edges.nextafter(high), edges.nextafter(low)]
    values = torch.cat([*near, (edges[1:] + edges[:-1]) / 2]).contiguous()
    found = torch.empty(len(values), dtype=torch.int32, device=DEVICE)
    bins_kernel[(1,)](values.to(DEVICE), found, low.item(), high.item(), bins, len(values), BLOCK=512)
    expected = (torch.searchsorted(edges, values, right=True) - 1).clamp_max(bins - 1)
    assert torch.equal(found.cpu().long(), expected)


@pytest.mark.parametrize("target", [-1, 4, 2**40])
def test_kernels_make_the_local_loss_of_no_class_nan(target):
    """The ops themselves, which check nothing; class 4 is the background."""
    activations = torch.randn((2, 5, 3, 3), device=DEVICE)
    mask = torch.zeros((2, 3, 3), dtype=torch.bool, device=DEVICE)
    mask[:, 0] = True
    label = torch.tensor([target, 3], device=DEVICE)
    tensors = {"activations": activations, "mask": mask, "target": label}
    options = {"ignore_index": -100, "backend": "triton"}
    losses = run_pass(LOCAL_LEVEL_LOSS.forward, **tensors, **options).losses
    tensors["grad_loss"] = torch.ones((), device=DEVICE)
    grads = run_pass(LOCAL_LEVEL_LOSS.backward, **tensors, **options).grad_activations
    for result in (losses, grads):
        assert result[0].isnan().all()
        assert result[1].isfinite().all()


def test_local_level_loss_over_several_blocks_of_classes(monkeypatch):
    """Also where all classes of the first block are -inf, and where they are so low that they vanish."""
    monkeypatch.setattr(local_level_loss, "WHOLE_PIXEL", 128)
    # The mask and the images are counted in several blocks too.
    monkeypatch.setattr(local_level_loss, "MOST_COUNTED", 2)
    activations = torch.randn((5, 300, 1, 5), generator=torch.Generator().manual_seed(0))
    activations[0, :256, 0, 1] = -torch.inf
    activations[0, :256, 0, 2] -= 200
    mask = torch.tensor([[[1, 1, 0, 0, 1]], [[0, 1, 0, 0, 1]]], dtype=torch.bool).repeat(3, 1, 1)[:5]
    target = torch.tensor([280, 3, -100, 4, -100])

    def run(function, dtype):
        leaf = activations.to(DEVICE, dtype).requires_grad_()
        loss = function(leaf, mask.to(DEVICE), target.to(DEVICE))
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    with camkernels.use_backend("triton"):
        ours = run(camkernels.local_level_loss, torch.float32)
    theirs = run(reference.local_level_loss, torch.float32)
    truth = run(reference.local_level_loss, torch.float64)
    assert truth[0].isfinite()
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert_as_close_as(a, b, c)


@triton.jit
def readers_kernel(found_ptr, low_ptr, high_ptr, origin, step, size, outputs, BLOCK: tl.constexpr):  # noqa: N803
    cell = tl.arange(0, BLOCK)
    first, end = crop_and_zoom.readers(cell, origin, step, size, outputs)
    tl.store(found_ptr + cell, first, mask=cell < size)
    tl.store(found_ptr + size + cell, end, mask=cell < size)
    low, high, _ = transform.border_taps(crop_and_zoom.source_of(cell, origin, step), size)
    tl.store(low_ptr + cell, low, mask=cell < outputs)
    tl.store(high_ptr + cell, high, mask=cell < outputs)


@pytest.mark.parametrize(
    "begin, end",
    [(0.0, 1.0), (0.2, 0.7), (-0.4, 0.3), (0.3, 5.0), (0.51, 0.52), (0.5, 0.500001), (-9.0, -8.0)],
)
def test_a_cell_finds_all_outputs_that_read_it(begin, end):
    """And few others: backward of crop_and_zoom looks at no more outputs than this."""
    for size, outputs in ((7, 7), (5, 40), (61, 9), (1, 3), (2, 1), (48, 64)):
        found = torch.empty((2, size), dtype=torch.int32, device=DEVICE)
        taps = torch.empty((2, outputs), dtype=torch.int32, device=DEVICE)
        axis = begin * size - 0.5, (end - begin) * size / outputs
        readers_kernel[(1,)](found, *taps, *axis, size, outputs, BLOCK=64)
        first, last = found.cpu()
        cell, output = torch.arange(size)[:, None], torch.arange(outputs)
        reads = (taps.cpu()[:, None] == cell).any(0)  # [size, outputs]
        run = (output >= first[:, None]) & (output < last[:, None])
        assert not (reads & ~run).any()
        assert ((run & ~reads).sum(1) <= (2 if end - begin > 0.001 else outputs)).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_on_the_device_of_the_tensors():
    features, weight, target = (x.to("cuda:1") for x in inputs())
    with camkernels.use_backend("triton"), torch.cuda.device(0):
        value = camkernels.fused_cam(features, weight, target)
    torch.testing.assert_close(value, reference.cam(features, weight, target))


def test_guard_leaves_the_current_device_alone():
    with front.on_device_of(torch.empty(1, device=DEVICE)) as switched:
        assert switched is None


@triton.jit
def first_rows_kernel(first_ptr, cells, pixels, scale, NEAREST: tl.constexpr):  # noqa: N803
    cell = tl.program_id(0)
    tl.store(first_ptr + cell, cam_erase.first_row_of(cell, scale, cells, pixels, NEAREST))


@pytest.mark.parametrize("nearest", [False, True], ids=["bilinear", "nearest"])
@pytest.mark.parametrize("cells, pixels", [(7, 224), (14, 225), (5, 3), (33, 40), (1, 9), (40, 40), (3, 1)])
def test_rows_of_the_image_are_parted_among_rows_of_the_map(cells, pixels, nearest):
    """Backward of the soft gate reads every row of the image once: where its upper tap is the map's row."""
    first = torch.empty(cells + 1, dtype=torch.int32, device=DEVICE)
    first_rows_kernel[(cells + 1,)](first, cells, pixels, cells / pixels, NEAREST=nearest)
    scale = torch.tensor(cells / pixels)
    rows = torch.arange(pixels)
    source = rows * scale if nearest else ((rows + 0.5) * scale - 0.5).clamp_min(0)
    low = source.to(torch.int32).clamp_max(cells - 1)
    expected = torch.searchsorted(low, torch.arange(cells + 1, dtype=torch.int32), out_int32=True)
    assert torch.equal(first.cpu(), expected)
