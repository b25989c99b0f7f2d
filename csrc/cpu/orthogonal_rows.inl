// The rows of orthogonality for one instruction set. Included by the files that are compiled for
// one.
//
// A block of previous rows stays in the L2 cache from the product that needs all of its width to
// the one that makes gradients of it, so that memory sees one read of the rows.

#include <algorithm>
#include <new>
#include <vector>

#include "cpu/orthogonal_rows.h"
#include "cpu/sweep.h"

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

// Rows that are combined at once; a block is several of these groups.
constexpr int64_t kGroup = 8;
// Rows of each side whose products are summed at once: 16 sums in registers.
constexpr int64_t kTile = 4;
// Numbers of a block: 256 KiB of float32. The next one and the gradient fit into the cache with it.
constexpr int64_t kBlock = 65536, kMostRows = 64;
// Columns of a panel: what it has of a group of rows, and of their combinations, is in the L1
// cache.
constexpr int64_t kPanel = 1024, kSmallestPanel = 128, kPanelNumbers = 8192;
// Numbers of current rows that stay in the L2 cache beside what streams by.
constexpr int64_t kStreamed = 131072;

template <class Number>
using RowPointers = std::vector<const Number*>;

// Memory that nobody has written yet, from the begin of a cache line on.
template <class Real>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : memory_(static_cast<Real*>(::operator new(count * sizeof(Real), kAlignment))) {}
  ~Buffer() { ::operator delete(memory_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Real* get() const { return memory_; }
  Real& operator[](int64_t i) const { return memory_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  Real* memory_;
};

// With many ranks it is the gradient that is large, and more rows are worth a pass over it.
int64_t rows_in_block(int64_t width, int64_t ranks) {
  const int64_t fit = std::max(kBlock / std::max<int64_t>(width, 1), ranks);
  return std::min(std::max(fit / kGroup * kGroup, kGroup), kMostRows);
}

int64_t panel_of(int64_t outs) {
  const int64_t fit = kPanelNumbers / std::max<int64_t>(outs, 1) / kSmallestPanel * kSmallestPanel;
  return std::min(std::max(fit, kSmallestPanel), kPanel);
}

// Distance of the rows of a scratch, so that they are not all in the same sets of the L1 cache.
constexpr int64_t pitch_of(int64_t width) { return (width + 15) / 16 * 16 + 16; }

template <class Element>
const Element* elements(const RowRef& row) {
  return static_cast<const Element*>(row.data);
}

// Brings a row into the cache in the order of memory, which the processor foresees: one core reads
// 34 GB/s so, and 13 where the rows of a tile come side by side, with software prefetch or without.
template <class Element>
void touch(const Element* row, int64_t width) {
  const volatile char* const bytes = reinterpret_cast<const volatile char*>(row);
  for (size_t byte = 0; byte < width * sizeof(Element); byte += 64) (void)bytes[byte];
}

// Transposes a square of vectors, in steps that swap ever larger quarters.
inline void transpose(FloatVector (&x)[TRIMTAB_WIDTH]) {
  for (int half = 1; half < TRIMTAB_WIDTH; half *= 2) {
    IntVector low, high;
    for (int lane = 0; lane < TRIMTAB_WIDTH; ++lane) {
      low[lane] = lane & half ? TRIMTAB_WIDTH + lane - half : lane;
      high[lane] = low[lane] + half;
    }
    for (int i = 0; i < TRIMTAB_WIDTH; ++i) {
      if (i & half) continue;
      const FloatVector a = x[i], b = x[i + half];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + half] = __builtin_shuffle(a, b, high);
    }
  }
}

// Rows whose elements are apart in memory. Those of a transposed matrix are neighbours there, and
// are read as many at a time as a vector holds.
template <class Element>
void gather_rows(const RowRef* rows, int64_t count, int64_t width, RealOf<Element>* scratch) {
  constexpr int64_t lanes = TRIMTAB_WIDTH;
  const int64_t pitch = pitch_of(width), step = rows[0].stride;
  bool neighbours = count == lanes && std::is_same_v<RealOf<Element>, float>;
  for (int64_t i = 1; i < count; ++i)
    neighbours = neighbours && rows[i].stride == step &&
                 elements<Element>(rows[i]) == elements<Element>(rows[0]) + i;
  int64_t v = 0;
  if constexpr (std::is_same_v<RealOf<Element>, float>)
    for (; neighbours && v + lanes <= width; v += lanes) {
      FloatVector square[TRIMTAB_WIDTH];
      for (int64_t i = 0; i < lanes; ++i)
        square[i] = Lanes<float>::load(elements<Element>(rows[0]) + (v + i) * step);
      transpose(square);
      for (int64_t i = 0; i < lanes; ++i) Lanes<float>::store(scratch + i * pitch + v, square[i]);
    }
  for (; v < width; ++v)
    for (int64_t i = 0; i < count; ++i)
      scratch[i * pitch + v] = to_real(elements<Element>(rows[i])[v * rows[i].stride]);
}

template <class Element>
void read_rows(const RowRef* rows, int64_t count, int64_t width, RealOf<Element>* scratch,
               const RealOf<Element>** out) {
  using Real = RealOf<Element>;
  const auto apart = [&](int64_t i) { return rows[i].stride != 1 && width > 1; };
  for (int64_t i = 0; i < count;) {
    Real* const to = scratch + i * pitch_of(width);
    out[i] = to;
    if (apart(i)) {
      int64_t end = i + 1;
      while (end < count && end < i + TRIMTAB_WIDTH && apart(end)) ++end;
      gather_rows<Element>(rows + i, end - i, width, to);
      for (; ++i < end;) out[i] = scratch + i * pitch_of(width);
      continue;
    }
    const Element* const row = elements<Element>(rows[i]);
    if constexpr (std::is_same_v<Element, Real>) {
      out[i] = row;
      touch(row, width);
    } else {
      for (int64_t v = 0; v < width; v += Lanes<Real>::width)
        store_lanes(to + v, load_lanes(row + v, width - v), width - v);
    }
    ++i;
  }
}

// products[i][j] = sum over the columns [begin, end) of a_i b_j, for kTile rows of each.
template <class Real>
void multiply_tile(const Real* const* a, const Real* const* b, int64_t begin, int64_t end,
                   Real (*products)[kTile]) {
  using L = Lanes<Real>;
  typename L::Vector sums[kTile][kTile]{};
  const auto step = [&](int64_t v, int64_t count) {
    typename L::Vector y[kTile];
    for (int64_t j = 0; j < kTile; ++j) y[j] = load_lanes(b[j] + v, count);
    for (int64_t i = 0; i < kTile; ++i) {
      const auto x = load_lanes(a[i] + v, count);
      for (int64_t j = 0; j < kTile; ++j) sums[i][j] += x * y[j];
    }
  };
  int64_t v = begin;
  for (; v + L::width <= end; v += L::width) step(v, L::width);
  if (v < end) step(v, end - v);
  for (int64_t i = 0; i < kTile; ++i)
    for (int64_t j = 0; j < kTile; ++j) products[i][j] = L::sum(sums[i][j]);
}

#if defined(__AVX512BF16__)
// The same of bfloat16 numbers, in orthogonal_pairs.inl.
void multiply_tile(const BFloat16* const* a, const BFloat16* const* b, int64_t begin, int64_t end,
                   float (*products)[kTile]);
#endif

// g (rows, ranks) += a b^T over the columns [begin, end).
template <class Number, class Real>
void multiply_panel(const Number* const* a, int64_t rows, const Number* const* b, int64_t ranks,
                    int64_t begin, int64_t end, Real* g) {
  const Number *tile_a[kTile], *tile_b[kTile];
  Real products[kTile][kTile];
  for (int64_t j = 0; j < ranks; j += kTile)
    for (int64_t i = 0; i < rows; i += kTile) {
      // Past the last row, that row again: what comes of it is not kept.
      for (int64_t k = 0; k < kTile; ++k) {
        tile_a[k] = a[std::min(i + k, rows - 1)];
        tile_b[k] = b[std::min(j + k, ranks - 1)];
      }
      multiply_tile(tile_a, tile_b, begin, end, products);
      for (int64_t y = i; y < std::min(i + kTile, rows); ++y)
        for (int64_t x = j; x < std::min(j + kTile, ranks); ++x)
          g[y * ranks + x] += products[y - i][x - j];
    }
}

// g (rows, ranks) = a b^T.
template <class Number, class Real>
void multiply(const Number* const* a, int64_t rows, const Number* const* b, int64_t ranks,
              int64_t width, Real* g) {
  std::fill(g, g + rows * ranks, Real{0});
  // Few rows at a time and all of their width: the processor foresees what is read in order. But
  // where b is large, a panel of it is taken for all rows.
  const int64_t step = ranks * width <= kStreamed ? kTile : std::max<int64_t>(rows, 1);
  for (int64_t i = 0; i < rows; i += step)
    for (int64_t begin = 0; begin < width; begin += kPanel / 2)
      multiply_panel(a + i, std::min(step, rows - i), b, ranks, begin,
                     std::min(begin + kPanel / 2, width), g + i * ranks);
}

// Coefficient of row i in the combination j.
template <class Real>
struct Coefficients {
  const Real* data;
  int64_t row_stride, out_stride;
  Real at(int64_t i, int64_t j) const { return data[i * row_stride + j * out_stride]; }
};

// out_j = sum over i < count of coefficient(i, j) row_i over the columns [begin, end); `fresh`
// begins at 0, otherwise at what is there.
template <int count, class Real>
void combine_group(const Real* const* rows, Coefficients<Real> coefficients, Real* out,
                   int64_t outs, int64_t pitch, int64_t begin, int64_t end, bool fresh) {
  using L = Lanes<Real>;
  using Vector = typename L::Vector;
  // Two vectors of every row share a coefficient, where there are registers for them.
  constexpr int64_t pair = TRIMTAB_WIDTH == 16 ? 2 : 1, step = pair * L::width;
  int64_t v = begin;
  for (; v + step <= end; v += step) {
    Vector x[pair][count];
    for (int k = 0; k < pair; ++k)
      for (int i = 0; i < count; ++i) x[k][i] = L::load(rows[i] + v + k * L::width);
    for (int64_t j = 0; j < outs; ++j) {
      Real* const to = out + j * pitch + v;
      Vector sum[pair]{};
      if (!fresh)
        for (int k = 0; k < pair; ++k) sum[k] = L::load(to + k * L::width);
      for (int i = 0; i < count; ++i) {
        const Vector coefficient = L::spread(coefficients.at(i, j));
        for (int k = 0; k < pair; ++k) sum[k] += coefficient * x[k][i];
      }
      for (int k = 0; k < pair; ++k) L::store(to + k * L::width, sum[k]);
    }
  }
  for (; v < end; v += L::width)
    for (int64_t j = 0; j < outs; ++j) {
      Real* const to = out + j * pitch + v;
      Vector sum = fresh ? Vector{} : load_lanes(to, end - v);
      for (int i = 0; i < count; ++i)
        sum += coefficients.at(i, j) * load_lanes(rows[i] + v, end - v);
      store_lanes(to, sum, end - v);
    }
}

// out (outs, width) = coefficients^T rows, added to what is there unless `fresh`; its rows are
// `pitch` apart.
template <class Real>
void combine(const Real* const* rows, int64_t count, Coefficients<Real> coefficients, Real* out,
             int64_t pitch, int64_t outs, int64_t width, bool fresh) {
  using Function = void (*)(const Real* const*, Coefficients<Real>, Real*, int64_t, int64_t,
                            int64_t, int64_t, bool);
  if (count == 0 && fresh)
    for (int64_t j = 0; j < outs; ++j) std::fill_n(out + j * pitch, width, Real{0});
  static constexpr Function groups[kGroup] = {
      combine_group<1, Real>, combine_group<2, Real>, combine_group<3, Real>,
      combine_group<4, Real>, combine_group<5, Real>, combine_group<6, Real>,
      combine_group<7, Real>, combine_group<8, Real>,
  };
  const int64_t panel = panel_of(outs);
  for (int64_t begin = 0; begin < width; begin += panel) {
    const int64_t end = std::min(begin + panel, width);
    for (int64_t i = 0; i < count; i += kGroup) {
      auto some = coefficients;
      some.data += i * coefficients.row_stride;
      groups[std::min(kGroup, count - i) - 1](rows + i, some, out, outs, pitch, begin, end,
                                              fresh && i == 0);
    }
  }
}

// G becomes its slope, the derivative of the value; returns the value without the weight.
template <class Real>
double slope_of(Real* g, int64_t count, Real weight, bool squared) {
  using L = Lanes<Real>;
  const auto zero = L::spread(0), up = L::spread(weight), down = L::spread(-weight);
  WideSum<Real> value;
  for (int64_t i = 0; i < count; i += L::width) {
    const auto x = load_lanes(g + i, count - i);
    value.add(squared ? x * x : L::choose(x < 0, -x, x));
    // As in torch, the sign of NaN is 0.
    const auto slope =
        squared ? 2 * weight * x : L::choose(x > 0, up, L::choose(x < 0, down, zero));
    store_lanes(g + i, slope, count - i);
  }
  return value.value();
}

// Where a gradient is wanted, writes the one in a scratch times `factor`.
template <class Real>
void write_grad(const OverlapSlice<Real>& slice, const Real* scratch, Real factor) {
  using L = Lanes<Real>;
  if (!slice.grad_current) return;
  for (int64_t j = 0; j < slice.current_count; ++j) {
    const Real* const from = scratch + j * pitch_of(slice.width);
    Real* const to = slice.grad_current + j * slice.width;
    for (int64_t v = 0; v < slice.width; v += L::width)
      store_lanes(to + v, load_lanes(from + v, slice.width - v) * factor, slice.width - v);
  }
}

template <class Real>
void overlap(OverlapSlice<Real>& slice) {
  const int64_t rows = slice.previous_count, ranks = slice.current_count, width = slice.width;
  const int64_t most = std::min(rows_in_block(width, ranks), rows), pitch = pitch_of(width);
  RowPointers<Real> previous(most), current(ranks);
  const Buffer<Real> previous_scratch(most * pitch), current_scratch(ranks * pitch);
  const Buffer<Real> g(most * ranks), grad(slice.grad_current ? ranks * pitch : 0);
  slice.read_current(slice.current, ranks, width, current_scratch.get(), current.data());
  WideSum<double> value;
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    slice.read_previous(slice.previous + first, count, width, previous_scratch.get(),
                        previous.data());
    multiply(previous.data(), count, current.data(), ranks, width, g.get());
    value.add(slope_of(g.get(), count * ranks, slice.weight, slice.squared));
    if (slice.grad_current)
      combine<Real>(previous.data(), count, {g.get(), ranks, 1}, grad.get(), pitch, ranks, width,
                    first == 0);
    if (slice.grad_previous)
      combine<Real>(current.data(), ranks, {g.get(), 1, ranks}, slice.grad_previous + first * width,
                    width, count, width, true);
  }
  if (rows == 0 && slice.grad_current) std::fill_n(grad.get(), ranks * pitch, Real{0});
  write_grad(slice, grad.get(), Real{1});
  slice.value = value.value() * static_cast<double>(slice.weight);
}

