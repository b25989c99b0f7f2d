// Combinations of rows of C: the gradient of P, S C, and what is left of rows outside of a
// subspace, P - G C.
#pragma once

#include "cuda/orthogonal_products.cuh"

namespace trimtab {
namespace {

// A block makes so many rows and columns of the result, from so many ranks at a time.
constexpr int kSpreadRows = 64, kSpreadColumns = 128, kSpreadRanks = 32;
constexpr int kSpreadPitch = kSpreadColumns + 4;  // of the sums

struct SpreadWork {
  Table table;
  bool projects;         // P - G C, else S C
  bool squared;          // the gradient's factor
  const float* weight;   // of the gradient, or null
  const float* factors;  // S, or parts of G
  int terms;             // numbers of 8 bits that stand for one
};

// Factors [first, first + kSpreadRanks) of the rows of a block; 0 where there is none.
struct SpreadFactors {
  const float* from;
  int rows, ranks, slices;
  int64_t pairs;
  int stride;
  TRIMTAB_DEVICE float operator()(int i, int j) const {
    if (i >= rows || j >= ranks) return 0.0f;
    float sum = 0;
    for (int slice = 0; slice < slices; ++slice)
      sum += from[slice * pairs + int64_t{i} * stride + j];
    return sum;
  }
};

// Sums of PlainSpread: 4 rows by 8 columns for each thread, that begin at 4 c and 64 + 4 c.
struct PlainSpread {
  using Element = float;
  static constexpr int kPitch = kSpreadColumns + 4, kFactorPitch = kSpreadRows + 4;
  static constexpr int kFactorBytes = 4 * kSpreadRanks * kFactorPitch;
  float sum[4][8] = {};

  TRIMTAB_DEVICE static void set_factors(const SpreadFactors& from, void* factors, int) {
    auto* to = static_cast<float*>(factors);
    for (int e = static_cast<int>(threadIdx.x); e < kSpreadRows * kSpreadRanks;
         e += static_cast<int>(kThreads)) {
      const int i = e / kSpreadRanks, j = e % kSpreadRanks;
      to[j * kFactorPitch + i] = from(i, j);
    }
  }
  TRIMTAB_DEVICE static int row() { return static_cast<int>(threadIdx.x) / 16 * 4; }
  TRIMTAB_DEVICE static int column() { return static_cast<int>(threadIdx.x) % 16 * 4; }

  TRIMTAB_DEVICE void add(const void* factors, const float* c, int ranks, int) {
    const auto* s = static_cast<const float*>(factors) + row();
    c += column();
#pragma unroll 4
    for (int j = 0; j < ranks; ++j, s += kFactorPitch, c += kPitch) {
      const auto left = load<4>(s);
      const Vector<float, 4> right[2] = {load<4>(c), load<4>(c + 64)};
#pragma unroll
      for (int k = 0; k < 32; ++k)
        sum[k / 8][k % 8] =
            __fmaf_rn(left.at[k / 8], right[k % 8 / 4].at[k % 4], sum[k / 8][k % 8]);
    }
  }
  TRIMTAB_DEVICE void store(float* sums) const {
#pragma unroll
    for (int k = 0; k < 32; ++k)
      sums[(row() + k / 8) * kSpreadPitch + column() + k % 4 + k % 8 / 4 * 64] = sum[k / 8][k % 8];
  }
};

// On tensor cores, beside bfloat16: 16 rows by 64 columns for each warp.
struct TensorSpread {
  using Element = uint16_t;
  static constexpr int kPitch = kSpreadColumns + 8, kFactorPitch = kSpreadRanks + 8;
  static constexpr int kTerms = 3;
  static constexpr int kFactorBytes = 2 * kTerms * kSpreadRows * kFactorPitch;
  float sum[8][4] = {};

  TRIMTAB_DEVICE static void set_factors(const SpreadFactors& from, void* factors, int terms) {
    auto* to = static_cast<uint16_t*>(factors);
    for (int e = static_cast<int>(threadIdx.x); e < kSpreadRows * kSpreadRanks;
         e += static_cast<int>(kThreads)) {
      const int i = e / kSpreadRanks, j = e % kSpreadRanks;
      float s = from(i, j);
      for (int term = 0; term < terms; ++term) {
        const uint16_t bits = leading_bits(s);
        to[(term * kSpreadRows + i) * kFactorPitch + j] = bits;
        s -= to_real(BFloat16{bits});
      }
    }
  }
  TRIMTAB_DEVICE static int row() { return static_cast<int>(warp_index()) / 2 * kSide; }
  TRIMTAB_DEVICE static int column() { return static_cast<int>(warp_index()) % 2 * 64; }

