// Runs a grid: one cluster of blocks after the other, each thread a fibre. A fibre runs until it
// waits for others, and the schedule says who is next.
#pragma once

#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_on_cpu/cuda_words.h"
#include "cuda_on_cpu/fiber.h"
#include "cuda_on_cpu/symbol.h"

namespace cuda_on_cpu {

// Where a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && same(file, other.file) && same(what, other.what);
  }
  static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
};

inline std::string text(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(site.what) + " (" + (slash ? slash + 1 : site.file) + ":" +
         std::to_string(site.line) + ")";
}

enum class Wait : uint8_t { none, barrier, cluster, warp, ended };

struct Copy {
  unsigned char* to;
  std::array<unsigned char, 16> bytes;
  int count;
  unsigned group;
};

struct Block;

struct Thread {
  Fiber fiber;
  unsigned index, place;  // in the block, in the cluster
  Block* block;
  Wait wait;
  Site site;
  std::vector<Copy> copies;
  unsigned copy_group;
};

// Lanes of one warp that have come to a collective.
struct Meeting {
  unsigned mask, arrived;
  Site site;
  std::array<void*, 32> lanes;
};

struct Block {
  uint3 index;
  unsigned rank;
  unsigned char* shared;
  unsigned arrived, ended;
  Site site;
  int gathered, result;  // of __syncthreads_or and its like
  int64_t reached_in;    // the last phase in which a neighbour reached into the shared memory
  bool waited_for_previous;
  std::vector<std::vector<Meeting>> warps;
};

// Where each thread stands: ready ones are 1.
class ReadySet {
 public:
  void resize(unsigned count) { words_.assign((count + 63) / 64, 0); }
  void add(unsigned i) { words_[i / 64] |= uint64_t{1} << i % 64; }
  void remove(unsigned i) { words_[i / 64] &= ~(uint64_t{1} << i % 64); }
  int from(unsigned start) const {
    uint64_t word = words_[start / 64] >> start % 64 << start % 64;
    for (size_t i = start / 64;; word = words_[i]) {
      if (word) return static_cast<int>(i * 64 + __builtin_ctzll(word));
      if (++i == words_.size()) return -1;
    }
  }
  int last() const {
    for (size_t i = words_.size(); i-- > 0;)
      if (words_[i]) return static_cast<int>(i * 64 + 63 - __builtin_clzll(words_[i]));
    return -1;
  }

 private:
  std::vector<uint64_t> words_;
};

enum class Order : int { forward, reverse, shuffled };

struct Launch {
  const void* kernel;
  dim3 grid;
  unsigned threads, cluster;
  size_t shared_bytes;
  bool dependent;
  void (*call)(void*);
  void* arguments;
};

class Machine {
 public:
  Order order = Order::forward;
  uint64_t seed = 0;
  Thread* current = nullptr;

  void run(const Launch& launch);

  // Ends the launch with an error that names the current thread.
  [[noreturn]] void fail(const std::string& message) {
    error_ = "block " + text(current->block->index) + ", thread " + std::to_string(current->index) +
             ": " + message;
    current->fiber.switch_to(caller_);
    std::abort();
  }

  void barrier(const Site& site) {
    Block& block = *current->block;
    if (block.arrived == 0) block.site = site;
    if (!(block.site == site))
      fail("waits at " + text(site) + " while others of its block wait at " + text(block.site) +
           "; all threads must meet at the same barrier: look for a branch around one");
    if (++block.arrived < launch_->threads) return wait(Wait::barrier, site);
    block.arrived = 0;
    block.result = block.gathered;
    const unsigned first = block.rank * launch_->threads;
    for (unsigned i = 0; i < launch_->threads; ++i) wake(threads_[first + i]);
  }

  void cluster_barrier(const Site& site) {
    if (++cluster_arrived_ < live_count()) return wait(Wait::cluster, site);
    cluster_arrived_ = 0;
    ++phase_;
    for (unsigned i = 0; i < live_count(); ++i) wake(threads_[i]);
  }

