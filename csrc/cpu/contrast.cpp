// Contrast on the CPU: checks, threads, registration.

#include "cpu/contrast_rows.h"
#include "cpu/isa.h"
#include "torch_api.h"

namespace trimtab {
namespace {

const ContrastTable& contrast_for_this_processor() {
#if defined(__x86_64__)
  return table_for_this_processor(generic_contrast, avx2_contrast, avx512_contrast);
#else
  refuse_unless_allowed(generic_contrast.name);
  return generic_contrast;
#endif
}

template <class Element>
const ContrastFunctions<Element>& functions() {
  static const ContrastTable& table = contrast_for_this_processor();
  return functions_of<Element>(table);
}

// Below this many elements a second thread costs more than it does.
constexpr int64_t kElementsPerThread = 32768;

template <class F>
void for_each_range(int64_t rows, int64_t classes, F&& f) {
  const int64_t grain = kElementsPerThread / (classes > 0 ? classes : 1);
  torch::stable::parallel_for(0, rows, grain > 1 ? grain : 1, f);
}

template <class Element>
constexpr ScalarType real_type =
    std::is_same_v<Element, double> ? ScalarType::Double : ScalarType::Float;

template <class Value>
constexpr ScalarType dtype_of = std::is_same_v<Value, int64_t>  ? ScalarType::Long
                                : std::is_same_v<Value, double> ? ScalarType::Double
                                                                : ScalarType::Float;

template <class Value>
Value* vector_of(const char* argument, const Tensor& tensor, int64_t length) {
  check_vector(argument, tensor, length, dtype_of<Value>);
  return static_cast<Value*>(tensor.data_ptr());
}

template <class Value, class Number>
PerRow<Value> per_row(const char* argument, Number number, const OptionalTensor& rows,
                      int64_t count) {
  return {static_cast<Value>(number),
          rows.has_value() ? vector_of<Value>(argument, *rows, count) : nullptr};
}

template <class Element>
LogitRows<Element> logit_rows(const char* argument, const Tensor& tensor, const Tensor& like,
                              const char* map_argument, const OptionalTensor& map, int64_t count) {
  const int64_t length = map.has_value() ? tensor.size(0) : count;
  check_rows(argument, tensor, length, like.size(1));
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), argument,
                  " must be of the dtype of positive");
  return {true, static_cast<const Element*>(tensor.data_ptr()), tensor.stride(0), length,
          map.has_value() ? vector_of<int64_t>(map_argument, *map, count) : nullptr};
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
  inputs.alpha = per_row<Real>("alpha_rows", alpha, alpha_rows, count);
  return inputs;
}

