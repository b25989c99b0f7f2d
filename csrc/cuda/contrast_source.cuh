// The rows that a token is drawn from, and what a block makes of its slice of them.
#pragma once

#include "cuda/contrast_select.cuh"

namespace trimtab {
namespace {

struct Extremes {
  float z, anchor;  // the largest, or NaN
};

// The rows that one output row is made of.
template <class Element>
class SampleSource {
 public:
  static constexpr int width = 16 / static_cast<int>(sizeof(Element));

  TRIMTAB_DEVICE SampleSource(const ContrastInputs<Element>& inputs, int64_t i)
      : positive_(row_at(inputs.positive, i)), alpha_(at(inputs.alpha, i)) {
    if (inputs.negative.given) negative_ = row_at(inputs.negative, i);
    if (inputs.anchor.given) anchor_ = row_at(inputs.anchor, i);
    exists_ =
        positive_ && (negative_ || !inputs.negative.given) && (anchor_ || !inputs.anchor.given);
    if (inputs.negative.given && alpha_ == 0) {
      positive_ = anchor_ ? anchor_ : positive_;
      negative_ = anchor_ = nullptr;
    }
    by_vectors_ = (offset_from_16_bytes(positive_) | offset_from_16_bytes(negative_) |
                   offset_from_16_bytes(anchor_)) == 0;
  }

  TRIMTAB_DEVICE bool exists() const { return exists_; }

  // Writes z, and returns the extremes of what this thread has written.
  TRIMTAB_DEVICE Extremes combine_slice(const ScoreSlice& row) const {
    if (threadIdx.x < (-row.end & 7u)) row.score[row.end - row.begin + threadIdx.x] = -kInfinity;
    if (negative_)
      return anchor_ ? combine_given<true, true>(row) : combine_given<true, false>(row);
    return anchor_ ? combine_given<false, true>(row) : combine_given<false, false>(row);
  }

  // Calls f(z, class) for what this thread has written where the anchor is not below `threshold`.
  template <class F>
  TRIMTAB_DEVICE void visit_plausible(const ScoreSlice& row, float threshold, F&& f) const {
    sweep(row, [&](auto count, int v) {
      const Numbers<count> anchor = load_anchor<count>(v);
      unsigned chosen = 0;
#pragma unroll
      for (int e = 0; e < count; ++e) chosen |= (anchor.at[e] >= threshold ? 1u : 0u) << e;
      row.visit_chosen(v, chosen, f);
    });
  }

  // z becomes -inf where the anchor is below `threshold`; returns the largest of this thread.
  TRIMTAB_DEVICE float mask_implausible(const ScoreSlice& row, float threshold) const {
    float best = -kInfinity;
    sweep(row, [&](auto count, int v) {
      const Numbers<count> anchor = load_anchor<count>(v);
      Numbers<count> z = row.get<count>(v);
#pragma unroll
      for (int e = 0; e < count; ++e) {
        z.at[e] = anchor.at[e] >= threshold ? z.at[e] : -kInfinity;
        best = larger(best, z.at[e]);
      }
      row.put(v, z);
    });
    return best;
  }

  // Calls f(how many, class of the first) for what is this thread's, the same in each sweep.
  template <class F>
  TRIMTAB_DEVICE void sweep(const ScoreSlice& row, F&& f) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    int alone = row.begin;
    // A slice begins at a multiple of `width`.
    if (by_vectors_) {
      alone = max(row.begin, row.end / width * width);
#pragma unroll 1
      for (int v = row.begin + thread * width; v < alone; v += threads * width)
        f(std::integral_constant<int, width>{}, v);
    }
#pragma unroll 4
    for (int v = alone + thread; v < row.end; v += threads) f(std::integral_constant<int, 1>{}, v);
  }

 private:
  template <int N>
  TRIMTAB_DEVICE Numbers<N> load_anchor(int v) const {
    return to_numbers(load_stream<N>((anchor_ ? anchor_ : positive_) + v));
  }

  template <bool kNegative, bool kAnchor>
  TRIMTAB_DEVICE Extremes combine_given(const ScoreSlice& row) const {
    Extremes most{-kInfinity, -kInfinity};
    sweep(row, [&](auto count, int v) {
      // All loads are under way before the first result is needed.
      const auto p = load_stream<count>(positive_ + v);
      auto n = p, a = p;
      if constexpr (kNegative) n = load_stream<count>(negative_ + v);
      if constexpr (kAnchor) a = load_stream<count>(anchor_ + v);
      Numbers<count> z = to_numbers(p);
      const Numbers<count> negative = to_numbers(n), anchor = to_numbers(a);
#pragma unroll
      for (int e = 0; e < count; ++e) {
        if constexpr (kNegative)
          z.at[e] = combine<Scalar>(z.at[e], negative.at[e], anchor.at[e], alpha_);
        most.z = larger(most.z, z.at[e]);
        if constexpr (kNegative || kAnchor) most.anchor = larger(most.anchor, anchor.at[e]);
      }
      row.put(v, z);
    });
    if constexpr (!kNegative && !kAnchor) most.anchor = most.z;
    return most;
  }

  const Element *positive_, *negative_ = nullptr, *anchor_ = nullptr;
  float alpha_;
  bool exists_, by_vectors_;
};

}  // namespace
}  // namespace trimtab
