// The CPU kernels, compiled once per instruction set; a table of functions is chosen at run time.
#pragma once

#include <cstdint>
#include <vector>

#include "../shared/dtype.h"

namespace camkernels::cpu {

struct CamFwd {
  AnyArray features;  // [N, C, H, W], or [N, H, W, C] if channels_last
  AnyArray weight;    // [L, C]
  AnyArray target;    // [N, K]; null: map k is class k
  AnyArray bias;      // [L]; null: none
  void* cam;          // [N, K, H, W], dtype of features
  void* cam32;        // [N, K, H, W] float; null where cam is of the accumulation type or not normalised
  void* extent;       // [N, K, 2], accumulation type; null where not normalised
  int64_t channels, pixels, maps;
  bool channels_last;
  double eps;
};

struct CamBwd {
  AnyArray grad_cam;    // [N, K, H, W]
  AnyArray features;    // as forward
  AnyArray weight;      // [L, C]
  AnyArray target;      // [N, K]
  const void* cam;      // [N, K, H, W], accumulation type; used where extent is given
  const void* extent;   // [N, K, 2]; null where not normalised
  void* grad_raw;       // [N, K, H, W] scratch, accumulation type: gradient of the raw maps
  void* grad_features;  // as features; null where not wanted
  void* grad_weight;    // [L, C], accumulation type, zeroed; null where not wanted
  int64_t images, channels, pixels, maps;
  bool channels_last;
  bool streamed;  // grad_features is written past the caches
  double eps;
};

struct CamErase {
  AnyArray images;          // [N, D, H0, W0], or [N, H0, W0, D] if channels_last; null in a hard backward
  void* erased;             // as images; in backward the gradient of images, or null
  const void* grad_erased;  // as images; backward only
  AnyArray grad_cam;        // [N, H, W]; backward only, null: none
  const void* cam;          // [N, H, W], accumulation type
  void* grad_map;           // [N, H, W], accumulation type; backward only, null where not wanted
  const double* fill;       // [depth]
  DType image_dtype;
  int64_t height, width;  // of the map
  int64_t depth, image_height, image_width;
  bool channels_last, nearest;
  bool streamed;                // the output is written past the caches
  double threshold, sharpness;  // sharpness 0 erases hard
};

// `accumulate` is kDouble for float64 features, else kFloat. Ranges are of the index named.
struct Kernels {
  const char* name;
  void (*cam_fwd)(const CamFwd&, int64_t block_begin, int64_t block_end);  // blocks of kMapBlock maps
  void (*cam_bwd_maps)(const CamBwd&, int64_t map_begin, int64_t map_end);
  void (*cam_bwd_channels)(const CamBwd&, int64_t channel_begin, int64_t channel_end);
  void (*cam_erase_fwd)(const CamErase&, DType accumulate, int64_t image, int64_t row_begin, int64_t row_end);
  void (*cam_erase_bwd)(const CamErase&, DType accumulate, int64_t image);
};

// Maps of one image that a thread computes together: enough to reuse each feature it loads, few enough
// for their sums to stay in the first-level cache at 14 x 14.
inline constexpr int64_t kMapBlock = 32;

const Kernels& kernels();
void use_kernels(const Kernels* chosen);
std::vector<const Kernels*> usable_kernels();  // widest first

}  // namespace camkernels::cpu
