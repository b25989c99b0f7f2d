// Elements of a row as the float32 numbers that kernels compute with.
#pragma once

#include "common/dtype.h"
#include "cuda/device.cuh"

namespace trimtab {

template <int N>
struct Numbers {
  float at[N];
};

template <int N, class Element>
TRIMTAB_DEVICE Numbers<N> to_numbers(const Vector<Element, N>& vector) {
  Numbers<N> numbers;
  if constexpr (std::is_same_v<Element, BFloat16> && N % 2 == 0) {
    // One instruction for an element; taken out of a register by itself, the upper one costs two.
    const auto words = bit_cast<Vector<uint32_t, N / 2>>(vector);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      numbers.at[2 * i] = bit_cast<float>(words.at[i] << 16);
      numbers.at[2 * i + 1] = bit_cast<float>(words.at[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) numbers.at[e] = to_real(vector.at[e]);
  }
  return numbers;
}

}  // namespace trimtab
