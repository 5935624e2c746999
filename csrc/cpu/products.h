// The products from which every CAM kernel is made, and the transposition that brings operands into shape.
//
// Included once per instruction set, hence the unnamed namespace (see vector.h).
#pragma once

#include <type_traits>
#include <utility>

#include "vector.h"

namespace camkernels::cpu {
namespace {

// A matrix of scalars that are broadcast: element (m, r) at data[m * row_stride + r * column_stride].
template <typename Real>
struct Scalars {
  const Real* data;
  int64_t row_stride;
  int64_t column_stride;
};

// Rows of one matrix that a panel step multiplies and adds at once: as many streams as the hardware
// prefetcher follows, and a partial sum of so few terms keeps the rounding error of long sums low.
constexpr int kPanelRows = 8;

template <int kRows, int kDepth, typename Real>
inline void panel_tile(Scalars<Real> a, const Real* const* b, Real* out, int64_t out_stride, int64_t columns,
                       bool first) {
  constexpr int kLanes = Lanes<Real>::kCount;
  Real scalar[kRows][kDepth];
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kDepth; ++r) scalar[m][r] = a.data[m * a.row_stride + r * a.column_stride];
  }
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    Vector<Real> sum[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) sum[m] = Vector<Real>{};
#pragma GCC unroll 8
    for (int r = 0; r < kDepth; ++r) {
      const Vector<Real> value = load_vector(b[r] + j);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) sum[m] += scalar[m][r] * value;
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      Real* to = out + m * out_stride + j;
      store_vector(to, first ? sum[m] : load_vector(to) + sum[m]);
    }
  }
  for (; j < columns; ++j) {
    for (int m = 0; m < kRows; ++m) {
      Real sum = 0;
      for (int r = 0; r < kDepth; ++r) sum += scalar[m][r] * b[r][j];
      Real* to = out + m * out_stride + j;
      *to = first ? sum : *to + sum;
    }
  }
}

template <int kDepth, typename Real>
inline void panel_rows(Scalars<Real> a, const Real* const* b, Real* out, int64_t out_stride, int64_t rows,
                       int64_t columns, bool first) {
  for (; rows >= 4; rows -= 4) {
    panel_tile<4, kDepth>(a, b, out, out_stride, columns, first);
    a.data += 4 * a.row_stride;
    out += 4 * out_stride;
  }
  if (rows == 3) panel_tile<3, kDepth>(a, b, out, out_stride, columns, first);
  if (rows == 2) panel_tile<2, kDepth>(a, b, out, out_stride, columns, first);
  if (rows == 1) panel_tile<1, kDepth>(a, b, out, out_stride, columns, first);
}

// From so many columns on a single row of sums takes the rows of b one after the other: the prefetcher
// follows one long stream better than kPanelRows short ones.
constexpr int64_t kLongRow = 128;
// Columns whose partial sums stay in the first-level cache beside them.
constexpr int64_t kRowTile = 1024;

// One row of panel, the same to the bit.
template <typename T>
inline void panel_row(Scalars<Accumulate<T>> a, const T* b, int64_t b_stride, Accumulate<T>* out,
                      int64_t depth, int64_t columns, Accumulate<T>* staging, bool overwrite) {
  using Real = Accumulate<T>;
  Real sums[kRowTile];
  for (int64_t begin = 0; begin < columns; begin += kRowTile) {
    const int64_t count = columns - begin < kRowTile ? columns - begin : kRowTile;
    Real* to = out + begin;
    for (int64_t r = 0; r < depth;) {
      const bool first = overwrite && r == 0;
      const int64_t end = depth - r >= kPanelRows ? r + kPanelRows : r + 1;
      for (const int64_t start = r; r < end; ++r) {
        const Real scalar = a.data[r * a.column_stride];
        const Real* row = widened(b + r * b_stride + begin, staging, count);
        if (r == start) {
          for (int64_t j = 0; j < count; ++j) sums[j] = scalar * row[j];
        } else {
          for (int64_t j = 0; j < count; ++j) sums[j] += scalar * row[j];
        }
      }
      if (first) {
        std::memcpy(to, sums, count * sizeof(Real));
      } else {
        for (int64_t j = 0; j < count; ++j) to[j] += sums[j];
      }
    }
  }
}

