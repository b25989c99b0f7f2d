// Vectors of the width that this file is compiled for, by the vector extensions of GCC and Clang.
//
// Every file compiles its own copy, in an unnamed namespace: an inline function that two of them
// shared would be kept once by the linker, and the wrong one could run on an older processor, or
// with products fused that must not be.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__AVX512BF16__)
#define TRIMTAB_ISA avx512bf16
#define TRIMTAB_WIDTH 16
#elif defined(__AVX512F__)
#define TRIMTAB_ISA avx512
#define TRIMTAB_WIDTH 16
#elif defined(__AVX2__)
#define TRIMTAB_ISA avx2
#define TRIMTAB_WIDTH 8
#else
#define TRIMTAB_ISA generic
#define TRIMTAB_WIDTH 4
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

typedef float FloatVector __attribute__((vector_size(4 * TRIMTAB_WIDTH)));
typedef int32_t IntVector __attribute__((vector_size(4 * TRIMTAB_WIDTH)));
typedef uint32_t UintVector __attribute__((vector_size(4 * TRIMTAB_WIDTH)));
typedef uint16_t ShortVector __attribute__((vector_size(2 * TRIMTAB_WIDTH)));
typedef uint64_t WordVector __attribute__((vector_size(4 * TRIMTAB_WIDTH)));
typedef float HalfVector __attribute__((vector_size(2 * TRIMTAB_WIDTH)));
typedef double DoubleVector __attribute__((vector_size(4 * TRIMTAB_WIDTH)));

template <class To, class From>
inline To bits_of(From from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// float: a vector. double: one number at a time, for checks against the oracle rather than for
// speed.
template <class Real>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = FloatVector;
  using Mask = IntVector;
  using Key = UintVector;
  // Of the machine that common/philox.h computes on.
  using Float = FloatVector;
  using Int = IntVector;
  using Uint = UintVector;
  using Word = WordVector;
  static constexpr int64_t width = TRIMTAB_WIDTH;

  static Vector spread(float x) { return x - Vector{}; }
  static Mask all() { return Mask{} == Mask{}; }
  static Mask first(int64_t count) {
    Mask mask;
    for (int lane = 0; lane < width; ++lane) mask[lane] = lane < count ? -1 : 0;
    return mask;
  }
  static Vector choose(Mask mask, Vector yes, Vector no) { return mask ? yes : no; }
  // One bit per lane of a mask, from the lowest.
  static uint32_t bits(Mask mask) {
#if TRIMTAB_WIDTH == 16
    return _mm512_movepi32_mask(bits_of<__m512i>(mask));
#elif TRIMTAB_WIDTH == 8
    return _mm256_movemask_ps(bits_of<__m256>(mask));
#elif defined(__SSE2__)
    return _mm_movemask_ps(bits_of<__m128>(mask));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < width; ++lane) bits |= (mask[lane] & 1u) << lane;
    return bits;
#endif
  }
  static Vector to_float(IntVector x) { return __builtin_convertvector(x, Vector); }
  static Vector to_float(UintVector x) { return __builtin_convertvector(x, Vector); }
  // The products of the low halves of 64-bit lanes.
  static Word low_product(Word x, uint32_t factor) {
#if TRIMTAB_WIDTH == 16
    return bits_of<Word>(_mm512_mul_epu32(bits_of<__m512i>(x), _mm512_set1_epi64(factor)));
#elif TRIMTAB_WIDTH == 8
    return bits_of<Word>(_mm256_mul_epu32(bits_of<__m256i>(x), _mm256_set1_epi64x(factor)));
#elif defined(__SSE2__)
    return bits_of<Word>(_mm_mul_epu32(bits_of<__m128i>(x), _mm_set1_epi64x(factor)));
#else
    return (x & 0xffffffffu) * factor;
#endif
  }

  static Vector load(const float* p) {
    Vector x;
    memcpy(&x, p, sizeof(x));
    return x;
  }
  static Vector load(const BFloat16* p) {
    ShortVector bits;
    memcpy(&bits, p, sizeof(bits));
#if TRIMTAB_WIDTH == 16
    // One instruction where the conversion and the shift are two: the high half of lane i is word
    // i.
    const UintVector lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return bits_of<Vector>(_mm512_maskz_permutexvar_epi16(
        0xaaaaaaaa, bits_of<__m512i>(lane << 16), _mm512_castsi256_si512(bits_of<__m256i>(bits))));
#else
    return bits_of<Vector>(__builtin_convertvector(bits, UintVector) << 16);
#endif
  }
  static Vector load(const Float16* p) {
#if TRIMTAB_WIDTH == 16
    return bits_of<Vector>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return bits_of<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    Vector x;
    for (int lane = 0; lane < width; ++lane) x[lane] = to_real(p[lane]);
    return x;
#endif
  }

  static void store(float* p, Vector x) { memcpy(p, &x, sizeof(x)); }
  static void store(BFloat16* p, Vector x) {
    const UintVector bits = bits_of<UintVector>(x);
    const UintVector rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const UintVector kept = x == x ? rounded : UintVector{} + 0x7fc0;
    const ShortVector narrow = __builtin_convertvector(kept, ShortVector);
    memcpy(p, &narrow, sizeof(narrow));
  }
  static void store(Float16* p, Vector x) {
#if TRIMTAB_WIDTH == 16
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bits_of<__m512>(x), 0));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bits_of<__m256>(x), 0));
#else
    for (int lane = 0; lane < width; ++lane) p[lane] = from_real<Float16>(x[lane]);
