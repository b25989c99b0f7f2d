// What one row operator does with a range of rows; see common/token_loss.h for the arithmetic.
//
// Each instruction set compiles token_loss_rows.inl into a table of these, and token_loss.cpp picks
// a table when the library is loaded.
#pragma once

#include <cstdint>

#include "common/token_loss_rows.h"

namespace trimtab {

template <class Element>
struct RowFunctions {
  void (*loss)(const LossRows<Element>&, int64_t begin, int64_t end);
  void (*logp)(const LogpRows<Element>&, int64_t begin, int64_t end);
  void (*add)(const PartialSum<Element>&, int64_t begin, int64_t end);
};

struct RowTable {
  RowFunctions<float> float32;
  RowFunctions<double> float64;
  RowFunctions<BFloat16> bfloat16;
  RowFunctions<Float16> float16;
  const char* name;
};

extern const RowTable generic_rows;
#if defined(__x86_64__)
extern const RowTable avx2_rows;
extern const RowTable avx512_rows;
#endif

}  // namespace trimtab
