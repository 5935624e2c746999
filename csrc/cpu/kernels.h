// The CPU kernels, compiled once per instruction set; a table of functions is chosen at run time.
#pragma once

#include <cstdint>
#include <vector>

#include "../shared/dtype.h"
#include "../shared/transform.h"

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

struct CamSeedsBwd {
  void* grad;              // [N, D, pixels], or [N, pixels, D] if channels_last
  AnyArray grad_vectors;   // [N, K, D], dtype of grad
  const int64_t* indices;  // [N, K]
  int64_t seeds, depth, pixels;
  bool channels_last;
  bool streamed;  // grad is written past the caches
  bool add;       // to what grad holds already; else all of it is written
};

// Images sorted into groups, those of one class: place s holds image order[s], and the group is of the
// places begin[s] to end[s] - 1.
struct StochasticConsistency {
  AnyArray vectors;      // [N, K, D]
  const int64_t* order;  // [N]
  const int64_t* begin;  // [N]
  const int64_t* end;    // [N]
  int64_t images, seeds, depth;
  bool squared;
  void* sums;          // [N, K], accumulation type; forward only
  const void* scale;   // [], accumulation type; backward only
  void* grad_vectors;  // [N, K, D]; backward only
};

// Last feature maps of some images.
struct Branch {
  AnyArray features;  // [N, C, H, W], or [N, H, W, C] if channels_last
  void* grad;         // as features; backward only, null where not wanted
  int64_t height, width;
  bool channels_last;
  bool streamed;  // grad is written past the caches
  int64_t cells() const { return height * width; }
};

struct Classifier {
  AnyArray weight;    // [L, C]
  void* grad_weight;  // [L, C], accumulation type, zeroed; backward only, null where not wanted
  int64_t classes, channels;
};

struct CamTransformMse {
  Branch maps;    // of the images: F, with class activation maps M = W F
  Branch maps_t;  // of the transformed images: F', M'
  Classifier classifier;
  AnyArray matrix;    // [1 or N, 2, 3] where geometry.affine
  Geometry geometry;  // of kOneGrid
  Comparison comparison;
  int64_t images;
  bool matrix_per_image;
  void* means;  // [N, L], accumulation type; forward only
  void* kept;   // [N, L, cells], accumulation type; null where not wanted. kOneGrid: T(M) - M', 0 in cells
                // that are not valid. Else the larger of M and M', M if they are equal.
  const void* grad_means;  // [N, L], accumulation type; backward only
  void* slope;    // [images of a chunk, L, H * W], accumulation type; backward of a common grid only:
  void* slope_t;  // gradients of M and of M'

  bool larger_is_first() const { return maps.cells() >= maps_t.cells(); }
};

// Maps of classes that an image does not show. A slot holds one of them: those of image n are its first
// counts[n] slots.
struct NegativeCamLoss {
  Branch branch;
  Classifier classifier;
  AnyArray bias;    // [L] or null
  AnyArray logits;  // [N, L]; null: sums of the maps
  int64_t images, slots;
  bool uniform;
  double level, temperature;
  void* losses;           // [N, K], accumulation type; forward only
  const int32_t* chosen;  // [N, K], classes in rising order
  const int32_t* counts;  // [N]
  void* kept;             // [N, K, pixels], accumulation type; forward: null where not wanted
  int32_t* positive;      // [N, K]; forward only
  const void* grad;       // [], accumulation type; backward only
};

// The best of n classifiers for each class and pixel. Row k * L1 + l of the weight, [n * L1, C], is class l
// of classifier k, the last class being the background; columns are the pixels of all images, one after
// another.
struct LocalActivations {
  Branch branch;
  Classifier classifier;
  AnyArray bias;  // [n, L1]; null: none
  int64_t images, classifiers;
  void* activations;          // [N, L1, H, W], dtype of features; forward only
  void* attention;            // [N, H, W], dtype of features; forward only
  void* part_attention;       // [parts, columns], accumulation type; forward only, as the next one:
  int32_t* part_class;        // [parts, columns]: the greatest of a part of the classes
  uint8_t* winner;            // [N, L1, H, W]; forward: null where not wanted
  int32_t* attention_class;   // [N, H, W]; forward: null where not wanted
  AnyArray grad_activations;  // [N, L1, H, W]; backward only, null: none
  AnyArray grad_attention;    // [N, H, W]; backward only, null: none
  void* grad_bias;            // [n, L1], accumulation type; backward only

  int64_t classes() const { return classifier.classes / classifiers; }
  int64_t columns() const { return images * branch.cells(); }
};

struct FocusArea {
  AnyArray features;  // [N, C, H, W], or [N, H, W, C] if channels_last
  bool* mask;         // [N, H, W]
  void* coverage;     // [N], accumulation type
  int64_t channels, pixels;
  bool channels_last;
};

struct OtsuMask {
  AnyArray maps;    // [M, P]
  bool* mask;       // [M, P]
  void* threshold;  // [M], dtype of maps
  int64_t pixels;
  int bins;
};

// Pixels whose losses are one partial sum.
inline constexpr int64_t kLossTile = 64;

struct LocalLevelLoss {
  AnyArray activations;             // [N, L + 1, pixels]
  const bool* mask;                 // [N, pixels]
  AnyArray target;                  // [N]
  const int64_t* attended;          // [N], pixels in the mask
  void* losses;                     // [N, tiles], accumulation type; forward only
  const void* grad;                 // [], accumulation type; backward only
  void* grad_activations;           // as activations; backward only
  int64_t images, classes, pixels;  // background is one of the classes
  int64_t ignored;                  // an image of this class adds 0
  int64_t counted;                  // images of other classes
  int64_t tiles() const { return (pixels + kLossTile - 1) / kLossTile; }
};

