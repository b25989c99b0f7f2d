// Token loss on a GPU: checks, how rows are cut, launches, registration.

#include "cuda/token_loss.cuh"

#include <algorithm>

#include "cuda/launch.h"
#include "token_loss_arguments.h"

namespace trimtab {
namespace {

constexpr int64_t kRowsPerLaunch = int64_t{1} << 27;  // times 8 blocks, as many as a grid has
// Of so many, one can load, one compute and one write. Each needs few warps: a thread has the 8
// elements of a vector to work on at a time, and what a row costs beside its elements grows with
// the warps.
constexpr int64_t kBlocksPerMultiprocessor = 3;
constexpr int64_t kThreads = 256;
constexpr int64_t kVectorsPerThread = 4;

struct Launches {
  Cut cut;
  Shape shape;  // of a row
};

// The smallest cluster of which as many blocks fit a multiprocessor as should; else the largest,
// with all the shared memory that a block can have.
template <class Element>
Launches launches_for(const Tensor& logits) {
  constexpr int64_t width = Slice<Element>::width, system = 1024, own = sizeof(Exchange);
  const Device& device = device_of(logits);
  const int64_t vectors = (logits.size(1) + width - 1) / width;
  const int64_t share = device.shared_per_multiprocessor / kBlocksPerMultiprocessor - system;
  const unsigned largest = device.major >= 9 ? 8 : 1;
  int log2 = 0;
  while (1u << log2 < largest && own + 16 * ((vectors >> log2) + 1) > share) ++log2;
  const unsigned cluster = 1u << log2;
  const int64_t slice = (vectors + cluster - 1) / cluster;
  const int64_t held = std::min(slice, (device.shared_per_block - own) / 16);
  const int64_t warps = (slice + kVectorsPerThread * kWarp - 1) / (kVectorsPerThread * kWarp);
  const int64_t most = own + 16 * slice > share ? kMostThreads : kThreads;
  const auto threads = static_cast<unsigned>(std::clamp<int64_t>(warps * kWarp, kWarp, most));
  Launches launches;
  launches.cut = {0, static_cast<int>(slice), static_cast<int>(held), log2};
  launches.shape = {dim3(cluster), threads, static_cast<size_t>(own + 16 * held), cluster};
  return launches;
}

// Calls start(cut, shape) for all rows.
template <class Element, class F>
void launch_rows(const Tensor& logits, F&& start) {
  STD_TORCH_CHECK(logits.size(1) < int64_t{1} << 30,
                  "logits must have less than 2**30 classes on CUDA, got ", logits.size(1));
  const Guard guard(logits);
  const auto [cut, shape] = launches_for<Element>(logits);
  const int64_t rows = logits.size(0);
  for (int64_t first = 0; first < rows; first += kRowsPerLaunch) {
    Cut part = cut;
    part.first_row = first;
    Shape grid = shape;
    grid.grid.x *= static_cast<unsigned>(std::min(rows - first, kRowsPerLaunch));
    start(part, grid);
  }
}

LogitTransform<float> transform_of(double logit_scale, double softcap) {
  return {static_cast<float>(logit_scale), static_cast<float>(softcap), 1.0f};
}

void token_loss_rows(const Tensor& logits, const Tensor& target, const OptionalTensor& coef,
                     const OptionalTensor& class_weight, int64_t ignore_index, double logit_scale,
                     double softcap, double label_smoothing, double lse_square_scale,
                     const Tensor& loss, const OptionalTensor& grad) {
  dispatch_to_cuda("logits", logits, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    const auto rows =
        loss_arguments<Element>(logits, target, coef, class_weight, ignore_index, logit_scale,
                                softcap, label_smoothing, lse_square_scale, loss, grad);
    const LossOptions<float> options{static_cast<float>(label_smoothing),
                                     static_cast<float>(lse_square_scale)};
    const auto kernel = softcap > 0 ? loss_kernel<Element, true> : loss_kernel<Element, false>;
    launch_rows<Element>(logits, [&](const Cut& cut, const Shape& shape) {
      launch(kernel, shape, stream_of(logits), rows, transform_of(logit_scale, softcap), options,
             cut);
    });
  });
}

template <class Element>
void run_logp(const LogpRows<Element>& rows, const Tensor& logits) {
  const auto kernel = rows.softcap > 0 ? logp_kernel<Element, true> : logp_kernel<Element, false>;
  const auto transform = transform_of(rows.logit_scale, rows.softcap);
  launch_rows<Element>(logits, [&](const Cut& cut, const Shape& shape) {
    launch(kernel, shape, stream_of(logits), rows, transform, cut);
  });
}

void token_logp_rows(const Tensor& logits, const Tensor& target,
                     const OptionalTensor& inv_temperature, int64_t ignore_index,
                     double logit_scale, double softcap, const Tensor& logp, const Tensor& entropy,
                     const Tensor& lse, const Tensor& predicted, const OptionalTensor& grad) {
  dispatch_to_cuda("logits", logits, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    auto rows = logp_arguments<Element>(logits, target, inv_temperature, ignore_index, logit_scale,
                                        softcap, pointer_to(grad));
    set_results(rows, logits, logp, entropy, lse, predicted);
    run_logp(rows, logits);
  });
}

void token_logp_rows_backward(const Tensor& logits, const Tensor& target,
                              const OptionalTensor& inv_temperature, int64_t ignore_index,
                              double logit_scale, double softcap, const OptionalTensor& grad_logp,
                              const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
                              const Tensor& grad) {
  dispatch_to_cuda("logits", logits, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    auto rows = logp_arguments<Element>(logits, target, inv_temperature, ignore_index, logit_scale,
                                        softcap, &grad);
    set_upstreams(rows, logits, grad_logp, grad_entropy, grad_lse);
    run_logp(rows, logits);
  });
}

void accumulate(const OptionalTensor& accumulator, const Tensor& part, const Tensor& out) {
  dispatch_to_cuda("part", part, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    const auto sums = sum_arguments<Element>(accumulator, part, out);
    const Guard guard(part);
    const int64_t count = part.numel(), to_block = 256 * Slice<Element>::width;
    const bool wide = is_aligned(part.data_ptr()) && is_aligned(out.data_ptr()) &&
                      (!accumulator.has_value() || is_aligned(accumulator->data_ptr()));
    const int64_t most = int64_t{32} * device_of(part).multiprocessors;
    const auto blocks = static_cast<unsigned>(std::min((count + to_block - 1) / to_block, most));
    launch(accumulate_kernel<Element>, {dim3(blocks), 256}, stream_of(part), sums, count, wide);
  });
}

}  // namespace
}  // namespace trimtab

TRIMTAB_REGISTER_CUDA(library) {
  library.impl("token_loss_rows", TORCH_BOX(&trimtab::token_loss_rows));
  library.impl("token_logp_rows", TORCH_BOX(&trimtab::token_logp_rows));
  library.impl("token_logp_rows_backward", TORCH_BOX(&trimtab::token_logp_rows_backward));
  library.impl("accumulate", TORCH_BOX(&trimtab::accumulate));
}
