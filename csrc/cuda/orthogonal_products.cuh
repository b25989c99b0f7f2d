// Products of tiles in shared memory: in float32 for everything, on tensor cores for 16-bit
// numbers.
//
// A tile has rows of P and of C, `pitch` elements apart. G = P C^T is made in units of 4 or 16 rows
// and 8 ranks, and so is what the rows add to S^T P, in units of some columns and 8 ranks whose
// sums stay in registers from tile to tile. No sum depends on the size of the tile.
#pragma once

#include "cuda/orthogonal.cuh"

namespace trimtab {

struct Tile {
  int rows, width;  // multiples of 16
  int pitch;        // of P and C, in elements
  int ranks;        // a multiple of 8
  int most_rows;    // that shared memory has room for, a multiple of 16
};

// The columns and ranks that a block has sums for; with few, more blocks fit a multiprocessor.
constexpr int kFewUnits = 32, kMostUnits = 88;  // of 16 columns and 8 ranks
constexpr int kMostGroups = 4;

// Adds up 32 values over the lanes; lane i receives the sum of value i.
template <int half = 16>
TRIMTAB_DEVICE float fold(float (&values)[32]) {
  const bool upper = lane_index() & half;
#pragma unroll
  for (int k = 0; k < half; ++k) {
    const float mine = upper ? values[k + half] : values[k];
    const float other = upper ? values[k] : values[k + half];
    values[k] = mine + __shfl_xor_sync(kAllLanes, other, half);
  }
  if constexpr (half > 1) return fold<half / 2>(values);
  return values[0];
}

struct Plain {
  using Element = float;
  using Few = Plain;
  static constexpr int kParts = 1;  // of each sum of G
  static constexpr int kPad = 4;    // elements between rows, so that they begin in other banks
  static constexpr int kColumns = 2;
  static constexpr int kUnits = 3;
  static constexpr int kBlocks = 2;  // on a multiprocessor

  struct Sums {
    float at[kUnits][kColumns * kGroup] = {};
  };

  TRIMTAB_HD static int factor_bytes(int most_rows, int ranks) { return 4 * most_rows * ranks; }

  // Adds the products of the tile to `sums`, or writes them there. Part h of row i and rank j
  // stands at (h * most_rows + i) * ranks + j.
  TRIMTAB_DEVICE static void multiply(const Tile& tile, const float* p, const float* c, bool add,
                                      float* sums) {
    const int lane = static_cast<int>(lane_index()), groups = tile.ranks / kGroup;
    for (int unit = static_cast<int>(warp_index()); unit < tile.rows / 4 * groups; unit += kWarps) {
      const int row = unit / groups * 4, rank = unit % groups * kGroup;
      float sum[4 * kGroup] = {};
      // Twice as wide, the operands would leave no registers for the sums of `combine`.
#pragma unroll 1
      for (int k = 2 * lane; k < tile.width; k += 2 * static_cast<int>(kWarp)) {
        Vector<float, 2> left[4], right[kGroup];
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i] = load<2>(p + (row + i) * tile.pitch + k);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) right[j] = load<2>(c + (rank + j) * tile.pitch + k);
#pragma unroll
        for (int which = 0; which < 2 * 4 * kGroup; ++which) {
          const int i = which / 2 / kGroup, j = which / 2 % kGroup, v = which % 2;
          sum[i * kGroup + j] = __fmaf_rn(left[i].at[v], right[j].at[v], sum[i * kGroup + j]);
        }
      }
      float* to = sums + (row + lane / kGroup) * tile.ranks + rank + lane % kGroup;
      const float total = fold(sum);
      *to = add ? *to + total : total;
    }
  }

  TRIMTAB_DEVICE static float sum_at(const Tile& tile, const float* sums, int i, int j) {
    return sums[i * tile.ranks + j];
  }

  TRIMTAB_DEVICE static void set_factor(const Tile& tile, void* factors, int i, int j, float s,
                                        int) {
    static_cast<float*>(factors)[i * tile.ranks + j] = s;
  }

  // Adds S^T P.
  TRIMTAB_DEVICE static void combine(const Tile& tile, const float* p, const void* factors, int,
                                     Sums& sums) {
    const int pairs = tile.width / kColumns, units = pairs * (tile.ranks / kGroup);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = static_cast<int>(threadIdx.x) + u * static_cast<int>(kThreads);
      if (unit >= units) break;
      const float* from = p + unit % pairs * kColumns;
      const float* s = static_cast<const float*>(factors) + unit / pairs * kGroup;
#pragma unroll 2
      for (int i = 0; i < tile.rows; ++i, from += tile.pitch, s += tile.ranks) {
        const auto x = load<kColumns>(from);
        const Vector<float, 4> factor[2] = {load<4>(s), load<4>(s + 4)};
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
            sums.at[u][j * kColumns + v] =
                __fmaf_rn(x.at[v], factor[j / 4].at[j % 4], sums.at[u][j * kColumns + v]);
      }
    }
  }

  // Calls f(rank, column, sum) for all that this thread has.
  template <class F>
  TRIMTAB_DEVICE static void for_each(const Tile& tile, const Sums& sums, F&& f) {
    const int pairs = tile.width / kColumns, units = pairs * (tile.ranks / kGroup);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = static_cast<int>(threadIdx.x) + u * static_cast<int>(kThreads);
      if (unit >= units) break;
#pragma unroll
      for (int k = 0; k < kColumns * kGroup; ++k)
        f(unit / pairs * kGroup + k / kColumns, unit % pairs * kColumns + k % kColumns,
          sums.at[u][k]);
    }
  }
};