// A matrix to be written, whose rows do not overlap.
template <class Value>
Value* check_output(const char* argument, const Tensor& out, int64_t rows, int64_t columns,
                    ScalarType dtype) {
  check_rows(argument, out, rows, columns);
  STD_TORCH_CHECK(out.scalar_type() == dtype, argument, " must be ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(out.scalar_type()));
  STD_TORCH_CHECK(rows <= 1 || out.stride(0) >= columns, argument,
                  " must have rows that do not overlap, got stride ", out.stride(0));
  return static_cast<Value*>(out.data_ptr());
}

void contrastive_logits_rows(const Tensor& positive, const OptionalTensor& negative,
                             const OptionalTensor& anchor, double alpha,
                             const OptionalTensor& alpha_rows, double log_beta,
                             const OptionalTensor& log_beta_rows, const Tensor& out) {
  dispatch_floating("positive", positive, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    using Real = typename Accumulate<Element>::type;
    STD_TORCH_CHECK(out.dim() == 2, "out must be of shape (B, V)");
    const int64_t count = out.size(0);
    ContrastiveLogits<Element> rows{};
    rows.inputs =
        contrast_inputs<Element>(positive, negative, anchor, {}, alpha, alpha_rows, count);
    rows.log_beta = per_row<Real>("log_beta_rows", log_beta, log_beta_rows, count);
    rows.out = check_output<Real>("out", out, count, rows.inputs.classes, real_type<Element>);
    rows.out_stride = out.stride(0);
    const auto kernel = functions<Element>().logits;
    for_each_range(count, rows.inputs.classes,
                   [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  });
}

template <class Element>
ContrastiveLogp<Element> logp_arguments(const Tensor& positive, const OptionalTensor& negative,
                                        const OptionalTensor& anchor, const Tensor& target,
                                        double alpha, const OptionalTensor& alpha_rows,
                                        double temperature, const OptionalTensor& temperature_rows,
                                        int64_t ignore_index) {
  using Real = typename Accumulate<Element>::type;
  STD_TORCH_CHECK(target.dim() == 1, "target must be of shape (B,)");
  const int64_t count = target.size(0);
  ContrastiveLogp<Element> rows{};
  rows.inputs = contrast_inputs<Element>(positive, negative, anchor, {}, alpha, alpha_rows, count);
  rows.target = vector_of<int64_t>("target", target, count);
  rows.ignore_index = ignore_index;
  rows.temperature = per_row<Real>("temperature_rows", temperature, temperature_rows, count);
  return rows;
}

void contrastive_logp_rows(const Tensor& positive, const OptionalTensor& negative,
                           const OptionalTensor& anchor, const Tensor& target, double alpha,
                           const OptionalTensor& alpha_rows, double temperature,
                           const OptionalTensor& temperature_rows, int64_t ignore_index,
                           const Tensor& logp) {
  dispatch_floating("positive", positive, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    using Real = typename Accumulate<Element>::type;
    auto rows = logp_arguments<Element>(positive, negative, anchor, target, alpha, alpha_rows,
                                        temperature, temperature_rows, ignore_index);
    rows.logp = vector_of<Real>("logp", logp, target.size(0));
    const auto kernel = functions<Element>().logp;
    for_each_range(target.size(0), rows.inputs.classes,
                   [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  });
}

void contrastive_logp_rows_backward(const Tensor& positive, const OptionalTensor& negative,
                                    const OptionalTensor& anchor, const Tensor& target,
                                    double alpha, const OptionalTensor& alpha_rows,
                                    double temperature, const OptionalTensor& temperature_rows,
                                    int64_t ignore_index, const Tensor& grad_logp,
                                    const OptionalTensor& grad_positive,
                                    const OptionalTensor& grad_negative,
                                    const OptionalTensor& grad_anchor) {
  dispatch_floating("positive", positive, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    using Real = typename Accumulate<Element>::type;
    auto rows = logp_arguments<Element>(positive, negative, anchor, target, alpha, alpha_rows,
                                        temperature, temperature_rows, ignore_index);
    const int64_t count = target.size(0);
    rows.grad_logp = vector_of<Real>("grad_logp", grad_logp, count);
    const auto grad_rows = [&](const char* argument,
                               const OptionalTensor& grad) -> GradRows<Element> {
      if (!grad.has_value()) return {nullptr, 0};
      return {check_output<Element>(argument, *grad, count, rows.inputs.classes,
                                    positive.scalar_type()),
              grad->stride(0)};
    };
    STD_TORCH_CHECK(anchor.has_value() || !grad_anchor.has_value(),
                    "grad_anchor must be None without an anchor");
    rows.grad_positive = grad_rows("grad_positive", grad_positive);
    rows.grad_negative = grad_rows("grad_negative", grad_negative);
    rows.grad_anchor = grad_rows("grad_anchor", grad_anchor);
    const auto kernel = functions<Element>().logp;
    for_each_range(count, rows.inputs.classes,
                   [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  });
}

void contrastive_sample_rows(const Tensor& positive, const OptionalTensor& negative,
                             const OptionalTensor& anchor, const OptionalTensor& positive_rows,
                             const OptionalTensor& negative_rows, const OptionalTensor& anchor_rows,
                             double alpha, const OptionalTensor& alpha_rows, double log_beta,
                             const OptionalTensor& log_beta_rows, double temperature,
                             const OptionalTensor& temperature_rows, int64_t top_k,
                             const OptionalTensor& top_k_rows, double tail,
                             const OptionalTensor& tail_rows, double log_min_p,
                             const OptionalTensor& log_min_p_rows, int64_t seed,
                             const OptionalTensor& seed_rows, int64_t position,
                             const OptionalTensor& position_rows, const Tensor& token,
                             const Tensor& logp, const Tensor& kept) {
  dispatch_floating("positive", positive, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    using Real = typename Accumulate<Element>::type;
    STD_TORCH_CHECK(token.dim() == 1, "token must be of shape (B,)");
    const int64_t count = token.size(0);
    ContrastiveSample<Element> rows{};
    rows.inputs = contrast_inputs<Element>(positive, negative, anchor,
                                           {positive_rows, negative_rows, anchor_rows}, alpha,
                                           alpha_rows, count);
    rows.log_beta = per_row<Real>("log_beta_rows", log_beta, log_beta_rows, count);
    rows.temperature = per_row<Real>("temperature_rows", temperature, temperature_rows, count);
    rows.top_k = per_row<int64_t>("top_k_rows", top_k, top_k_rows, count);
    rows.tail = per_row<Real>("tail_rows", tail, tail_rows, count);
    rows.log_min_p = per_row<Real>("log_min_p_rows", log_min_p, log_min_p_rows, count);
    rows.seed = per_row<int64_t>("seed_rows", seed, seed_rows, count);
    rows.position = per_row<int64_t>("position_rows", position, position_rows, count);
    rows.token = vector_of<int64_t>("token", token, count);
    rows.logp = vector_of<Real>("logp", logp, count);
    rows.kept = vector_of<int64_t>("kept", kept, count);
    const auto kernel = functions<Element>().sample;
    for_each_range(count, rows.inputs.classes,
                   [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  });
}

}  // namespace
}  // namespace trimtab

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, library) {
  library.impl("contrastive_logits_rows", TORCH_BOX(&trimtab::contrastive_logits_rows));
  library.impl("contrastive_logp_rows", TORCH_BOX(&trimtab::contrastive_logp_rows));
  library.impl("contrastive_logp_rows_backward",
               TORCH_BOX(&trimtab::contrastive_logp_rows_backward));
  library.impl("contrastive_sample_rows", TORCH_BOX(&trimtab::contrastive_sample_rows));
}
