// What the row operators of token loss are given, for host and device.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace trimtab {

// Pointers are null where an optional argument is not given.
template <class Element>
struct LossRows {
  using Real = typename Accumulate<Element>::type;
  const Element* logits;
  int64_t logits_stride;
  int64_t classes;
  const int64_t* target;
  int64_t ignore_index;
  const Real* coef;
  const Real* class_weight;
  double logit_scale, softcap, label_smoothing, lse_square_scale;
  Real* loss;
  Element* grad;
  int64_t grad_stride;
};

template <class Element>
struct LogpRows {
  using Real = typename Accumulate<Element>::type;
  const Element* logits;
  int64_t logits_stride;
  int64_t classes;
  const int64_t* target;
  int64_t ignore_index;
  const Real* inv_temperature;
  double logit_scale, softcap;
  // Forward: the results. Backward: null.
  Real *logp, *entropy, *lse;
  int64_t* predicted;
  // Backward: the upstreams. Forward: null, and `grad` takes the gradient of logp itself.
  const Real *grad_logp, *grad_entropy, *grad_lse;
  Element* grad;
  int64_t grad_stride;
};

// sum = previous + part, in float32, rounded once. `previous` and `sum` are float32 or of the
// part's type; of each pair of pointers one is null, or for no previous sum both.
template <class Element>
struct PartialSum {
  const float* previous_wide;
  const Element *previous, *part;
  float* sum_wide;
  Element* sum;
};

}  // namespace trimtab
