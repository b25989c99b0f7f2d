// Token loss on the CPU: checks, the choice of an instruction set, threads, registration.

#include "cpu/isa.h"
#include "cpu/token_loss_rows.h"
#include "torch_api.h"

namespace trimtab {
namespace {

const RowTable& rows_for_this_processor() {
#if defined(__x86_64__)
  return table_for_this_processor(generic_rows, avx2_rows, avx512_rows);
#else
  refuse_unless_allowed(generic_rows.name);
  return generic_rows;
#endif
}

template <class Element>
const RowFunctions<Element>& functions() {
  static const RowTable& table = rows_for_this_processor();
  return functions_of<Element>(table);
}

// A thread gets at least this many elements: below, starting it costs more than it does.
constexpr int64_t kElementsPerThread = 32768;

int64_t rows_per_thread(int64_t classes) {
  return classes >= kElementsPerThread ? 1 : kElementsPerThread / (classes > 0 ? classes : 1);
}

template <class Element>
constexpr ScalarType real_type =
    std::is_same_v<Element, double> ? ScalarType::Double : ScalarType::Float;

template <class T>
const T* optional_vector(const char* argument, const OptionalTensor& tensor, int64_t length,
                         ScalarType dtype) {
  if (!tensor.has_value()) return nullptr;
  check_vector(argument, *tensor, length, dtype);
  return static_cast<const T*>(tensor->data_ptr());
}

template <class T>
T* vector_of(const char* argument, const Tensor& tensor, int64_t length, ScalarType dtype) {
  check_vector(argument, tensor, length, dtype);
  return static_cast<T*>(tensor.data_ptr());
}

template <class Element, class Rows>
void set_logits(Rows& rows, const Tensor& logits, const Tensor& target) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be of shape (N, V)");
  check_rows("logits", logits, logits.size(0), logits.size(1));
  rows.logits = static_cast<const Element*>(logits.data_ptr());
  rows.logits_stride = logits.stride(0);
  rows.classes = logits.size(1);
  rows.target = vector_of<int64_t>("target", target, logits.size(0), ScalarType::Long);
}

template <class Element, class Rows>
void set_grad(Rows& rows, const Tensor& logits, const Tensor* grad) {
  if (!grad) return;
  check_rows("grad", *grad, logits.size(0), logits.size(1));
  STD_TORCH_CHECK(grad->scalar_type() == logits.scalar_type(),
                  "grad must be of the dtype of logits");
  STD_TORCH_CHECK(grad->size(0) <= 1 || grad->stride(0) >= grad->size(1),
                  "grad must have rows that do not overlap, got stride ", grad->stride(0));
  rows.grad = static_cast<Element*>(grad->data_ptr());
  rows.grad_stride = grad->stride(0);
}

void token_loss_rows(const Tensor& logits, const Tensor& target, const OptionalTensor& coef,
                     const OptionalTensor& class_weight, int64_t ignore_index, double logit_scale,
                     double softcap, double label_smoothing, double lse_square_scale,
                     const Tensor& loss, const OptionalTensor& grad) {
  dispatch_floating("logits", logits, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    using Real = typename Accumulate<Element>::type;
    constexpr ScalarType real = real_type<Element>;
    LossRows<Element> rows{};
    set_logits<Element>(rows, logits, target);
    set_grad<Element>(rows, logits, pointer_to(grad));
    const int64_t count = logits.size(0);
    rows.ignore_index = ignore_index;
    rows.coef = optional_vector<Real>("coef", coef, count, real);
    rows.class_weight = optional_vector<Real>("class_weight", class_weight, rows.classes, real);
    rows.logit_scale = logit_scale;
    rows.softcap = softcap;
    rows.label_smoothing = label_smoothing;
    rows.lse_square_scale = lse_square_scale;
    rows.loss = vector_of<Real>("loss", loss, count, real);
    const auto kernel = functions<Element>().loss;
    torch::stable::parallel_for(0, count, rows_per_thread(rows.classes),
                                [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  });
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
  rows.inv_temperature =
      optional_vector<Real>("inv_temperature", inv_temperature, logits.size(0), real_type<Element>);
  rows.logit_scale = logit_scale;
  rows.softcap = softcap;
  return rows;
}

template <class Element>
void run_logp(const LogpRows<Element>& rows, int64_t count) {
  const auto kernel = functions<Element>().logp;
  torch::stable::parallel_for(0, count, rows_per_thread(rows.classes),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

void token_logp_rows(const Tensor& logits, const Tensor& target,
                     const OptionalTensor& inv_temperature, int64_t ignore_index,
                     double logit_scale, double softcap, const Tensor& logp, const Tensor& entropy,
                     const Tensor& lse, const Tensor& predicted, const OptionalTensor& grad) {
  dispatch_floating("logits", logits, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    using Real = typename Accumulate<Element>::type;
    constexpr ScalarType real = real_type<Element>;
    auto rows = logp_arguments<Element>(logits, target, inv_temperature, ignore_index, logit_scale,
                                        softcap, pointer_to(grad));
    const int64_t count = logits.size(0);
    rows.logp = vector_of<Real>("logp", logp, count, real);
    rows.entropy = vector_of<Real>("entropy", entropy, count, real);
    rows.lse = vector_of<Real>("lse", lse, count, real);
    rows.predicted = vector_of<int64_t>("predicted", predicted, count, ScalarType::Long);
    run_logp(rows, count);
  });
}

void token_logp_rows_backward(const Tensor& logits, const Tensor& target,
                              const OptionalTensor& inv_temperature, int64_t ignore_index,
                              double logit_scale, double softcap, const OptionalTensor& grad_logp,
                              const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
                              const Tensor& grad) {
  dispatch_floating("logits", logits, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    using Real = typename Accumulate<Element>::type;
    constexpr ScalarType real = real_type<Element>;
    auto rows = logp_arguments<Element>(logits, target, inv_temperature, ignore_index, logit_scale,
                                        softcap, &grad);
    const int64_t count = logits.size(0);
    rows.grad_logp = optional_vector<Real>("grad_logp", grad_logp, count, real);
    rows.grad_entropy = optional_vector<Real>("grad_entropy", grad_entropy, count, real);
    rows.grad_lse = optional_vector<Real>("grad_lse", grad_lse, count, real);
    run_logp(rows, count);
  });
}

void accumulate(const OptionalTensor& accumulator, const Tensor& part, const Tensor& out) {
  dispatch_floating("part", part, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    PartialSum<Element> sums{};
    const int64_t count = part.numel();
    const auto place = [&](const char* argument, const Tensor& tensor, auto*& narrow, auto*& wide) {
      STD_TORCH_CHECK(tensor.numel() == count && tensor.is_contiguous(), argument,
                      " must be contiguous and of the shape of part");
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
    const auto kernel = functions<Element>().add;
    torch::stable::parallel_for(0, count, kElementsPerThread,
                                [&](int64_t begin, int64_t end) { kernel(sums, begin, end); });
  });
}

}  // namespace
}  // namespace trimtab

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, library) {
  library.impl("token_loss_rows", TORCH_BOX(&trimtab::token_loss_rows));
  library.impl("token_logp_rows", TORCH_BOX(&trimtab::token_logp_rows));
  library.impl("token_logp_rows_backward", TORCH_BOX(&trimtab::token_logp_rows_backward));
  library.impl("accumulate", TORCH_BOX(&trimtab::accumulate));
}
