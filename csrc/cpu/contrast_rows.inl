// The rows of contrast for one instruction set. Included by the files that are compiled for one.
//
// A row is combined once into a scratch row, which stays in the L2 cache (513 KB at V 128256); what
// comes after reads that, and of it only the blocks that matter. Memory sees one read of the
// inputs.

#include <cmath>
#include <initializer_list>
#include <limits>
#include <new>

#include "common/contrast.h"
#include "common/token_loss.h"
#include "cpu/contrast_rows.h"
#include "cpu/sweep.h"

#include "cpu/contrast_combine.inl"
#include "cpu/contrast_sample.inl"

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

template <class Element>
void fill_row(Element* row, int64_t classes, RealOf<Element> value) {
  using L = Lanes<RealOf<Element>>;
  for (int64_t v = 0; v < classes; v += L::width)
    store_lanes(row + v, L::spread(value), classes - v);
}

// The largest anchor, or NaN if there is one.
template <class C>
typename C::Real largest_anchor(const C& combination, int64_t classes) {
  using L = typename C::L;
  auto best = L::spread(-infinity<typename C::Real>);
  typename C::Mask nan{};
  combination.sweep_anchor(0, classes, [&](auto a, int64_t, auto mask) {
    nan = nan | (mask & (a != a));
    best = L::choose(mask & (a > best), a, best);
  });
  return L::bits(nan) ? std::numeric_limits<typename C::Real>::quiet_NaN() : L::maximum(best);
}

template <class Element>
void logits_rows(const ContrastiveLogits<Element>& rows, int64_t begin, int64_t end) {
  using Real = RealOf<Element>;
  using L = Lanes<Real>;
  const int64_t classes = rows.inputs.classes;
  for (int64_t i = begin; i < end; ++i) {
    Real* const out = rows.out + i * rows.out_stride;
    const Real log_beta = at(rows.log_beta, i);
    visit_row(rows.inputs, i, [&](const auto& combination) {
      Real threshold = -infinity<Real>;
      if (log_beta > -infinity<Real>) threshold = largest_anchor(combination, classes) + log_beta;
      if (threshold != threshold) return fill_row(out, classes, threshold);
      combination.sweep(0, classes, [&](auto z, auto a, int64_t v, auto) {
        const auto masked = L::choose(a < threshold, L::spread(-infinity<Real>), z);
        store_lanes(out + v, masked, classes - v);
      });
    });
  }
}

// The sums of one row; z becomes exp(s - m), and 0 at the target.
template <class Real>
RowSums<Real> logp_sums(const Row<Real>& row, Real largest, Real temperature, int64_t target) {
  using L = Lanes<Real>;
  RowSums<Real> sums{};
  sums.maximum = largest / temperature;
  sums.target_shift = row.value[target] / temperature - sums.maximum;
  row.value[target] = -infinity<Real>;
  WideSum<Real> rest;
  for (int64_t v = 0; v < row.blocks * kBlock; v += L::width) {
    const auto shift = L::load(row.value + v) / temperature - sums.maximum;
    const auto e = L::exp_of_nonpositive(shift);
    L::store(row.value + v, e);
    rest.add(e);
  }
  sums.rest = static_cast<Real>(rest.value());
  return sums;
}

template <class Element>
void write_grad(const GradRows<Element>& grad, int64_t i, const RealOf<Element>* ds,
                int64_t classes, RealOf<Element> factor, bool plus_one) {
  using L = Lanes<RealOf<Element>>;
  if (!grad.data) return;
  Element* const row = grad.data + i * grad.stride;
  for (int64_t v = 0; v < classes; v += L::width) {
    const auto d = L::load(ds + v);
    store_lanes(row + v, plus_one ? d * factor + d : d * factor, classes - v);
  }
}

