"""Small cases of every CUDA kernel, for compute-sanitizer (see gpu.sh)."""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from calls import CALLS  # type: ignore[import-not-found]
from cases import Case  # type: ignore[import-not-found]

import camkernels

CASES = [
    # The larger shape is spread over a cluster of several blocks, the smaller one is not.
    Case(device="cuda", images=2, dtype=dtype, weight_dtype=torch.float32, layout=layout, **sizes)
    for dtype, layout, sizes in itertools.product(
        (torch.float32, torch.bfloat16),
        ("contiguous", "channels_last"),
        (
            {"channels": 16, "classes": 5, "image_size": (20, 24)},
            {"channels": 64, "classes": 70, "shape": (14, 14), "image_size": (64, 68)},
        ),
    )
]
# The keys of these seeds are in scratch memory on every GPU; an odd number of pixels.
LARGE = [
    Case(device="cuda", images=1, channels=8, classes=2, shape=(177, 177), layout=layout)
    for layout in ("contiguous", "channels_last")
]


def main() -> None:
    with camkernels.use_backend("cuda"):
        for call in CALLS:
            if "cuda" not in call.op.backends:
                continue
            for case in CASES + (LARGE if call.name == "fused_cam_seeds" else []):
                inputs = call.inputs(case)
                outputs = [x for x in call.outputs(case, inputs) if x.requires_grad]
                ends = [outputs, outputs[:1]] if len(outputs) > 1 else [outputs]  # also without the map's
                for wanted in ends:
                    torch.autograd.backward(wanted, [torch.randn_like(x) for x in wanted], retain_graph=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
