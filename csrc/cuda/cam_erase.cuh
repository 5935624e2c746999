// The image with the peak of its class activation map erased, and the gradients of that.
#pragma once

#include "cam_front.cuh"
#include "sample.cuh"

namespace camkernels::cuda {

inline constexpr int kFills = 16;
inline constexpr int kTileRows = 32;
inline constexpr int kTileBytes = 40 << 10;

// How a map erases an image.
struct Erasing {
  int64_t images;
  int depth;
  int image_height;
  int image_width;
  int map_height;
  int map_width;
  float threshold;
  float sharpness;  // 0 erases hard
  float scale_y;
  float scale_x;
  DType dtype;
  bool nearest;
  bool channels_last;
  bool vectors;                // 16-byte accesses along image rows
  int fills;                   // 1, or one for each of the image's channels
  float fill[kFills];          // rounded to the image's dtype
  uint32_t fill_bits[kFills];  // the same as the image's dtype stores it

  __host__ __device__ int map_pixels() const { return map_height * map_width; }
  __host__ __device__ int64_t elements() const { return int64_t{depth} * image_height * image_width; }
  __device__ int fill_of(int channel) const { return fills == 1 ? 0 : channel; }
};

__device__ __forceinline__ Taps<float> taps_y(const Erasing& erasing, int y) {
  return source_taps(y, erasing.scale_y, erasing.map_height, erasing.nearest);
}

__device__ __forceinline__ Taps<float> taps_x(const Erasing& erasing, int x) {
  return source_taps(x, erasing.scale_x, erasing.map_width, erasing.nearest);
}

__device__ __forceinline__ float soft_gate(const Erasing& erasing, float heat) {
  return 1.0f / (1.0f + expf(-erasing.sharpness * (heat - erasing.threshold)));
}

// Where the elements of one image lie.
struct Strides {
  int channel;
  int row;
  int column;
};

__device__ __forceinline__ Strides strides_of(const Erasing& erasing) {
  if (erasing.channels_last) return {1, erasing.image_width * erasing.depth, erasing.depth};
  return {erasing.image_height * erasing.image_width, erasing.image_width, 1};
}

// Rows [begin, end) of one image, all channels of kVec neighbouring pixels by one thread. Element is the
// image's dtype, or when erasing hard an integer of its size: kept pixels keep their bits.
template <typename Element, int kVec, bool kSoft>
__device__ void erase_pixels(const Erasing& erasing, const float* heat, const Element* image, Element* erased,
                             int begin, int end) {
  constexpr int kInFlight = 4;
  const Strides strides = strides_of(erasing);
  const int columns = erasing.image_width / kVec;
#pragma unroll 1
  for (int item = threadIdx.x; item < (end - begin) * columns; item += blockDim.x) {
    const int y = begin + item / columns;
    const int x = item % columns * kVec;
    const Taps<float> row = taps_y(erasing, y);
    float gates[kVec];
    bool any_kept = false;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float value = sample(heat, erasing.map_width, row, taps_x(erasing, x + i));
      gates[i] = kSoft ? soft_gate(erasing, value) : value > erasing.threshold;
      any_kept = any_kept || kSoft || gates[i] == 0.0f;
    }
    const int offset = y * strides.row + x * strides.column;
#pragma unroll 1
    for (int first = 0; first < erasing.depth; first += kInFlight) {
      Vector<Element, kVec> values[kInFlight] = {};
#pragma unroll
      for (int d = 0; d < kInFlight; ++d) {
        if (any_kept && first + d < erasing.depth) {
          values[d] = load_vector<kVec>(image + offset + (first + d) * strides.channel);
        }
      }
#pragma unroll
      for (int d = 0; d < kInFlight; ++d) {
        if (first + d >= erasing.depth) break;
        const int fill = erasing.fill_of(first + d);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          Element& value = values[d].at[i];
          if constexpr (kSoft) {
            value = from_float<Element>(to_float(value) * (1.0f - gates[i]) + erasing.fill[fill] * gates[i]);
          } else {
            if (gates[i] != 0.0f) value = static_cast<Element>(erasing.fill_bits[fill]);
          }
        }
        store_vector<kVec>(erased + offset + (first + d) * strides.channel, values[d]);
      }
    }
  }
}

