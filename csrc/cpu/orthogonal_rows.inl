// The rows of the orthogonal operators for one instruction set. Included by the files that are
// compiled for one.
//
// `previous` P is taken in blocks of rows that stay in the L2 cache. A block meets the packed rows
// of `current` C twice: for the products G = P C^T, and, once these are whole, for what it adds to
// the gradient, G^T P or sign(G)^T P. Memory sees one read of P. A projection is the same with the
// basis for P and the tensor for C: t - (Q t^T)^T Q.

#include <algorithm>
#include <new>
#include <utility>

#include "cpu/orthogonal_rows.h"
#include "cpu/sweep.h"

#include "cpu/orthogonal_blocks.inl"

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

// sums[i][j] += left[i] * right[j] for every step, where load(step, left, right) gives the vectors.
// `apart`: the steps are summed first, then added to what is there, which rounds less. `fresh`:
// nothing is there.
template <class Number, int64_t kLeft, bool apart, class Load>
inline void add_outer_products(int64_t begin, int64_t end, RealOf<Number>* sums, bool fresh,
                               Load&& load) {
  using L = Lanes<RealOf<Number>>;
  constexpr int64_t count = kLeft * kGroup;
  // GCC leaves the sums in memory unless it is made to unroll.
  typename L::Vector sum[count];
#pragma GCC unroll 16
  for (int64_t k = 0; k < count; ++k)
    sum[k] = apart || fresh ? L::spread(0) : L::load(sums + k * L::width);
  for (int64_t step = begin; step < end; ++step) {
    typename Lanes<Number>::Vector left[kLeft], right[kGroup];
    load(step, left, right);
#pragma GCC unroll 16
    for (int64_t k = 0; k < count; ++k)
      sum[k] = Lanes<Number>::add_product(sum[k], left[k / kGroup], right[k % kGroup]);
  }
#pragma GCC unroll 16
  for (int64_t k = 0; k < count; ++k)
    L::store(sums + k * L::width, apart && !fresh ? L::load(sums + k * L::width) + sum[k] : sum[k]);
}

// The products of a tile, each a vector of partial sums, over vectors [begin, end) of the columns.
template <class Number, class Element>
void add_products(const Element* const* rows, int64_t begin, int64_t end, const Number* packed,
                  RealOf<Number>* sums) {
  using L = Lanes<Number>;
  const Element* row[kTile];
  for (int64_t i = 0; i < kTile; ++i) row[i] = rows[i];
  add_outer_products<Number, kTile, true>(begin, end, sums, false,
                                          [&](int64_t v, auto* p, auto* c) {
                                            for (int64_t i = 0; i < kTile; ++i)
                                              p[i] = L::load(row[i] + v * L::width);
                                            for (int64_t j = 0; j < kGroup; ++j)
                                              c[j] = L::load(packed + (v * kGroup + j) * L::width);
                                          });
}

// Adds each lane to the one that is `half` away, for two vectors at once: the lanes whose number
// has the bit of `half` are b's, the others a's.
template <int half, size_t... lane>
FloatVector fold(FloatVector a, FloatVector b, std::index_sequence<lane...>) {
  constexpr int width = TRIMTAB_WIDTH;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (lane & half ? width + lane : lane)...) +
         __builtin_shufflevector(a, b, ((lane & half ? width + lane : lane) ^ half)...);
#else
  const IntVector own = {static_cast<int>(lane & half ? width + lane : lane)...};
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, own ^ half);
#endif
}

template <int half>
void fold_all(FloatVector* sums) {
#pragma GCC unroll 16
  for (int k = 0; k < half; ++k)
    sums[k] = fold<half>(sums[k], sums[k + half], std::make_index_sequence<TRIMTAB_WIDTH>{});
  if constexpr (half > 1) fold_all<half / 2>(sums);
}

// Lane k: the sum of the lanes of vector k, of as many vectors as there are lanes.
inline FloatVector sums_of(const float* vectors) {
  FloatVector sum[TRIMTAB_WIDTH];
  for (int k = 0; k < TRIMTAB_WIDTH; ++k) sum[k] = Lanes<float>::load(vectors + k * TRIMTAB_WIDTH);
  fold_all<TRIMTAB_WIDTH / 2>(sum);
  return sum[0];
}
inline double sums_of(const double* vectors) { return *vectors; }

