// Contrast on the CPU: checks, threads, registration.

#include "contrast_arguments.h"
#include "cpu/contrast_rows.h"
#include "cpu/isa.h"

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
void run_logp(const ContrastiveLogp<Element>& rows, int64_t count) {
  const auto kernel = functions<Element>().logp;
  for_each_range(count, rows.inputs.classes,
                 [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

void contrastive_logits_rows(const Tensor& positive, const OptionalTensor& negative,
                             const OptionalTensor& anchor, double alpha,
                             const OptionalTensor& alpha_rows, double log_beta,
                             const OptionalTensor& log_beta_rows, const Tensor& out) {
  dispatch_floating("positive", positive, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    const auto rows = contrastive_logits_arguments<Element>(
        positive, negative, anchor, alpha, alpha_rows, log_beta, log_beta_rows, out);
    const auto kernel = functions<Element>().logits;
    for_each_range(out.size(0), rows.inputs.classes,
                   [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  });
}

void contrastive_logp_rows(const Tensor& positive, const OptionalTensor& negative,
                           const OptionalTensor& anchor, const Tensor& target, double alpha,
                           const OptionalTensor& alpha_rows, double temperature,
                           const OptionalTensor& temperature_rows, int64_t ignore_index,
                           const Tensor& logp) {
  dispatch_floating("positive", positive, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    using Real = typename Accumulate<Element>::type;
    auto rows =
        contrastive_logp_arguments<Element>(positive, negative, anchor, target, alpha, alpha_rows,
                                            temperature, temperature_rows, ignore_index);
    rows.logp = vector_of<Real>("logp", logp, target.size(0), positive);
    run_logp(rows, target.size(0));
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
    auto rows =
        contrastive_logp_arguments<Element>(positive, negative, anchor, target, alpha, alpha_rows,
                                            temperature, temperature_rows, ignore_index);
    set_grads(rows, positive, anchor, target, grad_logp, grad_positive, grad_negative, grad_anchor);
    run_logp(rows, target.size(0));
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
    const auto rows = contrastive_sample_arguments<Element>(
        positive, negative, anchor, positive_rows, negative_rows, anchor_rows, alpha, alpha_rows,
        log_beta, log_beta_rows, temperature, temperature_rows, top_k, top_k_rows, tail, tail_rows,
        log_min_p, log_min_p_rows, seed, seed_rows, position, position_rows, token, logp, kept);
    const auto kernel = functions<Element>().sample;
    for_each_range(token.size(0), rows.inputs.classes,
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
