// One token of each contrasted row. A cluster of blocks takes a row: it is combined once, into
// memory near the blocks, and what comes after reads that.
#pragma once

#include "cuda/contrast_select.cuh"

namespace trimtab {
namespace {

constexpr unsigned kMostSampleThreads = 512;

// How a launch cuts its rows. It depends on the device and the length of a row, never on their
// number: a row's bits are the same in every batch.
struct SampleCut {
  int64_t rows;
  int slice;       // classes of a block, a multiple of 8
  float* scratch;  // `slice` numbers for each block of the grid where shared memory has no room
};

// The rows that one output row is made of.
template <class Element>
class SampleSource {
 public:
  static constexpr int width = 16 / static_cast<int>(sizeof(Element));

  TRIMTAB_DEVICE SampleSource(const ContrastInputs<Element>& inputs, int64_t i)
      : positive_(row_at(inputs.positive, i)), alpha_(at(inputs.alpha, i)) {
    if (inputs.negative.given) negative_ = row_at(inputs.negative, i);
    if (inputs.anchor.given) anchor_ = row_at(inputs.anchor, i);
    exists_ =
        positive_ && (negative_ || !inputs.negative.given) && (anchor_ || !inputs.anchor.given);
    if (inputs.negative.given && alpha_ == 0) {
      positive_ = anchor_ ? anchor_ : positive_;
      negative_ = anchor_ = nullptr;
    }
  }

  TRIMTAB_DEVICE bool exists() const { return exists_; }

  // Writes z; updates the largest z and anchor. False if there is a NaN among them.
  TRIMTAB_DEVICE bool combine_slice(const ScoreSlice& row, float& best, float& best_anchor) const {
    bool nan = false;
    sweep(row, [&](auto count, int v) {
      constexpr int N = count;
      const auto p = load_stream<N>(positive_ + v);
      auto n = p, a = p;
      if (negative_) n = load_stream<N>(negative_ + v);
      if (anchor_) a = load_stream<N>(anchor_ + v);
      Numbers<N> z = to_numbers(p);
      const Numbers<N> negative = to_numbers(n), anchor = to_numbers(a);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (negative_)
          z.at[e] = combine<Scalar>(z.at[e], negative.at[e], anchor.at[e], alpha_);
        else
          nan |= anchor.at[e] != anchor.at[e];
        nan |= z.at[e] != z.at[e];
        best = z.at[e] > best ? z.at[e] : best;
        best_anchor = anchor.at[e] > best_anchor ? anchor.at[e] : best_anchor;
      }
      put(row, v, z);
    });
    for (int v = row.end + static_cast<int>(threadIdx.x); v < (row.end + 7) / 8 * 8;
         v += blockDim.x)
      row.score[v - row.begin] = -kInfinity;
    return !nan;
  }

  // z becomes -inf where the anchor is below `threshold`; returns the largest z.
  TRIMTAB_DEVICE float mask_implausible(const ScoreSlice& row, float threshold) const {
    const Element* const source = anchor_ ? anchor_ : positive_;
    float best = -kInfinity;
    sweep(row, [&](auto count, int v) {
      constexpr int N = count;
      const Numbers<N> anchor = to_numbers(load_stream<N>(source + v));
      Numbers<N> z = get<N>(row, v);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        z.at[e] = anchor.at[e] >= threshold ? z.at[e] : -kInfinity;
        best = z.at[e] > best ? z.at[e] : best;
      }
      put(row, v, z);
    });
    return best;
  }

 private:
  // Calls f(how many, class of the first) for what is this thread's, the same in each sweep.
  template <class F>
  TRIMTAB_DEVICE void sweep(const ScoreSlice& row, F&& f) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    int alone = row.begin;
    // A slice begins at a multiple of `width`.
    if (((offset_from_16_bytes(positive_) | offset_from_16_bytes(negative_) |
          offset_from_16_bytes(anchor_))) == 0) {
      alone = max(row.begin, row.end / width * width);
#pragma unroll 1
      for (int v = row.begin + thread * width; v < alone; v += threads * width)
        f(std::integral_constant<int, width>{}, v);
    }
#pragma unroll 4
    for (int v = alone + thread; v < row.end; v += threads) f(std::integral_constant<int, 1>{}, v);
  }

  template <int N>
  TRIMTAB_DEVICE static Numbers<N> get(const ScoreSlice& row, int v) {
    constexpr int each = N < 4 ? N : 4;
    Numbers<N> numbers;
#pragma unroll
    for (int e = 0; e < N; e += each) {
      const auto part = load<each>(row.score + (v - row.begin) + e);
#pragma unroll
      for (int i = 0; i < each; ++i) numbers.at[e + i] = part.at[i];
    }
    return numbers;
  }
  template <int N>
  TRIMTAB_DEVICE static void put(const ScoreSlice& row, int v, const Numbers<N>& numbers) {
    constexpr int each = N < 4 ? N : 4;
#pragma unroll
    for (int e = 0; e < N; e += each) {
      Vector<float, each> part;
#pragma unroll
      for (int i = 0; i < each; ++i) part.at[i] = numbers.at[e + i];
      store(row.score + (v - row.begin) + e, part);
    }
  }

  const Element *positive_, *negative_ = nullptr, *anchor_ = nullptr;
  float alpha_;
  bool exists_;
};

