// Torch bindings and threading of crop_and_zoom on the CPU.
#include <algorithm>

#include "../common.h"
#include "checks.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

// `image` is [N, D, H0, W0] and `crop` [N, D, h, w].
template <typename Kernel>
void run_rows(const Tensor& from, const Tensor& to, const Tensor& image, const Tensor& crop,
              const Tensor& boxes, Kernel kernel) {
  CropAndZoom p{};
  p.from = any_array(from);
  p.to = to.mutable_data_ptr();
  p.boxes = any_array(boxes);
  p.depth = image.size(1);
  p.image_height = image.size(2);
  p.image_width = image.size(3);
  p.height = crop.size(2);
  p.width = crop.size(3);
  p.channels_last = is_channels_last(image) && is_channels_last(crop);  // one pixel alone looks like both
  p.streamed = worth_streaming(to.numel());
  // A batch that does not come out even is cut into bands of rows, so that every thread has its share.
  const int64_t count = to.size(0), rows = to.size(2), threads = torch::stable::get_num_threads();
  const int64_t wanted = count % threads == 0 ? 1 : (4 * threads + count - 1) / count;
  const int64_t bands = std::min(rows, wanted);
  const int64_t cost = p.depth * (image.size(2) * image.size(3) + p.height * p.width);
  torch::stable::parallel_for(0, count * bands, grain(cost / bands), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t band = item % bands;
      kernel(p, item / bands, band * rows / bands, (band + 1) * rows / bands);
    }
  });
}

}  // namespace

void crop_and_zoom_fwd_cpu(const Tensor& images, const Tensor& boxes, int64_t, int64_t,
                           const Tensor& zoomed) {
  run_rows(images, zoomed, images, zoomed, boxes, kernels().crop_and_zoom_fwd);
}

void crop_and_zoom_bwd_cpu(const Tensor& grad, const Tensor& boxes, int64_t, int64_t, bool,
                           const Tensor& grad_images) {
  run_rows(grad, grad_images, grad_images, grad, boxes, kernels().crop_and_zoom_bwd);
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("crop_and_zoom_fwd", TORCH_BOX(&crop_and_zoom_fwd_cpu));
  m.impl("crop_and_zoom_bwd", TORCH_BOX(&crop_and_zoom_bwd_cpu));
}

}  // namespace camkernels::cpu
