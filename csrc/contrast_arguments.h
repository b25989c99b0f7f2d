// The checks of the row operators of contrast, the same on every device.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/contrast_rows.h"
#include "torch_api.h"

namespace trimtab {

template <class Value>
constexpr ScalarType dtype_of = std::is_same_v<Value, int64_t>  ? ScalarType::Long
                                : std::is_same_v<Value, double> ? ScalarType::Double
                                                                : ScalarType::Float;

// `like` tells the device.
template <class Value>
Value* vector_of(const char* argument, const Tensor& tensor, int64_t length, const Tensor& like) {
  check_vector(argument, tensor, length, dtype_of<Value>);
  check_device(argument, tensor, like);
  return static_cast<Value*>(tensor.data_ptr());
}

template <class Value, class Number>
PerRow<Value> per_row(const char* argument, Number number, const OptionalTensor& rows,
                      int64_t count, const Tensor& like) {
  return {static_cast<Value>(number),
          rows.has_value() ? vector_of<Value>(argument, *rows, count, like) : nullptr};
}

template <class Element>
LogitRows<Element> logit_rows(const char* argument, const Tensor& tensor, const Tensor& like,
                              const char* map_argument, const OptionalTensor& map, int64_t count) {
  const int64_t length = map.has_value() ? tensor.size(0) : count;
  check_rows(argument, tensor, length, like.size(1));
  check_device(argument, tensor, like);
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), argument,
                  " must be of the dtype of positive");
  return {true, static_cast<const Element*>(tensor.data_ptr()), tensor.stride(0), length,
          map.has_value() ? vector_of<int64_t>(map_argument, *map, count, like) : nullptr};
}

struct RowMaps {
  OptionalTensor positive, negative, anchor;
};

template <class Element>
ContrastInputs<Element> contrast_inputs(const Tensor& positive, const OptionalTensor& negative,
                                        const OptionalTensor& anchor, const RowMaps& maps,
                                        double alpha, const OptionalTensor& alpha_rows,
                                        int64_t count) {
  using Real = typename Accumulate<Element>::type;
  STD_TORCH_CHECK(positive.dim() == 2, "positive must be of shape (B, V)");
  ContrastInputs<Element> inputs{};
  inputs.positive =
      logit_rows<Element>("positive", positive, positive, "positive_rows", maps.positive, count);
  if (negative.has_value())
    inputs.negative =
        logit_rows<Element>("negative", *negative, positive, "negative_rows", maps.negative, count);
  if (anchor.has_value())
    inputs.anchor =
        logit_rows<Element>("anchor", *anchor, positive, "anchor_rows", maps.anchor, count);
  inputs.classes = positive.size(1);
  inputs.alpha = per_row<Real>("alpha_rows", alpha, alpha_rows, count, positive);
  return inputs;
}