template <class Element>
void project(const ProjectionSlice& slice) {
  using Real = RealOf<Element>;
  using L = Lanes<Real>;
  const int64_t ranks = slice.basis_count, width = slice.width, pitch = pitch_of(width);
  const int64_t most = std::min(kGroup, slice.tensor_count);
  RowPointers<Real> tensor(most), basis(ranks);
  const Buffer<Real> tensor_scratch(most * pitch), basis_scratch(ranks * pitch);
  const Buffer<Real> inside(most * pitch), g(most * ranks);
  read_rows<Element>(slice.basis, ranks, width, basis_scratch.get(), basis.data());
  for (int64_t first = 0; first < slice.tensor_count; first += most) {
    const int64_t count = std::min(most, slice.tensor_count - first);
    read_rows<Element>(slice.tensor + first, count, width, tensor_scratch.get(), tensor.data());
    multiply(tensor.data(), count, basis.data(), ranks, width, g.get());
    // Summed apart, then subtracted: one rounding of the tensor's size instead of one per rank.
    combine<Real>(basis.data(), ranks, {g.get(), 1, ranks}, inside.get(), pitch, count, width,
                  true);
    for (int64_t i = 0; i < count; ++i) {
      Element* const out = static_cast<Element*>(slice.out) + (first + i) * width;
      for (int64_t v = 0; v < width; v += L::width)
        store_lanes(out + v,
                    load_lanes(tensor[i] + v, width - v) -
                        load_lanes(inside.get() + i * pitch + v, width - v),
                    width - v);
    }
  }
}

}  // namespace
}  // namespace TRIMTAB_ISA
}  // namespace trimtab

