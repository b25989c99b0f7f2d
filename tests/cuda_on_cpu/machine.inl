// What Machine does once for each launch, block and thread, and what it says when something is
// wrong.
#pragma once

namespace cuda_on_cpu {

#if defined(__SANITIZE_ADDRESS__)
// The allocator's red zones begin at the first byte beyond.
constexpr size_t kMargin = 0;
#else
constexpr size_t kMargin = 256;
#endif
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating type

inline std::string Machine::lanes_text(unsigned mask) {
  std::string list;
  for (int first = 0; first < 32; ++first) {
    if ((mask >> first & 1) == 0) continue;
    int last = first;
    while (last < 31 && (mask >> (last + 1) & 1)) ++last;
    list += (list.empty() ? "" : ", ") + std::to_string(first);
    if (last > first) list += "-" + std::to_string(last);
    first = last;
  }
  return list;
}

inline void Machine::thread_main() {
  Machine& self = machine();
  self.current->fiber.arrive();
  try {
    self.launch_->call(self.launch_->arguments);
    self.end_thread();
  } catch (const std::exception& exception) {
    self.fail(exception.what());
  }
  std::abort();
}

inline void Machine::end_thread() {
  Block& block = *current->block;
  if (!current->copies.empty())
    fail("ends with copies to shared memory under way; look for the last copy_async_wait<0>()");
  current->wait = Wait::ended;
  ++ended_;
  if (++block.ended == launch_->threads) {
    if (launch_->dependent && !block.waited_for_previous)
      fail(
          "ends without wait_for_previous_kernel(), though the launch lets it start early; what "
          "runs after it could then overtake the previous kernel");
    if (launch_->cluster > 1) leave_shared_memory(block);
  }
  leave();
}

inline void Machine::leave_shared_memory(Block& block) {
  if (block.reached_in == phase_)
    fail(
        "is the last of its block, which leaves the cluster although a neighbour has reached into "
        "its shared memory since the last cluster_sync(); end with a cluster_sync()");
  std::memset(block.shared, kPoison, launch_->shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.shared, launch_->shared_bytes);
#endif
}

inline void Machine::set_up_block(unsigned rank, uint64_t number) {
  const Launch& launch = *launch_;
  const uint64_t x = number % launch.grid.x, rest = number / launch.grid.x;
  Block& block = blocks_[rank];
  block = Block{};
  block.index = {static_cast<unsigned>(x), static_cast<unsigned>(rest % launch.grid.y),
                 static_cast<unsigned>(rest / launch.grid.y)};
  block.rank = rank;
  block.reached_in = -1;
  block.warps.resize((launch.threads + 31) / 32);
  const size_t bytes = launch.shared_bytes + 2 * kMargin;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes + (bytes == 0)) != 0) throw std::bad_alloc();
  std::memset(memory, kPoison, bytes);
  block.shared = static_cast<unsigned char*>(memory) + kMargin;
  for (unsigned i = 0; i < launch.threads; ++i) {
    Thread& thread = threads_[rank * launch.threads + i];
    thread.index = i;
    thread.block = &block;
    thread.copies.clear();
    thread.copy_group = 0;
    thread.fiber.start(thread_main);
    wake(thread);
  }
}

inline void Machine::check_overrun(const Block& block) {
  for (size_t i = 0; i < kMargin && error_.empty(); ++i)
    if (block.shared[launch_->shared_bytes + i] != kPoison ||
        block.shared[-1 - static_cast<int64_t>(i)] != kPoison)
      error_ = "block " + text(block.index) + ": wrote beyond the " +
               std::to_string(launch_->shared_bytes) +
               " bytes of shared memory that the launch gave it; the sanitised build says where";
}

inline void Machine::run_cluster(uint64_t number) {
  const Launch& launch = *launch_;
  cluster_arrived_ = ended_ = 0;
  phase_ = 0;
  ready_.resize(live_count());
  for (unsigned rank = 0; rank < launch.cluster; ++rank)
    set_up_block(rank, number * launch.cluster + rank);
  go(caller_, threads_[static_cast<unsigned>(pick())]);
  if (error_.empty() && ended_ < live_count()) error_ = who_waits();
  for (Block& block : blocks_) {
    if (error_.empty()) check_overrun(block);
    std::free(block.shared - kMargin);
  }
}

