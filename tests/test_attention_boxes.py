"""attention_boxes: the least box that holds a mask."""

import pytest
import torch
from cases import BACKENDS, KERNEL_BACKENDS, without_cuda

import camkernels
from camkernels import attention_boxes

everywhere = pytest.mark.parametrize(("backend", "device"), without_cuda(BACKENDS))
on_kernels = pytest.mark.parametrize(("backend", "device"), without_cuda(KERNEL_BACKENDS))


def by_definition(mask):
    height, width = mask.shape[1:]
    boxes = []
    for each in mask.cpu():
        rows, columns = each.nonzero(as_tuple=True)
        box = [0, 0, width, height]
        if len(rows):
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        boxes.append(torch.tensor(box).float() / torch.tensor([width, height, width, height]))
    return torch.stack(boxes)


@everywhere
@pytest.mark.parametrize("size", [(7, 7), (14, 21), (1, 1), (5, 130), (37, 3)])
def test_boxes_of_random_masks(backend, device, size):
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand((8, *size), generator=draw) < torch.rand((8, 1, 1), generator=draw) ** 4
    mask[3] = False
    mask[4] = True
    mask[5] = False
    mask[5, -1, -1] = True
    mask = mask.to(device)
    with camkernels.use_backend(backend):
        boxes = attention_boxes(mask)
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes.cpu(), by_definition(mask))


@everywhere
def test_by_hand(backend, device):
    mask = torch.zeros(2, 4, 5, dtype=torch.bool, device=device)
    mask[0, 1, 2] = mask[0, 3, 3] = True
    with camkernels.use_backend(backend):
        boxes = attention_boxes(mask)
    assert boxes[0].tolist() == pytest.approx([2 / 5, 1 / 4, 4 / 5, 1.0])
    assert boxes[1].tolist() == [0.0, 0.0, 1.0, 1.0]  # an empty mask: the whole image


@on_kernels
def test_strides_and_no_images(backend, device):
    mask = torch.zeros(3, 6, 4, dtype=torch.bool, device=device)
    mask[1, 2:4, 1] = True
    with camkernels.use_backend(backend):
        plain = attention_boxes(mask)
        odd = attention_boxes(mask.mT.contiguous().mT)
        none = attention_boxes(mask[:0])
    assert torch.equal(plain, odd)
    assert plain[1].tolist() == pytest.approx([1 / 4, 2 / 6, 2 / 4, 4 / 6])
    assert none.shape == (0, 4)
