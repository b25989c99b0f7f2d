// Tensor core instructions as loops: who holds which element is PTX's word, the sum is rounded
// once.
#pragma once

#include "common/dtype.h"
#include "cuda_on_cpu/collectives.h"

namespace trimtab {

struct MatrixLane {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// `element(register, which)` is the number in a register; `per_register` columns of k lie in one.
template <class Element>
void mma(const char* name, const char* file, int line, MatrixLane mine, int per_register,
         Element element) {
  const auto complete = [&](const auto& lanes) {
    const int quarter = 4 * per_register;  // columns of k that one register of each lane covers
    const auto lane_at = [&](int i) {
      return static_cast<MatrixLane*>(lanes[static_cast<size_t>(i)]);
    };
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float& d = lane_at(row % 8 * 4 + column / 2)->d[row / 8 * 2 + column % 2];
        double sum = d;
        for (int k = 0; k < 2 * quarter; ++k) {
          const int t = k % quarter / per_register, half = k / quarter, which = k % per_register;
          sum +=
              static_cast<double>(element(lane_at(row % 8 * 4 + t)->a[half * 2 + row / 8], which)) *
              static_cast<double>(element(lane_at(column * 4 + t)->b[half], which));
        }
        d = static_cast<float>(sum);
      }
    }
  };
  cuda_on_cpu::machine().meet({name, file, line}, 0xffffffffu, mine, complete);
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  mma("mma_bf16()", file, line, {d, a, b}, 2, [](uint32_t bits, int which) {
    return to_real(BFloat16{static_cast<uint16_t>(bits >> 16 * which)});
  });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  mma("mma_f16()", file, line, {d, a, b}, 2, [](uint32_t bits, int which) {
    return to_real(Float16{static_cast<uint16_t>(bits >> 16 * which)});
  });
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  mma("mma_tf32()", file, line, {d, a, b}, 1,
      [](uint32_t bits, int) { return bit_cast<float>(bits & 0xffffe000u); });
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;  // to nearest, ties away from zero
}

struct MatrixRow {
  uint32_t* registers;
  const void* row;
};

template <int N>
void load_matrices(const char* name, const char* file, int line, uint32_t (&registers)[N],
                   const void* row, bool transposed) {
  auto& m = cuda_on_cpu::machine();
  if (cuda_on_cpu::lane() < 8 * N &&
      (reinterpret_cast<uintptr_t>(row) % 16 != 0 || !m.in_shared(row, 16)))
    m.fail(std::string(name) +
           " of a row that is not 16 aligned bytes of the block's shared memory");
  MatrixRow mine{registers, row};
  m.meet({name, file, line}, 0xffffffffu, mine, [&](const auto& lanes) {
    const auto lane_at = [&](int i) {
      return static_cast<MatrixRow*>(lanes[static_cast<size_t>(i)]);
    };
    for (int matrix = 0; matrix < N; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) {
        uint32_t both = 0;
        for (int which = 0; which < 2; ++which) {
          const int across = lane / 4, along = lane % 4 * 2 + which;
          const int r = transposed ? along : across, c = transposed ? across : along;
          uint16_t element;
          std::memcpy(&element, static_cast<const uint16_t*>(lane_at(8 * matrix + r)->row) + c, 2);
          both |= uint32_t{element} << 16 * which;
        }
        lane_at(lane)->registers[matrix] = both;
      }
    }
  });
}

template <int N>
void ldmatrix(uint32_t (&registers)[N], const void* row, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  load_matrices("ldmatrix()", file, line, registers, row, false);
}
template <int N>
void ldmatrix_transposed(uint32_t (&registers)[N], const void* row,
                         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  load_matrices("ldmatrix_transposed()", file, line, registers, row, true);
}

}  // namespace trimtab
