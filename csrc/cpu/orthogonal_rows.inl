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
constexpr int64_t kBlock = 65536;
// Columns of a panel: a group of rows, or of gradients, in the L1 cache.
constexpr int64_t kPanel = 1024;

template <class Real>
using RowPointers = std::vector<const Real*>;

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

int64_t rows_in_block(int64_t width) {
  const int64_t fit = kBlock / std::max<int64_t>(width, 1) / kGroup * kGroup;
  return std::min<int64_t>(std::max<int64_t>(fit, kGroup), 4 * kGroup);
}

template <class Element>
void read_rows(const RowRef* rows, int64_t count, int64_t width, RealOf<Element>* scratch,
               const RealOf<Element>** out) {
  using L = Lanes<RealOf<Element>>;
  bool gather = false;
  for (int64_t i = 0; i < count; ++i) {
    const Element* const row = static_cast<const Element*>(rows[i].data);
    RealOf<Element>* const to = scratch + i * width;
    out[i] = to;
    if (rows[i].stride != 1 && width > 1) {
      gather = true;
    } else if constexpr (std::is_same_v<Element, RealOf<Element>>) {
      out[i] = row;
    } else {
      for (int64_t v = 0; v < width; v += L::width)
        store_lanes(to + v, load_lanes(row + v, width - v), width - v);
    }
  }
  if (!gather) return;
  // Column by column: rows that are columns in memory are neighbours there.
  for (int64_t v = 0; v < width; ++v)
    for (int64_t i = 0; i < count; ++i)
      if (rows[i].stride != 1)
        scratch[i * width + v] =
            to_real(static_cast<const Element*>(rows[i].data)[v * rows[i].stride]);
}

// products[i * pitch + j] += sum over the columns [begin, end) of a_i b_j, for kTile rows of each.
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

