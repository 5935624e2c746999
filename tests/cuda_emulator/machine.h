// The emulated machine: runs a kernel's blocks, cluster after cluster, one fiber per CUDA thread.
#pragma once

#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "fiber.h"

namespace emulator {

inline constexpr unsigned kWarpSize = 32;

struct Shape {
  int64_t blocks = 1;
  int threads = 1;
  int cluster = 1;
  int64_t shared = 0;
};

// One that has ended.
struct Launch {
  const void* kernel;
  Shape shape;
};

inline constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
inline constexpr int kMaxThreads = 1024;
inline constexpr int kMaxCluster = 8;
inline constexpr int64_t kMaxShared = 232448;

// The thread_local variables of the library that the kernels are in. The emulator has no other than this one,
// which is there so that there is a first.
inline thread_local char anchor = 0;

class Statics {
 public:
  // Those of the host's running thread.
  static Statics find() {
    Statics found;
    dl_iterate_phdr(&Statics::look, &found);
    if (found.begin_ == nullptr)
      throw std::runtime_error("the thread_local variables are nowhere to be found");
    return found;
  }

  char* begin() const { return begin_; }
  size_t size() const { return size_; }
  bool holds(const char* byte) const { return byte >= begin_ && byte < begin_ + size_; }

 private:
  static int look(dl_phdr_info* info, size_t, void* result) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
      Statics segment;
      segment.begin_ = static_cast<char*>(info->dlpi_tls_data);
      segment.size_ = info->dlpi_phdr[i].p_memsz;
      if (!segment.holds(&anchor)) continue;
      *static_cast<Statics*>(result) = segment;
      return 1;
    }
    return 0;
  }

  char* begin_ = nullptr;
  size_t size_ = 0;
};

// Where a thread waits, and for whom.
struct Site {
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;
  unsigned mask = 0;
  bool operator==(const Site& other) const {
    return what == other.what && file == other.file && line == other.line && mask == other.mask;
  }
  std::string text() const { return std::string(what) + " at " + file + ":" + std::to_string(line); }
};

struct Block;
struct Meeting;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned index = 0;
  int64_t shared_at = 0;   // bytes of shared memory taken so far
  uint64_t exchanged = 0;  // what this thread gives to a shuffle or a vote
  bool arrived_at_cluster = false;
  bool owes_wait = false;  // has arrived at a cluster barrier and not waited there yet
  bool finished = false;
  Site site;
};

// Threads that meet at a barrier: a block's, a warp's or a cluster's.
struct Meeting {
  std::vector<Thread*> members;
  size_t arrived = 0;
  Thread* first = nullptr;      // of those that have arrived
  Thread* gone = nullptr;       // a member that has left the kernel
  std::vector<uint64_t> given;  // a warp's: what its lanes gave to the last shuffle or vote
};

struct Piece {
  std::unique_ptr<char[]> memory;
  int64_t bytes = 0;
};

struct Block {
  unsigned index = 0;
  unsigned rank = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  Meeting meeting;
  std::vector<Meeting> warps;
  std::map<int64_t, Piece> shared;  // by offset in the block's shared memory
  std::vector<char> statics;        // its static shared memory, while another block's is in place
  bool started = false;
};