  // Waits until all lanes of the mask are here; the last to come calls `complete(lanes)` for all.
  template <class Lane, class Complete>
  void meet(const Site& site, unsigned mask, Lane& mine, Complete complete) {
    const unsigned lane = current->index % 32, bit = 1u << lane;
    std::vector<Meeting>& meetings = current->block->warps[current->index / 32];
    Meeting* here = nullptr;
    for (Meeting& meeting : meetings) {
      if (meeting.arrived == 0) continue;
      const bool joins = meeting.mask == mask && meeting.site == site;
      // Lanes that are still at an earlier call may come here later; those that wait for this lane
      // can not.
      if (!joins && (meeting.arrived & mask) != 0 && (meeting.mask & bit) != 0)
        fail("is at " + text(site) + " with mask " + hex(mask) + " while lanes " +
             lanes_text(meeting.arrived) + " of its warp are at " + text(meeting.site) +
             " with mask " + hex(meeting.mask) + "; the lanes of a mask must run the same call");
      if (joins) here = &meeting;
    }
    if ((mask & bit) == 0)
      fail("is at " + text(site) + " with mask " + hex(mask) + ", which leaves out its own lane " +
           std::to_string(lane));
    if (here == nullptr) {
      for (Meeting& meeting : meetings)
        if (meeting.arrived == 0) here = &meeting;
      if (here == nullptr) here = &meetings.emplace_back();
      here->mask = mask;
      here->site = site;
    }
    here->arrived |= bit;
    here->lanes[lane] = &mine;
    if (here->arrived != mask) return wait(Wait::warp, site);
    here->arrived = 0;
    complete(here->lanes);
    const unsigned first = current->place - lane;
    for (unsigned left = mask; left != 0; left &= left - 1)
      wake(threads_[first + static_cast<unsigned>(__builtin_ctz(left))]);
  }

  Block& block_at(unsigned rank) { return blocks_[rank]; }
  const Launch& launch() const { return *launch_; }
  int64_t phase() const { return phase_; }
  bool in_shared(const void* pointer, size_t bytes) const {
    const auto* start = current->block->shared;
    const auto* p = static_cast<const unsigned char*>(pointer);
    return p >= start && p + bytes <= start + launch_->shared_bytes;
  }

  static std::string text(const Site& site) { return cuda_on_cpu::text(site); }
  static std::string text(const uint3& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) +
           ")";
  }
  static std::string hex(unsigned mask) {
    char buffer[16];
    std::snprintf(buffer, sizeof(buffer), "0x%08x", mask);
    return buffer;
  }
  static std::string lanes_text(unsigned mask);

  void asan_report(const char* report);

 private:
  unsigned live_count() const { return launch_->cluster * launch_->threads; }
  void wake(Thread& thread) {
    thread.wait = Wait::none;
    ready_.add(thread.place);
  }
  void wait(Wait why, const Site& site) {
    current->wait = why;
    current->site = site;
    leave();
  }
  // Gives way to the next thread that is ready, or to the caller when none is.
  void leave() {
    Thread& me = *current;
    ready_.remove(me.place);
    const int next = pick();
    if (next < 0)
      me.fiber.switch_to(caller_);
    else
      go(me.fiber, threads_[static_cast<unsigned>(next)]);
  }
  void go(Fiber& from, Thread& to) {
    current = &to;
    threadIdx.x = to.index;
    blockIdx = to.block->index;
    from.switch_to(to.fiber);
  }
  int pick() {
    if (order == Order::forward) return ready_.from(0);
    if (order == Order::reverse) return ready_.last();
    const int found = ready_.from(static_cast<unsigned>(random(live_count())));
    return found < 0 ? ready_.from(0) : found;
  }
  uint64_t random(uint64_t bound) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return (random_ >> 16) % bound;
  }

  static void thread_main();
  void end_thread();
  void run_cluster(uint64_t number);
  void set_up_block(unsigned rank, uint64_t number);
  void leave_shared_memory(Block& block);
  void check_overrun(const Block& block);
  std::string who_waits() const;

  std::mutex mutex_;
  const Launch* launch_ = nullptr;
  Fiber caller_;
  std::deque<Thread> threads_;  // of a cluster; a Thread stays where it is
  std::vector<Block> blocks_;
  ReadySet ready_;
  unsigned cluster_arrived_ = 0, ended_ = 0;
  int64_t phase_ = 0;  // cluster_syncs so far
  uint64_t random_ = 1;
  std::string error_;
};

inline Machine& machine() {
  static Machine machine;
  return machine;
}

}  // namespace cuda_on_cpu

#include "cuda_on_cpu/machine.inl"
