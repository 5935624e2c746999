"""stochastic_consistency: values and gradients against the reference in float64, over every pair."""

import math

import pytest
import torch
from calls import passes
from cases import (
    BACKENDS,
    DEVICE,
    GPU,
    KERNEL_BACKENDS,
    as_double,
    as_plain,
    lay_out,
    may_hold_infinities,
    peak_bytes,
    run,
    without_cuda,
)
from closeness import assert_as_close_as

import camkernels
from camkernels import _C, reference, stochastic_consistency

OPTIONS = [("all", True), ("all", False), ("adjacent", True), ("adjacent", False)]
# [N, K, D]: no pair, one, odd, several blocks of images and of channels.
SHAPES = [(1, 3, 5), (2, 1, 1), (7, 3, 33), (20, 1, 9), (5, 1, 600)]


def vectors_of(shape, device="cpu", dtype=torch.float32, layout="contiguous", seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    if layout == "channels_last":  # what the name means in three dimensions: the middle one is dense
        return values.mT.contiguous().mT
    return lay_out(values, layout)


def target_of(images, device="cpu", classes=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, (images,), generator=draw).to(device)


def assert_right(backend, vectors, target, pairs="all", squared=True):
    options = {"pairs": pairs, "squared": squared}
    found = run(backend, lambda v: stochastic_consistency(v, target, **options), [vectors])
    plain, truth = (
        run("reference", lambda v: reference.stochastic_consistency(v, target.cpu(), **options), tensors)
        for tensors in (as_plain([vectors]), as_double([vectors]))
    )
    assert found.values[0].dtype == found.grads[0].dtype == vectors.dtype
    assert_as_close_as(found.values[0].cpu(), plain.values[0], truth.values[0], what="loss")
    assert_as_close_as(found.grads[0].cpu(), plain.grads[0], truth.grads[0], what="grad_vectors")
    return found


@pytest.mark.parametrize("backend, device", without_cuda(KERNEL_BACKENDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pairs, squared", OPTIONS)
def test_matches_reference(backend, device, dtype, shape, pairs, squared):
    if backend != "cpu" and dtype == torch.float64:
        with camkernels.use_backend(backend), pytest.raises(RuntimeError, match="not float64"):
            stochastic_consistency(vectors_of(shape, device, dtype), target_of(shape[0], device))
        return
    assert_right(backend, vectors_of(shape, device, dtype), target_of(shape[0], device), pairs, squared)


@pytest.mark.parametrize("backend, device", without_cuda(KERNEL_BACKENDS))
@pytest.mark.parametrize("layout", ["channels_last", "strided", "offset"])
@pytest.mark.parametrize("squared", [True, False])
def test_vectors_of_any_layout(backend, device, layout, squared):
    assert_right(backend, vectors_of((7, 3, 10), device, layout=layout), target_of(7, device), "all", squared)


@pytest.mark.parametrize("backend, device", without_cuda(KERNEL_BACKENDS))
@pytest.mark.parametrize("squared", [True, False])
def test_wide_vectors(backend, device, squared):
    """More channels than a block of any kernel has."""
    vectors = vectors_of((3, 1, 2100 if squared or GPU or backend == "cpu" else 2049), device)
    assert_right(backend, vectors, target_of(3, device, classes=1), "all", squared)


@pytest.mark.parametrize("backend, device", without_cuda(BACKENDS))
@pytest.mark.parametrize("squared", [True, False])
def test_by_hand(backend, device, squared):
    """Class 4 holds images 0, 1 and 4, whose vectors are 3-4-5 triangles apart; class 9 holds 2 and 3."""
    vectors = torch.tensor([[0.0, 0], [3, 4], [1, 1], [1, 3], [0, 8]], device=device)[:, None]
    target = torch.tensor([4, 4, 9, 9, 4], device=device)
    with camkernels.use_backend(backend):
        every = stochastic_consistency(vectors, target, squared=squared)
        adjacent = stochastic_consistency(vectors, target, pairs="adjacent", squared=squared)
    between = [5.0, 8.0, 5.0, 2.0]
    power = 2 if squared else 1
    assert every.item() == pytest.approx(sum(d**power for d in between) / 4, rel=1e-6)
    assert adjacent.item() == pytest.approx((5**power + 2**power) / 2, rel=1e-6)


@pytest.mark.parametrize("backend, device", without_cuda(BACKENDS))
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_any_numbers_are_classes(backend, device, dtype):
    vectors = vectors_of((6, 2, 5), device)
    target = torch.tensor([0, 1, 0, 2, 1, 0], device=device)
    names = torch.tensor([-7, 2**31 - 1, 5], device=device)
    with camkernels.use_backend(backend):
        plain = stochastic_consistency(vectors, target)
        assert torch.allclose(stochastic_consistency(vectors, names[target].to(dtype)), plain, rtol=1e-6)


@pytest.mark.parametrize("backend, device", without_cuda(BACKENDS))
@may_hold_infinities
@pytest.mark.parametrize("pairs, squared", OPTIONS)
def test_without_a_pair_loss_and_gradient_are_zero(backend, device, pairs, squared):
    """Whatever the vectors hold: the mean over no pair is 0."""
    vectors = vectors_of((4, 2, 5), device)
    vectors[1, 0, 2], vectors[2] = math.nan, math.inf
    target = torch.tensor([3, 1, 2, 0], device=device)
    found = run(backend, lambda v: stochastic_consistency(v, target, pairs=pairs, squared=squared), [vectors])
    assert found.values[0].item() == 0
    assert torch.equal(found.grads[0], torch.zeros_like(vectors))


@pytest.mark.parametrize("backend, device", without_cuda(BACKENDS))
@may_hold_infinities
@pytest.mark.parametrize("pairs, squared", OPTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_image_alone_does_not_touch_the_others(backend, device, pairs, squared, value):
    clean = vectors_of((5, 2, 3), device)
    spoilt = clean.clone()
    spoilt[2] = value
    target = torch.tensor([0, 0, 1, 5, 5], device=device)
    results = [
        run(backend, lambda v: stochastic_consistency(v, target, pairs=pairs, squared=squared), [vectors])
        for vectors in (clean, spoilt)
    ]
    assert torch.equal(results[0].values[0], results[1].values[0])
    assert torch.equal(results[0].grads[0], results[1].grads[0])
    assert not results[0].grads[0][2].any()


@pytest.mark.parametrize("backend, device", without_cuda(BACKENDS))
@pytest.mark.parametrize("pairs, squared", OPTIONS)
def test_a_nan_in_a_pair_shows(backend, device, pairs, squared):
    vectors = vectors_of((4, 1, 3), device)
    vectors[0, 0, 1] = math.nan
    with camkernels.use_backend(backend):
        loss = stochastic_consistency(
            vectors, torch.zeros(4, dtype=torch.int64, device=device), pairs=pairs, squared=squared
        )
    assert loss.isnan()


@pytest.mark.parametrize("backend, device", without_cuda(BACKENDS))
@pytest.mark.parametrize("squared", [True, False])
def test_equal_vectors_have_a_gradient_of_zero(backend, device, squared):
    """The distance has a kink there, of which the middle is taken; no 0 / 0."""
    vectors = vectors_of((1, 2, 9), device).expand(4, 2, 9).clone()
    vectors[3] += 1
    target = torch.tensor([0, 0, 0, 1], device=device)
    found = run(backend, lambda v: stochastic_consistency(v, target, squared=squared), [vectors])
    assert found.values[0].item() == 0
    assert not found.grads[0].any()


@pytest.mark.parametrize("backend, device", without_cuda(BACKENDS))
@pytest.mark.parametrize("squared", [True, False])
def test_vectors_far_from_the_origin_lose_nothing(backend, device, squared):
    """Differences of neighbours are exact in float32: a million from 0 the loss has the same bits."""
    draw = torch.Generator().manual_seed(0)
    steps = torch.randint(-2, 3, (8, 2, 16), generator=draw).float()
    target = torch.zeros(8, dtype=torch.int64, device=device)
    near, far = (
        run(backend, lambda v: stochastic_consistency(v, target, squared=squared), [(steps + at).to(device)])
        for at in (0.0, 2.0**20)
    )
    assert torch.equal(near.values[0], far.values[0])
    assert torch.equal(near.grads[0], far.grads[0])


@pytest.mark.parametrize("backend, device", without_cuda(KERNEL_BACKENDS))
@pytest.mark.parametrize("squared", [True, False])
def test_the_order_of_the_batch_does_not_matter(backend, device, squared):
    vectors, target = vectors_of((9, 2, 7), device), target_of(9, device)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(2)).to(device)
    one = run(backend, lambda v: stochastic_consistency(v, target, squared=squared), [vectors])
    other = run(
        backend, lambda v: stochastic_consistency(v, target[shuffled], squared=squared), [vectors[shuffled]]
    )
    assert torch.allclose(one.values[0], other.values[0], rtol=1e-6)
    assert torch.allclose(one.grads[0][shuffled], other.grads[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend, device", without_cuda(BACKENDS))
@pytest.mark.parametrize("pairs, squared", OPTIONS)
def test_empty_batch(backend, device, pairs, squared):
    target = target_of(0, device)
    found = run(
        backend,
        lambda v: stochastic_consistency(v, target, pairs=pairs, squared=squared),
        [vectors_of((0, 3, 5), device)],
    )
    assert found.values[0].item() == 0
    assert found.grads[0].shape == (0, 3, 5)


@pytest.mark.parametrize("backend, device", without_cuda(KERNEL_BACKENDS))
@pytest.mark.parametrize("squared", [True, False])
def test_deterministic_and_everything_is_written(backend, device, squared):
    """Under this setting PyTorch fills what is allocated with NaN."""
    vectors, target = vectors_of((8, 2, 5), device), target_of(8, device)

    def op(vectors):
        return stochastic_consistency(vectors, target, squared=squared)

    plainly = run(backend, op, [vectors])
    torch.use_deterministic_algorithms(True)
    try:
        again = run(backend, op, [vectors])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(plainly.values[0], again.values[0])
    assert torch.equal(plainly.grads[0], again.grads[0])


@pytest.mark.parametrize("backend, device", without_cuda(KERNEL_BACKENDS))
@may_hold_infinities
@pytest.mark.parametrize("squared", [True, False])
def test_groups_of_one_class(backend, device, squared):
    """Each image once, those of a class next to each other. One alone has no gradient, whatever comes from
    above."""
    vectors, classes = vectors_of((5, 2, 4), device).requires_grad_(), [7, -1, 7, 7, 2**40]
    with camkernels.use_backend(backend), passes() as seen:
        loss = stochastic_consistency(vectors, torch.tensor(classes, device=device), squared=squared)
    order, begin, end = (getattr(seen[0].values, name).tolist() for name in ("order", "begin", "end"))
    assert sorted(order) == [0, 1, 2, 3, 4]
    for place, image in enumerate(order):
        same = [other for other in range(5) if classes[other] == classes[image]]
        assert sorted(order[begin[place] : end[place]]) == same
    (grad,) = torch.autograd.grad(loss, vectors, torch.tensor(math.inf, device=device))
    assert not grad[[4, 1]].any()


@pytest.mark.parametrize("pairs, squared", OPTIONS)
def test_gradcheck(pairs, squared):
    vectors = vectors_of((6, 2, 4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: stochastic_consistency(v, target_of(6, classes=2), pairs=pairs, squared=squared), [vectors]
    )


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("squared", [True, False])
def test_every_instruction_set(capability, dtype, squared):
    chosen = _C.cpu_capability()
    _C.use_cpu_capability(capability)
    try:
        assert_right("cpu", vectors_of((7, 3, 37), dtype=dtype), target_of(7), "all", squared)
    finally:
        _C.use_cpu_capability(chosen)


@pytest.mark.parametrize("backend, device", without_cuda(BACKENDS))
def test_the_default_dtype_is_nothing_to_it(backend, device):
    """300 images of one class: more pairs than float16 can count."""
    vectors, target = vectors_of((300, 2, 3), device).requires_grad_(), torch.zeros(300, dtype=torch.int64)
    with camkernels.use_backend(backend):
        expected = stochastic_consistency(vectors, target.to(device))
        torch.set_default_dtype(torch.float16)
        try:
            found = stochastic_consistency(vectors, target.to(device))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert found > 0


def test_memory_does_not_grow_with_the_number_of_pairs():
    """A thousand images of one class: half a million pairs, none of which is written down."""
    vectors = vectors_of((1000, 3, 16), DEVICE).requires_grad_()
    target = torch.zeros(1000, dtype=torch.int64, device=DEVICE)

    def step():
        return torch.autograd.grad(stochastic_consistency(vectors, target), vectors)

    step()
    most, _ = peak_bytes(step, DEVICE)
    assert most <= 3 * vectors.numel() * 4
