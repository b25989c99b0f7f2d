// What one thread does for the orthogonal operators.
//
// Each instruction set compiles orthogonal_rows.inl into a table of these, and orthogonal.cpp picks
// a table when the library is loaded. The threads take items from one counter until none is left:
// what an item computes depends neither on its thread nor on the other items.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/dtype.h"

namespace trimtab {

// Rows of a matrix, at strides in elements.
template <class Element>
struct Rows {
  const Element* data;
  int64_t count, row_stride, column_stride;
};

// Rows of a dtype that only `pack` knows: it writes them in the order that the kernels read.
template <class Real>
struct PackableRows {
  Rows<void> rows;
  void (*pack)(const Rows<void>& rows, int64_t columns, Real* packed);
};

template <class Element>
struct PenaltyModule {
  using Real = typename Accumulate<Element>::type;
  // Several, of so many rows together.
  const Rows<Element>* previous;
  int64_t rows;
  PackableRows<Real> current;
  int64_t columns;
  Real weight;
  // Contiguous, or null; grad_previous is that of all the tensors one after the other.
  Real *grad_current, *grad_previous;
};

// Rows [begin, end) of a module's `previous`. Their part of the gradient of `current`, but for the
// weight and times `scale`, goes to `grad_current` where that is not null.
template <class Element>
struct PenaltyChunk {
  using Real = typename Accumulate<Element>::type;
  const PenaltyModule<Element>* module;
  int64_t begin, end;
  Real scale;
  Real* grad_current;
  double value;
};

template <class Element>
struct PenaltyWork {
  PenaltyChunk<Element>* chunks;
  int64_t count;
  bool squared;
};

// The gradient of a module whose rows were several chunks: `scale` times the sum of theirs.
template <class Real>
struct PartialGradients {
  const Real* parts;
  int64_t count, length;
  Real scale;
  Real* out;
};

// Contiguous rows `out`: a tensor's rows without what lies in the span of `basis`.
template <class Element>
struct Projection {
  Rows<void> rows;
  Rows<Element> basis;
  int64_t columns;
  Element* out;
};

template <class Element>
struct ProjectionWork {
  const Projection<Element>* items;
  int64_t count;
};

template <class Element>
struct OrthogonalFunctions {
  using Real = typename Accumulate<Element>::type;
  void (*pack)(const Rows<void>& rows, int64_t columns, Real* packed);
  void (*penalty)(const PenaltyWork<Element>&, std::atomic<int64_t>& next);
  void (*add_parts)(const PartialGradients<Real>&, int64_t begin, int64_t end);
  void (*project)(const ProjectionWork<Element>&, std::atomic<int64_t>& next);
};

struct OrthogonalTable {
  OrthogonalFunctions<float> float32;
  OrthogonalFunctions<double> float64;
  OrthogonalFunctions<BFloat16> bfloat16;
  OrthogonalFunctions<Float16> float16;
  const char* name;
};

extern const OrthogonalTable generic_orthogonal;
#if defined(__x86_64__)
extern const OrthogonalTable avx2_orthogonal;
extern const OrthogonalTable avx512_orthogonal;
extern const OrthogonalTable avx512bf16_orthogonal;
#endif

}  // namespace trimtab