// out[m, j] = sum_r a(m, r) * b[r, j] (added to out unless `overwrite`); rows of b are contiguous.
// `staging` holds kPanelRows * columns elements if T is a half type.
template <typename T>
inline void panel(Scalars<Accumulate<T>> a, const T* b, int64_t b_stride, Accumulate<T>* out,
                  int64_t out_stride, int64_t rows, int64_t depth, int64_t columns, Accumulate<T>* staging,
                  bool overwrite) {
  using Real = Accumulate<T>;
  if (rows == 1 && columns >= kLongRow) {
    return panel_row(a, b, b_stride, out, depth, columns, staging, overwrite);
  }
  const Real* line[kPanelRows];
  for (int64_t r = 0; r < depth;) {
    const int count = depth - r >= kPanelRows ? kPanelRows : 1;
    for (int i = 0; i < count; ++i) line[i] = widened(b + (r + i) * b_stride, staging + i * columns, columns);
    const Scalars<Real> part{a.data + r * a.column_stride, a.row_stride, a.column_stride};
    const bool first = overwrite && r == 0;
    if (count == kPanelRows) {
      panel_rows<kPanelRows>(part, line, out, out_stride, rows, columns, first);
    } else {
      panel_rows<1>(part, line, out, out_stride, rows, columns, first);
    }
    r += count;
  }
}

// Calls function(std::integral_constant<int, count>), for 1 <= count <= kMost.
template <int kMost, typename Function>
inline void with_count(int64_t count, Function&& function) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, function);
  }
  function(std::integral_constant<int, kMost>{});
}

// Sums of a product that is long in every direction: rows and vectors of columns that one register tile
// holds, with registers left for the operands.
constexpr int kTileRows = 6;
constexpr int kTileVectors = CAMKERNELS_VECTOR_BYTES == 64 ? 4 : 2;

template <int kRows, int kVectors, typename Real>
inline void product_tile(Scalars<Real> a, const Real* b, int64_t b_stride, Real* out, int64_t out_stride,
                         int64_t depth, bool overwrite) {
  constexpr int kLanes = Lanes<Real>::kCount;
  Vector<Real> sum[kRows][kVectors] = {};
  for (int64_t r = 0; r < depth; ++r) {
    Vector<Real> value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = load_vector(b + r * b_stride + v * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const Real scalar = a.data[m * a.row_stride + r * a.column_stride];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] += scalar * value[v];
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Real* to = out + m * out_stride + v * kLanes;
      store_vector(to, overwrite ? sum[m][v] : load_vector(to) + sum[m][v]);
    }
  }
}

template <int kVectors, typename Real, typename Between>
inline void product_columns(Scalars<Real> a, const Real* b, int64_t b_stride, Real* out, int64_t out_stride,
                            int64_t rows, int64_t depth, bool overwrite, Between& between) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0, m = 0; tile < tiles; ++tile) {
    const int64_t count = (rows - m) / (tiles - tile);  // as even as can be
    const Scalars<Real> part{a.data + m * a.row_stride, a.row_stride, a.column_stride};
    Real* to = out + m * out_stride;
    with_count<kTileRows>(count, [&](auto size) {
      product_tile<decltype(size)::value, kVectors>(part, b, b_stride, to, out_stride, depth, overwrite);
    });
    between();
    m += count;
  }
}

// out[m, j] = sum_r a(m, r) * b[r, j] (added to out unless `overwrite`); columns are a whole number of
// vectors. Unlike panel it sums in registers all along `depth`, for operands in cache. Calls between() after
// every tile.
template <typename Real, typename Between>
inline void product(Scalars<Real> a, const Real* b, int64_t b_stride, Real* out, int64_t out_stride,
                    int64_t rows, int64_t depth, int64_t columns, bool overwrite, Between&& between) {
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  for (int64_t j = 0; j < columns; j += kTileVectors * kLanes) {
    const int64_t left = (columns - j) / kLanes;
    with_count<kTileVectors>(left < kTileVectors ? left : kTileVectors, [&](auto vectors) {
      product_columns<decltype(vectors)::value>(a, b + j, b_stride, out + j, out_stride, rows, depth,
                                                overwrite, between);
    });
  }
}

// Tiles of such a product.
template <typename Real>
inline int64_t product_tiles(int64_t rows, int64_t columns) {
  constexpr int64_t kColumns = kTileVectors * Lanes<Real>::kCount;
  return (rows + kTileRows - 1) / kTileRows * ((columns + kColumns - 1) / kColumns);
}

template <typename Real>
using LaneIndices = std::make_integer_sequence<int, Lanes<Real>::kCount>;

// Lanes without bit kStep: a, with it: b; each added to its neighbour kStep lanes away.
template <int kStep, typename Real, int... kLane>
inline Vector<Real> fold(Vector<Real> a, Vector<Real> b, std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = Lanes<Real>::kCount;
  return __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane : kLane)...) +
         __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + (kLane ^ kStep) : kLane ^ kStep)...);
}

// Lane i, for i < kCount (a power of two), becomes the sum of the lanes of value[i].
template <int kCount, typename Real>
inline Vector<Real> lane_sums(const Vector<Real>* value) {
  if constexpr (kCount == 1) {
    return value[0];
  } else {
    return fold<kCount / 2, Real>(lane_sums<kCount / 2, Real>(value),
                                  lane_sums<kCount / 2, Real>(value + kCount / 2), LaneIndices<Real>{});
  }
}