// A matrix to be written, whose rows do not overlap.
template <class Value>
Value* check_output(const char* argument, const Tensor& out, int64_t rows, int64_t columns,
                    ScalarType dtype, const Tensor& like) {
  check_rows(argument, out, rows, columns);
  check_device(argument, out, like);
  STD_TORCH_CHECK(out.scalar_type() == dtype, argument, " must be ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(out.scalar_type()));
  STD_TORCH_CHECK(rows <= 1 || out.stride(0) >= columns, argument,
                  " must have rows that do not overlap, got stride ", out.stride(0));
  return static_cast<Value*>(out.data_ptr());
}

template <class Element>
ContrastiveLogits<Element> contrastive_logits_arguments(
    const Tensor& positive, const OptionalTensor& negative, const OptionalTensor& anchor,
    double alpha, const OptionalTensor& alpha_rows, double log_beta,
    const OptionalTensor& log_beta_rows, const Tensor& out) {
  using Real = typename Accumulate<Element>::type;
  STD_TORCH_CHECK(out.dim() == 2, "out must be of shape (B, V)");
  const int64_t count = out.size(0);
  ContrastiveLogits<Element> rows{};
  rows.inputs = contrast_inputs<Element>(positive, negative, anchor, {}, alpha, alpha_rows, count);
  rows.log_beta = per_row<Real>("log_beta_rows", log_beta, log_beta_rows, count, positive);
  rows.out = check_output<Real>("out", out, count, rows.inputs.classes, dtype_of<Real>, positive);
  rows.out_stride = out.stride(0);
  return rows;
}

template <class Element>
ContrastiveLogp<Element> contrastive_logp_arguments(
    const Tensor& positive, const OptionalTensor& negative, const OptionalTensor& anchor,
    const Tensor& target, double alpha, const OptionalTensor& alpha_rows, double temperature,
    const OptionalTensor& temperature_rows, int64_t ignore_index) {
  using Real = typename Accumulate<Element>::type;
  STD_TORCH_CHECK(target.dim() == 1, "target must be of shape (B,)");
  const int64_t count = target.size(0);
  ContrastiveLogp<Element> rows{};
  rows.inputs = contrast_inputs<Element>(positive, negative, anchor, {}, alpha, alpha_rows, count);
  rows.target = vector_of<int64_t>("target", target, count, positive);
  rows.ignore_index = ignore_index;
  rows.temperature =
      per_row<Real>("temperature_rows", temperature, temperature_rows, count, positive);
  return rows;
}

template <class Element>
void set_grads(ContrastiveLogp<Element>& rows, const Tensor& positive, const OptionalTensor& anchor,
               const Tensor& target, const Tensor& grad_logp, const OptionalTensor& grad_positive,
               const OptionalTensor& grad_negative, const OptionalTensor& grad_anchor) {
  using Real = typename Accumulate<Element>::type;
  const int64_t count = target.size(0);
  rows.grad_logp = vector_of<Real>("grad_logp", grad_logp, count, positive);
  const auto grad_rows = [&](const char* argument,
                             const OptionalTensor& grad) -> GradRows<Element> {
    if (!grad.has_value()) return {nullptr, 0};
    return {check_output<Element>(argument, *grad, count, rows.inputs.classes,
                                  positive.scalar_type(), positive),
            grad->stride(0)};
  };
  STD_TORCH_CHECK(anchor.has_value() || !grad_anchor.has_value(),
                  "grad_anchor must be None without an anchor");
  rows.grad_positive = grad_rows("grad_positive", grad_positive);
  rows.grad_negative = grad_rows("grad_negative", grad_negative);
  rows.grad_anchor = grad_rows("grad_anchor", grad_anchor);
}

template <class Element>
ContrastiveSample<Element> contrastive_sample_arguments(
    const Tensor& positive, const OptionalTensor& negative, const OptionalTensor& anchor,
    const OptionalTensor& positive_rows, const OptionalTensor& negative_rows,
    const OptionalTensor& anchor_rows, double alpha, const OptionalTensor& alpha_rows,
    double log_beta, const OptionalTensor& log_beta_rows, double temperature,
    const OptionalTensor& temperature_rows, int64_t top_k, const OptionalTensor& top_k_rows,
    double tail, const OptionalTensor& tail_rows, double log_min_p,
    const OptionalTensor& log_min_p_rows, int64_t seed, const OptionalTensor& seed_rows,
    int64_t position, const OptionalTensor& position_rows, const Tensor& token, const Tensor& logp,
    const Tensor& kept) {
  using Real = typename Accumulate<Element>::type;
  STD_TORCH_CHECK(token.dim() == 1, "token must be of shape (B,)");
  const int64_t count = token.size(0);
  ContrastiveSample<Element> rows{};
  rows.inputs = contrast_inputs<Element>(positive, negative, anchor,
                                         {positive_rows, negative_rows, anchor_rows}, alpha,
                                         alpha_rows, count);
  rows.log_beta = per_row<Real>("log_beta_rows", log_beta, log_beta_rows, count, positive);
  rows.temperature =
      per_row<Real>("temperature_rows", temperature, temperature_rows, count, positive);
  rows.top_k = per_row<int64_t>("top_k_rows", top_k, top_k_rows, count, positive);
  rows.tail = per_row<Real>("tail_rows", tail, tail_rows, count, positive);
  rows.log_min_p = per_row<Real>("log_min_p_rows", log_min_p, log_min_p_rows, count, positive);
  rows.seed = per_row<int64_t>("seed_rows", seed, seed_rows, count, positive);
  rows.position = per_row<int64_t>("position_rows", position, position_rows, count, positive);
  rows.token = vector_of<int64_t>("token", token, count, positive);
  rows.logp = vector_of<Real>("logp", logp, count, positive);
  rows.kept = vector_of<int64_t>("kept", kept, count, positive);
  return rows;
}

}  // namespace trimtab