// The same for channels_last images, a vector of neighbouring elements by one thread.
template <typename Element, int kVec, bool kSoft>
__device__ void erase_elements(const Erasing& erasing, const float* heat, const Element* image,
                               Element* erased, int begin, int end) {
  const int row_elements = erasing.image_width * erasing.depth;
  const int vectors = row_elements / kVec;
#pragma unroll 1
  for (int item = threadIdx.x; item < (end - begin) * vectors; item += blockDim.x) {
    const int y = begin + item / vectors;
    const int column = item % vectors * kVec;
    const Taps<float> row = taps_y(erasing, y);
    int x = column / erasing.depth;
    int channel = column % erasing.depth;
    float gate = 0.0f;
    float gates[kVec];
    int fills[kVec];
    bool any_kept = false;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i == 0 || channel == 0) {
        const float value = sample(heat, erasing.map_width, row, taps_x(erasing, x));
        gate = kSoft ? soft_gate(erasing, value) : value > erasing.threshold;
      }
      gates[i] = gate;
      fills[i] = erasing.fill_of(channel);
      any_kept = any_kept || kSoft || gate == 0.0f;
      if (++channel == erasing.depth) {
        channel = 0;
        ++x;
      }
    }
    const int offset = y * row_elements + column;
    Vector<Element, kVec> values = {};
    if (any_kept) values = load_vector<kVec>(image + offset);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if constexpr (kSoft) {
        values.at[i] = from_float<Element>(to_float(values.at[i]) * (1.0f - gates[i]) +
                                           erasing.fill[fills[i]] * gates[i]);
      } else {
        if (gates[i] != 0.0f) values.at[i] = static_cast<Element>(erasing.fill_bits[fills[i]]);
      }
    }
    store_vector<kVec>(erased + offset, values);
  }
}

template <typename Element, bool kSoft>
__device__ void erase_rows_as(const Erasing& erasing, const float* heat, int64_t image, const void* from,
                              void* to, int begin, int end) {
  const Element* source = static_cast<const Element*>(from) + image * erasing.elements();
  Element* erased = static_cast<Element*>(to) + image * erasing.elements();
  if (!erasing.vectors) {
    erase_pixels<Element, 1, kSoft>(erasing, heat, source, erased, begin, end);
  } else if (erasing.channels_last) {
    erase_elements<Element, kVectorOf<Element>, kSoft>(erasing, heat, source, erased, begin, end);
  } else {
    erase_pixels<Element, kVectorOf<Element>, kSoft>(erasing, heat, source, erased, begin, end);
  }
}

// Erases rows [begin, end) of an image. heat: [h, w], normalised; from, to: [N, D, H0, W0]
template <bool kSoft>
__device__ void erase_rows(const Erasing& erasing, const float* heat, int64_t image, const void* from,
                           void* to, int begin, int end) {
  if constexpr (kSoft) {
    if (erasing.dtype == DType::kFloat) {
      erase_rows_as<float, true>(erasing, heat, image, from, to, begin, end);
    } else if (erasing.dtype == DType::kHalf) {
      erase_rows_as<Half, true>(erasing, heat, image, from, to, begin, end);
    } else {
      erase_rows_as<BFloat16, true>(erasing, heat, image, from, to, begin, end);
    }
  } else {
    if (erasing.dtype == DType::kFloat) {
      erase_rows_as<uint32_t, false>(erasing, heat, image, from, to, begin, end);
    } else {
      erase_rows_as<uint16_t, false>(erasing, heat, image, from, to, begin, end);
    }
  }
}