#endif
  }

  static Vector add_product(Vector sum, Vector a, Vector b) { return sum + a * b; }

  // The upper half is added to the lower one until a number is left.
  static float sum(Vector x) {
#if TRIMTAB_WIDTH == 16
    const __m512 wide = bits_of<__m512>(x);
    return sum_of_8(_mm256_add_ps(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1)));
#elif TRIMTAB_WIDTH == 8
    return sum_of_8(bits_of<__m256>(x));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
  }
#if TRIMTAB_WIDTH >= 8
  static float sum_of_8(__m256 x) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
#endif
  static float maximum(Vector x) {
    float best = x[0];
    for (int lane = 1; lane < width; ++lane) best = x[lane] > best ? x[lane] : best;
    return best;
  }

  // exp(r) - 1 for |r| <= ln(2) / 2, by the polynomial of Cephes' expf.
  static Vector expm1_reduced(Vector r) {
    Vector q = spread(1.9875691500e-4f);
    q = q * r + 1.3981999507e-3f;
    q = q * r + 8.3334519073e-3f;
    q = q * r + 4.1665795894e-2f;
    q = q * r + 1.6666665459e-1f;
    q = q * r + 5.0000001201e-1f;
    return q * (r * r) + r;
  }
  // x = n ln(2) + r. Adding 1.5 * 2**23 rounds to an integer.
  static Vector nearest_power(Vector x) {
    return (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  }
  static Vector remainder(Vector x, Vector n) {
    return (x - n * 0.693359375f) - n * -2.12194440e-4f;
  }
  static Vector power_of_two(Vector n) {
    return bits_of<Vector>((__builtin_convertvector(n, IntVector) + 127) << 23);
  }

  // exp(x) for x <= 0, within 1.01 ulp; exactly 0 below -87.3, where the result would be subnormal.
  static Vector exp_of_nonpositive(Vector x) {
    const Vector n = nearest_power(x), p = expm1_reduced(remainder(x, n)) + 1.0f;
#if TRIMTAB_WIDTH == 16
    const __mmask16 normal = _mm512_cmp_ps_mask(x, spread(-87.3f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, p, n);
#else
    return x < -87.3f ? Vector{} : p * power_of_two(n);
#endif
  }
  // With E = exp(-2|x|): tanh|x| = (1 - E) / (1 + E) near 0, 1 - 2E / (1 + E) elsewhere, so that
  // neither form cancels.
  static Vector tanh(Vector x) {
    Vector twice = x < 0 ? 2.0f * x : -2.0f * x;
    twice = twice < -87.0f ? spread(-87.0f) : twice;
    const Vector n = nearest_power(twice), scale = power_of_two(n);
    const Vector q = expm1_reduced(remainder(twice, n));
    const Vector less_one = q * scale + (scale - 1.0f), e = (q + 1.0f) * scale;
    const Mask small = twice > -1.1f;
    const Vector ratio = (small ? -less_one : 2.0f * e) / (small ? less_one + 2.0f : e + 1.0f);
    const Vector size = small ? ratio : 1.0f - ratio;
    return x < 0 ? -size : size;
  }
};

template <>
struct Lanes<double> {
  using Vector = double;
  using Mask = bool;
  using Key = uint64_t;
  static constexpr int64_t width = 1;

  static Vector spread(double x) { return x; }
  static Mask all() { return true; }
  static Mask first(int64_t count) { return count > 0; }
  static Vector choose(Mask mask, Vector yes, Vector no) { return mask ? yes : no; }
  static uint32_t bits(Mask mask) { return mask; }
  static Vector load(const double* p) { return *p; }
  static void store(double* p, Vector x) { *p = x; }
  static Vector add_product(Vector sum, Vector a, Vector b) { return sum + a * b; }
  static double sum(Vector x) { return x; }
  static double maximum(Vector x) { return x; }
  static Vector exp_of_nonpositive(Vector x) { return __builtin_exp(x); }
  static Vector tanh(Vector x) { return __builtin_tanh(x); }
};

#if defined(__AVX512BF16__)
// Numbers that are multiplied as they are: a lane of float32 gets the exact products of two
// neighbours. Subnormal numbers count as 0, those that come out too.
template <>
struct Lanes<BFloat16> {
  using Vector = uint16_t __attribute__((vector_size(64)));
  static constexpr int64_t width = 32;

  static Vector load(const BFloat16* p) {
    Vector x;
    memcpy(&x, p, sizeof(x));
    return x;
  }
  static void store(BFloat16* p, Vector x) { memcpy(p, &x, sizeof(x)); }
  static FloatVector add_product(FloatVector sum, Vector a, Vector b) {
    return bits_of<FloatVector>(
        _mm512_dpbf16_ps(bits_of<__m512>(sum), bits_of<__m512bh>(a), bits_of<__m512bh>(b)));
  }
};
#endif

}  // namespace
}  // namespace TRIMTAB_ISA
}  // namespace trimtab
