// Distances of the seed vectors of images of one class for one instruction set.
//
// The sum of ||a - b||**2 over all pairs of a group of n vectors is n times the sum of ||a - mean||**2. Both
// passes, the mean and the deviations from it, read vectors that stay in cache. Vectors are counted from the
// first of their group: differences of neighbours are exact where the vectors, far from 0, would be rounded
// in their sum.
#pragma once

#include <cmath>
#include <memory>

#include "kernels.h"
#include "vector.h"

namespace camkernels::cpu {
namespace {

// The vectors of one seed in the group of one place.
template <typename T>
struct Group {
  Group(const StochasticConsistency& p, int64_t place, int64_t seed)
      : size(p.end[place] - p.begin[place]),
        images(p.order + p.begin[place]),
        vectors(static_cast<const T*>(p.vectors.data)),
        seed(seed),
        seeds(p.seeds),
        depth(p.depth) {}
  int64_t offset(int64_t member) const { return (images[member] * seeds + seed) * depth; }
  const Accumulate<T>* row(int64_t member, Accumulate<T>* staging) const {
    return widened(vectors + offset(member), staging, depth);
  }
  // Less the group's first vector.
  const Accumulate<T>* from_first(int64_t member, Accumulate<T>* staging) const {
    const T* first = vectors + offset(0);
    const T* own = vectors + offset(member);
    for (int64_t d = 0; d < depth; ++d) staging[d] = to_real(own[d]) - to_real(first[d]);
    return staging;
  }

  int64_t size;
  const int64_t* images;
  const T* vectors;
  int64_t seed, seeds, depth;
};

// Of the vectors less the first of them.
template <typename T>
inline void mean_row(const Group<T>& group, Accumulate<T>* mean, Accumulate<T>* staging) {
  using Real = Accumulate<T>;
  for (int64_t d = 0; d < group.depth; ++d) mean[d] = 0;
  for (int64_t member = 0; member < group.size; ++member) {
    const Real* row = group.from_first(member, staging);
    for (int64_t d = 0; d < group.depth; ++d) mean[d] += row[d];
  }
  for (int64_t d = 0; d < group.depth; ++d) mean[d] /= static_cast<Real>(group.size);
}

template <typename Real>
inline Real squared_distance(const Real* a, const Real* b, int64_t depth) {
  constexpr int kLanes = Lanes<Real>::kCount;
  Vector<Real> lanes = {};
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    const Vector<Real> difference = load_vector(a + d) - load_vector(b + d);
    lanes += difference * difference;
  }
  Real sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  for (; d < depth; ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}

// What the place gives to the sum: squared, the first place of a group gives all of it; else a place gives
// its distances to those behind it.
template <typename T>
void stochastic_consistency_fwd(const StochasticConsistency& p, int64_t item_begin, int64_t item_end) {
  using Real = Accumulate<T>;
  const std::unique_ptr<Real[]> mean(new Real[p.depth]);
  const std::unique_ptr<Real[]> staging(new Real[2 * p.depth]);
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t place = item % p.images, seed = item / p.images;
    const Group<T> group(p, place, seed);
    const int64_t own = place - p.begin[place];
    Real sum = 0;
    if (p.squared && own == 0 && group.size > 1) {
      mean_row(group, mean.get(), staging.get());
      for (int64_t member = 0; member < group.size; ++member) {
        sum += squared_distance(group.from_first(member, staging.get()), mean.get(), p.depth);
      }
      sum *= static_cast<Real>(group.size);
    } else if (!p.squared) {
      const Real* row = group.row(own, staging.get());
      for (int64_t member = own + 1; member < group.size; ++member) {
        sum += std::sqrt(squared_distance(row, group.row(member, staging.get() + p.depth), p.depth));
      }
    }
    static_cast<Real*>(p.sums)[place * p.seeds + seed] = sum;
  }
}

template <typename T>
void stochastic_consistency_bwd(const StochasticConsistency& p, int64_t item_begin, int64_t item_end) {
  using Real = Accumulate<T>;
  const Real scale = *static_cast<const Real*>(p.scale);
  const std::unique_ptr<Real[]> mean(new Real[p.depth]);
  const std::unique_ptr<Real[]> grad(new Real[p.depth]);
  const std::unique_ptr<Real[]> staging(new Real[2 * p.depth]);
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t place = item % p.images, seed = item / p.images;
    const Group<T> group(p, place, seed);
    const int64_t own = place - p.begin[place];
    // Squared: the group's first place makes the gradients of all of it, which share a mean.
    if (p.squared && own != 0) continue;
    T* to = static_cast<T*>(p.grad_vectors);
    if (p.squared && group.size > 1) {
      mean_row(group, mean.get(), staging.get());
      const Real factor = 2 * scale * static_cast<Real>(group.size);
      for (int64_t member = 0; member < group.size; ++member) {
        const Real* row = group.from_first(member, staging.get());
        for (int64_t d = 0; d < p.depth; ++d) grad[d] = factor * (row[d] - mean[d]);
        store_row(grad.get(), to + group.offset(member), p.depth, false);
      }
      continue;
    }
    for (int64_t d = 0; d < p.depth; ++d) grad[d] = 0;
    const Real* row = group.row(own, staging.get());
    for (int64_t member = 0; member < group.size; ++member) {
      if (p.squared || member == own) continue;
      const Real* other = group.row(member, staging.get() + p.depth);
      const Real distance = std::sqrt(squared_distance(row, other, p.depth));
      if (distance == 0) continue;
      const Real factor = scale / distance;
      for (int64_t d = 0; d < p.depth; ++d) grad[d] += factor * (row[d] - other[d]);
    }
    store_row(grad.get(), to + group.offset(own), p.depth, false);
  }
}

}  // namespace
}  // namespace camkernels::cpu