// Threads that wait at the same place or have ended, as "threads 0-31, 64".
inline std::string Machine::who_waits() const {
  std::string text = "threads wait for others that never come";
  Wait first = Wait::ended;
  for (const Block& block : blocks_) {
    const unsigned begin = block.rank * launch_->threads;
    std::string list;
    for (unsigned i = 0; i < launch_->threads;) {
      const Thread& thread = threads_[begin + i];
      unsigned last = i;
      const auto same = [&](const Thread& other) {
        return other.wait == thread.wait &&
               (thread.wait == Wait::ended || other.site == thread.site);
      };
      while (last + 1 < launch_->threads && same(threads_[begin + last + 1])) ++last;
      if (thread.wait != Wait::ended && first == Wait::ended) first = thread.wait;
      list += list.empty() ? " " : ", ";
      list += (last > i ? "threads " : "thread ") + std::to_string(i);
      if (last > i) list += "-" + std::to_string(last);
      list += thread.wait == Wait::ended ? " ended" : " at " + cuda_on_cpu::text(thread.site);
      i = last + 1;
    }
    // One line of a block tells as much as eight that are alike.
    if (text.size() < 1500) text += "; block " + Machine::text(block.index) + ":" + list;
  }
  if (first == Wait::barrier)
    return text +
           "; every thread of a block must reach each of its barriers: look for a return, a "
           "branch or a loop that ends at different counts around one";
  if (first == Wait::cluster)
    return text + "; every thread of every block of a cluster must reach each cluster_sync()";
  return text +
         "; every lane of the mask must reach the call: look for a return or a branch "
         "around it, and for blocks that are no multiple of 32 threads";
}

// The kind of error, the access, and the first frames that are neither the library's nor ours.
inline void Machine::asan_report(const char* report) {
  if (!error_.empty() || current == nullptr) return;
  std::string kind, places;
  int frames = 0;
  std::istringstream lines(report);
  for (std::string line; std::getline(lines, line) && frames < 3;) {
    const size_t error = line.find("AddressSanitizer: ");
    const size_t frame = line.find(" in ");
    if (error != std::string::npos)
      kind = line.substr(error, line.find(" on ", error) - error);
    else if (line.find(" of size ") != std::string::npos)
      kind += ", " + line.substr(0, line.find(" at "));
    else if (line.find("    #") == 0 && frame != std::string::npos && ++frames)
      if (line.find(" std::", frame) == std::string::npos)
        places += line.substr(frame, line.find(' ', frame + 4) - frame) + " (" +
                  line.substr(line.rfind('/') + 1) + ")";
  }
  error_ = "block " + text(current->block->index) + ", thread " + std::to_string(current->index) +
           ": " + kind + places;
}

inline void Machine::run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  launch_ = &launch;
  error_.clear();
  random_ = seed * 0x9E3779B97F4A7C15u + 0x2545F4914F6CDD1Du;
  gridDim = launch.grid;
  blockDim = dim3(launch.threads);
  threadIdx = {0, 0, 0};
  blocks_.resize(launch.cluster);
  while (threads_.size() < live_count()) {
    const auto place = static_cast<unsigned>(threads_.size());
    Thread& thread = threads_.emplace_back();
    thread.place = place;
    thread.fiber.allocate(place);
  }
  caller_.adopt();
#if defined(__SANITIZE_ADDRESS__)
  __asan_set_error_report_callback([](const char* report) { machine().asan_report(report); });
#endif
  const uint64_t clusters =
      uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z / launch.cluster;
  const uint64_t start = order == Order::shuffled ? random(clusters) : 0;
  for (uint64_t i = 0; i < clusters && error_.empty(); ++i)
    run_cluster(order == Order::reverse ? clusters - 1 - i : (start + i) % clusters);
  current = nullptr;
  if (!error_.empty())
    throw std::runtime_error("kernel " + name_of_function(launch.kernel) + ", " + error_);
}

}  // namespace cuda_on_cpu
