// One token of each contrasted row. A cluster of blocks takes a row: it is combined once, into
// memory near the blocks, and what comes after reads that.
#pragma once

#include "cuda/contrast_list.cuh"

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
  TRIMTAB_DEVICE void write_bad(const SampleCluster& cluster) const {
    if (cluster.rank() == 0 && threadIdx.x == 0)
      write(-1, std::numeric_limits<float>::quiet_NaN(), 0);
  }
};

// All that is left of a slice, or of a row: the winner, as its sum of score and noise and its
// class in one number, and what its log-probability takes.
template <class Number>
struct Left {
  uint64_t winner;
  int count;
  Number mass;
};

// The largest first word of random bits, as a number, with which a token of weight 1 can reach
// `best`: -log(-log(1 - x)) is at most -log(x). In proportion for the others. A thousandth of
// slack covers the roundings.
TRIMTAB_DEVICE float highest_word(float best) { return expf(1e-3f - best) * 0x1p32f; }

// Gumbel-max over what is kept of a slice. The high word of a token's random bits already tells
// that it can't win, for all but few: only those need the two logarithms. `reached` hastens that;
// which threads see it when changes nothing.
template <class Scores>
TRIMTAB_DEVICE auto draw(const Scores& row, const Kept& kept, int64_t seed, int64_t position,
                         uint32_t* reached) {
  const auto low_word = [](int64_t x) { return static_cast<uint32_t>(x); };
  const auto high_word = [](int64_t x) { return static_cast<uint32_t>(x >> 32); };
  uint64_t winner = 0;
  int count = 0;
  typename Scores::Sum mass;
  uint32_t best = 0;
  float words_of_one = 0;
  // Neighbours share the words of one block of Philox.
  constexpr int together = Scores::in_order ? 2 : 1;
  row.template sweep<together>([&](const auto& scores, const auto& classes) {
    const uint32_t others = *static_cast<volatile uint32_t*>(reached);
    if (others > best) {
      best = others;
      words_of_one = highest_word(number_of_key(best));
    }
    bool any = false;
    float weight[together];  // -1 for what does not stay
#pragma unroll
    for (int e = 0; e < together; ++e) {
      const float s = scores.at[e];
      weight[e] = -1.0f;
      if (!kept.holds(s, classes[e])) continue;
      weight[e] = exp_of_nonpositive(s - kept.top);
      mass.add(weight[e]);
      ++count;
      any = true;
    }
    if (!any) return;
    const auto words = philox4x32_10<Scalar>(
        {static_cast<uint64_t>(classes[0] / 2), 0, low_word(position), high_word(position)},
        low_word(seed), high_word(seed));
#pragma unroll
    for (int e = 0; e < together; ++e) {
      const int v = classes[e];
      const bool odd = Scores::in_order ? e : v % 2;
      const auto high = static_cast<uint32_t>(odd ? words.r2 : words.r0);
      if (!(static_cast<float>(high) <= weight[e] * words_of_one)) continue;
      const auto low = static_cast<uint32_t>(odd ? words.r3 : words.r1);
      const float key = (scores.at[e] - kept.top) + gumbel<Scalar>(high, low);
      // Of equals the lowest class.
      const uint64_t candidate =
          static_cast<uint64_t>(order_key(key)) << 32 | (0xffffffffu - static_cast<uint32_t>(v));
      winner = candidate > winner ? candidate : winner;
      atomicMax(reached, order_key(key));
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
                  block_sum(own.count, cluster.scratch<int>()),
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

template <class Scores>
TRIMTAB_DEVICE void greedy(SampleCluster& cluster, const Scores& row, float largest,
                           const SampleOut& out) {
  int token = std::numeric_limits<int>::max();
  row.sweep([&](const auto& scores, const auto& classes) {
#pragma unroll
    for (int e = 0; e < Scores::width; ++e)
      if (scores.at[e] == largest) token = min(token, classes[e]);
  });
  token = cluster.combine(block_min(token, cluster.scratch<int>()), Min{});
  row.visit(token, [&](float) { out.write(token, 0.0f, 1); });
}

// A list is the first block's work, and the others are done.
template <class Draw>
TRIMTAB_DEVICE void work_on_list(SampleCluster& cluster, const Candidates& listed, float largest,
                                 const Parameters& given, int classes, Kept kept,
                                 const SampleOut& out, Draw&& draw_from) {
  if (cluster.rank() != 0) return;
  SampleCluster block = cluster.alone();
  const ScoreList list{cluster.shared()->list_score, cluster.shared()->list_class, listed.count};
  if (given.temperature == 0) return greedy(block, list, largest, out);
  if (given.top_k < classes) keep_top_k(block, list, given.top_k, kept);
  if (given.tail >= 0) {
    Masses masses = listed.masses;
    if (masses.total == 0)
      masses.total = sum_between(block, list, kept.threshold, kInfinity, kept.top);
    find_top_p(block, list, given.tail, kept.threshold, masses, kListed, kept);
  }
  draw_from(block, list, kept);
}

template <class Element>
TRIMTAB_DEVICE void sample_row(SampleCluster& cluster, const ContrastiveSample<Element>& rows,
                               const ScoreSlice& row, int64_t i) {
  const SampleOut out{rows.token, rows.logp, rows.kept, i};
  const SampleSource<Element> source(rows.inputs, i);
  const int classes = static_cast<int>(rows.inputs.classes);
  const float temperature = at(rows.temperature, i), log_beta = at(rows.log_beta, i);
  if (!source.exists() || !(temperature >= 0)) return out.write_bad(cluster);
  Extremes best = source.combine_slice(row);
  const Extremes block{block_max(best.z, cluster.scratch<float>()),
                       block_max(best.anchor, cluster.scratch<float>())};
  const Extremes all = cluster.combine(block, [](const Extremes& a, const Extremes& b) {
    return Extremes{larger(a.z, b.z), larger(a.anchor, b.anchor)};
  });
  if (all.z != all.z || all.anchor != all.anchor) return out.write_bad(cluster);
  float largest = all.z;
  Candidates listed{{0, 0}, kListed + 1};
  if (log_beta > -kInfinity) {
    const float threshold = all.anchor + log_beta;
    const Survivors left = list_plausible(cluster, source, row, threshold, best.anchor,
                                          temperature > 0 ? temperature : 1.0f);
    largest = left.largest;
    listed.count = left.count;
    if (left.count > kListed) {
      best.z = source.mask_implausible(row, threshold);
      __syncthreads();
    }
  }
  if (!std::isfinite(largest)) return out.write_bad(cluster);
  // Of zeros of both signs threads may hold either as the largest: added to 0 they are one.
  Kept kept{temperature > 0 ? largest / temperature + 0.0f : 0.0f};
  if (!std::isfinite(kept.top)) return out.write_bad(cluster);
  const int64_t k = at(rows.top_k, i);
  const Parameters given{temperature, at(rows.tail, i),
                         k > 0 && k < classes ? static_cast<int>(k) : classes};
  const auto draw_from = [&](SampleCluster& blocks, const auto& scores, Kept left) {
    left.log_min_p = at(rows.log_min_p, i);
    draw_and_measure(blocks, scores, left, at(rows.seed, i), at(rows.position, i), out);
  };
  if (listed.count > kListed && temperature > 0)
    listed = list_candidates(cluster, source, row, best.z, given, classes, kept);
  if (listed.count <= kListed)
    return work_on_list(cluster, listed, largest, given, classes, kept, out, draw_from);
  if (temperature == 0) return greedy(cluster, row, largest, out);
  if (temperature != 1) row.divide(temperature);
  kept.threshold = kLowest;
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
  const unsigned size = cluster.size();
  const int classes = static_cast<int>(rows.inputs.classes);
  ScoreSlice row;
  row.score = cut.scratch ? cut.scratch + static_cast<int64_t>(blockIdx.x) * cut.slice
                          : reinterpret_cast<float*>(shared + sizeof(SampleExchange));
  row.begin = min(static_cast<int>(cluster.rank()) * cut.slice, classes);
  row.end = min(row.begin + cut.slice, classes);
  cluster_sync();  // every block of the cluster runs
  for (int64_t i = blockIdx.x / size; i < cut.rows; i += gridDim.x / size) {
    if (threadIdx.x == 0) cluster.start_row();
    sample_row(cluster, rows, row, i);
    __syncthreads();
  }
}

}  // namespace
}  // namespace trimtab
