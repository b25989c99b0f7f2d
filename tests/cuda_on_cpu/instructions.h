// Twin of csrc/cuda/instructions.cuh for device code that runs on the CPU.
#pragma once

#include "cuda_on_cpu/collectives.h"
#include "cuda_on_cpu/matrices.h"

#define TRIMTAB_DEVICE inline

namespace trimtab {

using cuda_on_cpu::machine;

inline void check_aligned(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    machine().fail(std::string(what) + " of " + std::to_string(bytes) +
                   " bytes at an address that is no multiple of it; look at the start of the row, "
                   "its stride, and whether a scalar path takes over");
}

template <class T>
T* shared_memory() {
  if (machine().launch().shared_bytes == 0)
    machine().fail("uses shared memory, but the launch gives it none");
  return reinterpret_cast<T*>(machine().current->block->shared);
}

template <class Raw>
Raw load_raw(const void* from) {
  check_aligned(from, sizeof(Raw), "load");
  return *static_cast<const Raw*>(from);
}
template <class Raw>
void store_raw(void* to, Raw raw) {
  check_aligned(to, sizeof(Raw), "store");
  *static_cast<Raw*>(to) = raw;
}
template <class Raw>
Raw load_raw_stream(const Raw* global) {
  return load_raw<Raw>(global);
}
template <class Raw>
void store_raw_stream(Raw* global, Raw raw) {
  store_raw(global, raw);
}

// The bytes arrive at the wait; until then the target is poison.
template <int Bytes>
void copy_async(void* shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  check_aligned(shared, Bytes, "copy_async to shared memory");
  check_aligned(global, Bytes, "copy_async from global memory");
  if (!machine().in_shared(shared, Bytes))
    machine().fail("copy_async to a place outside the block's shared memory");
  if (valid < 0 || valid > Bytes) machine().fail("copy_async of less than nothing or too much");
  cuda_on_cpu::Thread& thread = *machine().current;
  cuda_on_cpu::Copy copy{static_cast<unsigned char*>(shared), {}, Bytes, thread.copy_group};
  std::memcpy(copy.bytes.data(), global, static_cast<size_t>(valid));
  std::memset(shared, cuda_on_cpu::kPoison, Bytes);
  thread.copies.push_back(copy);
}
inline void copy_async_commit() { ++machine().current->copy_group; }
template <int Pending>
void copy_async_wait() {
  cuda_on_cpu::Thread& thread = *machine().current;
  std::vector<cuda_on_cpu::Copy> later;
  for (const cuda_on_cpu::Copy& copy : thread.copies) {
    if (copy.group + Pending < thread.copy_group)
      std::memcpy(copy.to, copy.bytes.data(), static_cast<size_t>(copy.count));
    else
      later.push_back(copy);
  }
  thread.copies.swap(later);
}

// As far from 2**x as the instruction may be, up or down as the bits of x have it.
inline float exp2_approximate(float x) {
  const float power = std::exp2(x);
  if (x == 0) return 1;
  if (power < 0x1p-126f) return 0;
  const bool up = cuda_bits<uint32_t>(x) * 0x9E3779B9u >> 31;
  return power < 0x1p127f ? power * (up ? 1 + 0x1p-22f : 1 - 0x1p-22f) : power;
}
inline float larger(float a, float b) { return a > b || a != a ? a : b; }

inline unsigned cluster_rank() { return machine().current->block->rank; }
inline unsigned cluster_size() { return machine().launch().cluster; }
inline void cluster_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  machine().cluster_barrier({"cluster_sync()", file, line});
}
inline void cluster_leave(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  machine().cluster_barrier({"cluster_leave()", file, line});
}
template <class T>
T* at_rank(T* shared, unsigned rank) {
  auto& m = machine();
  cuda_on_cpu::Block& own = *m.current->block;
  const std::string call = "at_rank(shared, " + std::to_string(rank) + ")";
  if (rank >= m.launch().cluster)
    m.fail(call + " in a cluster of " + std::to_string(cluster_size()));
  if (!m.in_shared(shared, sizeof(T))) m.fail(call + " of a place outside its shared memory");
  if (rank == own.rank) return shared;
  cuda_on_cpu::Block& other = m.block_at(rank);
  if (m.phase() == 0)
    m.fail(call + " before the first cluster_sync(), when that block may not run yet");
  if (other.ended == m.launch().threads) m.fail(call + ", a block that has left the cluster");
  other.reached_in = m.phase();
  return reinterpret_cast<T*>(other.shared +
                              (reinterpret_cast<unsigned char*>(shared) - own.shared));
}

inline void wait_for_previous_kernel() { machine().current->block->waited_for_previous = true; }
inline void let_next_kernel_start() {}

}  // namespace trimtab
