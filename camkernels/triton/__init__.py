"""Kernels for GPUs that Triton serves; one launcher per op, under the op's name."""

from camkernels.triton.attention_boxes import attention_boxes_fwd
from camkernels.triton.cam import cam_bwd, cam_fwd
from camkernels.triton.cam_erase import cam_erase_bwd, cam_erase_fwd
from camkernels.triton.cam_seeds import cam_seeds_bwd, cam_seeds_fwd
from camkernels.triton.cam_transform_mse import cam_transform_mse_bwd, cam_transform_mse_fwd
from camkernels.triton.crop_and_zoom import crop_and_zoom_bwd, crop_and_zoom_fwd
from camkernels.triton.focus_area import focus_area_fwd
from camkernels.triton.local_activations import local_activations_bwd, local_activations_fwd
from camkernels.triton.local_level_loss import local_level_loss_bwd, local_level_loss_fwd
from camkernels.triton.masked_max_pool import masked_max_pool_bwd, masked_max_pool_fwd
from camkernels.triton.negative_cam_loss import negative_cam_loss_bwd, negative_cam_loss_fwd
from camkernels.triton.otsu_mask import otsu_mask_fwd
from camkernels.triton.stochastic_consistency import stochastic_consistency_bwd, stochastic_consistency_fwd

__all__ = [
    "attention_boxes_fwd",
    "cam_bwd",
    "cam_erase_bwd",
    "cam_erase_fwd",
    "cam_fwd",
    "cam_seeds_bwd",
    "cam_seeds_fwd",
    "cam_transform_mse_bwd",
    "cam_transform_mse_fwd",
    "crop_and_zoom_bwd",
    "crop_and_zoom_fwd",
    "focus_area_fwd",
    "local_activations_bwd",
    "local_activations_fwd",
    "local_level_loss_bwd",
    "local_level_loss_fwd",
    "masked_max_pool_bwd",
    "masked_max_pool_fwd",
    "negative_cam_loss_bwd",
    "negative_cam_loss_fwd",
    "otsu_mask_fwd",
    "stochastic_consistency_bwd",
    "stochastic_consistency_fwd",
]
