"""Fused kernels for class-activation-map (CAM) training losses.

One call per loss, exact values and gradients, no host synchronisation:

    from camkernels import fused_cam_erase, fused_cam_seeds, fused_cam_transform_mse
    from camkernels import fused_local_activations, fused_negative_cam_loss
    erased, cam = fused_cam_erase(features, classifier.weight, target, images)
    vectors, indices, count, cam = fused_cam_seeds(features, classifier.weight, target, num_seeds=3)
    loss = fused_cam_transform_mse(features, features_t, classifier.weight, transform)
    loss = fused_negative_cam_loss(features, classifier.weight, target, bias=classifier.bias, logits=logits)
    activations, attention = fused_local_activations(features, local_weight, local_bias)
"""

from camkernels import losses, metrics, transforms
from camkernels._backend import use_backend
from camkernels._version import __version__
from camkernels.ops.attention_boxes import attention_boxes
from camkernels.ops.cam import fused_cam
from camkernels.ops.cam_erase import CamErase, fused_cam_erase
from camkernels.ops.cam_seeds import CamSeeds, fused_cam_seeds
from camkernels.ops.cam_transform_mse import fused_cam_transform_mse
from camkernels.ops.crop_and_zoom import crop_and_zoom
from camkernels.ops.focus_area import FocusArea, focus_area
from camkernels.ops.local_activations import LocalActivations, fused_local_activations
from camkernels.ops.local_level_loss import local_level_loss
from camkernels.ops.masked_max_pool import masked_max_pool
from camkernels.ops.negative_cam_loss import fused_negative_cam_loss
from camkernels.ops.otsu_mask import OtsuMask, otsu_mask
from camkernels.ops.stochastic_consistency import stochastic_consistency

__all__ = [
    "CamErase",
    "CamSeeds",
    "FocusArea",
    "LocalActivations",
    "OtsuMask",
    "__version__",
    "attention_boxes",
    "crop_and_zoom",
    "focus_area",
    "fused_cam",
    "fused_cam_erase",
    "fused_cam_seeds",
    "fused_cam_transform_mse",
    "fused_local_activations",
    "fused_negative_cam_loss",
    "local_level_loss",
    "losses",
    "masked_max_pool",
    "metrics",
    "otsu_mask",
    "stochastic_consistency",
    "transforms",
    "use_backend",
]
