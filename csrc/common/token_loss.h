// The arithmetic of one row of logits, for host and device.
//
// With m = max z, y the target and s = z - m:
//   rest = sum over v != y of exp(s_v),  total = rest + exp(s_y)
//   nll = log(total) - s_y,  lse = m + log(total),  1 - p_y = rest / total
// The target stays out of the sum, so that a confident row keeps its relative accuracy: with s_y =
// 0 the loss is log1p(rest), and the target's gradient comes from rest / total, not from p_y - 1.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace trimtab {

// How a logit becomes z: softcap * tanh(scale * x / softcap) * inv_temperature; softcap 0 stands
// for none.
template <class Real>
struct LogitTransform {
  Real scale;
  Real softcap;
  Real inv_temperature;
};

template <class Real>
struct LossOptions {
  Real label_smoothing;
  Real lse_square_scale;
};

// What a sweep over the row leaves.
template <class Real>
struct RowSums {
  Real maximum;
  Real rest;                 // sum over v != y of exp(s_v)
  Real target_shift;         // s_y
  Real target_class_weight;  // c_y, 1 without class weights
  Real class_weight_sum;     // sum of c_v: V without class weights; only for smoothing
  Real weighted_shift;       // sum of c_v s_v, a sum of one sign; only for smoothing
  Real entropy_shift;        // sum of exp(s_v) s_v; only for the entropy
};

template <class Real>
struct RowStatistics {
  Real total, log_total, nll, lse;
  Real target_p;     // p_y
  Real target_miss;  // 1 - p_y
};

template <class Real>
TRIMTAB_HD RowStatistics<Real> row_statistics(const RowSums<Real>& sums) {
  RowStatistics<Real> row;
  const Real target = std::exp(sums.target_shift);
  row.total = sums.rest + target;
  row.log_total = sums.target_shift == 0 ? std::log1p(sums.rest) : std::log(row.total);
  row.nll = row.log_total - sums.target_shift;
  row.lse = sums.maximum + row.log_total;
  row.target_p = target / row.total;
  row.target_miss = sums.rest / row.total;
  return row;
}

template <class Real>
TRIMTAB_HD Real row_entropy(const RowSums<Real>& sums, const RowStatistics<Real>& row) {
  return row.log_total - sums.entropy_shift / row.total;
}

template <class Real>
TRIMTAB_HD Real row_loss(const RowSums<Real>& sums, const RowStatistics<Real>& row,
                         const LossOptions<Real>& options, int64_t classes) {
  Real loss = (1 - options.label_smoothing) * sums.target_class_weight * row.nll;
  if (options.label_smoothing > 0) {
    const Real uniform = sums.class_weight_sum * row.log_total - sums.weighted_shift;
    loss += options.label_smoothing / static_cast<Real>(classes) * uniform;
  }
  return loss + options.lse_square_scale * row.lse * row.lse;
}

// The gradient for z, up to the slope of the transform:
//   d_v = p_v (pull + push + tilt s_v) + smooth (p_v C - c_v),  C = sum of c_v, and at the target
//   d_y = p_y (push + tilt s_y) - pull (1 - p_y) + smooth (p_y C - c_y)
template <class Real>
struct RowGradient {
  Real pull;    // towards the target
  Real push;    // down on every logit alike
  Real tilt;    // of the entropy
  Real smooth;  // of the label smoothing
  Real class_weight_sum;
};

template <class Real>
TRIMTAB_HD RowGradient<Real> loss_gradient(const RowSums<Real>& sums,
                                           const RowStatistics<Real>& row,
                                           const LossOptions<Real>& options, int64_t classes,
                                           Real coef) {
  const Real smooth = options.label_smoothing / static_cast<Real>(classes);
  RowGradient<Real> gradient;
  gradient.pull = coef * (1 - options.label_smoothing) * sums.target_class_weight;
  gradient.push = coef * 2 * options.lse_square_scale * row.lse;
  gradient.tilt = 0;
  gradient.smooth = coef * smooth;
  gradient.class_weight_sum = sums.class_weight_sum;
  return gradient;
}

template <class Real>
TRIMTAB_HD RowGradient<Real> logp_gradient(const RowSums<Real>& sums,
                                           const RowStatistics<Real>& row, Real grad_logp,
                                           Real grad_entropy, Real grad_lse) {
  const Real entropy = row_entropy(sums, row);
  return {-grad_logp, grad_lse - grad_entropy * (entropy - row.log_total), -grad_entropy, 0, 0};
}

template <class Real>
TRIMTAB_HD Real target_gradient(const RowSums<Real>& sums, const RowStatistics<Real>& row,
                                const RowGradient<Real>& gradient) {
  Real bent = gradient.push;
  if (row.target_p > 0) bent += gradient.tilt * sums.target_shift;
  const Real spread = row.target_p * gradient.class_weight_sum - sums.target_class_weight;
  return row.target_p * bent - gradient.pull * row.target_miss + gradient.smooth * spread;
}

}  // namespace trimtab
