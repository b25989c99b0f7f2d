// One contrasted row in memory, and how it is made; part of contrast_rows.inl.

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

template <class Real>
constexpr Real infinity = std::numeric_limits<Real>::infinity();

template <class Value>
Value at(const PerRow<Value>& parameter, int64_t i) {
  return parameter.rows ? parameter.rows[i] : parameter.number;
}

// Numbers in blocks, the last one filled up with -inf, and the largest number of each block. A
// reader looks at the largest first: what no block can contribute to is never read. A block whose
// largest is -inf may hold anything.
constexpr int64_t kBlock = 256;

constexpr int64_t blocks_of(int64_t count) { return (count + kBlock - 1) / kBlock; }

template <class Real>
struct Row {
  Real* value;
  Real* block_max;
  int64_t blocks;

  Real maximum() const {
    Real best = -infinity<Real>;
    for (int64_t b = 0; b < blocks; ++b) best = block_max[b] > best ? block_max[b] : best;
    return best;
  }
};

// The memory of a row, one per thread. The maxima are a row of their own.
template <class Real>
struct RowBuffer {
  Row<Real> row, maxima;
  Real* anchor_max;

  explicit RowBuffer(int64_t classes) {
    row.blocks = blocks_of(classes);
    maxima.blocks = blocks_of(row.blocks);
    const int64_t elements = row.blocks * kBlock, most = maxima.blocks * kBlock;
    const int64_t count = elements + 2 * most + maxima.blocks;
    memory_ = static_cast<Real*>(::operator new(count * sizeof(Real), kAlignment));
    row.value = memory_;
    row.block_max = maxima.value = memory_ + elements;
    anchor_max = maxima.value + most;
    maxima.block_max = anchor_max + most;
    for (int64_t b = 0; b < most; ++b) maxima.value[b] = -infinity<Real>;
  }
  ~RowBuffer() { ::operator delete(memory_, kAlignment); }
  RowBuffer(const RowBuffer&) = delete;
  RowBuffer& operator=(const RowBuffer&) = delete;

 private:
  static constexpr std::align_val_t kAlignment{64};
  Real* memory_;
};

// How z and the anchor come from the rows in memory: `contrasts` with a negative row, `anchored`
// with an anchor apart from the positive row.
template <bool contrasts_, bool anchored_, class Element>
struct Combination {
  using Real = RealOf<Element>;
  using L = Lanes<Real>;
  using Vector = typename L::Vector;
  using Mask = typename L::Mask;
  static constexpr bool contrasts = contrasts_, anchored = anchored_;
  const Element *positive, *negative, *anchor;
  Real alpha;

  // Calls f(z, anchor, index of the first, mask of the lanes that exist) over [begin, end).
  template <class F>
  void sweep(int64_t begin, int64_t end, F&& f) const {
    int64_t v = begin;
    for (; v + L::width <= end; v += L::width) apply(v, L::width, L::all(), f);
    if (v < end) apply(v, end - v, L::first(end - v), f);
  }
  // Calls f(anchor, ...) likewise.
  template <class F>
  void sweep_anchor(int64_t begin, int64_t end, F&& f) const {
    int64_t v = begin;
    for (; v + L::width <= end; v += L::width) f(L::load(anchor_row() + v), v, L::all());
    if (v < end) f(load_lanes(anchor_row() + v, end - v), v, L::first(end - v));
  }
  Real anchor_at(int64_t v) const { return to_real(anchor_row()[v]); }

 private:
  const Element* anchor_row() const { return anchored ? anchor : positive; }

  template <class F>
  void apply(int64_t v, int64_t count, Mask mask, F&& f) const {
    const Vector p = load_lanes(positive + v, count);
    Vector a = p, z = p;
    if constexpr (anchored) a = load_lanes(anchor + v, count);
    if constexpr (contrasts) z = combine<L>(p, load_lanes(negative + v, count), a, alpha);
    f(z, a, v, mask);
  }
};

template <class Element>
const Element* row_at(const LogitRows<Element>& rows, int64_t i) {
  const int64_t r = rows.map ? rows.map[i] : i;
  return r >= 0 && r < rows.count ? rows.data + r * rows.stride : nullptr;
}

// Calls f(combination) for output row i. False if a row that it needs does not exist.
template <class Element, class F>
bool visit_row(const ContrastInputs<Element>& inputs, int64_t i, F&& f) {
  const Element* const p = row_at(inputs.positive, i);
  const Element* const n = inputs.negative.given ? row_at(inputs.negative, i) : p;
  const Element* const a = inputs.anchor.given ? row_at(inputs.anchor, i) : p;
  if (!p || !n || !a) return false;
  const auto alpha = at(inputs.alpha, i);
  if (inputs.negative.given && alpha == 0)
    f(Combination<false, false, Element>{a, nullptr, nullptr, alpha});
  else if (inputs.negative.given && inputs.anchor.given)
    f(Combination<true, true, Element>{p, n, a, alpha});
  else if (inputs.negative.given)
    f(Combination<true, false, Element>{p, n, nullptr, alpha});
  else if (inputs.anchor.given)
    f(Combination<false, true, Element>{p, nullptr, a, alpha});
  else
    f(Combination<false, false, Element>{p, nullptr, nullptr, alpha});
  return true;
}

// Writes z and the largest z and anchor of each block. False if there is a NaN among them.
template <class C>
bool combine_row(const C& combination, int64_t classes, RowBuffer<typename C::Real>& buffer) {
  using L = typename C::L;
  using Vector = typename C::Vector;
  constexpr bool same = !C::contrasts && !C::anchored;
  const Vector lowest = L::spread(-infinity<typename C::Real>);
  typename C::Mask nan{};
  for (int64_t b = 0; b < buffer.row.blocks; ++b) {
    const int64_t from = b * kBlock, to = from + kBlock < classes ? from + kBlock : classes;
    Vector best = lowest, best_anchor = lowest;
    const auto larger = [&](Vector x, Vector y) { return L::choose(x > y, x, y); };
    combination.sweep(from, to, [&](Vector z, Vector a, int64_t v, auto mask) {
      nan = nan | (mask & (z != z));
      if constexpr (C::anchored && !C::contrasts) nan = nan | (mask & (a != a));
      const Vector shown = L::choose(mask, z, lowest);
      best = larger(shown, best);
      if constexpr (!same) best_anchor = larger(L::choose(mask, a, lowest), best_anchor);
      L::store(buffer.row.value + v, shown);
    });
    const int64_t written = (to + L::width - 1) / L::width * L::width;
    for (int64_t v = written; v < from + kBlock; v += L::width)
      L::store(buffer.row.value + v, lowest);
    buffer.row.block_max[b] = L::maximum(best);
    buffer.anchor_max[b] = same ? buffer.row.block_max[b] : L::maximum(best_anchor);
  }
  return L::bits(nan) == 0;
}

}  // namespace
}  // namespace TRIMTAB_ISA
}  // namespace trimtab
