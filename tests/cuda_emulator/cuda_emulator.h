// Runs CUDA kernels on the host, one fiber per CUDA thread, so that kernel sources can be tested without a
// GPU.
//
// A kernel that includes this header instead of the CUDA headers sees threadIdx, blockIdx, blockDim, gridDim,
// shared memory, __syncthreads, __syncwarp, warp shuffles and votes, atomics, clusters with distributed
// shared memory, uint4 and the half types. All blocks of a cluster run together; clusters run one after
// another, in random order.
//
// Between two barriers or atomics the threads run one at a time, in an order drawn from a seed: a missing
// barrier lets a reader run before its writer, and the result changes. Shared memory starts as NaN, so
// reading what nobody wrote shows in the result. A barrier or shuffle that the threads of a block, warp or
// cluster do not all reach at the same source line is an error, and so are a kernel that deadlocks, a cluster
// barrier arrived at but not waited for, a 16-byte access to an address that is not a multiple of 16, and a
// launch that no GPU takes.
//
// Dynamic shared memory comes through emulator::SharedMemory: each array is a heap block of its own, so an
// access past its end shows under AddressSanitizer. Static __shared__ variables are thread_local ones, of
// which every block has a copy that is brought in when one of its threads runs; between them are no such red
// zones, which is why the kernels of csrc/cuda use dynamic shared memory alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct __half {
  _Float16 value;
};
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
inline float __half2float(__half value) { return static_cast<float>(value.value); }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {0x7fff};
  bits += 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  return {static_cast<uint16_t>(bits >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

using std::isnan;
using std::max;
using std::min;

namespace emulator {

inline uint3 thread_index() { return {Machine::instance().thread().index, 0, 0}; }
inline uint3 block_index() { return {Machine::instance().block().index, 0, 0}; }
inline dim3 block_dim() { return {static_cast<unsigned>(Machine::instance().shape().threads), 1, 1}; }
inline dim3 grid_dim() { return {static_cast<unsigned>(Machine::instance().shape().blocks), 1, 1}; }

inline void sync_block(const char* file, int line) {
  Machine& machine = Machine::instance();
  machine.meet(machine.block().meeting, {"__syncthreads", file, line, 0});
}

inline void sync_warp(const char* file, int line) {
  Machine& machine = Machine::instance();
  machine.meet(machine.block().warps[machine.thread().index / kWarpSize], {"__syncwarp", file, line, 0});
}

// Every thread of the block learns whether any passed true.
inline int sync_block_or(int value, const char* file, int line) {
  Machine& machine = Machine::instance();
  Block& block = machine.block();
  machine.thread().exchanged = value != 0;
  machine.meet(block.meeting, {"__syncthreads_or", file, line, 0});
  bool any = false;
  for (auto& thread : block.threads) any = any || thread->exchanged != 0;
  machine.meet(block.meeting, {"__syncthreads_or", file, line, 1});
  return any;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned lane, const char* what, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const std::vector<uint64_t>& all = Machine::instance().exchange(bits, {what, file, line, mask});
  T result;
  std::memcpy(&result, &all[lane % kWarpSize], sizeof(T));
  return result;
}

inline unsigned lane() { return Machine::instance().thread().index % kWarpSize; }

inline unsigned ballot(unsigned mask, bool predicate, const char* file, int line) {
  const std::vector<uint64_t>& all =
      Machine::instance().exchange(predicate, {"__ballot_sync", file, line, mask});
  unsigned votes = 0;
  for (unsigned i = 0; i < kWarpSize; ++i) votes |= static_cast<unsigned>(all[i]) << i;
  return votes;
}

inline int cluster_rank() { return static_cast<int>(Machine::instance().block().rank); }
inline int cluster_size() { return Machine::instance().shape().cluster; }
inline void cluster_arrive() { Machine::instance().arrive_at_cluster(); }
inline void cluster_arrive_relaxed() { Machine::instance().arrive_at_cluster(); }
inline void cluster_wait() { Machine::instance().wait_for_cluster(); }

template <typename T>
const T* cluster_peer(const T* address, int rank) {
  return static_cast<const T*>(Machine::instance().peer(address, rank));
}

inline void require_alignment(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
  throw std::runtime_error("a 16-byte access to an address that is not a multiple of 16");
}

inline uint4 load_global(const uint4* from) {
  require_alignment(from);
  return *from;
}

inline void store_global(uint4* to, uint4 value) {
  require_alignment(to);
  *to = value;
}

class SharedMemory {
 public:
  template <typename T>
  T* take(int64_t count) {
    return reinterpret_cast<T*>(Machine::instance().shared_piece(count * static_cast<int64_t>(sizeof(T))));
  }
};

}  // namespace emulator

#define threadIdx emulator::thread_index()
#define blockIdx emulator::block_index()
#define blockDim emulator::block_dim()
#define gridDim emulator::grid_dim()
#define __syncthreads() emulator::sync_block(__FILE__, __LINE__)
#define __syncwarp() emulator::sync_warp(__FILE__, __LINE__)
#define __syncthreads_or(value) emulator::sync_block_or(value, __FILE__, __LINE__)
#define __shfl_sync(mask, value, from) emulator::shuffle(mask, value, from, "__shfl_sync", __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, distance) \
  emulator::shuffle(mask, value, emulator::lane() ^ (distance), "__shfl_xor_sync", __FILE__, __LINE__)
#define __ballot_sync(mask, predicate) emulator::ballot(mask, predicate, __FILE__, __LINE__)

namespace emulator {

// Other threads come first, whose atomics this one must then not undo.
template <typename T, typename Change>
T read_modify_write(T* address, Change change) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4);
  Machine::instance().give_way();
  const T before = *address;
  *address = change(before);
  return before;
}

}  // namespace emulator

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T before) { return before + value; });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T before) { return max(before, value); });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T before) { return min(before, value); });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T before) { return before == expected ? value : before; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T before) { return before | value; });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T before) { return before & value; });
}

inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
