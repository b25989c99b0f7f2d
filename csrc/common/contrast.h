// The arithmetic of contrasted rows and of the filters on them, for host and device.
//
// Every operation is rounded once, in the order written, so that all implementations agree to the
// bit: see `times`.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/dtype.h"
#include "common/philox.h"

namespace trimtab {

// z = a + alpha (p - n), where equal infinities cancel and a token at -inf in the anchor stays
// there. alpha is not 0: then z is a, whatever p and n are.
template <class M, class Number, class Real>
TRIMTAB_HD Number combine(Number positive, Number negative, Number anchor, Real alpha) {
  const Number difference = M::choose(positive == negative, Number{}, positive - negative);
  const Number z = anchor + times(difference, alpha);
  return M::choose(anchor == -std::numeric_limits<Real>::infinity(), anchor, z);
}

// Unsigned integers in the order of the numbers; the two zeros are one.
TRIMTAB_HD uint32_t order_key(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
TRIMTAB_HD uint64_t order_key(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x + 0.0);
  return bits ^ (bits >> 63 ? ~uint64_t{0} : uint64_t{1} << 63);
}
TRIMTAB_HD float number_of_key(uint32_t key) {
  return bit_cast<float>(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}
TRIMTAB_HD double number_of_key(uint64_t key) {
  return bit_cast<double>(key ^ (key >> 63 ? uint64_t{1} << 63 : ~uint64_t{0}));
}

// Whether top-p removes a token, from the mass up to and with it.
template <class Real>
TRIMTAB_HD bool in_tail(double mass, double total, Real tail) {
  return static_cast<Real>(mass / total) <= tail;
}

// How many of `most` equal tokens of this weight are in the tail, with `below` the mass under them.
template <class Real>
TRIMTAB_HD int64_t equals_in_tail(double below, double weight, double total, Real tail,
                                  int64_t most) {
  int64_t in = 0, out = most + 1;
  while (out - in > 1) {
    const int64_t middle = in + (out - in) / 2;
    (in_tail(below + static_cast<double>(middle) * weight, total, tail) ? in : out) = middle;
  }
  return in;
}

// The largest high word of a token's random bits with which its Gumbel variate can reach `bar`, or
// -1 when none can. A thousandth of slack covers the roundings of the variate and of what it is
// added to.
TRIMTAB_HD int64_t largest_high_word(double bar) {
  constexpr double largest_variate = 45.75, slack = 1e-3;
  if (!(bar <= largest_variate + slack)) return -1;
  const double chance = -std::expm1(-std::exp(slack - bar));
  const double word = chance * 0x1p32 + 1;
  return word < 0xffffffffu ? static_cast<int64_t>(word) : 0xffffffff;
}

// The Gumbel variate of the likeliest token is at least this: the largest exponential variate is
// 64 log(2).
constexpr float kSmallestGumbel = -3.8f;

}  // namespace trimtab
