// The random stream of every implementation: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011)
// and the Gumbel variates made of its words, the same bits on every device.
//
// The functions are templates over a machine M: what a number is, and the few operations that have
// no operator. Scalar below serves one number; the vectors of a CPU have machines of their own.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace trimtab {

struct Scalar {
  using Float = float;
  using Int = int32_t;
  using Uint = uint32_t;
  // Holds one word of Philox in its low half; the high half may hold anything.
  using Word = uint64_t;

  static TRIMTAB_HD Word low_product(Word x, uint32_t factor) { return (x & 0xffffffffu) * factor; }
  static TRIMTAB_HD float to_float(uint32_t x) { return static_cast<float>(x); }
  static TRIMTAB_HD float to_float(int32_t x) { return static_cast<float>(x); }
  template <class T>
  static TRIMTAB_HD T choose(bool condition, T yes, T no) {
    return condition ? yes : no;
  }
};

// A product that no compiler may fuse with a sum: nvcc fuses unless told by name, and the files of
// the CPU that include this are compiled with -ffp-contract=off.
template <class X, class Y>
TRIMTAB_HD X times(X x, Y y) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<X, float>)
    return __fmul_rn(x, y);
  else
    return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

template <class M>
struct PhiloxWords {
  typename M::Word r0, r1, r2, r3;
};

template <class M>
TRIMTAB_HD PhiloxWords<M> philox4x32_10(PhiloxWords<M> counter, uint32_t key0, uint32_t key1) {
  auto [c0, c1, c2, c3] = counter;
  for (int round = 0; round < 10; ++round) {
    const auto even = M::low_product(c0, 0xD2511F53u), odd = M::low_product(c2, 0xCD9E8D57u);
    c0 = (odd >> 32) ^ c1 ^ key0;
    c1 = odd;
    c2 = (even >> 32) ^ c3 ^ key1;
    c3 = even;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// A logarithm waits as the pair (t, e) that stands for log((1 + t) 2**e).
template <class M>
struct LogArgument {
  typename M::Float t, e;
};

// f must be positive and normal; 1 + t is in [sqrt(1/2), sqrt(2)).
template <class M>
TRIMTAB_HD LogArgument<M> split(typename M::Float f) {
  using Int = typename M::Int;
  const Int bits = bit_cast<Int>(f);
  const Int from_sqrt_half = bits - 0x3f3504f3;
  const Int significand = bits - (from_sqrt_half & static_cast<int32_t>(0xff800000u));
  return {bit_cast<typename M::Float>(significand) - 1.0f, M::to_float(from_sqrt_half >> 23)};
}

template <class M>
TRIMTAB_HD typename M::Float log_of(LogArgument<M> x) {
  using Float = typename M::Float;
  const Float t = x.t, e = x.e;
  Float q = times(t, -0.076708652f) + 0.12785538f;
  q = times(q, t) - 0.13156946f;
  q = times(q, t) + 0.14197648f;
  q = times(q, t) - 0.16623273f;
  q = times(q, t) + 0.20001446f;
  q = times(q, t) - 0.25000829f;
  q = times(q, t) + 0.33333328f;
  const Float square = times(t, t);
  Float r = times(times(square, t), q);
  r = r + times(e, -2.12194440e-4f);
  r = r - times(square, 0.5f);
  r = r + t;
  return r + times(e, 0.693359375f);
}

template <class M>
TRIMTAB_HD typename M::Float unit_interval(typename M::Uint high, typename M::Uint low) {
  return times(M::to_float(high) + times(M::to_float(low), 0x1p-32f), 0x1p-32f);
}

// -log(-log(1 - x)), where x has 64 random bits. Near 0 the inner logarithm starts from x,
// elsewhere from 1 - x, so that both tails have all their digits.
template <class M>
TRIMTAB_HD typename M::Float gumbel(typename M::Uint high, typename M::Uint low) {
  using Float = typename M::Float;
  const Float x = unit_interval<M>(high, low);
  const LogArgument<M> far = split<M>(unit_interval<M>(~high, ~low | 1u));
  const auto near_zero = high < 0x4AFB0CCDu;
  const Float zero{};
  const LogArgument<M> inner{M::choose(near_zero, -x, far.t), M::choose(near_zero, zero, far.e)};
  const Float exponential = -log_of<M>(inner), smallest = zero + 0x1p-66f;
  return -log_of<M>(split<M>(M::choose(exponential > smallest, exponential, smallest)));
}

}  // namespace trimtab