// Where the results of a row go. One number beside what the kernel was given: registers are few.
struct SampleOut {
  int64_t* token;
  float* logp;
  int64_t* kept;
  int64_t row;

  TRIMTAB_DEVICE void write(int drawn, float logp_of_it, int64_t count) const {
    token[row] = drawn;
    logp[row] = logp_of_it;
    kept[row] = count;
  }
  TRIMTAB_DEVICE void write_bad() const {
    if (cluster_rank() == 0 && threadIdx.x == 0)
      write(-1, std::numeric_limits<float>::quiet_NaN(), 0);
  }
};

// All that is left of a slice, or of a row: the winner, as its sum of score and noise and its
// class in one number, and what its log-probability takes.
template <class Number>
struct Left {
  uint64_t winner;
  int64_t count;
  Number mass;
};

// The largest first word of random bits, as a number, with which a token of weight 1 can reach
// `best`: -log(-log(1 - x)) is at most -log(x). In proportion for the others. A thousandth of
// slack covers the roundings.
TRIMTAB_DEVICE float highest_word(float best) {
  return expf(1e-3f - (best > kSmallestGumbel ? best : kSmallestGumbel)) * 0x1p32f;
}

// Gumbel-max over what is kept of a slice. The high word of a token's random bits already tells
// that it can't win, for all but few: only those need the two logarithms. `reached` hastens that;
// which threads see it when changes nothing.
template <class Scores>
TRIMTAB_DEVICE auto draw(const Scores& row, const Kept& kept, int64_t seed, int64_t position,
                         uint32_t* reached) {
  const auto low_word = [](int64_t x) { return static_cast<uint32_t>(x); };
  const auto high_word = [](int64_t x) { return static_cast<uint32_t>(x >> 32); };
  uint64_t winner = 0;
  int64_t count = 0;
  typename Scores::Sum mass;
  uint32_t best = order_key(kSmallestGumbel);
  float words_of_one = highest_word(kSmallestGumbel);
  row.sweep([&](const Vector<float, 4>& scores, const auto& classes) {
    const uint32_t others = *static_cast<volatile uint32_t*>(reached);
    if (others > best) {
      best = others;
      words_of_one = highest_word(number_of_key(best));
    }
    // Neighbours share the words of one block of Philox.
    constexpr int together = Scores::in_order ? 2 : 1;
#pragma unroll
    for (int first = 0; first < 4; first += together) {
      bool holds[together], any = false;
      float weight[together];
#pragma unroll
      for (int e = 0; e < together; ++e) {
        const float s = scores.at[first + e];
        holds[e] = kept.holds(s, classes[first + e]);
        weight[e] = holds[e] ? exp_of_nonpositive(s - kept.top) : 0.0f;
        count += holds[e];
        mass.add(weight[e]);
        any |= holds[e];
      }
      if (!any) continue;
      const auto words = philox4x32_10<Scalar>(
          {static_cast<uint64_t>(classes[first] / 2), 0, low_word(position), high_word(position)},
          low_word(seed), high_word(seed));
#pragma unroll
      for (int e = 0; e < together; ++e) {
        const int v = classes[first + e];
        const bool odd = Scores::in_order ? e : v % 2;
        const auto high = static_cast<uint32_t>(odd ? words.r2 : words.r0);
        if (!holds[e] || !(static_cast<float>(high) <= weight[e] * words_of_one)) continue;
        const auto low = static_cast<uint32_t>(odd ? words.r3 : words.r1);
        const float key = (scores.at[first + e] - kept.top) + gumbel<Scalar>(high, low);
        // Of equals the lowest class.
        const uint64_t candidate =
            static_cast<uint64_t>(order_key(key)) << 32 | (0xffffffffu - static_cast<uint32_t>(v));
        winner = candidate > winner ? candidate : winner;
        atomicMax(reached, order_key(key));
      }
    }
  });
  return Left<decltype(mass.sum)>{winner, count, mass.sum};
}

