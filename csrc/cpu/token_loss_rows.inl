// The rows of token loss for one instruction set. Included by the files that are compiled for one.
//
// A row is swept three times: maximum, sums, gradient. The second sweep leaves exp(z - max) in a
// scratch row for the third. Both stay in the L2 cache (192 KiB at V 32000 in 16 bits), so memory
// sees one read and one write.

#include <limits>
#include <type_traits>

#include "common/token_loss.h"
#include "cpu/sweep.h"
#include "cpu/token_loss_rows.h"

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

// A sum in two levels, so that its error grows with the square root of the length at most.
template <class Real>
struct LongSum {
  using L = Lanes<Real>;
  typename L::Vector block{}, total{};
  void add(typename L::Vector x) { block += x; }
  void flush() {
    total += block;
    block = typename L::Vector{};
  }
  Real value() {
    flush();
    return L::sum(total);
  }
};

// One row of numbers per thread.
template <class Real>
struct Scratch {
  Real* const values;
  explicit Scratch(int64_t count) : values(count > 0 ? new Real[count] : nullptr) {}
  ~Scratch() { delete[] values; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// From raw logits to s = z - max z, and the slope of z. z is a constant times u, where u is the
// logit or, with a softcap, its tanh. Subtracting the largest u before the product makes s exactly
// 0 at the maximum, whatever the constant.
template <class Real, bool is_capped>
struct Transform {
  using L = Lanes<Real>;
  using Vector = typename L::Vector;
  static constexpr bool capped = is_capped;
  Real scale, softcap, inv_temperature, factor, largest_u = 0;

  Transform(double logit_scale, double cap, Real inverse)
      : scale(static_cast<Real>(logit_scale)),
        softcap(static_cast<Real>(cap)),
        inv_temperature(inverse),
        factor((capped ? softcap : scale) * inverse) {}
  Vector u(Vector raw) const {
    if constexpr (capped) return L::tanh(raw * scale / softcap);
    return raw;
  }
  Vector shift(Vector raw) const { return (u(raw) - largest_u) * factor; }
  Vector slope(Vector raw) const {
    if constexpr (capped) {
      const Vector t = u(raw);
      return (1 - t) * (1 + t) * (scale * inv_temperature);
    }
    return L::spread(factor);
  }
  // The transform is monotone: the largest z comes from the largest logit, or with a negative scale
  // from the smallest.
  Real set_maximum(Real raw) {
    largest_u = first(u(L::spread(raw)));
    return largest_u * factor;
  }
  Real shift_of_one(Real raw) const { return first(shift(L::spread(raw))); }
  Real slope_of_one(Real raw) const { return first(slope(L::spread(raw))); }
  static Real first(Vector x) {
    if constexpr (L::width == 1)
      return x;
    else
      return x[0];
  }
};

enum class Extra { none, smoothing, entropy };

template <class Element>
RealOf<Element> element(const Element* row, int64_t v) {
  return to_real(row[v]);
}

template <class Element>
RealOf<Element> extreme_logit(const Element* row, int64_t classes, bool smallest) {
  using Real = RealOf<Element>;
  using L = Lanes<Real>;
  const Real sign = smallest ? -1 : 1;
  typename L::Vector best = L::spread(-std::numeric_limits<Real>::infinity());
  sweep(row, 0, classes, [&](auto raw, int64_t, auto mask) {
    const auto directed = raw * sign;
    best = L::choose(mask & (directed > best), directed, best);
  });
  return L::maximum(best) * sign;
}

// Sums over [begin, end), which leaves the target out. `scratch`, if any, receives exp(z - max).
template <Extra extra, class Element, class T>
void add_sums(const Element* row, int64_t begin, int64_t end, const T& transform,
              const RealOf<Element>* weight, RealOf<Element>* scratch,
              RowSums<RealOf<Element>>& sums) {
  using Real = RealOf<Element>;
  using L = Lanes<Real>;
  constexpr int64_t block = 64 * L::width;
  LongSum<Real> rest, shifted, weights, bent;
  for (int64_t from = begin; from < end; from += block) {
    const int64_t to = from + block < end ? from + block : end;
    sweep(row, from, to, [&](auto raw, int64_t v, auto mask) {
      const auto shift = transform.shift(raw);
      const auto e = L::choose(mask, L::exp_of_nonpositive(shift), typename L::Vector{});
      rest.add(e);
      if (scratch) store_lanes(scratch + v, e, end - v);
      if constexpr (extra == Extra::entropy) bent.add(L::choose(e > 0, e * shift, e));
      if constexpr (extra == Extra::smoothing) {
        const auto one = L::choose(mask, L::spread(1), typename L::Vector{});
        const auto w = weight ? load_lanes(weight + v, end - v) : one;
        weights.add(L::choose(mask, w, one));
        shifted.add(L::choose(mask, w * shift, one));
      }
    });
    rest.flush();
    bent.flush();
    weights.flush();
    shifted.flush();
  }
  sums.rest += rest.value();
  sums.entropy_shift += bent.value();
  sums.class_weight_sum += weights.value();
  sums.weighted_shift += shifted.value();
}

template <Extra extra, class Element, class T>
RowSums<RealOf<Element>> row_sums(const Element* row, int64_t classes, int64_t target, T& transform,
                                  const RealOf<Element>* weight, RealOf<Element>* scratch) {
  using Real = RealOf<Element>;
  RowSums<Real> sums{};
  sums.maximum = transform.set_maximum(extreme_logit(row, classes, transform.scale < 0));
  sums.target_shift = transform.shift_of_one(element(row, target));
  sums.target_class_weight = weight ? weight[target] : Real{1};
  if (scratch) scratch[target] = 0;
  add_sums<extra>(row, 0, target, transform, weight, scratch, sums);
  add_sums<extra>(row, target + 1, classes, transform, weight, scratch, sums);
  if (extra == Extra::entropy && sums.target_shift > -80)
    sums.entropy_shift += std::exp(sums.target_shift) * sums.target_shift;
  if constexpr (extra == Extra::smoothing) {
    sums.class_weight_sum += sums.target_class_weight;
    sums.weighted_shift += sums.target_class_weight * sums.target_shift;
  }
  return sums;
}

// Writes the gradient for the raw logits from exp(z - max); `grad` may be the row itself.
template <Extra extra, class Element, class T>
void write_gradient(const Element* row, int64_t classes, int64_t target, const T& transform,
                    const RealOf<Element>* weight, const RowSums<RealOf<Element>>& sums,
                    const RowStatistics<RealOf<Element>>& statistics,
                    const RowGradient<RealOf<Element>>& gradient, const RealOf<Element>* scratch,
                    Element* grad) {
  using Real = RealOf<Element>;
  using L = Lanes<Real>;
  const Real slope = T::capped ? 1 : transform.slope_of_one(0), inverse = 1 / statistics.total;
  const Real at_target =
      target_gradient(sums, statistics, gradient) * transform.slope_of_one(element(row, target));
  const Real flat = (gradient.pull + gradient.push) * slope, tilt = gradient.tilt * slope;
  const Real smooth = gradient.smooth * slope;
  sweep(row, 0, classes, [&](auto raw, int64_t v, auto) {
    const auto p = load_lanes(scratch + v, classes - v) * inverse;
    auto d = p * flat;
    if constexpr (extra == Extra::entropy)
      d = L::choose(p > 0, p * (flat + tilt * transform.shift(raw)), d);
    if constexpr (extra == Extra::smoothing) {
      const auto w = weight ? load_lanes(weight + v, classes - v) : L::spread(1);
      d += smooth * (p * gradient.class_weight_sum - w);
    }
    if constexpr (T::capped) d *= transform.slope(raw);
    store_lanes(grad + v, d, classes - v);
  });
  store_lanes(grad + target, L::spread(at_target), 1);
}

template <class Element>
void fill_row(Element* grad, int64_t classes, RealOf<Element> value) {
  using L = Lanes<RealOf<Element>>;
  for (int64_t v = 0; v < classes; v += L::width)
    store_lanes(grad + v, L::spread(value), classes - v);
}

template <class Element, bool capped, Extra extra>
void loss_row(const LossRows<Element>& rows, RealOf<Element>* scratch, int64_t i) {
  using Real = RealOf<Element>;
  const Element* row = rows.logits + i * rows.logits_stride;
  Transform<Real, capped> transform(rows.logit_scale, rows.softcap, 1);
  const LossOptions<Real> options{static_cast<Real>(rows.label_smoothing),
                                  static_cast<Real>(rows.lse_square_scale)};
  const int64_t target = rows.target[i];
  const auto sums =
      row_sums<extra>(row, rows.classes, target, transform, rows.class_weight, scratch);
  const auto statistics = row_statistics(sums);
  rows.loss[i] = row_loss(sums, statistics, options, rows.classes);
  if (!rows.grad) return;
  const Real coef = rows.coef ? rows.coef[i] : Real{1};
  const auto gradient = loss_gradient(sums, statistics, options, rows.classes, coef);
  write_gradient<extra>(row, rows.classes, target, transform, rows.class_weight, sums, statistics,
                        gradient, scratch, rows.grad + i * rows.grad_stride);
}

template <class Element>
void loss_rows(const LossRows<Element>& rows, int64_t begin, int64_t end) {
  using Real = RealOf<Element>;
  constexpr auto none = Extra::none, smoothing = Extra::smoothing;
  const auto one_row =
      rows.label_smoothing > 0
          ? (rows.softcap > 0 ? loss_row<Element, true, smoothing>
                              : loss_row<Element, false, smoothing>)
          : (rows.softcap > 0 ? loss_row<Element, true, none> : loss_row<Element, false, none>);
  const Scratch<Real> scratch(rows.grad ? rows.classes : 0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t target = rows.target[i];
    if (target >= 0 && target < rows.classes && target != rows.ignore_index) {
      one_row(rows, scratch.values, i);
      continue;
    }
    const Real value = target == rows.ignore_index ? 0 : std::numeric_limits<Real>::quiet_NaN();
    rows.loss[i] = value;
    if (rows.grad) fill_row(rows.grad + i * rows.grad_stride, rows.classes, value);
  }
}

// The first element that `is` holds for, or -1.
template <class Element, class F>
int64_t find_first(const Element* row, int64_t classes, F&& is) {
  using L = Lanes<RealOf<Element>>;
  constexpr int64_t block = 64 * L::width;
  for (int64_t from = 0; from < classes; from += block) {
    const int64_t to = from + block < classes ? from + block : classes;
    typename L::Vector found{};
    sweep(row, from, to, [&](auto raw, int64_t, auto mask) {
      found += L::choose(mask & is(raw), L::spread(1), L::spread(0));
    });
    if (L::sum(found) == 0) continue;
    for (int64_t v = from; v < to; ++v) {
      const auto hit = L::choose(is(L::spread(element(row, v))), L::spread(1), L::spread(0));
      if (L::sum(hit) > 0) return v;
    }
  }
  return -1;
}

// As torch: the first NaN, else the first of the largest.
template <class Element, class T>
int64_t argmax(const Element* row, int64_t classes, bool may_have_nan, const T& transform) {
  const auto is_nan = [](auto raw) { return raw != raw; };
  const int64_t nan = may_have_nan ? find_first(row, classes, is_nan) : -1;
  if (nan >= 0) return nan;
  const auto is_largest = [&](auto raw) { return transform.u(raw) == transform.largest_u; };
  const int64_t largest = find_first(row, classes, is_largest);
  return largest >= 0 ? largest : 0;
}

template <class Element, bool capped>
void logp_row(const LogpRows<Element>& rows, RealOf<Element>* scratch, int64_t i) {
  using Real = RealOf<Element>;
  const Element* row = rows.logits + i * rows.logits_stride;
  const Real inverse = rows.inv_temperature ? rows.inv_temperature[i] : Real{1};
  Transform<Real, capped> transform(rows.logit_scale, rows.softcap, inverse);
  const int64_t target = rows.target[i];
  const bool forward = rows.logp != nullptr;
  const Real* const no_weight = nullptr;
  const auto sums =
      row_sums<Extra::entropy>(row, rows.classes, target, transform, no_weight, scratch);
  const auto statistics = row_statistics(sums);
  if (forward) {
    rows.logp[i] = -statistics.nll;
    rows.entropy[i] = row_entropy(sums, statistics);
    rows.lse[i] = statistics.lse;
    const bool may_have_nan = statistics.total != statistics.total;
    rows.predicted[i] = argmax(row, rows.classes, may_have_nan, transform);
  }
  if (!rows.grad) return;
  const Real grad_logp = forward ? Real{1} : rows.grad_logp ? rows.grad_logp[i] : Real{0};
  const Real grad_entropy = rows.grad_entropy ? rows.grad_entropy[i] : Real{0};
  const Real grad_lse = rows.grad_lse ? rows.grad_lse[i] : Real{0};
  const auto gradient = logp_gradient(sums, statistics, grad_logp, grad_entropy, grad_lse);
  const auto write = grad_entropy != 0
                         ? write_gradient<Extra::entropy, Element, Transform<Real, capped>>
                         : write_gradient<Extra::none, Element, Transform<Real, capped>>;
  write(row, rows.classes, target, transform, no_weight, sums, statistics, gradient, scratch,
        rows.grad + i * rows.grad_stride);
}

template <class Element>
void logp_rows(const LogpRows<Element>& rows, int64_t begin, int64_t end) {
  using Real = RealOf<Element>;
  const Scratch<Real> scratch(rows.grad ? rows.classes : 0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t target = rows.target[i];
    if (target >= 0 && target < rows.classes && target != rows.ignore_index) {
      rows.softcap > 0 ? logp_row<Element, true>(rows, scratch.values, i)
                       : logp_row<Element, false>(rows, scratch.values, i);
      continue;
    }
    const Real value = target == rows.ignore_index ? 0 : std::numeric_limits<Real>::quiet_NaN();
    if (rows.logp) {
      rows.logp[i] = rows.entropy[i] = rows.lse[i] = value;
      rows.predicted[i] = -1;
    }
    if (rows.grad) fill_row(rows.grad + i * rows.grad_stride, rows.classes, value);
  }
}

template <class Element>
void add_part(const PartialSum<Element>& sums, int64_t begin, int64_t end) {
  using L = Lanes<RealOf<Element>>;
  for (int64_t i = begin; i < end; i += L::width) {
    auto sum = load_lanes(sums.part + i, end - i);
    if (sums.previous) sum += load_lanes(sums.previous + i, end - i);
    if constexpr (!std::is_same_v<Element, double>) {
      if (sums.previous_wide) sum += load_lanes(sums.previous_wide + i, end - i);
      if (sums.sum_wide) {
        store_lanes(sums.sum_wide + i, sum, end - i);
        continue;
      }
    }
    store_lanes(sums.sum + i, sum, end - i);
  }
}

}  // namespace

template <class Element>
constexpr RowFunctions<Element> functions() {
  return {loss_rows<Element>, logp_rows<Element>, add_part<Element>};
}

}  // namespace TRIMTAB_ISA

#define TRIMTAB_ROW_TABLE_NAMED(isa) isa##_rows
#define TRIMTAB_ROW_TABLE(isa) TRIMTAB_ROW_TABLE_NAMED(isa)
#define TRIMTAB_TEXT_OF(isa) #isa
#define TRIMTAB_TEXT(isa) TRIMTAB_TEXT_OF(isa)

const RowTable TRIMTAB_ROW_TABLE(TRIMTAB_ISA) = {
    TRIMTAB_ISA::functions<float>(),    TRIMTAB_ISA::functions<double>(),
    TRIMTAB_ISA::functions<BFloat16>(), TRIMTAB_ISA::functions<Float16>(),
    TRIMTAB_TEXT(TRIMTAB_ISA),
};

}  // namespace trimtab
