"""A small case of every CUDA kernel, for compute-sanitizer (see gpu.sh)."""

import itertools

import torch
from camkernels._library import memory_format

import camkernels
from camkernels.transforms import Affine, HorizontalFlip, Scale, Translate

# One for each path of the kernels: permutations, other moves, both kinds of common grid.
TURNED = torch.tensor([[0.9, 0.2, 0.1], [-0.2, 0.9, 0.0]])
SCALES = (Scale(96), Scale(96, "bilinear"))


def transform_losses(features: torch.Tensor, weight: torch.Tensor) -> None:
    for transform in (HorizontalFlip(), Translate(0.2, -0.1), Affine(TURNED.to(features.device)), *SCALES):
        features_t = features.detach().flip(0)
        if transform in SCALES:
            features_t = features_t[:, :, 1:, :-1].contiguous()
        camkernels.fused_cam_transform_mse(
            features, features_t.requires_grad_(), weight, transform
        ).backward()


def seeds_of_all_kinds(features: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> None:
    # More seeds than candidates, and fewer; from the features themselves, and from a layer of odd width.
    other = features.detach().repeat(1, 2, 1, 1)[:, 1:].contiguous(memory_format=memory_format(features))
    for num_seeds, sampling in ((3, "random"), (60, "random"), (5, "first")):
        for seed_features in (None, other.requires_grad_()):
            seeds = camkernels.fused_cam_seeds(
                features, weight, target, num_seeds, seed_features=seed_features, sampling=sampling
            )
            (seeds.vectors.float().square().sum() + seeds.cam.float().square().sum()).backward(
                retain_graph=True
            )
            seeds.vectors.float().sum().backward()  # without a gradient to the map


def seeds_of_a_large_map(layout: torch.memory_format) -> None:
    # Its keys are in scratch memory on every GPU; an odd number of pixels.
    features = torch.randn(1, 8, 177, 177, device="cuda").to(memory_format=layout).requires_grad_()
    weight = torch.randn(2, 8, device="cuda").requires_grad_()
    for num_seeds in (3, 300):
        seeds = camkernels.fused_cam_seeds(features, weight, torch.tensor([1], device="cuda"), num_seeds)
        (seeds.vectors.square().sum() + seeds.cam.square().sum()).backward()


def main() -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    layouts = (torch.contiguous_format, torch.channels_last)
    with camkernels.use_backend("cuda"):
        # The larger shape is spread over a cluster of several blocks, the smaller one is not.
        shapes = ((16, 7, 7, 20), (64, 14, 14, 64))
        for dtype, layout, (channels, height, width, side) in itertools.product(
            (torch.float32, torch.bfloat16), layouts, shapes
        ):
            features = torch.randn(2, channels, height, width, device="cuda", generator=draw)
            features = features.to(dtype=dtype, memory_format=layout).requires_grad_()
            images = torch.randn(2, 3, side, side + 4, device="cuda", generator=draw)
            images = images.to(dtype=dtype, memory_format=layout).requires_grad_()
            weight = torch.randn(5, channels, device="cuda", generator=draw).requires_grad_()
            target = torch.tensor([1, 4], device="cuda")
            for sharpness in (None, 5.0):
                erased, cam = camkernels.fused_cam_erase(
                    features, weight, target, images, sharpness=sharpness
                )
                (erased.float().sum() + cam.float().square().sum()).backward()
            transform_losses(features, weight)
            transform_losses(features, weight.repeat(14, 1))
            seeds_of_all_kinds(features, weight, target)
            for classes in (target, target[:, None].expand(2, 3).contiguous(), None):
                camkernels.fused_cam(features, weight, classes).float().square().sum().backward()
        for layout in layouts:
            seeds_of_a_large_map(layout)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
