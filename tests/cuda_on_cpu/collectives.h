// What the threads of a warp or of a block do together.
#pragma once

#include "cuda_on_cpu/machine.h"

#define CUDA_SITE_ARGUMENTS const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cuda_on_cpu {

inline int block_barrier(const Site& site, int start, int value, int (*combine)(int, int)) {
  Block& block = *machine().current->block;
  block.gathered = combine(block.arrived == 0 ? start : block.gathered, value);
  machine().barrier(site);
  return block.result;
}

struct Shuffled {
  uint64_t value;
  int source;
  uint64_t result;
};

// Each lane receives the value of lane `source`.
template <class T>
T shuffle(const Site& site, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 32 or 64 bits");
  Shuffled mine{0, source, 0};
  std::memcpy(&mine.value, &value, sizeof(T));
  if ((mask >> source & 1) == 0 && (mask >> machine().current->index % 32 & 1) != 0)
    machine().fail("at " + text(site) + " asks for the value of lane " + std::to_string(source) +
                   ", which its mask " + Machine::hex(mask) + " leaves out");
  machine().meet(site, mask, mine, [mask](const auto& lanes) {
    for (unsigned left = mask; left != 0; left &= left - 1) {
      auto* lane = static_cast<Shuffled*>(lanes[static_cast<unsigned>(__builtin_ctz(left))]);
      lane->result = static_cast<Shuffled*>(lanes[static_cast<unsigned>(lane->source)])->value;
    }
  });
  std::memcpy(&value, &mine.result, sizeof(T));
  return value;
}

// Each lane receives the combination of all values, in the order of the lanes.
template <class T, class Combine>
T reduce(const Site& site, unsigned mask, T value, Combine combine) {
  machine().meet(site, mask, value, [&](const auto& lanes) {
    const auto at = [&](unsigned left) -> T& {
      return *static_cast<T*>(lanes[static_cast<unsigned>(__builtin_ctz(left))]);
    };
    T all = at(mask);
    for (unsigned left = mask & (mask - 1); left != 0; left &= left - 1)
      all = combine(all, at(left));
    for (unsigned left = mask; left != 0; left &= left - 1) at(left) = all;
  });
  return value;
}

inline int lane() { return static_cast<int>(machine().current->index % 32); }
inline int first_of_group(int width) { return lane() & ~(width - 1); }

}  // namespace cuda_on_cpu

inline void __syncthreads(CUDA_SITE_ARGUMENTS) {
  cuda_on_cpu::machine().barrier({"__syncthreads()", file, line});
}
inline int __syncthreads_or(int value, CUDA_SITE_ARGUMENTS) {
  return cuda_on_cpu::block_barrier({"__syncthreads_or()", file, line}, 0, value,
                                    [](int a, int b) { return int{a || b}; });
}
inline int __syncthreads_and(int value, CUDA_SITE_ARGUMENTS) {
  return cuda_on_cpu::block_barrier({"__syncthreads_and()", file, line}, 1, value,
                                    [](int a, int b) { return int{a && b}; });
}
inline int __syncthreads_count(int value, CUDA_SITE_ARGUMENTS) {
  return cuda_on_cpu::block_barrier({"__syncthreads_count()", file, line}, 0, value,
                                    [](int a, int b) { return a + (b != 0); });
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_SITE_ARGUMENTS) {
  int nothing = 0;
  cuda_on_cpu::machine().meet({"__syncwarp()", file, line}, mask, nothing, [](const auto&) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_SITE_ARGUMENTS) {
  const int from = cuda_on_cpu::first_of_group(width) | (source & (width - 1));
  return cuda_on_cpu::shuffle({"__shfl_sync()", file, line}, mask, value, from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_SITE_ARGUMENTS) {
  int from = cuda_on_cpu::lane() ^ lanes;
  if (from >= cuda_on_cpu::first_of_group(width) + width) from = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle({"__shfl_xor_sync()", file, line}, mask, value, from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, CUDA_SITE_ARGUMENTS) {
  int from = cuda_on_cpu::lane() - static_cast<int>(lanes);
  if (from < cuda_on_cpu::first_of_group(width)) from = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle({"__shfl_up_sync()", file, line}, mask, value, from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, CUDA_SITE_ARGUMENTS) {
  int from = cuda_on_cpu::lane() + static_cast<int>(lanes);
  if (from >= cuda_on_cpu::first_of_group(width) + width) from = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle({"__shfl_down_sync()", file, line}, mask, value, from);
}

inline unsigned __ballot_sync(unsigned mask, int value, CUDA_SITE_ARGUMENTS) {
  const unsigned mine = value ? 1u << cuda_on_cpu::lane() : 0u;
  return cuda_on_cpu::reduce({"__ballot_sync()", file, line}, mask, mine,
                             [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int value, CUDA_SITE_ARGUMENTS) {
  return cuda_on_cpu::reduce({"__any_sync()", file, line}, mask, int{value != 0},
                             [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int value, CUDA_SITE_ARGUMENTS) {
  return cuda_on_cpu::reduce({"__all_sync()", file, line}, mask, int{value != 0},
                             [](int a, int b) { return a & b; });
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, CUDA_SITE_ARGUMENTS) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return static_cast<T>(cuda_on_cpu::reduce({"__reduce_add_sync()", file, line}, mask,
                                            static_cast<unsigned>(value),
                                            [](unsigned a, unsigned b) { return a + b; }));
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, CUDA_SITE_ARGUMENTS) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return cuda_on_cpu::reduce({"__reduce_max_sync()", file, line}, mask, value,
                             [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, CUDA_SITE_ARGUMENTS) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return cuda_on_cpu::reduce({"__reduce_min_sync()", file, line}, mask, value,
                             [](T a, T b) { return a < b ? a : b; });
}

#undef CUDA_SITE_ARGUMENTS