template <class Element>
void write_grads(const ContrastiveLogp<Element>& rows, int64_t i, const RealOf<Element>* ds) {
  const int64_t classes = rows.inputs.classes;
  const auto alpha = at(rows.inputs.alpha, i);
  write_grad(rows.grad_positive, i, ds, classes, alpha, !rows.inputs.anchor.given);
  write_grad(rows.grad_negative, i, ds, classes, -alpha, false);
  write_grad(rows.grad_anchor, i, ds, classes, RealOf<Element>{1}, false);
}

template <class Element>
void fill_logp(const ContrastiveLogp<Element>& rows, int64_t i, RealOf<Element> value) {
  if (rows.logp) rows.logp[i] = value;
  for (const auto* grad : {&rows.grad_positive, &rows.grad_negative, &rows.grad_anchor})
    if (grad->data) fill_row(grad->data + i * grad->stride, rows.inputs.classes, value);
}

template <class Element>
void logp_row(const ContrastiveLogp<Element>& rows, RowBuffer<RealOf<Element>>& buffer, int64_t i) {
  using Real = RealOf<Element>;
  using L = Lanes<Real>;
  const Row<Real>& row = buffer.row;
  const int64_t target = rows.target[i];
  const Real temperature = at(rows.temperature, i);
  Real anchor = 0;
  bool good = false;
  visit_row(rows.inputs, i, [&](const auto& combination) {
    good = combine_row(combination, rows.inputs.classes, buffer);
    anchor = combination.anchor_at(target);
  });
  const Real largest = row.maximum();
  if (!good || !(temperature > 0) || !std::isfinite(largest / temperature))
    return fill_logp(rows, i, std::numeric_limits<Real>::quiet_NaN());
  const auto sums = logp_sums(row, largest, temperature, target);
  const auto statistics = row_statistics(sums);
  if (rows.logp) {
    rows.logp[i] = -statistics.nll;
    return;
  }
  const Real upstream = rows.grad_logp[i] / temperature, factor = -upstream / statistics.total;
  for (int64_t v = 0; v < row.blocks * kBlock; v += L::width)
    L::store(row.value + v, L::load(row.value + v) * factor);
  // A token at -inf in the anchor stays there whatever the others are.
  row.value[target] = anchor == -infinity<Real> ? 0 : upstream * statistics.target_miss;
  write_grads(rows, i, row.value);
}

template <class Element>
void logp_rows(const ContrastiveLogp<Element>& rows, int64_t begin, int64_t end) {
  using Real = RealOf<Element>;
  RowBuffer<Real> buffer(rows.inputs.classes);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t target = rows.target[i];
    if (target == rows.ignore_index)
      fill_logp(rows, i, Real{0});
    else if (target < 0 || target >= rows.inputs.classes)
      fill_logp(rows, i, std::numeric_limits<Real>::quiet_NaN());
    else
      logp_row(rows, buffer, i);
  }
}

template <class Element>
constexpr ContrastFunctions<Element> contrast_functions() {
  return {logits_rows<Element>, logp_rows<Element>, sample_rows<Element>};
}

}  // namespace
}  // namespace TRIMTAB_ISA

#define TRIMTAB_CONTRAST_TABLE_NAMED(isa) isa##_contrast
#define TRIMTAB_CONTRAST_TABLE(isa) TRIMTAB_CONTRAST_TABLE_NAMED(isa)
#define TRIMTAB_TEXT_OF(isa) #isa
#define TRIMTAB_TEXT(isa) TRIMTAB_TEXT_OF(isa)

const ContrastTable TRIMTAB_CONTRAST_TABLE(TRIMTAB_ISA) = {
    TRIMTAB_ISA::contrast_functions<float>(),
    TRIMTAB_ISA::contrast_functions<double>(),
    TRIMTAB_ISA::contrast_functions<BFloat16>(),
    TRIMTAB_ISA::contrast_functions<Float16>(),
    TRIMTAB_TEXT(TRIMTAB_ISA),
};

}  // namespace trimtab
