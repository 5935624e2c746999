"""The executable definition of every op in plain PyTorch; imports nothing else of camkernels."""

from camkernels.reference.cam import cam
from camkernels.reference.cam_erase import cam_erase
from camkernels.reference.cam_seeds import cam_seeds
from camkernels.reference.cam_transform_mse import cam_transform_mse
from camkernels.reference.focus_area import focus_area
from camkernels.reference.negative_cam_loss import negative_cam_loss
from camkernels.reference.stochastic_consistency import stochastic_consistency

__all__ = [
    "cam",
    "cam_erase",
    "cam_seeds",
    "cam_transform_mse",
    "focus_area",
    "negative_cam_loss",
    "stochastic_consistency",
]