template <class Scores>
TRIMTAB_DEVICE void draw_and_measure(SampleCluster& cluster, const Scores& row, const Kept& kept,
                                     int64_t seed, int64_t position, const SampleOut& out) {
  const auto own = draw(row, kept, seed, position, &cluster.shared()->reached);
  using All = std::decay_t<decltype(own)>;
  using Number = decltype(All::mass);
  const All block{block_max(own.winner, cluster.scratch<uint64_t>()),
                  block_sum(own.count, cluster.scratch<int64_t>()),
                  block_sum(own.mass, cluster.scratch<Number>())};
  const All all = cluster.combine(block, [](const All& a, const All& b) {
    return All{max(a.winner, b.winner), a.count + b.count, a.mass + b.mass};
  });
  const int token = static_cast<int>(0xffffffffu - static_cast<uint32_t>(all.winner));
  row.visit(token, [&](float s) {
    const float log_total = static_cast<float>(log(Scores::Sum::value(all.mass)));
    out.write(token, (s - kept.top) - log_total, all.count);
  });
}

TRIMTAB_DEVICE void greedy(SampleCluster& cluster, const ScoreSlice& row, float largest,
                           const SampleOut& out) {
  int token = std::numeric_limits<int>::max();
  row.sweep([&](const Vector<float, 4>& scores, const auto& classes) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (scores.at[e] == largest) token = min(token, classes[e]);
  });
  token = cluster.combine(block_min(token, cluster.scratch<int>()), Min{});
  row.visit(token, [&](float) { out.write(token, 0.0f, 1); });
}

struct Extremes {
  float z, anchor;
  int bad;
};

// The largest z after the mask, the same for every thread of the cluster; NaN for a bad row.
// `best`: the largest that this thread has written.
template <class Element>
TRIMTAB_DEVICE float combine_row(SampleCluster& cluster, const SampleSource<Element>& source,
                                 const ScoreSlice& row, float log_beta, float& best) {
  Extremes own{-kInfinity, -kInfinity, 0};
  const bool good = source.combine_slice(row, own.z, own.anchor);
  best = own.z;
  own = {block_max(own.z, cluster.scratch<float>()),
         block_max(own.anchor, cluster.scratch<float>()), __syncthreads_or(!good)};
  const Extremes all = cluster.combine(own, [](const Extremes& a, const Extremes& b) {
    return Extremes{max(a.z, b.z), max(a.anchor, b.anchor), a.bad | b.bad};
  });
  if (all.bad) return std::numeric_limits<float>::quiet_NaN();
  if (!(log_beta > -kInfinity)) return all.z;
  best = source.mask_implausible(row, all.anchor + log_beta);
  return cluster.maximum(best);
}

// A score that at least k are not below: each block has its part of them among the largest of its
// threads.
TRIMTAB_DEVICE float bound_of_top_k(SampleCluster& cluster, float best, float largest, int64_t k) {
  const int64_t part = (k + cluster.size() - 1) / cluster.size();
  SampleExchange* const shared = cluster.shared();
  shared->list_score[threadIdx.x] = best;
  const auto threads = ScoreList::of(shared, static_cast<int>(blockDim.x));
  SampleCluster block = cluster.alone();
  Kept kept{largest};
  keep_top_k(block, threads, part, kept);
  __syncthreads();
  return cluster.combine(kept.threshold, Min{});
}

// Puts the scores that are not below bound / temperature on the list of the first block, if there
// is room. Returns, if asked, the masses of all scores and of those below.
TRIMTAB_DEVICE Masses list_candidates(SampleCluster& cluster, const ScoreSlice& row, float bound,
                                      float divided, float temperature, float top, bool by_mass) {
  SampleExchange* const first = cluster.at(cluster.shared(), 0);
  // Also what the division makes equal to the bound: it rounds to 24 bits, or to 2**-149.
  const float loose = bound - (fabsf(bound) * 0x1p-20f + temperature * 0x1p-140f);
  Masses own{0, 0};
  row.sweep([&](const Vector<float, 4>& scores, const auto& classes) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!by_mass && !(scores.at[e] >= loose)) continue;
      const float s = scores.at[e] / temperature;
      if (by_mass && s >= kLowest) {
        const auto weight = static_cast<double>(exp_of_nonpositive(s - top));
        own.total += weight;
        own.under += s >= divided ? 0.0 : weight;
      }
      if (!(s >= divided)) continue;
      const uint32_t place = atomicAdd(&first->listed, 1u);
      if (place >= kListed) continue;
      first->list_score[place] = s;
      first->list_class[place] = classes[e];
    }
  });
  if (by_mass) return {cluster.sum(own.total), cluster.sum(own.under)};
  cluster.sync();
  return own;
}

struct Parameters {
  float temperature, tail;
  int64_t top_k;  // the number of classes for no such filter
};

