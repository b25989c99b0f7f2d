// What one row operator of contrast does with a range of rows; see common/contrast.h for the
// arithmetic.
//
// Each instruction set compiles contrast_rows.inl into a table of these, and contrast.cpp picks a
// table when the library is loaded.
#pragma once

#include <cstdint>

#include "common/contrast_rows.h"

namespace trimtab {

template <class Element>
struct ContrastFunctions {
  void (*logits)(const ContrastiveLogits<Element>&, int64_t begin, int64_t end);
  void (*logp)(const ContrastiveLogp<Element>&, int64_t begin, int64_t end);
  void (*sample)(const ContrastiveSample<Element>&, int64_t begin, int64_t end);
};

struct ContrastTable {
  ContrastFunctions<float> float32;
  ContrastFunctions<double> float64;
  ContrastFunctions<BFloat16> bfloat16;
  ContrastFunctions<Float16> float16;
  const char* name;
};

extern const ContrastTable generic_contrast;
#if defined(__x86_64__)
extern const ContrastTable avx2_contrast;
extern const ContrastTable avx512_contrast;
#endif

}  // namespace trimtab
