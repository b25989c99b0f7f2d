// Token loss on the CPU: checks, the choice of an instruction set, threads, registration.

#include "cpu/isa.h"
#include "cpu/token_loss_rows.h"
#include "token_loss_arguments.h"

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
void run_logp(const LogpRows<Element>& rows, int64_t count) {
  const auto kernel = functions<Element>().logp;
  torch::stable::parallel_for(0, count, rows_per_thread(rows.classes),
                              [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

void token_loss_rows(const Tensor& logits, const Tensor& target, const OptionalTensor& coef,
                     const OptionalTensor& class_weight, int64_t ignore_index, double logit_scale,
                     double softcap, double label_smoothing, double lse_square_scale,
                     const Tensor& loss, const OptionalTensor& grad) {
  dispatch_floating("logits", logits, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    const auto rows =
        loss_arguments<Element>(logits, target, coef, class_weight, ignore_index, logit_scale,
                                softcap, label_smoothing, lse_square_scale, loss, grad);
    const auto kernel = functions<Element>().loss;
    torch::stable::parallel_for(0, logits.size(0), rows_per_thread(rows.classes),
                                [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  });
}

void token_logp_rows(const Tensor& logits, const Tensor& target,
                     const OptionalTensor& inv_temperature, int64_t ignore_index,
                     double logit_scale, double softcap, const Tensor& logp, const Tensor& entropy,
                     const Tensor& lse, const Tensor& predicted, const OptionalTensor& grad) {
  dispatch_floating("logits", logits, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    auto rows = logp_arguments<Element>(logits, target, inv_temperature, ignore_index, logit_scale,
                                        softcap, pointer_to(grad));
    set_results(rows, logits, logp, entropy, lse, predicted);
    run_logp(rows, logits.size(0));
  });
}

void token_logp_rows_backward(const Tensor& logits, const Tensor& target,
                              const OptionalTensor& inv_temperature, int64_t ignore_index,
                              double logit_scale, double softcap, const OptionalTensor& grad_logp,
                              const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
                              const Tensor& grad) {
  dispatch_floating("logits", logits, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    auto rows = logp_arguments<Element>(logits, target, inv_temperature, ignore_index, logit_scale,
                                        softcap, &grad);
    set_upstreams(rows, logits, grad_logp, grad_entropy, grad_lse);
    run_logp(rows, logits.size(0));
  });
}

void accumulate(const OptionalTensor& accumulator, const Tensor& part, const Tensor& out) {
  dispatch_floating("part", part, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    const auto sums = sum_arguments<Element>(accumulator, part, out);
    const auto kernel = functions<Element>().add;
    torch::stable::parallel_for(0, part.numel(), kElementsPerThread,
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
