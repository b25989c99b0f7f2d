// What the row operators of contrast are given, for host and device.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace trimtab {

// One number for all rows, or one per row.
template <class Value>
struct PerRow {
  Value number;
  const Value* rows;
};

// Rows of logits. `map`, where not null, says which of the `count` rows belongs to each output row.
template <class Element>
struct LogitRows {
  bool given;
  const Element* data;
  int64_t stride;
  int64_t count;
  const int64_t* map;
};

template <class Element>
struct ContrastInputs {
  using Real = typename Accumulate<Element>::type;
  LogitRows<Element> positive, negative, anchor;
  int64_t classes;
  PerRow<Real> alpha;
};

template <class Element>
struct ContrastiveLogits {
  using Real = typename Accumulate<Element>::type;
  ContrastInputs<Element> inputs;
  PerRow<Real> log_beta;
  Real* out;
  int64_t out_stride;
};

template <class Element>
struct GradRows {
  Element* data;
  int64_t stride;
};

// Forward: `logp` takes the results. Backward: it is null, and `grad_logp` is the upstream.
template <class Element>
struct ContrastiveLogp {
  using Real = typename Accumulate<Element>::type;
  ContrastInputs<Element> inputs;
  const int64_t* target;
  int64_t ignore_index;
  PerRow<Real> temperature;
  Real* logp;
  const Real* grad_logp;
  GradRows<Element> grad_positive, grad_negative, grad_anchor;
};

template <class Element>
struct ContrastiveSample {
  using Real = typename Accumulate<Element>::type;
  ContrastInputs<Element> inputs;
  PerRow<Real> log_beta, temperature;
  PerRow<int64_t> top_k;
  PerRow<Real> tail, log_min_p;
  PerRow<int64_t> seed, position;
  int64_t* token;
  Real* logp;
  int64_t* kept;
};

}  // namespace trimtab
