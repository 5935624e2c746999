// The table of kernels of one instruction set; setup.py compiles this file once for each, with
// CAMKERNELS_ISA (its name), CAMKERNELS_TABLE (the table's) and CAMKERNELS_VECTOR_BYTES.
#include "kernels.h"

#include "cam_erase_kernels.h"
#include "cam_kernels.h"
#include "cam_seeds_kernels.h"
#include "cam_transform_mse_kernels.h"
#include "crop_and_zoom_kernels.h"
#include "focus_area_kernels.h"
#include "local_activations_kernels.h"
#include "local_level_loss_kernels.h"
#include "masked_max_pool_kernels.h"
#include "negative_cam_loss_kernels.h"
#include "otsu_mask_kernels.h"
#include "stochastic_consistency_kernels.h"

namespace camkernels::cpu {
namespace {

// Calls function(a value of the element type).
template <typename Function>
void with_element_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kHalf:
      return function(Half{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kDouble:
      return function(double{});
    default:
      return function(float{});
  }
}

void run_cam_fwd(const CamFwd& p, int64_t begin, int64_t end) {
  with_element_type(p.features.dtype, [&](auto element) { cam_fwd<decltype(element)>(p, begin, end); });
}

void run_cam_bwd_maps(const CamBwd& p, int64_t begin, int64_t end) {
  if (p.features.dtype == DType::kDouble) {
    cam_bwd_maps<double>(p, begin, end);
  } else {
    cam_bwd_maps<float>(p, begin, end);
  }
}

void run_cam_bwd_channels(const CamBwd& p, int64_t begin, int64_t end) {
  with_element_type(p.features.dtype,
                    [&](auto element) { cam_bwd_channels<decltype(element)>(p, begin, end); });
}

template <typename Real>
void erase_fwd(const CamErase& p, int64_t image, int64_t row_begin, int64_t row_end) {
  with_element_type(p.image_dtype, [&](auto element) {
    cam_erase_fwd<Real, decltype(element)>(p, image, row_begin, row_end);
  });
}

template <typename Real>
void erase_bwd(const CamErase& p, int64_t image) {
  with_element_type(p.image_dtype, [&](auto element) { cam_erase_bwd<Real, decltype(element)>(p, image); });
}

void run_cam_erase_fwd(const CamErase& p, DType accumulate, int64_t image, int64_t row_begin,
                       int64_t row_end) {
  (accumulate == DType::kDouble ? erase_fwd<double> : erase_fwd<float>)(p, image, row_begin, row_end);
}

void run_cam_erase_bwd(const CamErase& p, DType accumulate, int64_t image) {
  (accumulate == DType::kDouble ? erase_bwd<double> : erase_bwd<float>)(p, image);
}

void run_cam_transform_mse_fwd(const CamTransformMse& p, int64_t image, int64_t class_begin,
                               int64_t class_end) {
  with_element_type(p.maps.features.dtype, [&](auto element) {
    cam_transform_mse_fwd<decltype(element)>(p, image, class_begin, class_end);
  });
}

void run_cam_transform_mse_slopes(const CamTransformMse& p, int64_t first_image, int64_t image,
                                  int64_t class_begin, int64_t class_end) {
  with_element_type(p.maps.features.dtype, [&](auto element) {
    cam_transform_mse_slopes<decltype(element)>(p, first_image, image, class_begin, class_end);
  });
}

void run_cam_transform_mse_bwd(const CamTransformMse& p, int64_t image_begin, int64_t image_end,
                               int64_t channel_begin, int64_t channel_end) {
  with_element_type(p.maps.features.dtype, [&](auto element) {
    cam_transform_mse_bwd<decltype(element)>(p, image_begin, image_end, channel_begin, channel_end);
  });
}

void run_cam_seeds_bwd(const CamSeedsBwd& p, int64_t image, int64_t channel_begin, int64_t channel_end) {
  with_element_type(p.grad_vectors.dtype, [&](auto element) {
    cam_seeds_bwd<decltype(element)>(p, image, channel_begin, channel_end);
  });
}

void run_stochastic_consistency_fwd(const StochasticConsistency& p, int64_t begin, int64_t end) {
  with_element_type(p.vectors.dtype,
                    [&](auto element) { stochastic_consistency_fwd<decltype(element)>(p, begin, end); });
}

void run_stochastic_consistency_bwd(const StochasticConsistency& p, int64_t begin, int64_t end) {
  with_element_type(p.vectors.dtype,
                    [&](auto element) { stochastic_consistency_bwd<decltype(element)>(p, begin, end); });
}

void run_negative_keys(const NegativeCamLoss& p, int64_t begin, int64_t end, void* keys) {
  with_element_type(p.branch.features.dtype, [&](auto element) {
    using T = decltype(element);
    negative_keys<T>(p, begin, end, static_cast<Accumulate<T>*>(keys));
  });
}

void run_negative_cam_loss_fwd(const NegativeCamLoss& p, int64_t image, int64_t slot_begin,
                               int64_t slot_end) {
  with_element_type(p.branch.features.dtype, [&](auto element) {
    negative_cam_loss_fwd<decltype(element)>(p, image, slot_begin, slot_end);
  });
}

void run_negative_cam_loss_bwd(const NegativeCamLoss& p, int64_t channel_begin, int64_t channel_end) {
  with_element_type(p.branch.features.dtype, [&](auto element) {
    negative_cam_loss_bwd<decltype(element)>(p, channel_begin, channel_end);
  });
}

void run_focus_area(const FocusArea& p, int64_t begin, int64_t end) {
  with_element_type(p.features.dtype, [&](auto element) { focus_area<decltype(element)>(p, begin, end); });
}

void run_local_activations_fwd(const LocalActivations& p, int64_t begin, int64_t end, int64_t part,
                               int64_t class_begin, int64_t class_end) {
  with_element_type(p.branch.features.dtype, [&](auto element) {
    local_activations_fwd<decltype(element)>(p, begin, end, part, class_begin, class_end);
  });
}

void run_local_attention(const LocalActivations& p, int64_t parts, int64_t begin, int64_t end) {
  with_element_type(p.branch.features.dtype,
                    [&](auto element) { local_attention<decltype(element)>(p, parts, begin, end); });
}

void run_local_activations_bwd(const LocalActivations& p, int64_t begin, int64_t end) {
  with_element_type(p.branch.features.dtype,
                    [&](auto element) { local_activations_bwd<decltype(element)>(p, begin, end); });
}

void run_local_activations_bias(const LocalActivations& p, int64_t begin, int64_t end) {
  with_element_type(p.branch.features.dtype,
                    [&](auto element) { local_activations_bias<decltype(element)>(p, begin, end); });
}

void run_otsu_mask_fwd(const OtsuMask& p, int64_t begin, int64_t end) {
  with_element_type(p.maps.dtype, [&](auto element) { otsu_mask_fwd<decltype(element)>(p, begin, end); });
}

void run_local_level_loss_fwd(const LocalLevelLoss& p, int64_t begin, int64_t end) {
  with_element_type(p.activations.dtype,
                    [&](auto element) { local_level_loss_fwd<decltype(element)>(p, begin, end); });
}

void run_local_level_loss_bwd(const LocalLevelLoss& p, int64_t begin, int64_t end) {
  with_element_type(p.activations.dtype,
                    [&](auto element) { local_level_loss_bwd<decltype(element)>(p, begin, end); });
}

void run_masked_max_pool_fwd(const MaskedMaxPool& p, int64_t image, int64_t begin, int64_t end) {
  with_element_type(p.features.dtype,
                    [&](auto element) { masked_max_pool_fwd<decltype(element)>(p, image, begin, end); });
}

void run_masked_max_pool_bwd(const MaskedMaxPool& p, int64_t image, int64_t begin, int64_t end) {
  with_element_type(p.grad.dtype,
                    [&](auto element) { masked_max_pool_bwd<decltype(element)>(p, image, begin, end); });
}

void run_crop_and_zoom_fwd(const CropAndZoom& p, int64_t image, int64_t begin, int64_t end) {
  with_element_type(p.from.dtype,
                    [&](auto element) { crop_and_zoom_fwd<decltype(element)>(p, image, begin, end); });
}

void run_crop_and_zoom_bwd(const CropAndZoom& p, int64_t image, int64_t begin, int64_t end) {
  with_element_type(p.from.dtype,
                    [&](auto element) { crop_and_zoom_bwd<decltype(element)>(p, image, begin, end); });
}

}  // namespace

extern const Kernels CAMKERNELS_TABLE;
const Kernels CAMKERNELS_TABLE = {CAMKERNELS_ISA,
                                  run_cam_fwd,
                                  run_cam_bwd_maps,
                                  run_cam_bwd_channels,
                                  run_cam_erase_fwd,
                                  run_cam_erase_bwd,
                                  run_cam_transform_mse_fwd,
                                  run_cam_transform_mse_slopes,
                                  run_cam_transform_mse_bwd,
                                  run_cam_seeds_bwd,
                                  run_stochastic_consistency_fwd,
                                  run_stochastic_consistency_bwd,
                                  run_negative_keys,
                                  run_negative_cam_loss_fwd,
                                  run_negative_cam_loss_bwd,
                                  run_focus_area,
                                  run_local_activations_fwd,
                                  run_local_attention,
                                  run_local_activations_bwd,
                                  run_local_activations_bias,
                                  run_otsu_mask_fwd,
                                  run_local_level_loss_fwd,
                                  run_local_level_loss_bwd,
                                  run_masked_max_pool_fwd,
                                  run_masked_max_pool_bwd,
                                  run_crop_and_zoom_fwd,
                                  run_crop_and_zoom_bwd};

}  // namespace camkernels::cpu
