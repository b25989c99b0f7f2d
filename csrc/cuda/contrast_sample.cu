// Tokens of contrasted rows on a GPU: checks, how rows are cut, launches.

#include "cuda/contrast_sample.cuh"

#include <algorithm>
#include <optional>

#include "contrast_arguments.h"
#include "cuda/contrast_launch.h"

namespace trimtab {
namespace {

// So many can hide each other's barriers. Each needs few warps: what a round of the search costs
// beside its scores grows with them.
constexpr int64_t kSampleBlocksPerMultiprocessor = 2;
constexpr int64_t kScoresPerThread = 16;

struct SampleLaunch {
  SampleCut cut;
  Shape shape;
  bool in_scratch;
};

// The smallest cluster of which as many blocks fit a multiprocessor as should, else the largest.
// Where a row has no room in it either, in scratch memory.
SampleLaunch sample_launch(const Tensor& positive, int64_t rows) {
  constexpr int64_t system = 1024, own = sizeof(SampleExchange);
  const Device& device = device_of(positive);
  const int64_t classes = positive.size(1);
  const int64_t share = device.shared_per_multiprocessor / kSampleBlocksPerMultiprocessor - system;
  const unsigned largest = device.major >= 9 ? kLargestCluster : 1;
  const auto slice_of = [&](unsigned blocks) {
    return ((classes + blocks - 1) / blocks + 7) / 8 * 8;
  };
  const auto bytes_of = [&](unsigned blocks) { return own + 4 * slice_of(blocks); };
  unsigned cluster = 1;
  while (cluster < largest && bytes_of(cluster) > share) cluster *= 2;
  SampleLaunch launch;
  launch.in_scratch = bytes_of(cluster) > device.shared_per_block;
  launch.cut = {rows, static_cast<int>(slice_of(cluster)), nullptr};
  const int64_t resident = 2 * int64_t{device.multiprocessors};
  const int64_t blocks = launch.in_scratch ? std::max<int64_t>(resident, cluster) : kMostBlocks;
  const int64_t clusters = std::min(rows, blocks / cluster);
  const int64_t warps = (slice_of(cluster) / kScoresPerThread + kWarp - 1) / kWarp;
  launch.shape.grid = dim3(static_cast<unsigned>(clusters * cluster));
  launch.shape.threads =
      static_cast<unsigned>(std::clamp<int64_t>(warps * kWarp, kWarp, kMostSampleThreads));
  launch.shape.shared_bytes = static_cast<size_t>(launch.in_scratch ? own : bytes_of(cluster));
  launch.shape.cluster = cluster;
  return launch;
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
  dispatch_contrast(positive, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    const auto rows = contrastive_sample_arguments<Element>(
        positive, negative, anchor, positive_rows, negative_rows, anchor_rows, alpha, alpha_rows,
        log_beta, log_beta_rows, temperature, temperature_rows, top_k, top_k_rows, tail, tail_rows,
        log_min_p, log_min_p_rows, seed, seed_rows, position, position_rows, token, logp, kept);
    if (token.size(0) == 0) return;
    const Guard guard(positive);
    SampleLaunch planned = sample_launch(positive, token.size(0));
    std::optional<Tensor> scratch;
    if (planned.in_scratch) {
      scratch = torch::stable::new_empty(
          positive, {int64_t{planned.shape.grid.x} * planned.cut.slice}, ScalarType::Float);
      planned.cut.scratch = static_cast<float*>(scratch->data_ptr());
    }
    launch(contrastive_sample_kernel<Element>, planned.shape, stream_of(positive), rows,
           planned.cut);
  });
}

}  // namespace
}  // namespace trimtab

TRIMTAB_REGISTER_CUDA(library) {
  library.impl("contrastive_sample_rows", TORCH_BOX(&trimtab::contrastive_sample_rows));
}