// g (rows, ranks) = a b^T.
template <class Real>
void multiply(const Real* const* a, int64_t rows, const Real* const* b, int64_t ranks,
              int64_t width, Real* g) {
  std::fill(g, g + rows * ranks, Real{0});
  const Real *tile_a[kTile], *tile_b[kTile];
  Real products[kTile][kTile];
  for (int64_t begin = 0; begin < width; begin += kPanel) {
    const int64_t end = std::min(begin + kPanel, width);
    for (int64_t i = 0; i < rows; i += kTile)
      for (int64_t j = 0; j < ranks; j += kTile) {
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
}

// Rows that are wanted soon: while the ones before are combined, memory has nothing to do.
struct Ahead {
  const RowRef* rows;
  int64_t element_size;
  void fetch(int64_t count, int64_t column, int64_t columns) const {
    for (int64_t i = 0; i < count; ++i) {
      const char* const from = static_cast<const char*>(rows[i].data) + column * element_size;
      for (int64_t byte = 0; byte < columns * element_size; byte += 64)
        __builtin_prefetch(from + byte, 0, 2);
    }
  }
};

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
                   int64_t outs, int64_t pitch, int64_t begin, int64_t end, bool fresh,
                   const Ahead* ahead) {
  using L = Lanes<Real>;
  using Vector = typename L::Vector;
  // Two vectors of every row share a coefficient, where there are registers for them.
  constexpr int64_t pair = TRIMTAB_WIDTH == 16 ? 2 : 1, step = pair * L::width;
  int64_t v = begin;
  for (; v + step <= end; v += step) {
    if (ahead) ahead->fetch(count, v, step);
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

// out (outs, width) = coefficients^T rows, added to what is there unless `fresh`.
template <class Real>
void combine(const Real* const* rows, int64_t count, Coefficients<Real> coefficients, Real* out,
             int64_t outs, int64_t width, bool fresh, Ahead ahead = {}, int64_t ahead_count = 0) {
  using Function = void (*)(const Real* const*, Coefficients<Real>, Real*, int64_t, int64_t,
                            int64_t, int64_t, bool, const Ahead*);
  if (count == 0 && fresh) std::fill(out, out + outs * width, Real{0});
  static constexpr Function groups[kGroup] = {
      combine_group<1, Real>, combine_group<2, Real>, combine_group<3, Real>,
      combine_group<4, Real>, combine_group<5, Real>, combine_group<6, Real>,
      combine_group<7, Real>, combine_group<8, Real>,
  };
  for (int64_t begin = 0; begin < width; begin += kPanel) {
    const int64_t end = std::min(begin + kPanel, width);
    for (int64_t i = 0; i < count; i += kGroup) {
      auto some = coefficients;
      some.data += i * coefficients.row_stride;
      const int64_t some_rows = std::min(kGroup, count - i);
      const Ahead next{ahead.rows + i, ahead.element_size};
      groups[some_rows - 1](rows + i, some, out, outs, width, begin, end, fresh && i == 0,
                            i + some_rows <= ahead_count ? &next : nullptr);
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

template <class Real>
void overlap(OverlapSlice<Real>& slice) {
  const int64_t rows = slice.previous_count, ranks = slice.current_count, width = slice.width;
  const int64_t most = std::min(rows_in_block(width), rows);
  RowPointers<Real> previous(most), current(ranks);
  const Buffer<Real> previous_scratch(most * width), current_scratch(ranks * width);
  const Buffer<Real> g(most * ranks);
  slice.read_current(slice.current, ranks, width, current_scratch.get(), current.data());
  if (slice.grad_current && rows == 0)
    std::fill(slice.grad_current, slice.grad_current + ranks * width, Real{0});
  WideSum<double> value;
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    slice.read_previous(slice.previous + first, count, width, previous_scratch.get(),
                        previous.data());
    multiply(previous.data(), count, current.data(), ranks, width, g.get());
    value.add(slope_of(g.get(), count * ranks, slice.weight, slice.squared));
    if (slice.grad_current) {
      const Ahead ahead{slice.previous + first + count, slice.previous_size};
      const bool neighbours = slice.previous[first].stride == 1;
      combine<Real>(previous.data(), count, {g.get(), ranks, 1}, slice.grad_current, ranks, width,
                    first == 0, ahead, neighbours ? rows - first - count : 0);
    }
    if (slice.grad_previous)
      combine<Real>(current.data(), ranks, {g.get(), 1, ranks}, slice.grad_previous + first * width,
                    count, width, true);
  }
  slice.value = value.value() * static_cast<double>(slice.weight);
}

template <class Element>
void project(const ProjectionSlice& slice) {
  using Real = RealOf<Element>;
  using L = Lanes<Real>;
  const int64_t ranks = slice.basis_count, width = slice.width;
  const int64_t most = std::min(kGroup, slice.tensor_count);
  RowPointers<Real> tensor(most), basis(ranks);
  const Buffer<Real> tensor_scratch(most * width), left(most * width);
  const Buffer<Real> basis_scratch(ranks * width), g(most * ranks);
  read_rows<Element>(slice.basis, ranks, width, basis_scratch.get(), basis.data());
  for (int64_t first = 0; first < slice.tensor_count; first += most) {
    const int64_t count = std::min(most, slice.tensor_count - first);
    read_rows<Element>(slice.tensor + first, count, width, tensor_scratch.get(), tensor.data());
    if (ranks > 0) multiply(tensor.data(), count, basis.data(), ranks, width, g.get());
    for (int64_t i = 0; i < count * ranks; ++i) g[i] = -g[i];
    for (int64_t i = 0; i < count; ++i)
      std::copy(tensor[i], tensor[i] + width, left.get() + i * width);
    combine<Real>(basis.data(), ranks, {g.get(), 1, ranks}, left.get(), count, width, false);
    Element* const out = static_cast<Element*>(slice.out) + first * width;
    for (int64_t v = 0; v < count * width; v += L::width)
      store_lanes(out + v, load_lanes(left.get() + v, count * width - v), count * width - v);
  }
}

template <class Element>
constexpr OrthogonalFunctions<Element> orthogonal_functions() {
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
