"""What every loss and function promises: torch.func, traces, fake tensors, copies, unknown labels."""

import copy
import inspect
import io
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import camkernels as ck
from camkernels import losses, transforms

N, C, L, H, W = 3, 4, 5, 5, 6
GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


FEATURES, MOVED, IMAGES = drawn(N, C, H, W), drawn(N, C, H, W), drawn(N, 3, 11, 13)
WEIGHT, BIAS, LOCAL_WEIGHT, LOCAL_BIAS = drawn(L, C), drawn(L), drawn(2, L, C), drawn(2, L)
LOGITS, VECTORS, ACTIVATIONS = drawn(N, L), drawn(N, 3, C), drawn(N, L, H, W)
CLASSES, PAIRS = torch.tensor([0, 3, 2]), torch.tensor([[0, 1], [2, 3], [4, 4]])
ONE_IGNORED = torch.tensor([0, -100, 2])
UNKNOWN = torch.tensor([[1, 0, 0, -1, 0], [0, 1, 1, 0, 0], [0, -1, 1, 1, 1]])
MASK, NOISE = ACTIVATIONS[:, 0] > 0, torch.rand(N, H * W, generator=GENERATOR)
BOXES = torch.tensor([[0.25, 0.1, 0.9, 0.6], [0, 0, 1, 1], [-0.2, 0.5, 0.3, 1.3]], dtype=torch.float64)
TRANSFORMS = [
    transforms.HorizontalFlip(),
    transforms.VerticalFlip(),
    transforms.Rotate90(2),
    transforms.Translate(0.3, 0.1),
    transforms.Scale((4, 7)),
    transforms.Scale(7, "bilinear"),
    transforms.Affine([[0.9, 0.1, 0.0], [0.0, 1.1, 0.1]]),
]

# How a loss is made, how it is called, and with what; the first tensor is one with a gradient.
LOSSES: dict[str, tuple[Callable[[], Any], Callable[..., Tensor], Sequence[Tensor]]] = {
    "PairwiseConsistencyLoss": (
        losses.PairwiseConsistencyLoss,
        lambda loss, *x: loss(*x),
        (LOGITS, LOGITS.flip(0), LOGITS.flip(1), ONE_IGNORED),
    ),
    "AttentionConsistencyLoss": (
        lambda: losses.AttentionConsistencyLoss(TRANSFORMS[3]),
        lambda loss, *x: loss(*x, WEIGHT).total,
        (FEATURES, MOVED),
    ),
    "WeightedBCEWithLogits": (
        lambda: losses.WeightedBCEWithLogits([0.0, 0.1, 0.5, 0.8, 1.0]),
        lambda loss, *x: loss(*x),
        (LOGITS, UNKNOWN),
    ),
    "StochasticConsistencyLoss": (
        losses.StochasticConsistencyLoss,
        lambda loss, *x: loss(*x),
        (VECTORS, CLASSES % 2),
    ),
    "GlobalConsistencyLoss": (
        lambda: losses.GlobalConsistencyLoss(L, C),
        lambda loss, *x: loss(*x),
        (VECTORS, CLASSES),
    ),
    "HomogeneousNegativeCAMLoss": (
        lambda: losses.HomogeneousNegativeCAMLoss(num_negatives=2),
        lambda loss, x, target: loss(x, WEIGHT, target, bias=BIAS),
        (FEATURES, CLASSES),
    ),
    "LocalLevelLoss": (
        lambda: losses.LocalLevelLoss(bins=16),
        lambda loss, *x: loss(*x),
        (ACTIVATIONS, FEATURES[:, 0], ONE_IGNORED),
    ),
}