// G of a block, [group][row][kGroup], with zeros where there is no row of P or of C.
template <class Number, class Element>
void block_products(const Block<Number, Element>& block, const Packing<Number>& packing,
                    const Number* packed, const Workspace<Element>& work) {
  using L = Lanes<RealOf<Element>>;
  const int64_t groups = packing.groups();
  for (int64_t g = 0; g < groups; ++g)
    fill_zero(work.sums + g * kBlockProducts * L::width, block.used * kGroup * L::width);
  const auto add = [&](const Element* const* rows, int64_t begin, int64_t end, int64_t at) {
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < block.used; i += kTile)
        add_products(rows + i, begin, end, packed + packing.at(g, at),
                     work.sums + (g * kBlockProducts + i * kGroup) * L::width);
  };
  const int64_t whole = block.whole_vectors;
  for (int64_t v = 0; v < whole; v += kStep)
    add(block.row, v, v + kStep < whole ? v + kStep : whole, 0);
  if (block.has_tail) add(block.tail, 0, 1, whole);
  for (int64_t g = 0; g < groups; ++g) {
    RealOf<Element>* const products = work.products + g * kBlockProducts;
    for (int64_t k = 0; k < block.used * kGroup; k += L::width)
      L::store(products + k, sums_of(work.sums + (g * kBlockProducts + k) * L::width));
    for (int64_t i = 0; i < block.used; ++i)
      for (int64_t j = i < block.count ? packing.rows - g * kGroup : 0; j < kGroup; ++j)
        products[i * kGroup + j] = 0;
  }
}

// Adds factors^T P for some vectors of columns, to one group of the gradient.
template <int64_t kVectors, class Element>
void add_gradient_tile(const Element* const* rows, int64_t count, int64_t v,
                       const RealOf<Element>* factors, RealOf<Element>* grad, bool fresh) {
  using L = Lanes<RealOf<Element>>;
  add_outer_products<RealOf<Element>, kVectors, true>(
      0, count, grad, fresh, [&](int64_t row, auto* p, auto* factor) {
        for (int64_t i = 0; i < kVectors; ++i) p[i] = L::load(rows[row] + (v + i) * L::width);
        for (int64_t j = 0; j < kGroup; ++j) factor[j] = L::spread(factors[row * kGroup + j]);
      });
}

// What a block adds to the gradient of C, from the factors that stand in place of G.
template <class Element>
void add_gradient(const Block<RealOf<Element>, Element>& block,
                  const Packing<RealOf<Element>>& packing, const Workspace<Element>& work,
                  const Ahead<Element>& ahead) {
  using L = Lanes<RealOf<Element>>;
  const int64_t whole = block.whole_vectors;
  const auto add = [&](auto vectors, const Element* const* rows, int64_t v, int64_t at) {
    for (int64_t g = 0; g < packing.groups(); ++g)
      add_gradient_tile<decltype(vectors)::value>(rows, block.count, v,
                                                  work.products + g * kBlockProducts,
                                                  work.grad + packing.at(g, at), block.is_first);
  };
  using One = std::integral_constant<int64_t, 1>;
  int64_t v = 0;
  for (; v + kTile <= whole; v += kTile) {
    ahead.fetch(v * L::width, kTile * L::width);
    add(std::integral_constant<int64_t, kTile>{}, block.row, v, v);
  }
  for (; v < whole; ++v) add(One{}, block.row, v, v);
  if (block.has_tail) add(One{}, block.tail, 0, whole);
}

// The gradient of a block itself, `slope` times factors C.
template <class Element>
void write_gradient(int64_t rows, const Packing<RealOf<Element>>& packing,
                    const Workspace<Element>& work, RealOf<Element> slope, RealOf<Element>* out) {
  using Real = RealOf<Element>;
  using L = Lanes<Real>;
  const int64_t columns = packing.columns, last = packing.vectors() - 1;
  for (int64_t v = 0; v <= last; v += kGroup)
    for (int64_t i = 0; i < rows; i += kTile) {
      Real sums[kTile * kGroup * L::width];
      add_outer_products<Real, kTile, false>(
          0, packing.rows, sums, true, [&](int64_t c, auto* factor, auto* x) {
            const int64_t g = c / kGroup, j = c % kGroup;
            const Real* const factors = work.products + g * kBlockProducts + i * kGroup + j;
            for (int64_t k = 0; k < kTile; ++k) factor[k] = L::spread(factors[k * kGroup]);
            for (int64_t k = 0; k < kGroup; ++k)
              x[k] =
                  L::load(work.packed + packing.at(g, v + k < last ? v + k : last) + j * L::width);
          });
      for (int64_t k = 0; k < kTile * kGroup; ++k) {
        const int64_t row = i + k / kGroup, first = (v + k % kGroup) * L::width;
        if (row < rows && first < columns)
          store_lanes(out + row * columns + first, L::load(sums + k * L::width) * slope,
                      columns - first);
      }
    }
}

// Adds to the value; what the gradients take for G is left in its place. The sign of 0 and that of
// NaN is 0, as torch.sign has it.
template <class Real>
void apply_norm(Real* products, int64_t groups, int64_t rows, bool squared, WideSum<Real>& value) {
  using L = Lanes<Real>;
  const auto one = L::spread(1), zero = L::spread(0);
  for (; groups > 0; --groups, products += kBlockProducts)
    for (int64_t k = 0; k < rows * kGroup; k += L::width) {
      const auto g = L::load(products + k);
      if (squared) {
        value.add(g * g);
        continue;
      }
      value.add(L::choose(g < zero, -g, g));
      L::store(products + k, L::choose(g > zero, one, L::choose(g < zero, -one, zero)));
    }
}

