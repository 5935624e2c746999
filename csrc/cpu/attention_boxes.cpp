// The tight box of each mask on the CPU.
#include <algorithm>
#include <vector>

#include "../common.h"
#include "checks.h"

namespace camkernels::cpu {
namespace {

// First and one past last of the places that hold true; 0 and `size` where none does.
struct Range {
  int64_t begin, end;
};

Range true_range(const uint8_t* values, int64_t size) {
  int64_t begin = 0, end = size;
  while (begin < size && values[begin] == 0) ++begin;
  if (begin == size) return {0, size};
  while (values[end - 1] == 0) --end;
  return {begin, end};
}

void tight_box(const uint8_t* mask, int64_t height, int64_t width, uint8_t* in_row, uint8_t* in_column,
               float* box) {
  std::fill_n(in_column, width, uint8_t{0});
  for (int64_t y = 0; y < height; ++y, mask += width) {
    uint8_t any = 0;
    for (int64_t x = 0; x < width; ++x) {
      in_column[x] |= mask[x];
      any |= mask[x];
    }
    in_row[y] = any;
  }
  const Range columns = true_range(in_column, width), rows = true_range(in_row, height);
  const float w = static_cast<float>(width), h = static_cast<float>(height);
  box[0] = static_cast<float>(columns.begin) / w;
  box[1] = static_cast<float>(rows.begin) / h;
  box[2] = static_cast<float>(columns.end) / w;
  box[3] = static_cast<float>(rows.end) / h;
}

}  // namespace

void attention_boxes_fwd_cpu(const Tensor& mask, const Tensor& boxes) {
  const int64_t height = mask.size(1), width = mask.size(2), pixels = height * width;
  const uint8_t* masks = static_cast<const uint8_t*>(mask.const_data_ptr());
  float* found = static_cast<float*>(boxes.mutable_data_ptr());
  torch::stable::parallel_for(0, mask.size(0), grain(pixels / 4), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> in_row(height), in_column(width);
    for (int64_t n = begin; n < end; ++n) {
      tight_box(masks + n * pixels, height, width, in_row.data(), in_column.data(), found + 4 * n);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(camkernels_cpp, CPU, m) {
  m.impl("attention_boxes_fwd", TORCH_BOX(&attention_boxes_fwd_cpu));
}

}  // namespace camkernels::cpu
