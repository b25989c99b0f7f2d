// The only file that includes torch's headers. They are LibTorch's stable ABI, floor 2.10, so that
// one library serves every later torch and every Python.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/dtype.h"

namespace trimtab {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<element>) for the floating dtypes of the package.
template <class F>
void dispatch_floating(const char* argument, const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(Tag<float>{});
    case ScalarType::Double: return f(Tag<double>{});
    case ScalarType::BFloat16: return f(Tag<BFloat16>{});
    case ScalarType::Half: return f(Tag<Float16>{});
    default:
      STD_TORCH_CHECK(false, argument, " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline const Tensor* pointer_to(const OptionalTensor& tensor) {
  return tensor.has_value() ? &*tensor : nullptr;
}

inline void check_device(const char* argument, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
      argument, " must be on the device of the other tensors");
}

// A contiguous vector of the given length and dtype.
inline void check_vector(const char* argument, const Tensor& tensor, int64_t length,
                         ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == length && tensor.is_contiguous(), argument,
                  " must be contiguous and of length ", length);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, argument, " must be ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// A matrix whose rows are contiguous, at any distance from each other.
inline void check_rows(const char* argument, const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
                  argument, " must be of shape (", rows, ", ", columns, ")");
  STD_TORCH_CHECK(rows == 0 || columns <= 1 || tensor.stride(1) == 1, argument,
                  " must have contiguous rows, got stride ", tensor.stride(1));
}

}  // namespace trimtab
