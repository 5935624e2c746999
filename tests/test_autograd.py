"""What autograd can ask for besides a gradient, and tensors that are more or less than their bytes: each rule
for every function."""

from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.utils.checkpoint
from calls import CALLS, DIFFERENTIABLE, each, loss_of
from cases import Case

import camkernels

CASE = Case(images=3, channels=5, classes=4, shape=(4, 6), image_size=(9, 11))


def test_a_level_of_forward_mode_is_no_matter_without_tangents():
    with torch.autograd.forward_ad.dual_level():
        for call in CALLS:
            inputs = {name: x.detach() for name, x in call.inputs(CASE).items()}
            found = call.outputs(CASE, inputs)
            assert all(not x.requires_grad for x in found)


FORWARD_MODE = {
    "dual": lambda loss, x: loss(torch.autograd.forward_ad.make_dual(x, x)),
    "dual of a negated view": lambda loss, x: loss(
        torch._neg_view(torch.autograd.forward_ad.make_dual(x, x))
    ),
    "linearize": lambda loss, x: torch.func.linearize(loss, x)[1](x),
    "batch of tangents": lambda loss, x: torch.autograd.functional.jacobian(
        loss, x, vectorize=True, strategy="forward-mode"
    ),
}


@each(DIFFERENTIABLE)
@pytest.mark.parametrize("way", FORWARD_MODE)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_tangents_are_refused(call, way):
    inputs = {name: x.detach() for name, x in call.inputs(CASE).items()}
    leaf = call.leaves[-1]
    level = torch.autograd.forward_ad.dual_level() if "dual" in way else nullcontext()
    with pytest.raises(RuntimeError, match=rf"{call.name}: .*use_backend\('reference'\)"), level:
        FORWARD_MODE[way](lambda x: loss_of(call, CASE, **{**inputs, leaf: x}), inputs[leaf])


@each(DIFFERENTIABLE)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # asked for by torch
def test_compiled_autograd_traces_an_eager_forward(call):
    inputs = call.inputs(CASE)
    truth = torch.autograd.grad(
        loss_of(call, CASE, **inputs), [inputs[n] for n in call.leaves], allow_unused=True
    )
    loss = loss_of(call, CASE, **inputs)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    for name, grad in zip(call.leaves, truth, strict=True):
        torch.testing.assert_close(inputs[name].grad, grad)


@each(DIFFERENTIABLE)
def test_what_is_saved_is_unpacked_once(call):
    """As a checkpoint demands, which makes it then, also where a second derivative could be asked for."""
    inputs = call.inputs(CASE)
    leaves = [inputs[name] for name in call.leaves]

    def loss(*values):
        return loss_of(call, CASE, **{**inputs, **dict(zip(call.leaves, values, strict=True))})

    truth = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
    made_again = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    found = torch.autograd.grad(made_again, leaves, allow_unused=True, create_graph=True)
    for grad, true in zip(found, truth, strict=True):
        torch.testing.assert_close(grad, true)


def test_a_batch_of_gradients_has_no_double_backward():
    features = CASE.features().requires_grad_()
    cam = camkernels.fused_cam(features, CASE.weight())
    with pytest.raises(RuntimeError, match="fused_cam: there is no double backward"):
        torch.autograd.grad(
            cam, features, torch.ones(2, *cam.shape), is_grads_batched=True, create_graph=True
        )


def test_a_tensor_that_left_its_vmap_is_refused_in_words():
    left = []
    torch.vmap(lambda x: left.append(x * 1) or x)(CASE.features()[None])
    with pytest.raises(RuntimeError, match=r"fused_cam: torch\.func transforms"):
        camkernels.fused_cam(left[0], CASE.weight())


class Watchful(torch.Tensor):
    """A subclass of Python only: the dispatcher sees a tensor like any other."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


@each(CALLS)
def test_a_subclass_sees_the_op_and_stays_one(call):
    inputs = {name: x.detach() for name, x in call.inputs(CASE).items()}
    plain = call.outputs(CASE, inputs)
    Watchful.seen.clear()
    found = call.outputs(CASE, {name: x.as_subclass(Watchful) for name, x in inputs.items()})
    assert f"camkernels.{call.op.name}_fwd.default" in Watchful.seen
    for ours, true in zip(found, plain, strict=True):
        assert type(ours) is Watchful
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), true, equal_nan=True)


def used_heap():
    """Freed memory that holds no zeros: what reads beyond a tensor finds NaN."""
    kept = [torch.full((1,), torch.nan) for _ in range(20000)]
    del kept[::2]
    return kept


# Tensors of the plain type whose bytes are not their numbers: what is negated when it is read comes from
# complex numbers, what is 0 without any bytes from autograd.
NOT_THEIR_BYTES = {
    "negated": lambda x: torch._neg_view(-x),
    "zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
}


@each(CALLS)
@pytest.mark.parametrize("kind", NOT_THEIR_BYTES)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_tensors_whose_bytes_are_not_their_numbers(call, kind, backend):
    inputs = {name: x.detach() for name, x in call.inputs(CASE).items()}
    heap = used_heap()
    with camkernels.use_backend(backend):
        for name, tensor in inputs.items():
            if tensor.dtype == torch.bool or (name, kind) == ("boxes", "zeros"):  # which is no box
                continue
            odd = NOT_THEIR_BYTES[kind](tensor)
            found = call.outputs(CASE, {**inputs, name: odd})
            truth = call.outputs(CASE, {**inputs, name: odd.clone()})
            for ours, true in zip(found, truth, strict=True):
                torch.testing.assert_close(ours, true, equal_nan=True)
    del heap


@each(DIFFERENTIABLE)
@pytest.mark.parametrize("kind", NOT_THEIR_BYTES)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_gradients_whose_bytes_are_not_their_numbers(call, kind, backend):
    inputs = call.inputs(CASE)
    leaves = [inputs[name] for name in call.leaves]
    heap = used_heap()
    with camkernels.use_backend(backend):
        outputs = [x for x in call.outputs(CASE, inputs) if x.requires_grad]
        odd = [NOT_THEIR_BYTES[kind](torch.ones_like(x)) for x in outputs]
        found, truth = (
            torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)
            for grads in (odd, [x.clone() for x in odd])
        )
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, true)
    del heap
