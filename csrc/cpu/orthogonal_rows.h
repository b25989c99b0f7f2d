// What the orthogonal operators do with some rows of a module.
//
// Each instruction set compiles orthogonal_rows.inl into a table of these, and orthogonal.cpp picks
// a table when the library is loaded.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace trimtab {

// A row in memory, and how far apart its elements are.
struct RowRef {
  const void* data;
  int64_t stride;
};

// Makes `count` rows of `width` elements readable as contiguous numbers: `out` gets a pointer to
// each, into `scratch` (count, width) where they have to be converted or gathered.
template <class Real>
using ReadRows = void (*)(const RowRef* rows, int64_t count, int64_t width, Real* scratch,
                          const Real** out);

// Previous rows P of a module against all its current rows C, with G = P C^T.
template <class Real>
struct OverlapSlice {
  const RowRef* previous;
  int64_t previous_count;
  ReadRows<Real> read_previous;
  const RowRef* current;
  int64_t current_count;
  ReadRows<Real> read_current;
  int64_t width;
  Real weight;
  bool squared;
  double value;         // written: weight * sum |G|, or of the squares
  Real* grad_current;   // written: the part of these rows, (current_count, width), or null
  Real* grad_previous;  // written, (previous_count, width), or null
};

// Rows t of a tensor against all rows Q of its basis: out = t - (t Q^T) Q.
struct ProjectionSlice {
  const RowRef* tensor;
  int64_t tensor_count;
  const RowRef* basis;
  int64_t basis_count;
  int64_t width;
  void* out;  // (tensor_count, width) of the tensor's elements
};

template <class Element>
struct OrthogonalFunctions {
  using Real = typename Accumulate<Element>::type;
  ReadRows<Real> read;
  void (*overlap)(OverlapSlice<Real>&);  // of rows that are Element on both sides
  void (*project)(const ProjectionSlice&);
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