struct CamEraseFwd {
  CamFront front;
  Erasing erasing;
  const void* images;  // [N, D, H0, W0]
  void* erased;        // [N, D, H0, W0]
};

template <typename T, bool kChannelsLast, bool kSoft>
__global__ void __launch_bounds__(kThreads, 2)
    cam_erase_fwd_kernel(const __grid_constant__ CamEraseFwd call) {
  const CamFront& front = call.front;
  const int rank = cluster_rank();
  const int size = cluster_size();
  const int64_t image = blockIdx.x / size;
  SharedMemory memory;
  const FrontBuffers buffers = take_front_buffers<T, 1>(memory, front, blockDim.x, size);
  raw_maps<T, kChannelsLast, 1>(front, image, 0, rank, size, buffers);
  normalise_maps<T, 1>(front, image, 0, rank, buffers);
  const int64_t rows = call.erasing.image_height;
  erase_rows<kSoft>(call.erasing, buffers.total, image, call.images, call.erased,
                    static_cast<int>(rows * rank / size), static_cast<int>(rows * (rank + 1) / size));
  leave_cluster(size);
}

struct CamEraseBwd {
  Erasing erasing;
  const void* grad_erased;  // [N, D, H0, W0]
  const void* images;       // [N, D, H0, W0], null when erasing hard
  const float* cam;         // [N, h, w], normalised
  AnyArray grad_cam;        // [N, h, w], or null
  void* grad_images;        // [N, D, H0, W0], or null
  float* grad_map;          // [N, h, w], or null
  int strips;               // blocks for each image, when erasing hard
  int tile_rows;            // image rows whose gate gradients are in shared memory together
};

// Hard erasing: an erased pixel's gradient is 0, the others' keep their bits; that is erasing, with fill 0.
__global__ void __launch_bounds__(kThreads, 2)
    cam_erase_bwd_hard_kernel(const __grid_constant__ CamEraseBwd call) {
  const Erasing& erasing = call.erasing;
  const int64_t image = blockIdx.x / call.strips;
  const int64_t strip = blockIdx.x % call.strips;
  const int64_t rows = erasing.image_height;
  SharedMemory memory;
  float* heat = memory.take<float>(erasing.map_pixels());
  for (int p = threadIdx.x; p < erasing.map_pixels(); p += blockDim.x) {
    heat[p] = call.cam[image * erasing.map_pixels() + p];
  }
  __syncthreads();
  erase_rows<false>(erasing, heat, image, call.grad_erased, call.grad_images,
                    static_cast<int>(rows * strip / call.strips),
                    static_cast<int>(rows * (strip + 1) / call.strips));
}

struct SoftBuffers {
  float* heat;      // [h, w], normalised
  float* slopes;    // [tile_rows, W0 + 1]: gradient of each pixel's upsampled heat
  float* gathered;  // [tile_rows, w + 1]: the same brought to the map's columns
  float* map;       // [h, w]: this block's share of the map's gradient
  float* total;     // [h, w]: the sum over the cluster
};

// Rows are padded by one so that a warp that reads down a column meets every bank.
template <typename Memory>
__host__ __device__ SoftBuffers take_soft_buffers(Memory& memory, const Erasing& erasing, int tile_rows,
                                                  int cluster) {
  SoftBuffers buffers;
  buffers.heat = memory.template take<float>(erasing.map_pixels());
  buffers.slopes = memory.template take<float>(int64_t{tile_rows} * (erasing.image_width + 1));
  buffers.gathered = memory.template take<float>(int64_t{tile_rows} * (erasing.map_width + 1));
  buffers.map = memory.template take<float>(erasing.map_pixels());
  buffers.total = cluster == 1 ? buffers.map : memory.template take<float>(erasing.map_pixels());
  return buffers;
}

