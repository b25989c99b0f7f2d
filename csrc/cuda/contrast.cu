// Contrast on a GPU: checks, how rows are cut, launches. The sampler has a file of its own.

#include <algorithm>

#include "contrast_arguments.h"
#include "cuda/contrast_launch.h"
#include "cuda/contrast_logits.cuh"
#include "cuda/contrast_logp.cuh"

namespace trimtab {
namespace {

constexpr int64_t kLogitsBlocksPerMultiprocessor = 4;
constexpr unsigned kLargestCluster = 8;

// Few rows are cut into parts, so that every multiprocessor has work. Those with a mask need the
// largest anchor of the whole row, which the blocks of a cluster can tell each other.
int64_t parts_of_row(const Tensor& positive, int64_t rows, bool masked, unsigned threads) {
  const Device& device = device_of(positive);
  const int64_t useful = (vectors_of_row(positive) + threads - 1) / threads;
  const int64_t wanted = kLogitsBlocksPerMultiprocessor * device.multiprocessors / rows;
  const int64_t parts = std::max<int64_t>(std::min(wanted, useful), 1);
  if (!masked) return parts;
  const unsigned largest = device.major >= 9 ? kLargestCluster : 1;
  unsigned cluster = 1;
  while (cluster < largest && 2 * cluster <= parts) cluster *= 2;
  return cluster;
}

void contrastive_logits_rows(const Tensor& positive, const OptionalTensor& negative,
                             const OptionalTensor& anchor, double alpha,
                             const OptionalTensor& alpha_rows, double log_beta,
                             const OptionalTensor& log_beta_rows, const Tensor& out) {
  dispatch_contrast(positive, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    const auto rows = contrastive_logits_arguments<Element>(
        positive, negative, anchor, alpha, alpha_rows, log_beta, log_beta_rows, out);
    const int64_t count = out.size(0);
    if (count == 0) return;
    const Guard guard(positive);
    const bool masked = rows.log_beta.rows || rows.log_beta.number > -kInfinity;
    Shape shape = shape_of_rows(positive, count, kLogitsThreads);
    const int64_t parts = parts_of_row(positive, count, masked, shape.threads);
    shape.grid = dim3(static_cast<unsigned>(std::min(count, kMostBlocks / parts) * parts));
    if (masked) shape.cluster = static_cast<unsigned>(parts);
    launch(contrastive_logits_kernel<Element>, shape, stream_of(positive), rows, count,
           static_cast<int>(parts));
  });
}

void contrastive_logp_rows(const Tensor& positive, const OptionalTensor& negative,
                           const OptionalTensor& anchor, const Tensor& target, double alpha,
                           const OptionalTensor& alpha_rows, double temperature,
                           const OptionalTensor& temperature_rows, int64_t ignore_index,
                           const Tensor& logp) {
  dispatch_contrast(positive, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    auto rows =
        contrastive_logp_arguments<Element>(positive, negative, anchor, target, alpha, alpha_rows,
                                            temperature, temperature_rows, ignore_index);
    const int64_t count = target.size(0);
    rows.logp = vector_of<float>("logp", logp, count, positive);
    const Guard guard(positive);
    launch(contrastive_logp_kernel<Element>, shape_of_rows(positive, count, kLogpThreads),
           stream_of(positive), rows, count);
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
  dispatch_contrast(positive, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    auto rows =
        contrastive_logp_arguments<Element>(positive, negative, anchor, target, alpha, alpha_rows,
                                            temperature, temperature_rows, ignore_index);
    set_grads(rows, positive, anchor, target, grad_logp, grad_positive, grad_negative, grad_anchor);
    const int64_t count = target.size(0);
    const Guard guard(positive);
    launch(contrastive_logp_backward_kernel<Element>,
           shape_of_rows(positive, count, kBackwardThreads), stream_of(positive), rows, count);
  });
}

}  // namespace
}  // namespace trimtab

TRIMTAB_REGISTER_CUDA(library) {
  library.impl("contrastive_logits_rows", TORCH_BOX(&trimtab::contrastive_logits_rows));
  library.impl("contrastive_logp_rows", TORCH_BOX(&trimtab::contrastive_logp_rows));
  library.impl("contrastive_logp_rows_backward",
               TORCH_BOX(&trimtab::contrastive_logp_rows_backward));
}
