// One row of contrast on a GPU: where its parts are, and the sweep that combines them. See
// common/contrast.h for the arithmetic. Files that include this are compiled with -fmad=false.
#pragma once

#include "common/contrast.h"
#include "common/contrast_rows.h"
#include "cuda/numbers.cuh"

namespace trimtab {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Value>
TRIMTAB_DEVICE Value at(const PerRow<Value>& parameter, int64_t i) {
  return parameter.rows ? parameter.rows[i] : parameter.number;
}

// Null if there is no such row.
template <class Element>
TRIMTAB_DEVICE const Element* row_at(const LogitRows<Element>& rows, int64_t i) {
  const int64_t r = rows.map ? rows.map[i] : i;
  return r >= 0 && r < rows.count ? rows.data + r * rows.stride : nullptr;
}

// A row dealt out to threads: vectors of `width` elements in [begin, end), and what is outside one
// by one.
template <int width_>
struct Deal {
  static constexpr int width = width_;
  int begin, end, classes;

  // The vectors of a row of Elements start on 16 bytes.
  template <class Element>
  static TRIMTAB_DEVICE Deal of(const Element* row, int classes) {
    const auto before = (16 - offset_from_16_bytes(row)) % 16 / sizeof(Element);
    const int begin = min(static_cast<int>(before), classes);
    return {begin, begin + (classes - begin) / width * width, classes};
  }
  static TRIMTAB_DEVICE Deal one_by_one(int classes) { return {classes, classes, classes}; }

  // Calls f(how many, index of the first) for what is this thread's.
  template <class F>
  TRIMTAB_DEVICE void sweep(int thread, int threads, F&& f) const {
    for (int v = begin + thread * width; v < end; v += threads * width)
      f(std::integral_constant<int, width>{}, v);
    sweep_outside(thread, threads, f);
  }
  // The same from the last to the first: what an earlier sweep has left in the L2 cache is read
  // before it goes.
  template <class F>
  TRIMTAB_DEVICE void sweep_back(int thread, int threads, F&& f) const {
    sweep_outside(thread, threads, f);
    const int step = threads * width, first = begin + thread * width;
    if (first >= end) return;
    for (int v = first + (end - 1 - first) / step * step; v >= first; v -= step)
      f(std::integral_constant<int, width>{}, v);
  }

 private:
  template <class F>
  TRIMTAB_DEVICE void sweep_outside(int thread, int threads, F&& f) const {
    for (int k = thread; k < classes - (end - begin); k += threads)
      f(std::integral_constant<int, 1>{}, k < begin ? k : k + (end - begin));
  }
};

// All rows that are given exist. Without a contrast `negative_` is null, and so is `anchor_` where
// it is the positive row.
template <class Element>
class ContrastRow {
 public:
  static constexpr int width = 16 / static_cast<int>(sizeof(Element));

  TRIMTAB_DEVICE ContrastRow(const ContrastInputs<Element>& inputs, int64_t i)
      : positive_(row_at(inputs.positive, i)), alpha_(at(inputs.alpha, i)) {
    if (inputs.negative.given) negative_ = row_at(inputs.negative, i);
    if (inputs.anchor.given) anchor_ = row_at(inputs.anchor, i);
    if (inputs.negative.given && alpha_ == 0) {
      positive_ = anchor_ ? anchor_ : positive_;
      negative_ = anchor_ = nullptr;
    }
    const auto together = [&](const Element* row) {
      return !row || offset_from_16_bytes(row) == offset_from_16_bytes(positive_);
    };
    const int classes = static_cast<int>(inputs.classes);
    deal_ = together(negative_) && together(anchor_) ? Deal<width>::of(positive_, classes)
                                                     : Deal<width>::one_by_one(classes);
  }

  // Calls f(numbers z, numbers of the anchor, index of the first) for what is this thread's of
  // `threads`.
  template <class F>
  TRIMTAB_DEVICE void sweep(int thread, int threads, F&& f) const {
    deal_.sweep(thread, threads, [&](auto count, int v) { apply<count>(v, f); });
  }
  template <class F>
  TRIMTAB_DEVICE void sweep_back(int thread, int threads, F&& f) const {
    deal_.sweep_back(thread, threads, [&](auto count, int v) { apply<count>(v, f); });
  }
  // Calls f(numbers of the anchor, ...) likewise.
  template <class F>
  TRIMTAB_DEVICE void sweep_anchor(int thread, int threads, F&& f) const {
    const Element* row = anchor_ ? anchor_ : positive_;
    deal_.sweep(thread, threads,
                [&](auto count, int v) { f(to_numbers(load<count>(row + v)), v); });
  }

  struct Point {
    float z, anchor;
  };
  TRIMTAB_DEVICE Point point(int v) const {
    Point point{};
    apply<1>(v, [&](const auto& z, const auto& a, int) { point = {z.at[0], a.at[0]}; });
    return point;
  }

 private:
  template <int N, class F>
  TRIMTAB_DEVICE void apply(int v, F&& f) const {
    // All loads are under way before the first result is needed.
    const auto p = load<N>(positive_ + v);
    auto n = p, a = p;
    if (negative_) n = load<N>(negative_ + v);
    if (anchor_) a = load<N>(anchor_ + v);
    Numbers<N> z = to_numbers(p);
    const Numbers<N> anchor = to_numbers(a);
    if (negative_) {
      const Numbers<N> negative = to_numbers(n);
#pragma unroll
      for (int e = 0; e < N; ++e)
        z.at[e] = combine<Scalar>(z.at[e], negative.at[e], anchor.at[e], alpha_);
    }
    f(z, anchor, v);
  }

  const Element *positive_, *negative_ = nullptr, *anchor_ = nullptr;
  float alpha_;
  Deal<width> deal_;
};

// Each number is rounded once to the type of the row.
template <class Element, int N>
TRIMTAB_DEVICE void write(Element* row, int v, const Numbers<N>& numbers) {
  constexpr int width =
      N < 16 / static_cast<int>(sizeof(Element)) ? N : 16 / static_cast<int>(sizeof(Element));
  Element rounded[N];
#pragma unroll
  for (int e = 0; e < N; ++e) rounded[e] = from_real<Element>(numbers.at[e]);
  if (offset_from_16_bytes(row + v) == 0 || N == 1) {
#pragma unroll
    for (int e = 0; e < N; e += width) {
      Vector<Element, width> vector;
      memcpy(&vector, rounded + e, sizeof(vector));
      store_stream(row + v + e, vector);
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) row[v + e] = rounded[e];
  }
}

template <class Element>
TRIMTAB_DEVICE void fill(Element* row, int classes, float value, int thread, int threads) {
  Deal<16 / static_cast<int>(sizeof(Element))>::of(row, classes)
      .sweep(thread, threads, [&](auto count, int v) {
        Numbers<count> numbers;
#pragma unroll
        for (int e = 0; e < count; ++e) numbers.at[e] = value;
        write(row, v, numbers);
      });
}

}  // namespace
}  // namespace trimtab
