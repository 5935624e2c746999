"""Kernels for GPUs that Triton serves; one launcher per op, under the op's name."""

from camkernels.triton.cam import cam_bwd, cam_fwd
from camkernels.triton.cam_erase import cam_erase_bwd, cam_erase_fwd
from camkernels.triton.cam_seeds import cam_seeds_bwd, cam_seeds_fwd
from camkernels.triton.cam_transform_mse import cam_transform_mse_bwd, cam_transform_mse_fwd
from camkernels.triton.stochastic_consistency import stochastic_consistency_bwd, stochastic_consistency_fwd

__all__ = [
    "cam_bwd",
    "cam_erase_bwd",
    "cam_erase_fwd",
    "cam_fwd",
    "cam_seeds_bwd",
    "cam_seeds_fwd",
    "cam_transform_mse_bwd",
    "cam_transform_mse_fwd",
    "stochastic_consistency_bwd",
    "stochastic_consistency_fwd",
]