#if defined(__AVX512BF16__)
#include "cpu/orthogonal_pairs.inl"
#endif

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

template <class Element>
constexpr OrthogonalFunctions<Element> orthogonal_functions() {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<Element, BFloat16>)
    return {read_rows<Element>, overlap_of_pairs, project<Element>};
#endif
  return {read_rows<Element>, overlap<RealOf<Element>>, project<Element>};
}

}  // namespace
}  // namespace TRIMTAB_ISA

#define TRIMTAB_ORTHOGONAL_TABLE_NAMED(isa) isa##_orthogonal
#define TRIMTAB_ORTHOGONAL_TABLE(isa) TRIMTAB_ORTHOGONAL_TABLE_NAMED(isa)
#define TRIMTAB_TEXT_OF(isa) #isa
#define TRIMTAB_TEXT(isa) TRIMTAB_TEXT_OF(isa)

const OrthogonalTable TRIMTAB_ORTHOGONAL_TABLE(TRIMTAB_ISA) = {
    TRIMTAB_ISA::orthogonal_functions<float>(),
    TRIMTAB_ISA::orthogonal_functions<double>(),
    TRIMTAB_ISA::orthogonal_functions<BFloat16>(),
    TRIMTAB_ISA::orthogonal_functions<Float16>(),
    TRIMTAB_TEXT(TRIMTAB_ISA),
};

}  // namespace trimtab