// Image rows [begin, end): writes the image's gradient and leaves that of the upsampled heat in slopes.
template <typename Element, int kVec>
__device__ void soft_backward(const CamEraseBwd& call, int64_t image, const SoftBuffers& buffers, int begin,
                              int end) {
  const Erasing& erasing = call.erasing;
  const Strides strides = strides_of(erasing);
  const int columns = erasing.image_width / kVec;
  const int64_t base = image * erasing.elements();
  const Element* grads = static_cast<const Element*>(call.grad_erased) + base;
  const Element* pixels = static_cast<const Element*>(call.images) + base;
  Element* grad_pixels =
      call.grad_images == nullptr ? nullptr : static_cast<Element*>(call.grad_images) + base;
#pragma unroll 1
  for (int item = threadIdx.x; item < (end - begin) * columns; item += blockDim.x) {
    const int y = item / columns;
    const int x = item % columns * kVec;
    const Taps<float> row = taps_y(erasing, begin + y);
    float gates[kVec];
    float slopes[kVec] = {};
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      gates[i] = soft_gate(erasing, sample(buffers.heat, erasing.map_width, row, taps_x(erasing, x + i)));
    }
    const int offset = (begin + y) * strides.row + x * strides.column;
#pragma unroll 1
    for (int d = 0; d < erasing.depth; ++d) {
      const int at = offset + d * strides.channel;
      const Vector<Element, kVec> grad = load_vector<kVec>(grads + at);
      if (call.grad_map != nullptr) {
        const Vector<Element, kVec> pixel = load_vector<kVec>(pixels + at);
        const float fill = erasing.fill[erasing.fill_of(d)];
#pragma unroll
        for (int i = 0; i < kVec; ++i) slopes[i] += to_float(grad.at[i]) * (fill - to_float(pixel.at[i]));
      }
      if (grad_pixels != nullptr) {
        Vector<Element, kVec> result;
#pragma unroll
        for (int i = 0; i < kVec; ++i)
          result.at[i] = from_float<Element>(to_float(grad.at[i]) * (1.0f - gates[i]));
        store_vector<kVec>(grad_pixels + at, result);
      }
    }
    if (call.grad_map == nullptr) continue;
    float* to = buffers.slopes + y * (erasing.image_width + 1) + x;
#pragma unroll
    for (int i = 0; i < kVec; ++i) to[i] = slopes[i] * erasing.sharpness * gates[i] * (1.0f - gates[i]);
  }
}

// How much a tap pair gives to cell `at`.
__device__ __forceinline__ float share_of(Taps<float> taps, int at) {
  return (taps.low == at ? 1.0f - taps.weight : 0.0f) + (taps.high == at ? taps.weight : 0.0f);
}

