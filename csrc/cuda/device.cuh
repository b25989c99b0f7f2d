// What kernels of every family share: vectors, reductions, and the instructions of
// instructions.cuh.
#pragma once

#if defined(TRIMTAB_CUDA_ON_CPU)
#include "cuda_on_cpu/instructions.h"
#else
#include "cuda/instructions.cuh"
#endif

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/dtype.h"

namespace trimtab {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

TRIMTAB_DEVICE unsigned lane_index() { return threadIdx.x % kWarp; }
TRIMTAB_DEVICE unsigned warp_index() { return threadIdx.x / kWarp; }
TRIMTAB_DEVICE unsigned warp_count() { return blockDim.x / kWarp; }

TRIMTAB_HD unsigned offset_from_16_bytes(const void* pointer) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(pointer) % 16);
}
TRIMTAB_HD bool is_aligned(const void* pointer) { return offset_from_16_bytes(pointer) == 0; }

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <int Bytes>
struct RawBits;
template <>
struct RawBits<16> {
  using type = uint4;
};
template <>
struct RawBits<8> {
  using type = uint2;
};
template <>
struct RawBits<4> {
  using type = uint32_t;
};
template <>
struct RawBits<2> {
  using type = uint16_t;
};

// The compiler splits an access of a struct of small members; that of a built-in vector stays
// whole.
template <class T, int N>
using Raw = typename RawBits<static_cast<int>(sizeof(T)) * N>::type;

template <int N, class T>
TRIMTAB_DEVICE Vector<T, N> load(const T* from) {
  const auto raw = load_raw<Raw<T, N>>(from);
  Vector<T, N> vector;
  memcpy(&vector, &raw, sizeof(vector));
  return vector;
}

template <class T, int N>
TRIMTAB_DEVICE void store(T* to, const Vector<T, N>& vector) {
  Raw<T, N> raw;
  memcpy(&raw, &vector, sizeof(raw));
  store_raw(static_cast<void*>(to), raw);
}

// For memory that is read once and that no thread of this kernel writes before.
template <int N, class T>
TRIMTAB_DEVICE Vector<T, N> load_stream(const T* from) {
  const auto raw = load_raw_stream(reinterpret_cast<const Raw<T, N>*>(from));
  Vector<T, N> vector;
  memcpy(&vector, &raw, sizeof(vector));
  return vector;
}

// For memory that nobody reads soon.
template <class T, int N>
TRIMTAB_DEVICE void store_stream(T* to, const Vector<T, N>& vector) {
  Raw<T, N> raw;
  memcpy(&raw, &vector, sizeof(raw));
  store_raw_stream(reinterpret_cast<Raw<T, N>*>(to), raw);
}

struct Add {
  template <class T>
  TRIMTAB_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
// Not fmax: a NaN must stay, whichever side it is on.
struct Max {
  template <class T>
  TRIMTAB_DEVICE T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};
struct Min {
  template <class T>
  TRIMTAB_DEVICE T operator()(T a, T b) const {
    return a < b || a != a ? a : b;
  }
};

// Every lane receives the same bits: a butterfly adds the same pairs on both sides. All 32 lanes
// must take part.
template <class Combine, class T>
TRIMTAB_DEVICE T warp_reduce(T x, Combine combine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x = combine(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}
TRIMTAB_DEVICE int warp_reduce(int x, Add) { return __reduce_add_sync(kAllLanes, x); }
TRIMTAB_DEVICE int warp_reduce(int x, Max) { return __reduce_max_sync(kAllLanes, x); }
TRIMTAB_DEVICE int warp_reduce(int x, Min) { return __reduce_min_sync(kAllLanes, x); }
TRIMTAB_DEVICE unsigned warp_reduce(unsigned x, Add) { return __reduce_add_sync(kAllLanes, x); }
TRIMTAB_DEVICE unsigned warp_reduce(unsigned x, Max) { return __reduce_max_sync(kAllLanes, x); }
TRIMTAB_DEVICE unsigned warp_reduce(unsigned x, Min) { return __reduce_min_sync(kAllLanes, x); }

template <class T>
TRIMTAB_DEVICE T warp_sum(T x) {
  return warp_reduce(x, Add{});
}
template <class T>
TRIMTAB_DEVICE T warp_max(T x) {
  return warp_reduce(x, Max{});
}
template <class T>
TRIMTAB_DEVICE T warp_min(T x) {
  return warp_reduce(x, Min{});
}

// Every thread receives the same bits. `scratch` is shared memory with one T for each warp, free
// again when the function returns; blockDim.x must be a multiple of 32.
template <class Combine, class T>
TRIMTAB_DEVICE T block_reduce(T x, T* scratch, Combine combine) {
  x = warp_reduce(x, combine);
  if (lane_index() == 0) scratch[warp_index()] = x;
  __syncthreads();
  // Lanes beyond the last warp repeat the first's value for extrema and add nothing to sums.
  T other = std::is_same_v<Combine, Add> ? T{} : scratch[0];
  if (lane_index() < warp_count()) other = scratch[lane_index()];
  other = warp_reduce(other, combine);
  __syncthreads();
  return other;
}
template <class T>
TRIMTAB_DEVICE T block_sum(T x, T* scratch) {
  return block_reduce(x, scratch, Add{});
}
template <class T>
TRIMTAB_DEVICE T block_max(T x, T* scratch) {
  return block_reduce(x, scratch, Max{});
}
template <class T>
TRIMTAB_DEVICE T block_min(T x, T* scratch) {
  return block_reduce(x, scratch, Min{});
}

}  // namespace trimtab
