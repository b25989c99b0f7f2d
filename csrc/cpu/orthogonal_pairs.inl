// The l1 penalty of bfloat16 rows where the processor multiplies pairs of them (AVX512_BF16); part
// of orthogonal_rows.inl. Twice the products of float32 in the same time, and no conversion.
//
// Products are exact and summed in float32, as elsewhere; subnormal numbers count as 0.

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

constexpr int64_t kNumbers = 32;  // in a vector
typedef int16_t ShortIndex __attribute__((vector_size(64)));

// The numbers that are left of a row, of those that a vector holds.
inline __mmask32 mask_of(int64_t left) {
  return left >= kNumbers ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
}

inline __m512i load_numbers(const BFloat16* from, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, from);
}

inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(a), bits_of<__m512bh>(b));
}

void multiply_tile(const BFloat16* const* a, const BFloat16* const* b, int64_t begin, int64_t end,
                   float (*products)[kTile]) {
  __m512 sums[kTile][kTile]{};
  for (int64_t v = begin; v < end; v += kNumbers) {
    const __mmask32 mask = mask_of(end - v);
    __m512i y[kTile];
    for (int64_t j = 0; j < kTile; ++j) y[j] = load_numbers(b[j] + v, mask);
    for (int64_t i = 0; i < kTile; ++i) {
      const __m512i x = load_numbers(a[i] + v, mask);
      for (int64_t j = 0; j < kTile; ++j) sums[i][j] = add_products(sums[i][j], x, y[j]);
    }
  }
  for (int64_t i = 0; i < kTile; ++i)
    for (int64_t j = 0; j < kTile; ++j)
      products[i][j] = Lanes<float>::sum(bits_of<FloatVector>(sums[i][j]));
}

// Signs as bfloat16, those of two rows in a word.
using SignPair = uint32_t;

inline SignPair sign_pair(float first, float second) {
  return bit_cast<uint32_t>(first) >> 16 | (bit_cast<uint32_t>(second) & 0xffff0000u);
}

// As combine_group, of pairs of rows, with signs[pair * outs + j]; writes whole vectors.
template <int pairs>
void combine_pairs(const BFloat16* const* rows, int64_t count, const SignPair* signs, float* out,
                   int64_t outs, int64_t pitch, int64_t begin, int64_t end, bool fresh) {
  // Interleaves two rows: their first halves, then their second ones.
  ShortIndex first, second;
  for (int lane = 0; lane < kNumbers; ++lane) {
    first[lane] = lane / 2 + lane % 2 * kNumbers;
    second[lane] = first[lane] + kNumbers / 2;
  }
  for (int64_t v = begin; v < end; v += kNumbers) {
    const __mmask32 mask = mask_of(end - v);
    __m512i low[pairs], high[pairs];
    for (int p = 0; p < pairs; ++p) {
      const __m512i a = load_numbers(rows[2 * p] + v, mask);
      const __m512i b = 2 * p + 1 < count ? load_numbers(rows[2 * p + 1] + v, mask) : __m512i{};
      low[p] = _mm512_permutex2var_epi16(a, bits_of<__m512i>(first), b);
      high[p] = _mm512_permutex2var_epi16(a, bits_of<__m512i>(second), b);
    }
    for (int64_t j = 0; j < outs; ++j) {
      float* const to = out + j * pitch + v;
      __m512 sum[2]{};
      if (!fresh) sum[0] = _mm512_loadu_ps(to), sum[1] = _mm512_loadu_ps(to + 16);
      for (int p = 0; p < pairs; ++p) {
        const __m512i sign = _mm512_set1_epi32(static_cast<int>(signs[p * outs + j]));
        sum[0] = add_products(sum[0], low[p], sign);
        sum[1] = add_products(sum[1], high[p], sign);
      }
      _mm512_storeu_ps(to, sum[0]), _mm512_storeu_ps(to + 16, sum[1]);
    }
  }
}

// As combine, of a block whose signs are g (count, outs).
inline void combine_signs(const BFloat16* const* rows, int64_t count, const float* g, float* out,
                          int64_t pitch, int64_t outs, int64_t width, bool fresh) {
  static constexpr decltype(&combine_pairs<1>) groups[] = {combine_pairs<1>, combine_pairs<2>,
                                                           combine_pairs<3>, combine_pairs<4>};
  std::vector<SignPair> signs((count + 1) / 2 * outs);
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t j = 0; j < outs; ++j)
      signs[i / 2 * outs + j] =
          sign_pair(g[i * outs + j], i + 1 < count ? g[(i + 1) * outs + j] : 0.0f);
  const int64_t panel = panel_of(outs);
  for (int64_t begin = 0; begin < width; begin += panel)
    for (int64_t i = 0; i < count; i += kGroup) {
      const int64_t some = std::min(kGroup, count - i);
      groups[(some - 1) / 2](rows + i, some, signs.data() + i / 2 * outs, out, outs, pitch, begin,
                             std::min(begin + panel, width), fresh && i == 0);
    }
}

inline bool are_contiguous(const RowRef* rows, int64_t count) {
  return std::all_of(rows, rows + count, [](const RowRef& row) { return row.stride == 1; });
}

void overlap_of_pairs(OverlapSlice<float>& slice) {
  const int64_t rows = slice.previous_count, ranks = slice.current_count, width = slice.width;
  if (slice.squared || slice.grad_previous || !are_contiguous(slice.previous, rows) ||
      !are_contiguous(slice.current, ranks))
    return overlap<float>(slice);
  const int64_t most = std::min(rows_in_block((width + 1) / 2, ranks), rows);
  const int64_t pitch = pitch_of(width);
  RowPointers<BFloat16> previous(rows), current(ranks);
  for (int64_t i = 0; i < rows; ++i) previous[i] = elements<BFloat16>(slice.previous[i]);
  for (int64_t j = 0; j < ranks; ++j) current[j] = elements<BFloat16>(slice.current[j]);
  const Buffer<float> g(most * ranks), grad(slice.grad_current ? ranks * pitch : 0);
  if (rows == 0 && slice.grad_current) std::fill_n(grad.get(), ranks * pitch, 0.0f);
  WideSum<double> value;
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    for (int64_t i = first; i < first + count; ++i) touch(previous[i], width);
    multiply(previous.data() + first, count, current.data(), ranks, width, g.get());
    value.add(slope_of(g.get(), count * ranks, 1.0f, false));
    if (slice.grad_current)
      combine_signs(previous.data() + first, count, g.get(), grad.get(), pitch, ranks, width,
                    first == 0);
  }
  write_grad(slice, grad.get(), slice.weight);
  slice.value = value.value() * static_cast<double>(slice.weight);
}

}  // namespace
}  // namespace TRIMTAB_ISA
}  // namespace trimtab
