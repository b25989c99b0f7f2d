// 16-bit floating types as plain bits, and their conversions, for host and device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TRIMTAB_HD __host__ __device__ __forceinline__
#else
#define TRIMTAB_HD inline
#endif

namespace trimtab {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type that arithmetic on an element runs in.
template <class Element>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <class To, class From>
TRIMTAB_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

TRIMTAB_HD float to_real(float x) { return x; }
TRIMTAB_HD double to_real(double x) { return x; }
TRIMTAB_HD float to_real(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

TRIMTAB_HD float to_real(Float16 x) {
#if defined(__CUDA_ARCH__)
  float real;
  asm("cvt.f32.f16 %0, %1;" : "=f"(real) : "h"(x.bits));
  return real;
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t rest = uint32_t{x.bits & 0x7fffu};
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Shifted into place, the exponent is 112 too small; the product restores it, subnormals
  // included.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
#endif
}

// Round to nearest, ties to even. Which of its NaNs stands for a NaN is up to the device.
template <class Element>
TRIMTAB_HD Element from_real(float x);
template <>
TRIMTAB_HD float from_real<float>(float x) {
  return x;
}
template <>
TRIMTAB_HD BFloat16 from_real<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  BFloat16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}
template <>
TRIMTAB_HD Float16 from_real<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (rest < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the significand in units of 2**-24, rounded by the addition.
    const float aligned = bit_cast<float>(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000u))};
  }
  rest += 0xfffu + (rest >> 13 & 1u);
  return {static_cast<uint16_t>(sign | (rest - 0x38000000u) >> 13)};
#endif
}
template <class Element>
TRIMTAB_HD Element from_real(double x) {
  return x;
}

}  // namespace trimtab
