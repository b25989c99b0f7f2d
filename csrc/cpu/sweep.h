// Rows of elements as vectors of the arithmetic they are computed in, whatever their length.
#pragma once

#include "cpu/simd.h"

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

template <class Element>
using RealOf = typename Accumulate<Element>::type;
template <class Element>
using VectorOf = typename Lanes<RealOf<Element>>::Vector;

template <class Element>
void copy_elements(const Element* from, Element* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <class Element>
VectorOf<Element> load_lanes(const Element* from, int64_t count) {
  using L = Lanes<RealOf<Element>>;
  if (count >= L::width) return L::load(from);
  Element padded[L::width] = {};
  copy_elements(from, padded, count);
  return L::load(padded);
}

template <class Element>
void store_lanes(Element* to, VectorOf<Element> x, int64_t count) {
  using L = Lanes<RealOf<Element>>;
  if (count >= L::width) return L::store(to, x);
  Element padded[L::width];
  L::store(padded, x);
  copy_elements(padded, to, count);
}

// Calls f(vector of elements, index of the first, mask of the lanes that exist) over [begin, end).
template <class Element, class F>
void sweep(const Element* row, int64_t begin, int64_t end, F&& f) {
  using L = Lanes<RealOf<Element>>;
  int64_t v = begin;
  for (; v + L::width <= end; v += L::width) f(L::load(row + v), v, L::all());
  if (v < end) f(load_lanes(row + v, end - v), v, L::first(end - v));
}

// A sum in float64; of float64 numbers, with what each addition rounds away kept beside it.
template <class Real>
struct WideSum;

template <>
struct WideSum<float> {
  DoubleVector low{}, high{};
  void add(FloatVector x) {
    HalfVector halves[2];
    memcpy(halves, &x, sizeof(x));
    low += __builtin_convertvector(halves[0], DoubleVector);
    high += __builtin_convertvector(halves[1], DoubleVector);
  }
  double value() const {
    const DoubleVector both = low + high;
    double sum = 0;
    for (int lane = 0; lane < TRIMTAB_WIDTH / 2; ++lane) sum += both[lane];
    return sum;
  }
};

template <>
struct WideSum<double> {
  double sum = 0, rounded_away = 0;
  void add(double x) {
    const double next = sum + x;
    rounded_away += (sum - next) + x;
    sum = next;
  }
  // Of an infinite sum nothing was rounded away.
  double value() const { return __builtin_isfinite(rounded_away) ? sum + rounded_away : sum; }
};

}  // namespace
}  // namespace TRIMTAB_ISA
}  // namespace trimtab