// The transpose of the upsampling, gathered rather than scattered, so that it needs no atomics and always
// adds in the same order: pixels of a row to the map's columns, then rows to the map's rows.
__device__ inline void gather_slopes(const Erasing& erasing, const SoftBuffers& buffers, int begin, int end,
                                     bool first) {
  const int rows = end - begin;
  const int width = erasing.map_width;
#pragma unroll 1
  for (int item = threadIdx.x; item < rows * width; item += blockDim.x) {
    const int y = item % rows;
    const int column = item / rows;
    // A superset of the pixels whose taps touch the column; the edge columns also serve what lies outside.
    const float from = (static_cast<float>(column) - 0.5f) / erasing.scale_x - 2.0f;
    const float to = (static_cast<float>(column) + 1.5f) / erasing.scale_x + 2.0f;
    const int x_begin = column == 0 ? 0 : max(0, static_cast<int>(from));
    const int x_end =
        column == width - 1 ? erasing.image_width : min(erasing.image_width, static_cast<int>(to) + 1);
    const float* slopes = buffers.slopes + y * (erasing.image_width + 1);
    float sum = 0.0f;
#pragma unroll 1
    for (int x = x_begin; x < x_end; ++x) {
      const float share = share_of(taps_x(erasing, x), column);
      if (share != 0.0f) sum = fmaf(share, slopes[x], sum);
    }
    buffers.gathered[y * (width + 1) + column] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int p = threadIdx.x; p < erasing.map_pixels(); p += blockDim.x) {
    const int map_row = p / width;
    float sum = first ? 0.0f : buffers.map[p];
#pragma unroll 1
    for (int y = 0; y < rows; ++y) {
      const float share = share_of(taps_y(erasing, begin + y), map_row);
      if (share != 0.0f) sum = fmaf(share, buffers.gathered[y * (width + 1) + p % width], sum);
    }
    buffers.map[p] = sum;
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, 2)
    cam_erase_bwd_soft_kernel(const __grid_constant__ CamEraseBwd call) {
  const Erasing& erasing = call.erasing;
  const int rank = cluster_rank();
  const int size = cluster_size();
  const int64_t image = blockIdx.x / size;
  const int map_pixels = erasing.map_pixels();
  SharedMemory memory;
  const SoftBuffers buffers = take_soft_buffers(memory, erasing, call.tile_rows, size);
  for (int p = threadIdx.x; p < map_pixels; p += blockDim.x) {
    buffers.heat[p] = call.cam[image * map_pixels + p];
    buffers.map[p] = 0.0f;  // stays so in a block without rows
  }
  __syncthreads();

  const int64_t rows = erasing.image_height;
  const int begin = static_cast<int>(rows * rank / size);
  const int end = static_cast<int>(rows * (rank + 1) / size);
#pragma unroll 1
  for (int tile = begin; tile < end; tile += call.tile_rows) {
    const int tile_end = min(tile + call.tile_rows, end);
    if (erasing.vectors && !erasing.channels_last) {
      soft_backward<Element, kVectorOf<Element>>(call, image, buffers, tile, tile_end);
    } else {
      soft_backward<Element, 1>(call, image, buffers, tile, tile_end);
    }
    if (call.grad_map == nullptr) continue;
    __syncthreads();  // all slopes are there, and what was gathered of the tile before is no longer read
    gather_slopes(erasing, buffers, tile, tile_end, tile == begin);
  }
  if (call.grad_map == nullptr) return;
  cluster_sum(buffers.map, buffers.total, map_pixels, size);
  if (rank == 0) {
    for (int p = threadIdx.x; p < map_pixels; p += blockDim.x) {
      const int64_t at = image * map_pixels + p;
      const float direct = call.grad_cam.data == nullptr ? 0.0f : load_as_float(call.grad_cam, at);
      call.grad_map[at] = buffers.total[p] + direct;
    }
  }
  leave_cluster(size);
}

// What follows from the sizes and the fill that the caller has set.
inline void plan_erasing(const char* op, const Hardware& hardware, Erasing& erasing,
                         std::initializer_list<const void*> pointers) {
  // So that an index which a block steps past the end is still an int.
  constexpr int64_t kMaxElements = std::numeric_limits<int32_t>::max() - kThreads;
  check_pixels(op, erasing.map_height, erasing.map_width);
  if (erasing.elements() > kMaxElements) {
    throw std::runtime_error(std::string(op) + ": an image of " + std::to_string(erasing.elements()) +
                             " elements is larger than the CUDA kernels allow (" +
                             std::to_string(kMaxElements) + " in one image)");
  }
  erasing.scale_y = resample_scale<float>(erasing.map_height, erasing.image_height);
  erasing.scale_x = resample_scale<float>(erasing.map_width, erasing.image_width);
  const int row = erasing.image_width * (erasing.channels_last ? erasing.depth : 1);
  erasing.vectors = hardware.vectors && row % (16 / size_of(erasing.dtype)) == 0;
  for (const void* pointer : pointers) erasing.vectors = erasing.vectors && aligned(pointer);
}

inline void set_fill(Erasing& erasing, const double* fill, int64_t count) {
  const bool same = std::all_of(fill, fill + count, [&](double value) { return value == fill[0]; });
  if (!same && count > kFills) {
    throw std::runtime_error("cam_erase: the CUDA kernels take up to " + std::to_string(kFills) +
                             " different fill values, not " + std::to_string(count));
  }
  erasing.fills = same ? 1 : static_cast<int>(count);
  for (int i = 0; i < erasing.fills; ++i) {
    dispatch(erasing.dtype, [&](auto element) {
      element = from_float<decltype(element)>(static_cast<float>(fill[i]));
      erasing.fill[i] = to_float(element);
      erasing.fill_bits[i] = 0;
      __builtin_memcpy(&erasing.fill_bits[i], &element, sizeof(element));
    });
  }
}

template <typename T, bool kChannelsLast, typename Launcher>
void launch_cam_erase_fwd_as(Launcher& launcher, const CamEraseFwd& call) {
  const int64_t image_bytes = 2 * call.erasing.elements() * size_of(call.erasing.dtype);
  const LaunchShape shape = plan_front<T, 1>("cam_erase_fwd", launcher.hardware(), call.front, image_bytes);
  if (call.erasing.sharpness > 0) {
    launcher.run(cam_erase_fwd_kernel<T, kChannelsLast, true>, shape, call);
  } else {
    launcher.run(cam_erase_fwd_kernel<T, kChannelsLast, false>, shape, call);
  }
}

template <typename Launcher>
void launch_cam_erase_fwd(Launcher& launcher, CamEraseFwd call) {
  plan_loads("cam_erase_fwd", launcher.hardware(), call.front, {call.front.features});
  plan_erasing("cam_erase_fwd", launcher.hardware(), call.erasing, {call.images, call.erased});
  dispatch(call.front.features_dtype, [&](auto element) {
    using T = decltype(element);
    if (call.front.channels_last) {
      launch_cam_erase_fwd_as<T, true>(launcher, call);
    } else {
      launch_cam_erase_fwd_as<T, false>(launcher, call);
    }
  });
}

template <typename Launcher>
void launch_cam_erase_bwd(Launcher& launcher, CamEraseBwd call) {
  const Hardware& hardware = launcher.hardware();
  Erasing& erasing = call.erasing;
  plan_erasing("cam_erase_bwd", hardware, erasing, {call.grad_erased, call.images, call.grad_images});
  const int64_t bytes = 3 * erasing.elements() * size_of(erasing.dtype);
  const auto check = [&](int64_t shared) {
    if (shared > hardware.shared_limit) {
      throw too_large("cam_erase_bwd", erasing.map_height, erasing.map_width, shared, hardware.shared_limit);
    }
  };
  if (erasing.sharpness == 0) {
    const double nothing = 0;
    set_fill(erasing, &nothing, 1);
    SharedSize size;
    size.take<float>(erasing.map_pixels());
    check(size.bytes());
    Hardware strips = hardware;
    strips.max_cluster = kMaxCluster;  // blocks of their own: no cluster is needed
    call.strips = choose_cluster(strips, erasing.images, bytes);
    launcher.run(cam_erase_bwd_hard_kernel,
                 LaunchShape{erasing.images * call.strips, hardware.threads, 1, size.bytes()}, call);
    return;
  }
  const int64_t row_bytes = int64_t{4} * (erasing.image_width + 1 + erasing.map_width + 1);
  call.tile_rows = static_cast<int>(std::clamp<int64_t>(kTileBytes / row_bytes, 1, kTileRows));
  const auto shared_with = [&](int cluster) {
    SharedSize size;
    take_soft_buffers(size, erasing, call.tile_rows, cluster);
    return size.bytes();
  };
  int cluster = choose_cluster(hardware, erasing.images, bytes);
  if (shared_with(cluster) > hardware.shared_limit) cluster = 1;
  check(shared_with(cluster));
  const LaunchShape shape{erasing.images * cluster, hardware.threads, cluster, shared_with(cluster)};
  dispatch(erasing.dtype,
           [&](auto element) { launcher.run(cam_erase_bwd_soft_kernel<decltype(element)>, shape, call); });
}

}  // namespace camkernels::cuda