// Vectors of b, and rows of a against each, that one tile of dots holds.
constexpr int kDotRows = CAMKERNELS_VECTOR_BYTES == 64 ? 4 : 3;
constexpr int kDotColumns = CAMKERNELS_VECTOR_BYTES == 64 ? 6 : 4;

constexpr int power_of_two(int count) { return count <= 1 ? 1 : 2 * power_of_two((count + 1) / 2); }

template <int kStep, typename Real>
inline Vector<Real> fold_rest(Vector<Real> value) {
  if constexpr (kStep < Lanes<Real>::kCount) {
    return fold_rest<2 * kStep, Real>(fold<kStep, Real>(value, value, LaneIndices<Real>{}));
  }
  return value;
}

// total[i] = sum of the lanes of value[i], all of them at once.
template <int kCount, typename Real>
inline void sum_lanes(const Vector<Real>* value, Real* total) {
  constexpr int kLanes = Lanes<Real>::kCount;
  if constexpr (kCount > kLanes) {
    sum_lanes<kLanes, Real>(value, total);
    sum_lanes<kCount - kLanes, Real>(value + kLanes, total + kLanes);
  } else {
    constexpr int kPadded = power_of_two(kCount);
    Vector<Real> padded[kPadded] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) padded[i] = value[i];
    const Vector<Real> sums = fold_rest<kPadded, Real>(lane_sums<kPadded, Real>(padded));
    std::memcpy(total, &sums, kCount * sizeof(Real));
  }
}

template <int kRows, int kColumns, typename Real>
inline void dots_tile(const Real* a, int64_t a_stride, const Real* const* b, int64_t depth, Real* out,
                      int64_t out_row_stride, int64_t out_column_stride, bool overwrite) {
  constexpr int kLanes = Lanes<Real>::kCount;
  Vector<Real> sum[kRows * kColumns] = {};
  int64_t j = 0;
  for (; j + kLanes <= depth; j += kLanes) {
    Vector<Real> left[kRows];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) left[m] = load_vector(a + m * a_stride + j);
#pragma GCC unroll 6
    for (int i = 0; i < kColumns; ++i) {
      const Vector<Real> right = load_vector(b[i] + j);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) sum[m * kColumns + i] += left[m] * right;
    }
  }
  Real total[kRows * kColumns];
  sum_lanes<kRows * kColumns, Real>(sum, total);
  for (int m = 0; m < kRows; ++m) {
    for (int i = 0; i < kColumns; ++i) {
      Real value = total[m * kColumns + i];
      for (int64_t t = j; t < depth; ++t) value += a[m * a_stride + t] * b[i][t];
      Real& to = out[m * out_row_stride + i * out_column_stride];
      to = overwrite ? value : to + value;
    }
  }
}

// Columns that are multiplied by a tile of rows before the next rows are read: these come from farther away.
constexpr int kDotGroup = 2 * kDotColumns;

// Sums of one row of dots, side by side along the depth: so b is one stream of memory, and no sum waits for
// the one before.
constexpr int kDotChains = 4;

template <typename Real>
inline Real dot(const Real* a, const Real* b, int64_t depth) {
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  Vector<Real> sum[kDotChains] = {};
  int64_t j = 0;
  for (; j + kDotChains * kLanes <= depth; j += kDotChains * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kDotChains; ++i) {
      sum[i] += load_vector(a + j + i * kLanes) * load_vector(b + j + i * kLanes);
    }
  }
  for (; j + kLanes <= depth; j += kLanes) sum[0] += load_vector(a + j) * load_vector(b + j);
  const Vector<Real> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  Real total;
  sum_lanes<1, Real>(&all, &total);
  for (; j < depth; ++j) total += a[j] * b[j];
  return total;
}

