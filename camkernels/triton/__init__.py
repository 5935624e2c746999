"""Kernels for GPUs that Triton serves; one launcher per op, under the op's name."""

from camkernels.triton.cam import cam_bwd, cam_fwd
from camkernels.triton.cam_erase import cam_erase_bwd, cam_erase_fwd
from camkernels.triton.cam_seeds import cam_seeds_bwd, cam_seeds_fwd
from camkernels.triton.cam_transform_mse import cam_transform_mse_bwd, cam_transform_mse_fwd
from camkernels.triton.focus_area import focus_area_fwd
from camkernels.triton.negative_cam_loss import negative_cam_loss_bwd, negative_cam_loss_fwd
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
    "focus_area_fwd",
    "negative_cam_loss_bwd",
    "negative_cam_loss_fwd",
    "stochastic_consistency_bwd",
    "stochastic_consistency_fwd",
]
