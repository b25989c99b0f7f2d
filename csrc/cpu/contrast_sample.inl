// One token of a contrasted row: filters and draw; part of contrast_rows.inl.
//
// Nothing is sorted. A filter leaves a threshold on s, and among the numbers equal to it the index
// of the first that stays. Thresholds come from histograms over a narrowing range of keys.

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

struct Drawn {
  int64_t token;
  double logp;
  int64_t kept;
};

constexpr Drawn kBadRow{-1, std::numeric_limits<double>::quiet_NaN(), 0};

using trimtab::order_key;
UintVector order_key(FloatVector x) {
  const IntVector bits = bits_of<IntVector>(x + 0.0f);
  return bits_of<UintVector>(bits ^ (bits >> 31 | INT32_MIN));
}

// Which s are left. Without a filter: those above -inf.
template <class Real>
struct Kept {
  using L = Lanes<Real>;
  Real top;
  Real log_min_p = -infinity<Real>;
  Real threshold = std::numeric_limits<Real>::lowest();
  int64_t first_equal = 0;

  bool may_have(Real block_max) const {
    return block_max >= threshold && block_max - top >= log_min_p;
  }
  typename L::Mask mask(typename L::Vector s, int64_t v) const {
    typename L::Mask kept = (s >= threshold) & (s - top >= log_min_p);
    if (first_equal > v) {
      const typename L::Mask early = L::first(first_equal - v);
      kept = kept & ((s > threshold) | (early == typename L::Mask{}));
    }
    return kept;
  }
};

// Calls f(vector, index of the first) in every block that may have a number of at least `floor`.
// Inlined, so that what f adds to stays in registers.
template <class Real, class F>
__attribute__((always_inline)) inline void sweep_from(const Row<Real>& row, Real floor, F&& f) {
  using L = Lanes<Real>;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (!(row.block_max[b] >= floor)) continue;
    for (int64_t v = b * kBlock; v < (b + 1) * kBlock; v += L::width) f(L::load(row.value + v), v);
  }
}

// Sums of weights by key, in bins of equal width. Neighbours add to different columns: a sum that
// waits for the one before it would take most of the time.
struct Histogram {
  static constexpr int bits = 8, bins = 1 << bits, columns = 4;
  double sums[bins][columns] = {};

  double of_bin(int bin) const {
    const double* s = sums[bin];
    return (s[0] + s[1]) + (s[2] + s[3]);
  }
};

template <class Real, class Key, class Weigh>
void fill(Histogram& histogram, const Row<Real>& row, Key low, Key high, int shift, Weigh&& weigh) {
  using L = Lanes<Real>;
  sweep_from(row, number_of_key(low), [&](typename L::Vector s, int64_t) {
    const typename L::Key offset = order_key(s) - low;
    uint32_t lanes = L::bits(offset <= high - low);
    if (!lanes) return;
    Key bin[L::width];
    Real weight[L::width];
    const typename L::Key bins = offset >> shift;
    memcpy(bin, &bins, sizeof(bin));
    L::store(weight, weigh(s));
    for (; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      histogram.sums[bin[lane]][lane % Histogram::columns] += weight[lane];
    }
  });
}

// Sum of the weights of the numbers in [low, high).
template <class Real, class Weigh>
double sum_between(const Row<Real>& row, Real low, Real high, Weigh&& weigh) {
  using L = Lanes<Real>;
  WideSum<Real> sum;
  sweep_from(row, low, [&](typename L::Vector s, int64_t) {
    sum.add(L::choose((s >= low) & (s < high), weigh(s), typename L::Vector{}));
  });
  return sum.value();
}

// Where the removed numbers end: all below `value` go.
template <class Real>
struct Boundary {
  Real value;
  double below;  // sum of the weights of what is below `value`
};

// Going up from `low`, with `below` the weights under it: the first number for which `removed(sum
// of the weights up to and with it)` is false, or `top`, the largest.
template <class Real, class Weigh, class Removed>
Boundary<Real> find_boundary(const Row<Real>& row, Real low, Real top, double below, Weigh&& weigh,
                             Removed&& removed) {
  using Key = decltype(order_key(low));
  constexpr int key_bits = 8 * sizeof(Key);
  Key first = order_key(low), last = order_key(top);
  for (;;) {
    int width = 0;
    while (width < key_bits && (last - first) >> width) ++width;
    const int shift = width > Histogram::bits ? width - Histogram::bits : 0;
    Histogram histogram;
    fill(histogram, row, first, last, shift, weigh);
    const int last_bin = static_cast<int>((last - first) >> shift);
    // Sums of another order may differ in their last digit: then the last bin that has any.
    int found = last_bin;
    double sum = below;
    for (int bin = 0; bin <= last_bin; ++bin) {
      const double part = histogram.of_bin(bin);
      if (part == 0) continue;
      found = bin;
      below = sum;
      sum += part;
      if (!removed(sum)) break;
    }
    first += static_cast<Key>(found) << shift;
    if (shift == 0) return {number_of_key(first), below};
    const Key span = (Key{1} << shift) - 1;
    if (last - first > span) last = first + span;
  }
}