  TRIMTAB_DEVICE void add(const void* factors, const uint16_t* c, int ranks, int terms) {
    const int lane = static_cast<int>(lane_index());
    const auto* s =
        static_cast<const uint16_t*>(factors) + (row() + lane % 16) * kFactorPitch + lane / 16 * 8;
    c += lane % 16 * kPitch + column() + lane / 16 * 8;
    for (int k = 0; k < ranks; k += kSide)
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];
        ldmatrix_transposed(b, c + k * kPitch + n * 8);
#pragma unroll 1
        for (int term = 0; term < terms; ++term) {
          uint32_t a[4];
          ldmatrix(a, s + term * kSpreadRows * kFactorPitch + k);
          mma_bf16(sum[n], a, {b[0], b[1]});
          mma_bf16(sum[n + 1], a, {b[2], b[3]});
        }
      }
  }
  TRIMTAB_DEVICE void store(float* sums) const {
    const int lane = static_cast<int>(lane_index());
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        sums[(row() + lane / 4 + k / 2 * 8) * kSpreadPitch + column() + n * 8 + lane % 4 * 2 +
             k % 2] = sum[n][k];
  }
};

// Byte offsets in shared memory. The sums take the place of the operands.
template <class Arithmetic>
struct SpreadLayout {
  static constexpr int previous_places = sizeof(FoundModule);
  static constexpr int current_places = previous_places + kSpreadRows * sizeof(Place);
  static constexpr int sums = current_places + kSpreadRanks * sizeof(Place);
  static constexpr int factors = sums;
  static constexpr int current = factors + Arithmetic::kFactorBytes;
  static constexpr int operands =
      current + kSpreadRanks * Arithmetic::kPitch * sizeof(typename Arithmetic::Element);
  static constexpr int results = sums + 4 * kSpreadRows * kSpreadPitch;
  static constexpr int bytes = operands > results ? operands : results;
};

// Where the results of a block go: rows [row, row + rows) and columns [first, first + columns).
struct SpreadResults {
  const SpreadWork& work;
  const Module& module;
  int row, rows, first, columns;

  TRIMTAB_DEVICE void write(const float* sums, const Place* places, float slope) const {
    const Kind kind = work.projects ? work.table.previous : Kind::float32;
    for (int i = static_cast<int>(warp_index()); i < rows; i += kWarps) {
      char* to = module.out + (int64_t{row + i} * module.columns + first) * size_of(kind);
      const Place place = places[i];
      for (int c = static_cast<int>(lane_index()); c < columns; c += static_cast<int>(kWarp)) {
        float x = sums[i * kSpreadPitch + c];
        if (work.projects)
          x = read_real(place.data + (int64_t{first} + c) * place.step, kind) - x;
        else
          x *= slope;
        write_real(to + c * size_of(kind), kind, x);
      }
    }
  }
};

template <class Arithmetic>
__global__ void __launch_bounds__(kThreads, 2) spread_kernel(const SpreadWork work) {
  using At = SpreadLayout<Arithmetic>;
  wait_for_previous_kernel();
  let_next_kernel_start();
  auto* shared = shared_memory<unsigned char>();
  const int block = static_cast<int>(blockIdx.x);
  auto& found = *shared_memory<FoundModule>();
  find_module(work.table, &Module::first_tile, block, found.module, found.number);
  const Module& module = found.module;
  const int across = ceil_div(module.columns, kSpreadColumns);
  const int row = (block - module.first_tile) / across * kSpreadRows;
  const int first = (block - module.first_tile) % across * kSpreadColumns;
  const SpreadResults results{work,  module,
                              row,   min(kSpreadRows, module.rows - row),
                              first, min(kSpreadColumns, module.columns - first)};
  auto* previous_places = reinterpret_cast<Place*>(shared + At::previous_places);
  auto* current_places = reinterpret_cast<Place*>(shared + At::current_places);
  auto* c = reinterpret_cast<typename Arithmetic::Element*>(shared + At::current);
  if (work.projects)
    set_places(previous_places, results.rows, work.table.previous,
               [&](int i) { return previous_row(work.table, module, row + i); });
  Arithmetic arithmetic;
  const Columns columns{first, results.columns, kSpreadColumns};
  for (int rank = 0; rank < module.ranks; rank += kSpreadRanks) {
    const int ranks = min(kSpreadRanks, module.ranks - rank);
    const bool apart = set_places(current_places, kSpreadRanks, work.table.current,
                                  [&](int j) { return current_row(module, rank + j); });
    load_rows(current_places, kSpreadRanks, apart, work.table.current, columns, c,
              Arithmetic::kPitch);
    const float* from = work.factors + (work.projects ? module.products : module.factors) +
                        int64_t{row} * module.ranks + rank;
    Arithmetic::set_factors({from, results.rows, ranks, work.projects ? module.slices : 1,
                             module.pairs(), module.ranks},
                            shared + At::factors, work.terms);
    copy_async_wait<0>();
    __syncthreads();
    arithmetic.add(shared + At::factors, c, ranks, work.terms);
  }
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(shared + At::sums);
  arithmetic.store(sums);
  __syncthreads();
  const float weight = work.weight ? work.weight[found.number] : 1.0f;
  results.write(sums, previous_places, work.squared ? 2.0f * weight : weight);
}

}  // namespace
}  // namespace trimtab