// Works out by a list what it can: top-k's or top-p's candidates are few in most rows. True if all
// that stays is on the list; the others then have no more to do. `best`: the largest of the thread.
template <class Draw>
TRIMTAB_DEVICE bool use_list(SampleCluster& cluster, const ScoreSlice& row, float best,
                             float largest, const Parameters& given, int classes, Kept kept,
                             Draw&& draw_from) {
  const int64_t threads = int64_t{blockDim.x} * cluster.size();
  const bool ranked = given.top_k < classes;
  // For top-p half of what there is room for: a thread may have more than one score above the
  // bound.
  const int64_t wanted = ranked ? given.top_k : min(threads, int64_t{kListed}) / 2;
  if ((!ranked && !(given.tail >= 0)) || wanted > threads) return false;
  // Every block is past the row before, and none at the list yet.
  if (threadIdx.x == 0) cluster.shared()->listed = 0;
  const float bound = bound_of_top_k(cluster, best, largest, wanted);
  kept.threshold = max(bound / given.temperature, kLowest);
  const Masses masses =
      list_candidates(cluster, row, bound, kept.threshold, given.temperature, kept.top, !ranked);
  const auto listed = static_cast<int>(cluster.at(cluster.shared(), 0)->listed);
  if (listed > kListed) return false;
  // The nucleus may reach further down than the list.
  if (!ranked && !in_tail(masses.under, masses.total, given.tail)) return false;
  if (cluster_rank() != 0) return true;
  SampleCluster block = cluster.alone();
  const auto list = ScoreList::of(cluster.shared(), listed);
  if (ranked) {
    keep_top_k(block, list, given.top_k, kept);
    if (given.tail >= 0) keep_top_p(block, list, given.tail, classes, kept);
  } else {
    find_top_p(block, list, given.tail, kept.threshold, masses, kListed, kept);
  }
  draw_from(block, list, kept);
  return true;
}

template <class Element>
TRIMTAB_DEVICE void sample_row(SampleCluster& cluster, const ContrastiveSample<Element>& rows,
                               const ScoreSlice& row, int64_t i) {
  const SampleOut out{rows.token, rows.logp, rows.kept, i};
  const SampleSource<Element> source(rows.inputs, i);
  const float temperature = at(rows.temperature, i);
  if (!source.exists() || !(temperature >= 0)) return out.write_bad();
  float best;
  const float largest = combine_row(cluster, source, row, at(rows.log_beta, i), best);
  if (!std::isfinite(largest)) return out.write_bad();
  if (temperature == 0) return greedy(cluster, row, largest, out);
  Kept kept{largest / temperature};
  if (!std::isfinite(kept.top)) return out.write_bad();
  const int classes = static_cast<int>(rows.inputs.classes);
  const int64_t k = at(rows.top_k, i);
  const Parameters given{temperature, at(rows.tail, i), k > 0 ? k : classes};
  const auto draw_from = [&](SampleCluster& blocks, const auto& scores, Kept left) {
    left.log_min_p = at(rows.log_min_p, i);
    draw_and_measure(blocks, scores, left, at(rows.seed, i), at(rows.position, i), out);
  };
  if (use_list(cluster, row, best, largest, given, classes, kept, draw_from)) return;
  if (temperature != 1) row.divide(temperature);
  if (given.top_k < classes) keep_top_k(cluster, row, given.top_k, kept);
  if (given.tail >= 0) keep_top_p(cluster, row, given.tail, classes, kept);
  draw_from(cluster, row, kept);
}

// A cluster for each row, and the rows that are as many clusters on.
template <class Element>
__global__ void __launch_bounds__(kMostSampleThreads, 2)
    contrastive_sample_kernel(const __grid_constant__ ContrastiveSample<Element> rows,
                              const __grid_constant__ SampleCut cut) {
  auto* const shared = shared_memory<unsigned char>();
  SampleCluster cluster(reinterpret_cast<SampleExchange*>(shared));
  const unsigned size = cluster_size();
  const int classes = static_cast<int>(rows.inputs.classes);
  ScoreSlice row;
  row.score = cut.scratch ? cut.scratch + static_cast<int64_t>(blockIdx.x) * cut.slice
                          : reinterpret_cast<float*>(shared + sizeof(SampleExchange));
  row.begin = min(static_cast<int>(cluster_rank()) * cut.slice, classes);
  row.end = min(row.begin + cut.slice, classes);
  for (int64_t i = blockIdx.x / size; i < cut.rows; i += gridDim.x / size) {
    if (threadIdx.x == 0) cluster.shared()->reached = 0;
    sample_row(cluster, rows, row, i);
    __syncthreads();
  }
  // Not cluster_leave: not all of what threads have read from other blocks is used by them.
  cluster_sync();
}

}  // namespace
}  // namespace trimtab