// The k-th largest number, or `low` if fewer are at least that.
template <class Real>
Real kth_largest(const Row<Real>& row, Real low, Real top, int64_t k) {
  const auto one = [](auto) { return Lanes<Real>::spread(1); };
  const double beyond = sum_between(row, low, infinity<Real>, one) - static_cast<double>(k);
  if (beyond <= 0) return low;
  const auto removed = [&](double count) { return count <= beyond; };
  return find_boundary(row, low, top, 0, one, removed).value;
}

// The index of the number equal to `value` that `skipped` others come before; if there are no more,
// of the last one where `value` is the largest of the row, else past the end.
template <class Real>
int64_t find_equal(const Row<Real>& row, Real value, int64_t skipped, bool is_largest) {
  using L = Lanes<Real>;
  int64_t found = -1, last = -1;
  sweep_from(row, value, [&](typename L::Vector s, int64_t v) {
    if (found >= 0) return;
    for (uint32_t lanes = L::bits(s == value); lanes; lanes &= lanes - 1) {
      last = v + __builtin_ctz(lanes);
      if (skipped-- == 0) {
        found = last;
        return;
      }
    }
  });
  if (found >= 0) return found;
  return is_largest ? last : row.blocks * kBlock;
}

template <class Real>
void keep_top_p(const Row<Real>& row, Real tail, Kept<Real>& kept) {
  using L = Lanes<Real>;
  const auto weigh = [&](typename L::Vector s) { return L::exp_of_nonpositive(s - kept.top); };
  const double total = sum_between(row, kept.threshold, infinity<Real>, weigh);
  // Below this even a row full of numbers would be in the tail: their sum is enough.
  const double most = static_cast<double>(row.blocks * kBlock);
  const Real sure = kept.top + static_cast<Real>(std::log(0.9 * tail * total / most));
  const Real low = sure < kept.threshold ? kept.threshold : sure < kept.top ? sure : kept.top;
  const double under = sum_between(row, kept.threshold, low, weigh);
  const auto removed = [&](double mass) { return in_tail(mass, total, tail); };
  const auto boundary = find_boundary(row, low, kept.top, under, weigh, removed);
  kept.threshold = boundary.value;
  const double weight = L::maximum(weigh(L::spread(boundary.value)));
  const int64_t skipped = equals_in_tail(boundary.below, weight, total, tail, row.blocks * kBlock);
  if (skipped > 0)
    kept.first_equal = find_equal(row, boundary.value, skipped, boundary.value == kept.top);
}

// z becomes -inf where the anchor is below `threshold`.
template <class C>
void mask_implausible(const C& combination, int64_t classes, typename C::Real threshold,
                      RowBuffer<typename C::Real>& buffer) {
  using L = typename C::L;
  using Vector = typename C::Vector;
  const Vector lowest = L::spread(-infinity<typename C::Real>);
  for (int64_t b = 0; b < buffer.row.blocks; ++b) {
    buffer.row.block_max[b] = -infinity<typename C::Real>;
    if (buffer.anchor_max[b] < threshold) continue;
    const int64_t from = b * kBlock, to = from + kBlock < classes ? from + kBlock : classes;
    Vector best = lowest;
    combination.sweep_anchor(from, to, [&](Vector a, int64_t v, auto mask) {
      typename C::Real* const place = buffer.row.value + v;
      const Vector z = L::choose(mask & (a >= threshold), L::load(place), lowest);
      best = L::choose(z > best, z, best);
      L::store(place, z);
    });
    buffer.row.block_max[b] = L::maximum(best);
  }
}

// Divides the largest of every block by the temperature, and the numbers of the blocks that top-k
// can't rule out: the k-th largest of the maxima is not above the k-th largest number.
template <class Real>
void temper(RowBuffer<Real>& buffer, Real temperature, int64_t top_k, Kept<Real>& kept) {
  using L = Lanes<Real>;
  Row<Real>&row = buffer.row, &maxima = buffer.maxima;
  for (int64_t b = 0; b < row.blocks; ++b) row.block_max[b] /= temperature;
  if (top_k > 0 && top_k <= row.blocks) {
    for (int64_t b = 0; b < maxima.blocks; ++b) {
      auto best = L::load(maxima.value + b * kBlock);
      for (int64_t i = L::width; i < kBlock; i += L::width) {
        const auto x = L::load(maxima.value + b * kBlock + i);
        best = L::choose(x > best, x, best);
      }
      maxima.block_max[b] = L::maximum(best);
    }
    kept.threshold = kth_largest(maxima, kept.threshold, kept.top, top_k);
  }
  if (temperature == 1) return;
  sweep_from(row, kept.threshold,
             [&](auto z, int64_t v) { L::store(row.value + v, z / temperature); });
}