// out[m, i] = sum_j a[m, j] * b[i, j] (added to out unless `overwrite`); rows of both are contiguous.
// `staging` holds kDotGroup * depth elements if T is a half type.
template <typename T, typename Between>
inline void dots(const Accumulate<T>* a, int64_t a_stride, const T* b, int64_t b_stride, Accumulate<T>* out,
                 int64_t out_row_stride, int64_t out_column_stride, int64_t rows, int64_t columns,
                 int64_t depth, Accumulate<T>* staging, bool overwrite, Between&& between) {
  using Real = Accumulate<T>;
  if (rows == 1) {
    for (int64_t i = 0; i < columns; ++i) {
      const Real value = dot(a, widened(b + i * b_stride, staging, depth), depth);
      Real& to = out[i * out_column_stride];
      to = overwrite ? value : to + value;
      if (i % kDotGroup == kDotGroup - 1) between();
    }
    return;
  }
  const Real* line[kDotGroup];
  const int64_t row_tiles = (rows + kDotRows - 1) / kDotRows;
  const int64_t groups = (columns + kDotGroup - 1) / kDotGroup;
  for (int64_t g = 0, first = 0; g < groups; ++g) {
    const int64_t group = (columns - first) / (groups - g);  // as even as can be
    for (int64_t t = 0; t < group; ++t) {
      line[t] = widened(b + (first + t) * b_stride, staging + t * depth, depth);
    }
    for (int64_t tile = 0, m = 0; tile < row_tiles; ++tile) {
      const int64_t count = (rows - m) / (row_tiles - tile);
      for (int64_t t = 0; t < group; t += kDotColumns) {
        const int64_t width = group - t < kDotColumns ? group - t : kDotColumns;
        Real* to = out + m * out_row_stride + (first + t) * out_column_stride;
        with_count<kDotRows>(count, [&](auto tall) {
          with_count<kDotColumns>(width, [&](auto wide) {
            dots_tile<decltype(tall)::value, decltype(wide)::value>(a + m * a_stride, a_stride, line + t,
                                                                    depth, to, out_row_stride,
                                                                    out_column_stride, overwrite);
          });
        });
      }
      between();
      m += count;
    }
    first += group;
  }
}

// Calls of between() that such a product makes.
inline int64_t dots_steps(int64_t rows, int64_t columns) {
  return (rows + kDotRows - 1) / kDotRows * ((columns + kDotGroup - 1) / kDotGroup);
}

struct Nothing {
  void operator()() const {}
};

// Asks for memory that is wanted soon, some lines at a time between the tiles of a product: the processor's
// own prefetcher does not foresee a jump to the next block.
class Ahead {
 public:
  // `rows` pieces of `bytes`, each `stride` bytes after the last.
  void want(const void* first, int64_t bytes, int64_t stride, int64_t rows) {
    if (count_ < 2) pieces_[count_++] = {static_cast<const char*>(first), bytes, stride, rows, 0};
  }
  void spread_over(int64_t steps) {
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) lines += pieces_[i].rows * ((pieces_[i].bytes + kLine - 1) / kLine);
    lines_per_step_ = (lines + steps - 1) / steps;
  }
  void operator()() {
    for (int64_t line = 0; line < lines_per_step_ && current_ < count_; ++line) {
      Piece& piece = pieces_[current_];
      __builtin_prefetch(piece.first + piece.done, 0, 2);
      piece.done += kLine;
      if (piece.done < piece.bytes) continue;
      piece.first += piece.stride;
      piece.done = 0;
      if (--piece.rows == 0) ++current_;
    }
  }

 private:
  struct Piece {
    const char* first;
    int64_t bytes, stride, rows, done;
  };
  static constexpr int64_t kLine = 64;
  Piece pieces_[2] = {};
  int count_ = 0, current_ = 0;
  int64_t lines_per_step_ = 0;
};

template <int kStep, typename Real, int... kLane>
inline void transpose_step(Vector<Real>* rows, std::integer_sequence<int, kLane...> lanes) {
  constexpr int kLanes = Lanes<Real>::kCount;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vector<Real> upper = rows[i], lower = rows[i + kStep];
    rows[i] = __builtin_shufflevector(upper, lower, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...);
    rows[i + kStep] =
        __builtin_shufflevector(upper, lower, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...);
  }
  if constexpr (2 * kStep < kLanes) transpose_step<2 * kStep, Real>(rows, lanes);
}

// to[j, i] = from[i, j] for i < rows, j < columns.
template <typename Real>
inline void transpose(const Real* from, int64_t from_stride, Real* to, int64_t to_stride, int64_t rows,
                      int64_t columns) {
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  int64_t i = 0;
  for (; i + kLanes <= rows; i += kLanes) {
    const Real* block = from + i * from_stride;
    const int64_t rest = columns % kLanes;
    // A few columns are copied one by one; more are done with the last whole block, some of them twice.
    const bool again = columns > kLanes && rest > 4;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t left = columns - j;
      if (left < kLanes && !again) {
        for (int64_t c = j; c < columns; ++c) {
          for (int64_t r = 0; r < kLanes; ++r) to[c * to_stride + i + r] = block[r * from_stride + c];
        }
        break;
      }
      const int64_t first = left < kLanes ? columns - kLanes : j;
      Vector<Real> value[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) value[r] = load_vector(block + r * from_stride + first);
      transpose_step<1, Real>(value, LaneIndices<Real>{});
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store_vector(to + (first + r) * to_stride + i, value[r]);
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

}  // namespace
}  // namespace camkernels::cpu
