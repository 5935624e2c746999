// Torch bindings and threading of cam_seeds on the CPU, and the choice of seeds.
//
// The choice lives here rather than with the kernels: what the standard library's sort leaves out of line
// must not be compiled for more than the plainest instruction set (see annotations.h).
#include <algorithm>
#include <vector>

#include "../common.h"
#include "../shared/sort_key.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

struct Candidate {
  uint32_t key;
  int64_t pixel;
};

bool chosen_before(const Candidate& a, const Candidate& b) {
  return a.key != b.key ? a.key > b.key : a.pixel < b.pixel;
}

// The first maximum; as in torch.argmax a NaN counts as the greatest.
template <typename Real>
int64_t peak_of(const Real* map, int64_t pixels) {
  int64_t peak = 0;
  for (int64_t p = 1; p < pixels && map[peak] == map[peak]; ++p) {
    if (map[p] > map[peak] || map[p] != map[p]) peak = p;
  }
  return peak;
}

// Fills indices [K] and returns how many candidates there were; noise [pixels] or null: raster order.
template <typename Real>
int64_t choose_seeds(const Real* map, const float* noise, int64_t pixels, Real threshold,
                     std::vector<Candidate>& candidates, int64_t* indices, int64_t seeds) {
  candidates.clear();
  for (int64_t p = 0; p < pixels; ++p) {
    if (map[p] > threshold) candidates.push_back({noise == nullptr ? 0 : sort_key(noise[p]), p});
  }
  const int64_t count = static_cast<int64_t>(candidates.size());
  if (count == 0) {
    std::fill_n(indices, seeds, peak_of(map, pixels));
    return 0;
  }
  const int64_t distinct = std::min(count, seeds);
  if (noise != nullptr) {  // they are found in raster order
    std::partial_sort(candidates.begin(), candidates.begin() + distinct, candidates.end(), chosen_before);
  }
  for (int64_t k = 0; k < seeds; ++k) indices[k] = k < distinct ? candidates[k].pixel : indices[k - distinct];
  return count;
}

// Elements are copied, never computed with: only their size matters.
template <typename Bits>
void gather_vectors(const void* features, bool channels_last, int64_t depth, int64_t pixels,
                    const int64_t* indices, int64_t seeds, void* vectors) {
  constexpr int64_t kLine = 64 / sizeof(Bits);  // channels of a seed that are written together
  const Bits* from = static_cast<const Bits*>(features);
  Bits* to = static_cast<Bits*>(vectors);
  if (channels_last) {
    for (int64_t k = 0; k < seeds; ++k) std::copy_n(from + indices[k] * depth, depth, to + k * depth);
    return;
  }
  for (int64_t first = 0; first < depth; first += kLine) {
    const int64_t end = std::min(depth, first + kLine);
    for (int64_t k = 0; k < seeds; ++k) {
      for (int64_t c = first; c < end; ++c) to[k * depth + c] = from[c * pixels + indices[k]];
    }
  }
}

// Where image `n` of a dense tensor begins.
const void* image_of(const Tensor& tensor, int64_t n) {
  return static_cast<const char*>(tensor.const_data_ptr()) +
         n * tensor.size(1) * tensor.size(2) * tensor.size(3) * tensor.element_size();
}

template <typename Real>
void cam_seeds_fwd(const CamFwd& front, const Tensor& seed_features, const float* noise, double threshold,
                   const Real* map, const Tensor& vectors, const Tensor& indices, const Tensor& count) {
  const int64_t seeds = indices.size(1), depth = seed_features.size(1), pixels = front.pixels;
  const int64_t size = seed_features.element_size();
  const bool channels_last = is_channels_last(seed_features);
  int64_t* chosen = static_cast<int64_t*>(indices.mutable_data_ptr());
  int64_t* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  char* gathered = static_cast<char*>(vectors.mutable_data_ptr());
  const auto gather = size == 2   ? gather_vectors<uint16_t>
                      : size == 4 ? gather_vectors<uint32_t>
                                  : gather_vectors<uint64_t>;
  const int64_t cost = front.channels * pixels + seeds * depth;
  // An image's vectors are taken right after its map is made, while its features are in cache.
  torch::stable::parallel_for(0, seed_features.size(0), grain(cost), [&](int64_t begin, int64_t end) {
    std::vector<Candidate> candidates;
    for (int64_t n = begin; n < end; ++n) {
      kernels().cam_fwd(front, n, n + 1);
      counts[n] = choose_seeds(map + n * pixels, noise == nullptr ? nullptr : noise + n * pixels, pixels,
                               static_cast<Real>(threshold), candidates, chosen + n * seeds, seeds);
      gather(image_of(seed_features, n), channels_last, depth, pixels, chosen + n * seeds, seeds,
             gathered + n * seeds * depth * size);
    }
  });
}

}  // namespace

void cam_seeds_fwd_cpu(const Tensor& features, const Tensor& weight, const Tensor& target,
                       const std::optional<Tensor>& seeds, const std::optional<Tensor>& noise, int64_t,
                       double threshold, double eps, const Tensor& vectors, const Tensor& indices,
                       const Tensor& count, const Tensor& cam, const Tensor& cam32, const Tensor& extent) {
  const Tensor& seed_features = seeds ? *seeds : features;
  check_target("fused_cam_seeds", target, weight.size(0));
  const CamFwd front =
      describe_cam_fwd(features, weight, target, std::nullopt, true, eps, cam, cam32, extent);
  const float* keys = noise ? static_cast<const float*>(noise->const_data_ptr()) : nullptr;
  const Tensor& map = cam32.numel() == 0 ? cam : cam32;
  if (dtype_of(map) == DType::kDouble) {
    cam_seeds_fwd(front, seed_features, keys, threshold, static_cast<const double*>(map.const_data_ptr()),
                  vectors, indices, count);
  } else {
    cam_seeds_fwd(front, seed_features, keys, threshold, static_cast<const float*>(map.const_data_ptr()),
                  vectors, indices, count);
  }
}

void cam_seeds_bwd_cpu(const Tensor& grad_vectors, const Tensor& indices, bool add,
                       const Tensor& grad_seed_features) {
  const CamSeedsBwd p{grad_seed_features.mutable_data_ptr(),
                      any_array(grad_vectors),
                      static_cast<const int64_t*>(indices.const_data_ptr()),
                      grad_vectors.size(1),
                      grad_seed_features.size(1),
                      grad_seed_features.size(2) * grad_seed_features.size(3),
                      is_channels_last(grad_seed_features),
                      worth_streaming(grad_seed_features.numel()),
                      add};
  // An image's channels_last rows are one task; of planes a task takes some channels.
  const int64_t blocks = p.channels_last ? 1 : (p.depth + kChannelBlock - 1) / kChannelBlock;
  const int64_t width = p.channels_last ? p.depth : kChannelBlock;
  const int64_t cost = width * (add ? p.seeds : p.pixels + p.seeds);
  torch::stable::parallel_for(0, indices.size(0) * blocks, grain(cost), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks * width;
      kernels().cam_seeds_bwd(p, item / blocks, first, std::min(p.depth, first + width));
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("cam_seeds_fwd", TORCH_BOX(&cam_seeds_fwd_cpu));
  m.impl("cam_seeds_bwd", TORCH_BOX(&cam_seeds_bwd_cpu));
}

}  // namespace camkernels::cpu