NO_GRADIENT = ("focus_area", "otsu_mask", "attention_boxes")
CALLS: dict[str, tuple[Callable[..., Any], Sequence[Tensor]]] = {
    "fused_cam": (lambda x, t: ck.fused_cam(x, WEIGHT, t, bias=BIAS), (FEATURES, CLASSES)),
    "fused_cam raw": (
        lambda x, t: ck.fused_cam(x, WEIGHT, t, bias=BIAS, normalize=False),
        (FEATURES, PAIRS),
    ),
    "fused_cam all": (lambda x: ck.fused_cam(x, WEIGHT), (FEATURES,)),
    "fused_cam_erase": (lambda x, t, i: ck.fused_cam_erase(x, WEIGHT, t, i), (FEATURES, CLASSES, IMAGES)),
    "fused_cam_erase soft": (
        lambda i, x, t: ck.fused_cam_erase(x, WEIGHT, t, i, sharpness=5, fill=[1, 2, 3], mode="nearest"),
        (IMAGES, FEATURES, CLASSES),
    ),
    "fused_cam_seeds": (
        lambda x, t, n: ck.fused_cam_seeds(x, WEIGHT, t, 3, noise=n),
        (FEATURES, CLASSES, NOISE),
    ),
    "fused_cam_seeds first": (
        lambda x, t: ck.fused_cam_seeds(x, WEIGHT, t, 3, sampling="first"),
        (FEATURES, CLASSES),
    ),
    "fused_negative_cam_loss": (
        lambda x, t, z: ck.fused_negative_cam_loss(x, WEIGHT, t, num_negatives=2, logits=z, kind="uniform"),
        (FEATURES, UNKNOWN, LOGITS),
    ),
    "focus_area": (ck.focus_area, (FEATURES,)),
    "fused_local_activations": (
        lambda x: ck.fused_local_activations(x, LOCAL_WEIGHT, LOCAL_BIAS),
        (FEATURES,),
    ),
    "otsu_mask": (lambda x: ck.otsu_mask(x, bins=16), (FEATURES,)),
    "local_level_loss": (ck.local_level_loss, (ACTIVATIONS, MASK, ONE_IGNORED)),
    "masked_max_pool": (ck.masked_max_pool, (FEATURES, MASK)),
    "attention_boxes": (ck.attention_boxes, (MASK,)),
    "crop_and_zoom": (lambda x, b: ck.crop_and_zoom(x, b, (3, 4)), (IMAGES, BOXES)),
    "stochastic_consistency": (
        lambda x, t: ck.stochastic_consistency(x, t, pairs="adjacent", squared=False),
        (VECTORS, CLASSES % 2),
    ),
    **{
        f"fused_cam_transform_mse {type(move).__name__} {i}": (
            (lambda move: lambda x, y: ck.fused_cam_transform_mse(x, y, WEIGHT, move))(move),
            (FEATURES, MOVED),
        )
        for i, move in enumerate(TRANSFORMS)
    },
    **{f"{type(move).__name__} {i}": (move, (IMAGES,)) for i, move in enumerate(TRANSFORMS)},
    **{
        name: ((lambda loss, call: lambda *x: call(loss, *x))(make().eval(), call), inputs)
        for name, (make, call, inputs) in LOSSES.items()
    },
}

everything = pytest.mark.parametrize("name", CALLS)
every_loss = pytest.mark.parametrize("name", LOSSES)


def test_nothing_is_left_out():
    assert set(LOSSES) == {
        name for name in losses.__all__ if issubclass(getattr(losses, name), torch.nn.Module)
    }
    functions = {name for name in ck.__all__ if inspect.isfunction(getattr(ck, name))}
    assert functions <= {name.split()[0] for name in CALLS}
    assert set(transforms.__all__) - {"Transform"} == {type(move).__name__ for move in TRANSFORMS}


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def summed(result: Any) -> Tensor:
    return sum((x.square() + x).sum() for x in as_tuple(result) if x.requires_grad or x.is_floating_point())


@everything
def test_results_and_gradients_of_samples(name):
    """vmap, and vmap of grad, against a loop: over single images, then over batches of two."""
    call, inputs = CALLS[name]
    single_and_double = [[x[:, None] for x in inputs], [torch.stack([x, x.flip(0)], 1) for x in inputs]]
    for batched in single_and_double:
        samples = list(zip(*batched, strict=True))
        with ck.use_backend("reference"):
            found = [*vmap(lambda *x: as_tuple(call(*x)))(*batched)]
            expected = [torch.stack(x) for x in zip(*(as_tuple(call(*x)) for x in samples), strict=True)]
            if name not in NO_GRADIENT:
                found.append(vmap(grad(lambda *x: summed(call(*x))))(*batched))
                of_loop = []
                for first, *rest in samples:
                    leaf = first.clone().requires_grad_()
                    of_loop += torch.autograd.grad(summed(call(leaf, *rest)), leaf)
                expected.append(torch.stack(of_loop))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert expected[-1].any()


def test_seeds_drawn_under_vmap():
    """Each sample has seeds of its own, as ``randomness`` asks."""
    with ck.use_backend("reference"):
        seeds = vmap(lambda x: ck.fused_cam_seeds(x[None], WEIGHT, CLASSES[:1], 3), randomness="different")(
            FEATURES[:1].expand(8, -1, -1, -1)
        )
    assert len({tuple(x) for x in seeds.indices[:, 0].tolist()}) > 1