template <class Element>
Packing<RealOf<Element>> packing_of(const PenaltyModule<Element>& module) {
  return {module.current.rows.count, module.columns};
}

// Calls f(block, the one ahead) for rows [begin, end) while it returns true. `streams`: they come
// from memory. The others come in small blocks, so that no result depends on the rows beside it.
template <class Number, class Element, class F>
bool for_each_block(const Rows<Element>* tensors, int64_t begin, int64_t end,
                    const Packing<Number>& packing, Element* gathered, bool streams, F&& f) {
  const bool early = streams && packing.is_small();
  const int64_t most = (early || !streams ? 32 : 64) / sizeof(Number);
  Cursor<Element> cursor(tensors, begin);
  Block<Number, Element> block;
  for (int64_t row = begin; row < end; row += block.count) {
    block.fill(cursor, std::min(most, end - row), packing.columns, gathered,
               streams && (row == begin || !early));
    block.is_first = row == begin;
    const Ahead<Element> ahead(cursor, early ? std::min(most, end - row - block.count) : 0);
    if (!f(block, ahead)) return false;
  }
  return true;
}

// The gradient of C from the workspace.
template <class Element>
void write_current(const PenaltyChunk<Element>& chunk, const Workspace<Element>& work) {
  using L = Lanes<RealOf<Element>>;
  if (!chunk.grad_current) return;
  const auto packing = packing_of(*chunk.module);
  packing.for_each([&](int64_t row, int64_t first, int64_t at) {
    store_lanes(chunk.grad_current + row * packing.columns + first,
                L::load(work.grad + at) * chunk.scale, packing.columns - first);
  });
}

template <class Element>
void penalty_chunk(PenaltyChunk<Element>& chunk, bool squared, const Workspace<Element>& work) {
  using Real = RealOf<Element>;
  const PenaltyModule<Element>& module = *chunk.module;
  const auto packing = packing_of(module);
  const Real slope = squared ? 2 * module.weight : module.weight;
  module.current.pack(module.current.rows, module.columns, work.packed);
  if (chunk.grad_current && chunk.begin == chunk.end) fill_zero(work.grad, packing.size());
  WideSum<Real> value;
  int64_t row = chunk.begin;
  for_each_block(module.previous, chunk.begin, chunk.end, packing, work.gathered, true,
                 [&](const auto& block, const auto& ahead) {
                   block_products(block, packing, work.packed, work);
                   apply_norm(work.products, packing.groups(), block.used, squared, value);
                   if (chunk.grad_current) add_gradient(block, packing, work, ahead);
                   if (module.grad_previous)
                     write_gradient(block.count, packing, work, slope,
                                    module.grad_previous + row * module.columns);
                   row += block.count;
                   return true;
                 });
  chunk.value = value.value();
  write_current(chunk, work);
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
void penalty(const PenaltyWork<Element>& all, std::atomic<int64_t>& next) {
  Workspace<Element> work;
  for (int64_t i = 0; i < all.count; ++i) work.include(packing_of(*all.chunks[i].module));
  work.allocate();
  for (int64_t i; (i = next++) < all.count;) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Element, BFloat16>)
      if (!all.squared && penalty_of_pairs(all.chunks[i], work)) continue;
#endif
    penalty_chunk(all.chunks[i], all.squared, work);
  }
}

template <class Real>
void add_parts(const PartialGradients<Real>& grad, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    Real sum = grad.out[i];
    for (int64_t part = 0; part < grad.count; ++part) sum += grad.parts[part * grad.length + i];
    grad.out[i] = sum * grad.scale;
  }
}

template <class Element>
void project_rows(const Projection<Element>& item, const Workspace<Element>& work) {
  using L = Lanes<RealOf<Element>>;
  const Packing<RealOf<Element>> packing{item.rows.count, item.columns};
  pack<RealOf<Element>, Element>(item.rows, item.columns, work.packed);
  if (item.basis.count == 0) fill_zero(work.grad, packing.size());
  for_each_block(&item.basis, 0, item.basis.count, packing, work.gathered, false,
                 [&](const auto& block, const auto& ahead) {
                   block_products(block, packing, work.packed, work);
                   add_gradient(block, packing, work, ahead);
                   return true;
                 });
  packing.for_each([&](int64_t row, int64_t first, int64_t at) {
    store_lanes(item.out + row * item.columns + first,
                L::load(work.packed + at) - L::load(work.grad + at), item.columns - first);
  });
}

template <class Element>
void project(const ProjectionWork<Element>& all, std::atomic<int64_t>& next) {
  Workspace<Element> work;
  for (int64_t i = 0; i < all.count; ++i)
    work.include({all.items[i].rows.count, all.items[i].columns});
  work.allocate();
  for (int64_t i; (i = next++) < all.count;) project_rows(all.items[i], work);
}

template <class Element>
constexpr OrthogonalFunctions<Element> orthogonal_functions() {
  return {pack<RealOf<Element>, Element>, penalty<Element>, add_parts<RealOf<Element>>,
          project<Element>};
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
