// The l1 penalty of bfloat16 rows where the processor multiplies pairs of them (AVX512_BF16); part
// of orthogonal_rows.inl. Twice the products of float32 in the same time, and no conversion.
//
// The instruction takes subnormal numbers for 0. Rows with a number other than 0 below 2^-55 are
// therefore left to float32: all products of the others are multiples of 2^-124, and so are sums.

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

using Pairs = Lanes<BFloat16>;

inline bool has_tiny(const BFloat16* numbers, int64_t vectors) {
  // Twice the bits less one: without the sign, and with 0 as the largest.
  Pairs::Vector least = ~Pairs::Vector{};
  for (int64_t v = 0; v < vectors; ++v) {
    const Pairs::Vector x = Pairs::load(numbers + v * Pairs::width), size = x + x - 1;
    least = size < least ? size : least;
  }
  constexpr uint16_t limit = (127 - 55) << 8;
  return _mm512_cmplt_epu16_mask(bits_of<__m512i>(least), _mm512_set1_epi16(limit - 1)) != 0;
}

// Two vectors of float32 lanes: the neighbours are numbers of one column.
inline void interleave(Pairs::Vector a, Pairs::Vector b, Pairs::Vector* out) {
  Pairs::Vector first;
  for (int lane = 0; lane < Pairs::width; ++lane) first[lane] = lane / 2 + lane % 2 * Pairs::width;
  const Pairs::Vector second = first + Pairs::width / 2;
  const auto pick = [&](Pairs::Vector from) {
    return bits_of<Pairs::Vector>(_mm512_permutex2var_epi16(
        bits_of<__m512i>(a), bits_of<__m512i>(from), bits_of<__m512i>(b)));
  };
  out[0] = pick(first), out[1] = pick(second);
}

// As add_gradient_tile, of pairs of rows that are `pitch` vectors apart.
template <int64_t kVectors>
void add_signs_tile(const Pairs::Vector* rows, int64_t pitch, int64_t pairs, const uint32_t* signs,
                    float* grad, bool fresh) {
  add_outer_products<BFloat16, kVectors, false>(
      0, pairs, grad, fresh, [&](int64_t p, auto* x, auto* sign) {
        for (int64_t i = 0; i < kVectors; ++i) x[i] = rows[p * pitch + i];
        for (int64_t j = 0; j < kGroup; ++j)
          sign[j] = bits_of<Pairs::Vector>(UintVector{} + signs[p * kGroup + j]);
      });
}

// As add_gradient. The signs of G are whole in bfloat16; those of two rows make a word.
inline void add_signs(const Block<BFloat16, BFloat16>& block, const Packing<float>& packing,
                      const Workspace<BFloat16>& work, const Ahead<BFloat16>& ahead) {
  constexpr int64_t kWords = kBlockProducts / 2;
  auto* const signs = reinterpret_cast<uint32_t*>(work.sums);
  const int64_t pairs = ceil_div(block.count, 2);
  for (int64_t g = 0; g < packing.groups(); ++g)
    for (int64_t k = g * kWords; k < g * kWords + pairs * kGroup; ++k) {
      const float* const g = work.products + k / kGroup * 2 * kGroup + k % kGroup;
      signs[k] = bit_cast<uint32_t>(g[0]) >> 16 | (bit_cast<uint32_t>(g[kGroup]) & 0xffff0000u);
    }
  for (int64_t v = 0; v < packing.vectors(); v += kTile) {
    ahead.fetch(v * TRIMTAB_WIDTH, kTile * TRIMTAB_WIDTH);
    Pairs::Vector strip[kBlockRows / 2][kTile];
    for (int64_t p = 0; p < pairs; ++p)
      for (int64_t half = 0; half < kTile; half += 2) {
        const int64_t at = (v + half) / 2;
        if (at >= block.whole_vectors + block.has_tail) continue;
        const auto row = [&](int64_t i) {
          return i == block.count ? Pairs::Vector{} : Pairs::load(block.vector(i, at));
        };
        interleave(row(2 * p), row(2 * p + 1), strip[p] + half);
      }
    for (int64_t g = 0; g < packing.groups(); ++g) {
      float* const grad = work.grad + packing.at(g, v);
      if (v + kTile <= packing.vectors())
        add_signs_tile<kTile>(strip[0], kTile, pairs, signs + g * kWords, grad, block.is_first);
      else
        for (int64_t k = 0; v + k < packing.vectors(); ++k)
          add_signs_tile<1>(strip[0] + k, kTile, pairs, signs + g * kWords,
                            grad + k * kGroup * TRIMTAB_WIDTH, block.is_first);
    }
  }
}

// Whether the rows are such that this could be done.
inline bool penalty_of_pairs(PenaltyChunk<BFloat16>& chunk, const Workspace<BFloat16>& work) {
  const PenaltyModule<BFloat16>& module = *chunk.module;
  if (module.grad_previous || module.current.pack != pack<float, BFloat16>) return false;
  const Packing<BFloat16> packing{module.current.rows.count, module.columns};
  auto* const packed = reinterpret_cast<BFloat16*>(work.packed);
  pack<BFloat16, BFloat16>(module.current.rows, module.columns, packed);
  if (has_tiny(packed, packing.size() / Pairs::width)) return false;
  if (chunk.grad_current && chunk.begin == chunk.end)
    fill_zero(work.grad, packing_of(module).size());
  WideSum<float> value;
  const bool done =
      for_each_block(module.previous, chunk.begin, chunk.end, packing, work.gathered, true,
                     [&](const auto& block, const auto& ahead) {
                       for (int64_t i = 0; i < block.count; ++i)
                         if (has_tiny(block.row[i], block.whole_vectors) ||
                             has_tiny(block.tails[i], block.has_tail))
                           return false;
                       block_products(block, packing, packed, work);
                       apply_norm(work.products, packing.groups(), block.used, false, value);
                       if (chunk.grad_current) add_signs(block, packing_of(module), work, ahead);
                       return true;
                     });
  if (!done) return false;
  chunk.value = value.value();
  write_current(chunk, work);
  return true;
}

}  // namespace
}  // namespace TRIMTAB_ISA
}  // namespace trimtab
