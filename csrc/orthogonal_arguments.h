// The checks of the row operators of orthogonality, the same on every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "torch_api.h"

namespace trimtab {

using Tensors = std::vector<Tensor>;

// The memory between the first and the last element of a tensor.
struct Span {
  const char* argument;
  const char *begin, *end;
};

// A tensor is asked for everything once: each question is a call into torch, and there may be a
// thousand tensors. Strides in elements.
struct GivenMatrix {
  const char* data;
  int64_t rows, columns, row_stride, column_stride;
  Span span;
};

inline GivenMatrix given_matrix(const char* argument, const Tensor& tensor, ScalarType dtype,
                                int64_t size, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 2, argument, " must hold tensors of two dimensions");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, argument, " must hold tensors of ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  check_device(argument, tensor, like);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t rows = sizes[0], columns = sizes[1], row_stride = strides[0];
  // That of a single column says nothing.
  const int64_t column_stride = columns > 1 ? strides[1] : 1;
  const auto* data = static_cast<const char*>(tensor.data_ptr());
  const bool empty = rows == 0 || columns == 0;
  STD_TORCH_CHECK(data || empty, argument, " must have memory, got freed storage");
  const int64_t last = (rows - 1) * row_stride + (columns - 1) * column_stride;
  return {data,       rows,          columns,
          row_stride, column_stride, {argument, data, empty ? data : data + (last + 1) * size}};
}

// Refuses outputs that share memory with each other or with an input.
inline void check_apart(std::vector<Span> outputs, const std::vector<Span>& inputs) {
  const auto refuse = [](const Span& output, const Span& other) {
    STD_TORCH_CHECK(false, output.argument, " must not share memory with ", other.argument);
  };
  const auto empty = [](const Span& span) { return span.begin == span.end; };
  outputs.erase(std::remove_if(outputs.begin(), outputs.end(), empty), outputs.end());
  std::sort(outputs.begin(), outputs.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < outputs.size(); ++i)
    if (outputs[i - 1].end > outputs[i].begin) refuse(outputs[i], outputs[i - 1]);
  for (const Span& input : inputs) {
    const auto after =
        std::partition_point(outputs.begin(), outputs.end(),
                             [&](const Span& output) { return output.begin < input.end; });
    if (!empty(input) && after != outputs.begin() && after[-1].end > input.begin)
      refuse(after[-1], input);
  }
}

struct PenaltyArguments {
  const Tensors& previous;
  const std::vector<int64_t>& counts;
  const Tensors& current;
  const OptionalTensor& weight;
  bool squared;
  const Tensor& value;
  const OptionalTensor &grad_current, &grad_previous;
};

inline void check_counts(const PenaltyArguments& arguments) {
  const int64_t modules = arguments.current.size();
  STD_TORCH_CHECK(modules > 0, "current must hold a tensor for each module, got none");
  STD_TORCH_CHECK(static_cast<int64_t>(arguments.counts.size()) == modules,
                  "counts must be of length ", modules, ", got ", arguments.counts.size());
  int64_t left = arguments.previous.size();
  for (int64_t count : arguments.counts) {
    STD_TORCH_CHECK(count >= 0 && count <= left, "counts must be of the tensors of previous, got ",
                    count, " where ", left, " are left");
    left -= count;
  }
  STD_TORCH_CHECK(left == 0, "counts must add up to the tensors of previous, ", left, " are left");
}

// What the penalty writes, checked; null where it is not wanted.
template <class Real>
struct PenaltyOutputs {
  Real *value, *grad_current, *grad_previous;
  const Real* weight;
};

template <class Real>
PenaltyOutputs<Real> penalty_outputs(const PenaltyArguments& arguments, int64_t current_elements,
                                     int64_t previous_elements, const std::vector<Span>& inputs,
                                     const Tensor& like) {
  constexpr ScalarType dtype =
      std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor& value = arguments.value;
  STD_TORCH_CHECK(value.dim() == 0 && value.scalar_type() == dtype, "value must be a scalar of ",
                  torch::headeronly::toString(dtype));
  std::vector<Span> outputs;
  const auto pointer = [&](const char* argument, const Tensor& tensor, int64_t length) {
    check_device(argument, tensor, like);
    const auto* data = static_cast<const char*>(tensor.data_ptr());
    outputs.push_back({argument, data, data + length * sizeof(Real)});
    return static_cast<Real*>(tensor.data_ptr());
  };
  const auto vector = [&](const char* argument, const OptionalTensor& tensor, int64_t length) {
    if (!tensor.has_value()) return static_cast<Real*>(nullptr);
    check_vector(argument, *tensor, length, dtype);
    return pointer(argument, *tensor, length);
  };
  PenaltyOutputs<Real> found{};
  found.value = pointer("value", value, 1);
  found.grad_current = vector("grad_current", arguments.grad_current, current_elements);
  found.grad_previous = vector("grad_previous", arguments.grad_previous, previous_elements);
  check_apart(std::move(outputs), inputs);
  outputs.clear();
  found.weight = vector("weight", arguments.weight, arguments.current.size());
  return found;
}

// A tensor, its basis and where the result goes, with their dtype.
struct GivenProjection {
  ScalarType dtype;
  GivenMatrix tensor, basis;
  void* out;
};

inline std::vector<GivenProjection> given_projections(const Tensors& tensors, const Tensors& bases,
                                                      const Tensors& outs) {
  STD_TORCH_CHECK(bases.size() == tensors.size() && outs.size() == tensors.size(),
                  "bases and outs must hold ", tensors.size(), " tensors, got ", bases.size(),
                  " and ", outs.size());
  std::vector<GivenProjection> given;
  std::vector<Span> inputs, outputs;
  for (size_t m = 0; m < tensors.size(); ++m) {
    const ScalarType dtype = tensors[m].scalar_type();
    int64_t size = 0;
    dispatch_floating("tensors", tensors[m],
                      [&](auto tag) { size = sizeof(typename decltype(tag)::type); });
    const GivenMatrix t = given_matrix("tensors", tensors[m], dtype, size, tensors[0]);
    const GivenMatrix basis = given_matrix("bases", bases[m], dtype, size, tensors[0]);
    const GivenMatrix out = given_matrix("outs", outs[m], dtype, size, tensors[0]);
    STD_TORCH_CHECK(basis.columns == t.columns, "bases must have rows of ", t.columns,
                    " as tensors have, got ", basis.columns);
    STD_TORCH_CHECK(out.rows == t.rows && out.columns == t.columns && outs[m].is_contiguous(),
                    "outs must be contiguous and of the shapes of tensors");
    inputs.push_back(t.span);
    inputs.push_back(basis.span);
    outputs.push_back(out.span);
    given.push_back({dtype, t, basis, outs[m].data_ptr()});
  }
  check_apart(std::move(outputs), inputs);
  return given;
}

}  // namespace trimtab