// Gumbel-max over what is kept. The high word of a token's random bits already tells that it can't
// win, for all but few: only those need the two logarithms.
template <class Real>
int64_t draw(const Row<Real>& row, const Kept<Real>& kept, int64_t seed, int64_t position) {
  using L = Lanes<Real>;
  using M = Lanes<float>;
  using Words = typename M::Word;
  constexpr int64_t step = M::width;
  const auto low_word = [](int64_t x) { return static_cast<uint32_t>(x); };
  const auto high_word = [](int64_t x) { return static_cast<uint32_t>(x >> 32); };
  const Words zero{};
  Words pair_of_lane{};
  for (int64_t lane = 0; lane < step / 2; ++lane) pair_of_lane[lane] = lane;
  Real best = -infinity<Real>;
  int64_t token = -1;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (!kept.may_have(row.block_max[b])) continue;
    const double reached = best > kSmallestGumbel ? best : kSmallestGumbel;
    const int64_t limit = largest_high_word(reached - (row.block_max[b] - kept.top));
    if (limit < 0) continue;
    for (int64_t v = b * kBlock; v < (b + 1) * kBlock; v += step) {
      uint32_t lanes = 0;
      for (int64_t i = 0; i < step; i += L::width)
        lanes |= L::bits(kept.mask(L::load(row.value + v + i), v + i)) << i;
      if (!lanes) continue;
      const Words pair = pair_of_lane + static_cast<uint64_t>(v / 2);
      const auto words =
          philox4x32_10<M>({pair, zero, zero + low_word(position), zero + high_word(position)},
                           low_word(seed), high_word(seed));
      const auto high = bits_of<typename M::Uint>((words.r0 & 0xffffffffu) | words.r2 << 32);
      lanes &= M::bits(high <= static_cast<uint32_t>(limit));
      if (!lanes) continue;
      const auto low = bits_of<typename M::Uint>((words.r1 & 0xffffffffu) | words.r3 << 32);
      float noise[step];
      M::store(noise, gumbel<M>(high, low));
      for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const Real key = (row.value[v + lane] - kept.top) + noise[lane];
        if (key > best) {
          best = key;
          token = v + lane;
        }
      }
    }
  }
  return token;
}

// Log-probability of the token, and how many are left.
template <class Real>
Drawn measure(const Row<Real>& row, const Kept<Real>& kept, int64_t token) {
  using L = Lanes<Real>;
  if (token < 0) return kBadRow;
  WideSum<Real> sum;
  int64_t count = 0;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (!kept.may_have(row.block_max[b])) continue;
    for (int64_t v = b * kBlock; v < (b + 1) * kBlock; v += L::width) {
      const auto s = L::load(row.value + v);
      const auto mask = kept.mask(s, v);
      const uint32_t lanes = L::bits(mask);
      if (!lanes) continue;
      count += __builtin_popcount(lanes);
      sum.add(L::choose(mask, L::exp_of_nonpositive(s - kept.top), typename L::Vector{}));
    }
  }
  const Real log_total = static_cast<Real>(std::log(sum.value()));
  return {token, (row.value[token] - kept.top) - log_total, count};
}

template <class Real>
Drawn greedy(const Row<Real>& row, Real largest) {
  return {find_equal(row, largest, 0, true), 0, 1};
}

template <class Element>
Drawn sample_row(const ContrastiveSample<Element>& rows, RowBuffer<RealOf<Element>>& buffer,
                 int64_t i) {
  using Real = RealOf<Element>;
  const Row<Real>& row = buffer.row;
  const int64_t classes = rows.inputs.classes;
  const Real log_beta = at(rows.log_beta, i);
  bool good = false;
  const bool exists = visit_row(rows.inputs, i, [&](const auto& combination) {
    good = combine_row(combination, classes, buffer);
    if (!good || !(log_beta > -infinity<Real>)) return;
    const Real top = Row<Real>{nullptr, buffer.anchor_max, row.blocks}.maximum();
    mask_implausible(combination, classes, top + log_beta, buffer);
  });
  if (!exists || !good) return kBadRow;
  const Real largest = row.maximum(), temperature = at(rows.temperature, i);
  if (!std::isfinite(largest) || !(temperature >= 0)) return kBadRow;
  if (temperature == 0) return greedy(row, largest);
  Kept<Real> kept{largest / temperature};
  if (!std::isfinite(kept.top)) return kBadRow;
  const int64_t top_k = at(rows.top_k, i);
  temper(buffer, temperature, top_k, kept);
  if (top_k > 0 && top_k < classes)
    kept.threshold = kth_largest(row, kept.threshold, kept.top, top_k);
  const Real tail = at(rows.tail, i);
  if (tail >= 0) keep_top_p(row, tail, kept);
  kept.log_min_p = at(rows.log_min_p, i);
  return measure(row, kept, draw(row, kept, at(rows.seed, i), at(rows.position, i)));
}

template <class Element>
void sample_rows(const ContrastiveSample<Element>& rows, int64_t begin, int64_t end) {
  RowBuffer<RealOf<Element>> buffer(rows.inputs.classes);
  for (int64_t i = begin; i < end; ++i) {
    const Drawn drawn = rows.inputs.classes > 0 ? sample_row(rows, buffer, i) : kBadRow;
    rows.token[i] = drawn.token;
    rows.logp[i] = static_cast<RealOf<Element>>(drawn.logp);
    rows.kept[i] = drawn.kept;
  }
}

}  // namespace
}  // namespace TRIMTAB_ISA
}  // namespace trimtab
