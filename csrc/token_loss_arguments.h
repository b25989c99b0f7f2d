// The checks of the row operators of token loss, the same on every device.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/token_loss_rows.h"
#include "torch_api.h"

namespace trimtab {

template <class Element>
constexpr ScalarType real_type =
    std::is_same_v<Element, double> ? ScalarType::Double : ScalarType::Float;

template <class T>
T* vector_of(const char* argument, const Tensor& tensor, int64_t length, ScalarType dtype,
             const Tensor& like) {
  check_vector(argument, tensor, length, dtype);
  check_device(argument, tensor, like);
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
const T* optional_vector(const char* argument, const OptionalTensor& tensor, int64_t length,
                         ScalarType dtype, const Tensor& like) {
  return tensor.has_value() ? vector_of<T>(argument, *tensor, length, dtype, like) : nullptr;
}

template <class Element, class Rows>
void set_logits(Rows& rows, const Tensor& logits, const Tensor& target) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be of shape (N, V)");
  check_rows("logits", logits, logits.size(0), logits.size(1));
  rows.logits = static_cast<const Element*>(logits.data_ptr());
  rows.logits_stride = logits.stride(0);
  rows.classes = logits.size(1);
  rows.target = vector_of<int64_t>("target", target, logits.size(0), ScalarType::Long, logits);
}

template <class Element, class Rows>
void set_grad(Rows& rows, const Tensor& logits, const Tensor* grad) {
  if (!grad) return;
  check_rows("grad", *grad, logits.size(0), logits.size(1));
  check_device("grad", *grad, logits);
  STD_TORCH_CHECK(grad->scalar_type() == logits.scalar_type(),
                  "grad must be of the dtype of logits");
  STD_TORCH_CHECK(grad->size(0) <= 1 || grad->stride(0) >= grad->size(1),
                  "grad must have rows that do not overlap, got stride ", grad->stride(0));
  rows.grad = static_cast<Element*>(grad->data_ptr());
  rows.grad_stride = grad->stride(0);
}

template <class Element>
LossRows<Element> loss_arguments(const Tensor& logits, const Tensor& target,
                                 const OptionalTensor& coef, const OptionalTensor& class_weight,
                                 int64_t ignore_index, double logit_scale, double softcap,
                                 double label_smoothing, double lse_square_scale,
                                 const Tensor& loss, const OptionalTensor& grad) {
  using Real = typename Accumulate<Element>::type;
  constexpr ScalarType real = real_type<Element>;
  LossRows<Element> rows{};
  set_logits<Element>(rows, logits, target);
  set_grad<Element>(rows, logits, pointer_to(grad));
  const int64_t count = logits.size(0);
  rows.ignore_index = ignore_index;
  rows.coef = optional_vector<Real>("coef", coef, count, real, logits);
  rows.class_weight =
      optional_vector<Real>("class_weight", class_weight, rows.classes, real, logits);
  rows.logit_scale = logit_scale;
  rows.softcap = softcap;
  rows.label_smoothing = label_smoothing;
  rows.lse_square_scale = lse_square_scale;
  rows.loss = vector_of<Real>("loss", loss, count, real, logits);
  return rows;
}

template <class Element>
LogpRows<Element> logp_arguments(const Tensor& logits, const Tensor& target,
                                 const OptionalTensor& inv_temperature, int64_t ignore_index,
                                 double logit_scale, double softcap, const Tensor* grad) {
  using Real = typename Accumulate<Element>::type;
  LogpRows<Element> rows{};
  set_logits<Element>(rows, logits, target);
  set_grad<Element>(rows, logits, grad);
  rows.ignore_index = ignore_index;
  rows.inv_temperature = optional_vector<Real>("inv_temperature", inv_temperature, logits.size(0),
                                               real_type<Element>, logits);
  rows.logit_scale = logit_scale;
  rows.softcap = softcap;
  return rows;
}

template <class Element>
void set_results(LogpRows<Element>& rows, const Tensor& logits, const Tensor& logp,
                 const Tensor& entropy, const Tensor& lse, const Tensor& predicted) {
  using Real = typename Accumulate<Element>::type;
  constexpr ScalarType real = real_type<Element>;
  const int64_t count = logits.size(0);
  rows.logp = vector_of<Real>("logp", logp, count, real, logits);
  rows.entropy = vector_of<Real>("entropy", entropy, count, real, logits);
  rows.lse = vector_of<Real>("lse", lse, count, real, logits);
  rows.predicted = vector_of<int64_t>("predicted", predicted, count, ScalarType::Long, logits);
}

template <class Element>
void set_upstreams(LogpRows<Element>& rows, const Tensor& logits, const OptionalTensor& grad_logp,
                   const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse) {
  using Real = typename Accumulate<Element>::type;
  constexpr ScalarType real = real_type<Element>;
  const int64_t count = logits.size(0);
  rows.grad_logp = optional_vector<Real>("grad_logp", grad_logp, count, real, logits);
  rows.grad_entropy = optional_vector<Real>("grad_entropy", grad_entropy, count, real, logits);
  rows.grad_lse = optional_vector<Real>("grad_lse", grad_lse, count, real, logits);
}

template <class Element>
PartialSum<Element> sum_arguments(const OptionalTensor& accumulator, const Tensor& part,
                                  const Tensor& out) {
  PartialSum<Element> sums{};
  const auto place = [&](const char* argument, const Tensor& tensor, auto*& narrow, auto*& wide) {
    STD_TORCH_CHECK(tensor.numel() == part.numel() && tensor.is_contiguous(), argument,
                    " must be contiguous and of the shape of part");
    check_device(argument, tensor, part);
    const bool same = tensor.scalar_type() == part.scalar_type();
    const bool is_float = tensor.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(same || (is_float && !std::is_same_v<Element, double>), argument,
                    " must be float32 or of the dtype of part");
    if (same)
      narrow = static_cast<std::remove_reference_t<decltype(narrow)>>(tensor.data_ptr());
    else
      wide = static_cast<std::remove_reference_t<decltype(wide)>>(tensor.data_ptr());
  };
  STD_TORCH_CHECK(part.is_contiguous(), "part must be contiguous");
  sums.part = static_cast<const Element*>(part.data_ptr());
  if (accumulator.has_value())
    place("accumulator", *accumulator, sums.previous, sums.previous_wide);
  place("out", out, sums.sum, sums.sum_wide);
  return sums;
}

}  // namespace trimtab