@everything
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_fake_tensors_have_the_shapes_of_real_ones(name, backend):
    call, inputs = CALLS[name]
    with ck.use_backend(backend):
        expected = as_tuple(call(*inputs))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            found = as_tuple(call(*(mode.from_tensor(x) for x in inputs)))
    for x, real in zip(found, expected, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (real.shape, real.dtype, real.stride())


@everything
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_a_trace_depends_on_no_value(name, backend, tracing_mode):
    """Made with some inputs, the graph gives the results and the gradient for others."""
    call, inputs = CALLS[name]

    def results(*given):
        values = as_tuple(call(*given))
        if name in NO_GRADIENT:
            return values
        return [*values, *torch.autograd.grad(summed(values), given[0])]

    def leaves(chosen):
        return [x.detach().requires_grad_(i == 0 and name not in NO_GRADIENT) for i, x in enumerate(chosen)]

    with ck.use_backend(backend):
        graph = make_fx(results, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(*leaves(inputs))
        others = leaves([x.flip(0) for x in inputs])
        torch.testing.assert_close(list(graph(*others)), list(results(*others)), rtol=1e-12, atol=1e-14)


def of_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def called(loss, call, inputs):
    call(loss, *inputs)


def differentiated(loss, call, inputs):
    grad(lambda x: call(loss.eval(), x, *inputs[1:]))(inputs[0])


def mapped(loss, call, inputs):
    vmap(lambda *x: call(loss.eval(), *(y[None] for y in x)))(*inputs)


def compiled(loss, call, inputs):
    torch.compile(lambda *x: call(loss, *x), backend="aot_eager", fullgraph=True)(*inputs)


def compiled_gradient(loss, call, inputs):
    of_loss = grad(lambda x, *rest: call(loss.eval(), x, *rest))
    torch.compile(lambda *x: of_loss(*x), backend="aot_eager", fullgraph=True)(*inputs)


def faked(loss, call, inputs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call(loss, *(mode.from_tensor(x) for x in inputs))


@every_loss
@pytest.mark.parametrize("before", [called, differentiated, mapped, compiled, compiled_gradient, faked])
def test_a_call_leaves_nothing_that_cannot_be_copied(name, before):
    make, call, inputs = LOSSES[name]
    loss = make()
    with ck.use_backend("reference"):
        called(loss, call, inputs)
        before(loss, call, inputs)
        values = [x for x in (*vars(loss).values(), *loss.buffers()) if isinstance(x, Tensor)]
        assert all(
            type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x) for x in values
        )
        for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), of_torch_save):
            assert torch.equal(call(copied(loss).eval(), *inputs), call(loss.eval(), *inputs))


@every_loss
def test_made_on_meta(name):
    make, call, inputs = LOSSES[name]
    with torch.device("meta"):
        loss = make()
    assert all(x.is_meta for x in loss.buffers())
    loss.to_empty(device="cpu")
    if list(loss.buffers()):
        for x in loss.buffers():
            x.fill_(7)
        loss.reset_parameters()
    assert torch.equal(call(loss, *inputs), call(make(), *inputs))
    torch.testing.assert_close(
        loss.state_dict(), (lambda other: (call(other, *inputs), other)[1])(make()).state_dict()
    )


def with_class(name: str, label: int) -> list[Tensor]:
    """The inputs of a loss with another label for the second image, or for one of its classes."""
    *rest, target = LOSSES[name][2]
    target = target.clone()
    target.view(N, -1)[1, 0] = label
    return [*rest, target]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("name", "label", "error", "message"),
    [
        *(
            (
                name,
                label,
                IndexError,
                f"target holds class {label}; {source}, so it must be in [0, {count}){also}",
            )
            for name, count, source, also in [
                ("PairwiseConsistencyLoss", L, "logits has 5 classes", " or the ignore_index -100"),
                (
                    "LocalLevelLoss",
                    L - 1,
                    "activations has 4 classes beside the background",
                    " or the ignore_index -100",
                ),
                ("HomogeneousNegativeCAMLoss", L, "weight has 5 classes", ""),
                ("GlobalConsistencyLoss", L, "num_classes is 5", ""),
            ]
            for label in ([-1, count] if also else [-1, -100, count])
        ),
        *(
            (
                "WeightedBCEWithLogits",
                label,
                ValueError,
                f"target holds {label}; it must be in [0, 1], or -1 for unknown",
            )
            for label in (2, -2, -100, 255)
        ),
    ],
)
def test_a_label_that_is_none(backend, name, label, error, message):
    make, call, _ = LOSSES[name]
    with ck.use_backend(backend), pytest.raises(error, match=f"^{name}: {re.escape(message)}$"):
        call(make(), *with_class(name, label))


@pytest.mark.parametrize("label", [-1, -100])
def test_stochastic_consistency_asks_only_whether_classes_are_equal(label):
    make, call, (vectors, _) = LOSSES["StochasticConsistencyLoss"]
    odd, plain = torch.tensor([label, 0, label]), torch.tensor([1, 0, 1])
    assert torch.equal(call(make(), vectors, odd), call(make(), vectors, plain))
