// The combination of rows after the plausibility mask, on a GPU.
#pragma once

#include "cuda/contrast.cuh"

namespace trimtab {
namespace {

constexpr int kLogitsThreads = 512;

// Every thread of the cluster receives the largest anchor, or NaN if there is one.
template <class Element>
TRIMTAB_DEVICE float largest_anchor(const ContrastRow<Element>& row, int thread, int threads) {
  float largest = -kInfinity;
  row.sweep_anchor(thread, threads, [&](const auto& a, int) {
    for (const float x : a.at) largest = larger(largest, x);
  });
  float* scratch = shared_memory<float>();
  largest = block_max(largest, scratch);
  if (cluster_size() == 1) return largest;
  if (threadIdx.x == 0) scratch[0] = largest;
  cluster_sync();
  for (unsigned rank = 0; rank < cluster_size(); ++rank)
    largest = larger(largest, *at_rank(scratch, rank));
  cluster_sync();
  return largest;
}

// As many blocks as there are parts take a row. With a mask they are a cluster; without one, they
// have nothing to tell each other.
template <class Element>
__global__ void __launch_bounds__(kLogitsThreads, 2)
    contrastive_logits_kernel(ContrastiveLogits<Element> rows, int64_t count, int parts) {
  const int part = static_cast<int>(blockIdx.x % parts);
  const int thread = part * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  const int threads = parts * static_cast<int>(blockDim.x);
  for (int64_t i = blockIdx.x / parts; i < count; i += gridDim.x / parts) {
    const ContrastRow<Element> row(rows.inputs, i);
    float* const out = rows.out + i * rows.out_stride;
    const float log_beta = at(rows.log_beta, i);
    float threshold = -kInfinity;
    if (log_beta > -kInfinity) threshold = largest_anchor(row, thread, threads) + log_beta;
    const bool unknown = threshold != threshold;
    row.sweep(thread, threads, [&](auto& z, const auto& a, int v) {
      constexpr int n = sizeof(z.at) / sizeof(float);
#pragma unroll
      for (int e = 0; e < n; ++e) {
        if (a.at[e] < threshold) z.at[e] = -kInfinity;
        if (unknown) z.at[e] = threshold;
      }
      write(out, v, z);
    });
  }
}

}  // namespace
}  // namespace trimtab
