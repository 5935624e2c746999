"""The executable definition of every op in plain PyTorch; imports nothing else of camkernels."""

from camkernels.reference.attention_boxes import attention_boxes
from camkernels.reference.cam import cam
from camkernels.reference.cam_erase import cam_erase
from camkernels.reference.cam_seeds import cam_seeds
from camkernels.reference.cam_transform_mse import cam_transform_mse
from camkernels.reference.crop_and_zoom import crop_and_zoom
from camkernels.reference.focus_area import focus_area
from camkernels.reference.local_activations import local_activations
from camkernels.reference.local_level_loss import local_level_loss
from camkernels.reference.masked_max_pool import masked_max_pool
from camkernels.reference.negative_cam_loss import negative_cam_loss
from camkernels.reference.otsu_mask import otsu_mask
from camkernels.reference.stochastic_consistency import mean_distance, stochastic_consistency

__all__ = [
    "attention_boxes",
    "cam",
    "cam_erase",
    "cam_seeds",
    "cam_transform_mse",
    "crop_and_zoom",
    "focus_area",
    "local_activations",
    "local_level_loss",
    "masked_max_pool",
    "mean_distance",
    "negative_cam_loss",
    "otsu_mask",
    "stochastic_consistency",
]
