// The words of CUDA C++ that need no machine behind them: qualifiers, built-in vectors, arithmetic
// by name, atomics. One thread runs at a time, so that every access is atomic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

template <class To, class From>
To cuda_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) { return cuda_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_bits<float>(x); }
inline float __int_as_float(int x) { return cuda_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// The value's type follows the target's, as overloads would convert it.
template <class T>
struct Same {
  using type = T;
};
template <class T>
T atomicExch(T* target, typename Same<T>::type value) {
  const T old = *target;
  *target = value;
  return old;
}
template <class T>
T atomicAdd(T* target, typename Same<T>::type value) {
  return atomicExch(target, static_cast<T>(*target + value));
}
template <class T>
T atomicMax(T* target, typename Same<T>::type value) {
  return atomicExch(target, std::max(*target, value));
}
template <class T>
T atomicMin(T* target, typename Same<T>::type value) {
  return atomicExch(target, std::min(*target, value));
}
template <class T>
T atomicOr(T* target, typename Same<T>::type value) {
  return atomicExch(target, static_cast<T>(*target | value));
}
template <class T>
T atomicCAS(T* target, typename Same<T>::type expected, typename Same<T>::type value) {
  return *target == expected ? atomicExch(target, value) : *target;
}
