// How the row operators of contrast are launched on a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace trimtab {

constexpr int64_t kMostBlocks = int64_t{1} << 30;  // of a launch; the kernels loop over the rest

// Calls f(Tag<element>) where a row is one that the kernels take.
template <class F>
void dispatch_contrast(const Tensor& positive, F&& f) {
  STD_TORCH_CHECK(positive.dim() != 2 || positive.size(1) < int64_t{1} << 30,
                  "positive must have less than 2**30 classes on CUDA, got ", positive.size(1));
  dispatch_to_cuda("positive", positive, f);
}

// Vectors of 16 bytes.
inline int64_t vectors_of_row(const Tensor& positive) {
  const int64_t width = positive.scalar_type() == ScalarType::Float ? 4 : 8;
  return (positive.size(1) + width - 1) / width;
}

// A block for each row. Its threads depend on the length of the row alone: a row's bits are the
// same in every batch.
inline Shape shape_of_rows(const Tensor& positive, int64_t rows, int64_t most_threads) {
  constexpr int64_t kVectorsPerThread = 4, kWarpThreads = 32;
  const int64_t warps = vectors_of_row(positive) / (kVectorsPerThread * kWarpThreads) + 1;
  const int64_t threads = std::min(warps * kWarpThreads, most_threads);
  Shape shape;
  shape.grid = dim3(static_cast<unsigned>(std::min(rows, kMostBlocks)));
  shape.threads = static_cast<unsigned>(threads);
  shape.shared_bytes = static_cast<size_t>(threads / kWarpThreads) * sizeof(float);
  return shape;
}

}  // namespace trimtab