struct Cluster {
  std::vector<Block> blocks;
  size_t arrived = 0;
  std::vector<Thread*> waiting;
};

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  template <typename Kernel, typename Call>
  void run(Kernel kernel, const Shape& shape, const Call& call, uint64_t seed) {
    require("blocks", shape.blocks, 1, kMaxBlocks);
    require("threads in a block", shape.threads, 1, kMaxThreads);
    require("blocks in a cluster", shape.cluster, 1, kMaxCluster);
    require("bytes of shared memory", shape.shared, 0, max_shared);
    if (shape.threads % kWarpSize != 0 || shape.blocks % shape.cluster != 0) {
      throw std::runtime_error("the emulator wants whole warps and whole clusters");
    }
    statics_ = Statics::find();
    shape_ = shape;
    random_.seed(seed);
    body_ = [kernel, &call] { kernel(call); };
    std::vector<int64_t> order(static_cast<size_t>(shape.blocks / shape.cluster));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::shuffle(order.begin(), order.end(), random_);
    for (const int64_t cluster : order) run_cluster(cluster);
    launches.push_back({reinterpret_cast<const void*>(kernel), shape});
  }

  Thread& thread() { return *running_; }
  Block& block() { return *running_->block; }
  Cluster& cluster() { return cluster_; }
  const Shape& shape() const { return shape_; }

  // Blocks the running thread until all members of the meeting have come to the same site.
  void meet(Meeting& meeting, const Site& site) {
    Thread& self = thread();
    self.site = site;
    if (meeting.gone != nullptr) fail("a thread has already left the kernel", self, *meeting.gone);
    if (meeting.arrived == 0) meeting.first = &self;
    if (!(meeting.first->site == site)) fail("threads diverge", self, *meeting.first);
    if (++meeting.arrived == meeting.members.size()) {
      meeting.arrived = 0;
      for (Thread* member : meeting.members) {
        if (member != &self) ready_.push_back(member);
      }
      return;
    }
    wait();
  }

  // What every lane of the warp passes, once all lanes of the mask (the whole warp) have.
  const std::vector<uint64_t>& exchange(uint64_t value, const Site& site) {
    Thread& self = thread();
    if (site.mask != 0xffffffffu) throw std::runtime_error(site.text() + ": only whole warps are emulated");
    Meeting& warp = block().warps[self.index / kWarpSize];
    self.exchanged = value;
    // Nobody still reads what was given before: all lanes but this one have come here since.
    if (warp.arrived + 1 == warp.members.size()) {
      warp.given.clear();
      for (Thread* member : warp.members) warp.given.push_back(member->exchanged);
    }
    meet(warp, site);
    return warp.given;
  }

  void arrive_at_cluster() {
    Thread& self = thread();
    self.site = {"cluster_arrive", "", 0, 0};
    if (self.owes_wait) blame(self, "arrives at a cluster barrier again before it has waited there");
    self.arrived_at_cluster = true;
    self.owes_wait = true;
    if (++cluster_.arrived == static_cast<size_t>(shape_.cluster) * static_cast<size_t>(shape_.threads)) {
      cluster_.arrived = 0;
      for (Block& block : cluster_.blocks) {
        for (auto& member : block.threads) member->arrived_at_cluster = false;
      }
      ready_.insert(ready_.end(), cluster_.waiting.begin(), cluster_.waiting.end());
      cluster_.waiting.clear();
    }
  }

  void wait_for_cluster() {
    Thread& self = thread();
    self.site = {"cluster_wait", "", 0, 0};
    if (!self.owes_wait) blame(self, "waits at a cluster barrier at which it has not arrived");
    self.owes_wait = false;
    if (!self.arrived_at_cluster) return;  // the last one has come since this thread arrived
    cluster_.waiting.push_back(&self);
    wait();
  }

  // Lets other threads run first.
  void give_way() {
    ready_.push_back(running_);
    wait();
  }

  char* shared_piece(int64_t bytes) {
    Thread& self = thread();
    const int64_t at = self.shared_at;
    self.shared_at += (bytes + 15) / 16 * 16;
    if (self.shared_at > shape_.shared) {
      throw std::runtime_error("the kernel takes " + std::to_string(self.shared_at) +
                               " bytes of shared memory, the launch gives it " +
                               std::to_string(shape_.shared));
    }
    Piece& piece = self.block->shared[at];
    if (bytes == 0) return nullptr;
    if (piece.memory == nullptr) {
      piece.memory.reset(new char[static_cast<size_t>(bytes)]);
      piece.bytes = bytes;
      std::memset(piece.memory.get(), 0xff, static_cast<size_t>(bytes));  // NaN in every float type
    } else if (piece.bytes != bytes) {
      throw std::runtime_error("threads cut up their shared memory differently");
    }
    return piece.memory.get();
  }

  const void* peer(const void* address, int rank) {
    const char* byte = static_cast<const char*>(address);
    if (thread().owes_wait) {
      blame(thread(), "reads another block's shared memory after it has arrived at the cluster barrier");
    }
    Block& other = cluster_.blocks.at(static_cast<size_t>(rank));
    if (!other.started) {
      throw std::runtime_error("a block reads shared memory of a block that has not started");
    }
    if (other.meeting.gone != nullptr) {
      throw std::runtime_error("a block reads shared memory of a block that has left the kernel");
    }
    // While this block's threads run, the others' copies are all put away.
    if (statics_.holds(byte)) return &other == &block() ? byte : &other.statics[byte - statics_.begin()];
    for (auto& [at, piece] : block().shared) {
      const char* begin = piece.memory.get();
      if (begin == nullptr || byte < begin || byte >= begin + piece.bytes) continue;
      const auto found = other.shared.find(at);
      if (found == other.shared.end()) {
        throw std::runtime_error("a block reads shared memory that the other block has not taken");
      }
      return found->second.memory.get() + (byte - begin);
    }
    throw std::runtime_error("cluster_peer: not an address in this block's shared memory");
  }

  std::vector<Launch> launches;
  int64_t max_shared = kMaxShared;  // bytes that a block may have

 private:
  void run_cluster(int64_t index) {
    cluster_ = Cluster{};
    cluster_.blocks.resize(static_cast<size_t>(shape_.cluster));
    ready_.clear();
    loaded_ = nullptr;
    size_t used = 0;
    for (int rank = 0; rank < shape_.cluster; ++rank) {
      Block& block = cluster_.blocks[static_cast<size_t>(rank)];
      block.index = static_cast<unsigned>(index * shape_.cluster + rank);
      block.rank = static_cast<unsigned>(rank);
      block.statics.assign(statics_.size(), '\xff');
      block.warps.resize(static_cast<size_t>(shape_.threads) / kWarpSize);
      for (int i = 0; i < shape_.threads; ++i) {
        auto thread = std::make_unique<Thread>();
        thread->block = &block;
        thread->index = static_cast<unsigned>(i);
        if (used == stacks_.size()) stacks_.push_back(std::make_unique<Stack>());
        thread->fiber.start(*stacks_[used++], &Machine::enter);
        block.meeting.members.push_back(thread.get());
        block.warps[thread->index / kWarpSize].members.push_back(thread.get());
        ready_.push_back(thread.get());
        block.threads.push_back(std::move(thread));
      }
    }
    error_ = nullptr;
    while (!ready_.empty() && error_ == nullptr) {
      const size_t pick = random_() % ready_.size();
      running_ = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      bring_in_statics(*running_->block);
      scheduler_.switch_to(running_->fiber);
    }
    if (error_ != nullptr) std::rethrow_exception(error_);
    for (Block& block : cluster_.blocks) {
      for (auto& thread : block.threads) {
        if (!thread->finished)
          throw std::runtime_error("deadlock: thread " + name(*thread) + " waits in " + thread->site.text());
      }
    }
  }

  static void enter() {
    Machine& machine = instance();
    try {
      machine.body_();
      if (machine.running_->owes_wait) {
        blame(*machine.running_, "leaves the kernel without a wait at the cluster barrier where it arrived");
      }
    } catch (...) {
      machine.error_ = std::current_exception();
    }
    Thread& self = *machine.running_;
    self.finished = true;
    self.block->meeting.gone = &self;
    self.block->warps[self.index / kWarpSize].gone = &self;
    machine.running_->fiber.finish(machine.scheduler_);
  }

  void bring_in_statics(Block& block) {
    block.started = true;
    if (loaded_ == &block) return;
    if (loaded_ != nullptr) std::memcpy(loaded_->statics.data(), statics_.begin(), statics_.size());
    std::memcpy(statics_.begin(), block.statics.data(), statics_.size());
    loaded_ = &block;
  }

  void wait() { thread().fiber.switch_to(scheduler_); }

  static std::string name(const Thread& thread) {
    return std::to_string(thread.index) + " of block " + std::to_string(thread.block->index);
  }

  static void require(const char* what, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return;
    throw std::runtime_error("a launch of " + std::to_string(value) + " " + what + "; allowed are " +
                             std::to_string(low) + " to " + std::to_string(high));
  }

  [[noreturn]] static void blame(const Thread& thread, const char* what) {
    throw std::runtime_error("thread " + name(thread) + " " + what);
  }

  [[noreturn]] void fail(const char* what, const Thread& one, const Thread& other) {
    throw std::runtime_error(std::string(what) + ": thread " + name(one) + " is in " + one.site.text() +
                             ", thread " + name(other) +
                             (other.site.what == nullptr ? " in none" : " in " + other.site.text()));
  }

  Shape shape_;
  Statics statics_;
  Block* loaded_ = nullptr;  // whose statics are in place
  std::mt19937_64 random_;
  std::function<void()> body_;
  Cluster cluster_;
  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<Thread*> ready_;
  Thread* running_ = nullptr;
  Fiber scheduler_;
  std::exception_ptr error_;
};

}  // namespace emulator