struct MaskedMaxPool {
  AnyArray features;    // [N, C, H, W], or [N, H, W, C] if channels_last; forward only
  const bool* mask;     // [N, H, W]
  void* pooled;         // [N, C], dtype of features; forward only
  int32_t* index;       // [N, C], the pixel of the maximum
  AnyArray grad;        // [N, C]; backward only
  void* grad_features;  // as features; backward only
  int64_t channels, pixels;
  bool channels_last;
  bool streamed;  // grad_features is written past the caches
};

struct CropAndZoom {
  AnyArray from;   // images [N, D, H0, W0], or [N, H0, W0, D] if channels_last; in backward grad [N, D, h, w]
  void* to;        // zoomed [N, D, h, w]; in backward grad_images
  AnyArray boxes;  // [N, 4], fractions (x0, y0, x1, y1)
  int64_t depth;
  int64_t image_height, image_width, height, width;
  bool channels_last;
  bool streamed;  // the output is written past the caches
};

// `accumulate` is kDouble for float64 features, else kFloat. Ranges are of the index named.
struct Kernels {
  const char* name;
  void (*cam_fwd)(const CamFwd&, int64_t block_begin, int64_t block_end);  // blocks of kMapBlock maps
  void (*cam_bwd_maps)(const CamBwd&, int64_t map_begin, int64_t map_end);
  void (*cam_bwd_channels)(const CamBwd&, int64_t channel_begin, int64_t channel_end);
  void (*cam_erase_fwd)(const CamErase&, DType accumulate, int64_t image, int64_t row_begin, int64_t row_end);
  void (*cam_erase_bwd)(const CamErase&, DType accumulate, int64_t image);
  void (*cam_transform_mse_fwd)(const CamTransformMse&, int64_t image, int64_t class_begin,
                                int64_t class_end);
  // Of a common grid only: fills slope and slope_t for `image`, of the chunk that begins at `first_image`.
  void (*cam_transform_mse_slopes)(const CamTransformMse&, int64_t first_image, int64_t image,
                                   int64_t class_begin, int64_t class_end);
  void (*cam_transform_mse_bwd)(const CamTransformMse&, int64_t image_begin, int64_t image_end,
                                int64_t channel_begin, int64_t channel_end);
  void (*cam_seeds_bwd)(const CamSeedsBwd&, int64_t image, int64_t channel_begin, int64_t channel_end);
  // Items are seeds times places, item = seed * images + place: a group's first place does the work of all of
  // it, and with one group only its seeds can be shared out.
  void (*stochastic_consistency_fwd)(const StochasticConsistency&, int64_t item_begin, int64_t item_end);
  void (*stochastic_consistency_bwd)(const StochasticConsistency&, int64_t item_begin, int64_t item_end);
  // Fills keys [images of the range, L], accumulation type: an image's negatives are those of largest key.
  void (*negative_keys)(const NegativeCamLoss&, int64_t image_begin, int64_t image_end, void* keys);
  void (*negative_cam_loss_fwd)(const NegativeCamLoss&, int64_t image, int64_t slot_begin, int64_t slot_end);
  void (*negative_cam_loss_bwd)(const NegativeCamLoss&, int64_t channel_begin, int64_t channel_end);
  void (*focus_area)(const FocusArea&, int64_t image_begin, int64_t image_end);
  void (*local_activations_fwd)(const LocalActivations&, int64_t column_begin, int64_t column_end,
                                int64_t part, int64_t class_begin, int64_t class_end);
  void (*local_attention)(const LocalActivations&, int64_t parts, int64_t column_begin, int64_t column_end);
  void (*local_activations_bwd)(const LocalActivations&, int64_t channel_begin, int64_t channel_end);
  void (*local_activations_bias)(const LocalActivations&, int64_t class_begin, int64_t class_end);
  void (*otsu_mask_fwd)(const OtsuMask&, int64_t map_begin, int64_t map_end);
  void (*local_level_loss_fwd)(const LocalLevelLoss&, int64_t tile_begin, int64_t tile_end);
  void (*local_level_loss_bwd)(const LocalLevelLoss&, int64_t tile_begin, int64_t tile_end);
  void (*masked_max_pool_fwd)(const MaskedMaxPool&, int64_t image, int64_t channel_begin,
                              int64_t channel_end);
  void (*masked_max_pool_bwd)(const MaskedMaxPool&, int64_t image, int64_t channel_begin,
                              int64_t channel_end);
  // Rows are of the output.
  void (*crop_and_zoom_fwd)(const CropAndZoom&, int64_t image, int64_t row_begin, int64_t row_end);
  void (*crop_and_zoom_bwd)(const CropAndZoom&, int64_t image, int64_t row_begin, int64_t row_end);
};

// Maps of one image that a thread computes together: enough to reuse each feature it loads, few enough
// for their sums to stay in the first-level cache at 14 x 14.
inline constexpr int64_t kMapBlock = 32;

// Channels whose features a thread holds at once in products of many classes: a whole number of vectors.
inline constexpr int64_t kChannelBlock = 64;

const Kernels& kernels();
void use_kernels(const Kernels* chosen);
std::vector<const Kernels*> usable_kernels();  // widest first

}  // namespace camkernels::cpu