// The leading 8 bits of a float32, which bfloat16 holds.
TRIMTAB_DEVICE uint16_t leading_bits(float x) {
  return static_cast<uint16_t>(bit_cast<uint32_t>(x) >> 16);
}

// Number is BFloat16 or Float16. Products of two of them are exact, and summed in float32.
template <class Number, int kOwnUnits = kMostUnits>
struct TensorCore {
  using Element = uint16_t;
  using Few = TensorCore<Number, kFewUnits>;
  static constexpr int kParts = 2;
  static constexpr int kPad = 8;
  static constexpr int kUnits = kOwnUnits / kWarps;
  // That registers have room for.
  static constexpr int kBlocks = kUnits <= 4 ? 4 : 2;
  static constexpr int kTogether = kUnits <= 4 ? 2 : 4;  // groups of ranks
  static constexpr int kFactorPad = 8;
  static constexpr int kTerms = 3;  // numbers of 8 bits hold a float32

  struct Sums {
    float at[kUnits][4] = {};
  };

  TRIMTAB_HD static int factor_bytes(int most_rows, int ranks) {
    return 2 * kTerms * ranks * (most_rows + kFactorPad);
  }

  TRIMTAB_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<Number, BFloat16>)
      mma_bf16(d, a, b);
    else
      mma_f16(d, a, b);
  }

  TRIMTAB_DEVICE static void multiply(const Tile& tile, const uint16_t* p, const uint16_t* c,
                                      bool add, float* sums) {
    const int groups = tile.ranks / kGroup;
    for (int unit = static_cast<int>(warp_index()); unit < tile.rows / kSide * kParts;
         unit += kWarps)
      for (int group = 0; group < groups; group += kTogether)
        multiply_unit(tile, unit / kParts * kSide, unit % kParts, group,
                      min(kTogether, groups - group), p, c, add, sums);
  }

  // Every other 16 columns of 16 rows, with some groups of ranks.
  TRIMTAB_DEVICE static void multiply_unit(const Tile& tile, int row, int part, int group,
                                           int groups, const uint16_t* p, const uint16_t* c,
                                           bool add, float* sums) {
    const int lane = static_cast<int>(lane_index());
    const uint16_t* left = p + (row + lane % 16) * tile.pitch + lane / 16 * 8;
    const uint16_t* right = c + (group * kGroup + lane % 8) * tile.pitch + lane / 8 % 2 * 8;
    float sum[kTogether][4] = {};
    for (int k = part * kSide; k < tile.width; k += kParts * kSide) {
      uint32_t a[4];
      ldmatrix(a, left + k);
#pragma unroll
      for (int g = 0; g < kTogether; ++g) {
        if (g >= groups) break;
        uint32_t b[2];
        ldmatrix(b, right + g * kGroup * tile.pitch + k);
        mma(sum[g], a, b);
      }
    }
    float* to = sums + (part * tile.most_rows + row + lane / 4) * tile.ranks + group * kGroup +
                lane % 4 * 2;
#pragma unroll
    for (int g = 0; g < kTogether; ++g) {
      if (g >= groups) break;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& at = to[k / 2 * 8 * tile.ranks + g * kGroup + k % 2];
        at = add ? at + sum[g][k] : sum[g][k];
      }
    }
  }

  TRIMTAB_DEVICE static float sum_at(const Tile& tile, const float* sums, int i, int j) {
    sums += i * tile.ranks + j;
    return sums[0] + sums[tile.most_rows * tile.ranks];
  }

  TRIMTAB_DEVICE static int factor_place(const Tile& tile, int i, int j, int term) {
    return (term * tile.ranks + j) * (tile.most_rows + kFactorPad) + i;
  }

  // One term holds signs; three, the largest first, are a float32 beside bfloat16.
  TRIMTAB_DEVICE static void set_factor(const Tile& tile, void* factors, int i, int j, float s,
                                        int terms) {
    auto* to = static_cast<uint16_t*>(factors);
    if (terms == 1) to[factor_place(tile, i, j, 0)] = from_real<Number>(s).bits;
#pragma unroll 1
    for (int term = 0; terms > 1 && term < terms; ++term) {
      const uint16_t bits = leading_bits(s);
      to[factor_place(tile, i, j, term)] = bits;
      s -= to_real(BFloat16{bits});
    }
  }

  TRIMTAB_DEVICE static void combine(const Tile& tile, const uint16_t* p, const void* factors,
                                     int terms, Sums& sums) {
    const int lane = static_cast<int>(lane_index());
    const int tiles = tile.width / kSide, units = tiles * (tile.ranks / kGroup);
    const auto* s = static_cast<const uint16_t*>(factors);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = static_cast<int>(warp_index()) + u * kWarps;
      if (unit >= units) break;
      const uint16_t* from =
          p + (lane % 8 + lane / 16 * 8) * tile.pitch + unit % tiles * kSide + lane / 8 % 2 * 8;
      for (int k = 0; k < tile.rows; k += kSide) {
        uint32_t a[4];
        ldmatrix_transposed(a, from + k * tile.pitch);
#pragma unroll 1
        for (int term = 0; term < terms; ++term) {
          const uint16_t* at =
              s + factor_place(tile, k + lane % 4 * 2, unit / tiles * kGroup + lane / 4, term);
          const uint32_t b[2] = {load_raw<uint32_t>(at), load_raw<uint32_t>(at + 8)};
          mma(sums.at[u], a, b);
        }
      }
    }
  }

  template <class F>
  TRIMTAB_DEVICE static void for_each(const Tile& tile, const Sums& sums, F&& f) {
    const int lane = static_cast<int>(lane_index());
    const int tiles = tile.width / kSide, units = tiles * (tile.ranks / kGroup);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = static_cast<int>(warp_index()) + u * kWarps;
      if (unit >= units) break;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        f(unit / tiles * kGroup + lane % 4 * 2 + k % 2, unit % tiles * kSide + lane / 4 + k / 2 * 8,
          sums.at[u][k]);
    }
  }
};

}  // namespace trimtab
