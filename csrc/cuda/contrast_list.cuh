// The list of what can be left of a row. Most filters leave few tokens, and the first block of the
// cluster can work on so few alone.
#pragma once

#include "cuda/contrast_source.cuh"

namespace trimtab {
namespace {

// The first block's list, to which all blocks add.
class ListWriter {
 public:
  TRIMTAB_DEVICE explicit ListWriter(const SampleCluster& cluster)
      : first_(cluster.at(cluster.shared(), 0)) {}

  TRIMTAB_DEVICE void add(float score, int v) {
    ++count_;
    if (full_) return;
    const uint32_t place = atomicAdd(&first_->listed, 1u);
    full_ = place >= kListed;
    if (full_) return;
    first_->list_score[place] = score;
    first_->list_class[place] = v;
  }
  // How many were added, by this thread, though the list may have had no room for them.
  TRIMTAB_DEVICE int count() const { return count_; }

 private:
  SampleExchange* first_;
  int count_ = 0;
  bool full_ = false;
};

struct Survivors {
  float largest;
  int count;
};

// Lists the scores that the mask leaves, divided by `divisor`. A thread without any, as most are,
// reads nothing. `best_anchor`: the largest of the thread.
template <class Element>
TRIMTAB_DEVICE Survivors list_plausible(SampleCluster& cluster, const SampleSource<Element>& source,
                                        const ScoreSlice& row, float threshold, float best_anchor,
                                        float divisor) {
  ListWriter list(cluster);
  float largest = -kInfinity;
  if (best_anchor >= threshold)
    source.visit_plausible(row, threshold, [&](float z, int v) {
      largest = larger(largest, z);
      if (z > -kInfinity) list.add(z / divisor, v);
    });
  const Survivors own{block_max(largest, cluster.scratch<float>()),
                      block_sum(list.count(), cluster.scratch<int>())};
  return cluster.combine(own, [](const Survivors& a, const Survivors& b) {
    return Survivors{larger(a.largest, b.largest), a.count + b.count};
  });
}

// A score that at least k are not below: each block has its part of them among the largest of its
// threads, in the uppermost of 256 bins. `best`: the largest of the thread, less than +inf.
TRIMTAB_DEVICE float bound_of_top_k(SampleCluster& cluster, float best, int k) {
  const int part = (k + static_cast<int>(cluster.size()) - 1) / static_cast<int>(cluster.size());
  SampleCluster block = cluster.alone();
  const bool counts = best >= kLowest;
  auto* const scratch = cluster.scratch<unsigned>();
  // Half of them: no difference overflows.
  const float least =
      0.5f * number_of_key(block_min(order_key(counts ? best : kInfinity), scratch));
  const float range = 0.5f * number_of_key(block_max(order_key(best), scratch)) - least;
  const float bins_per_score = range > 0x1p-100f ? (kBins - 1) / range : 0.0f;
  const int bin = counts ? static_cast<int>((0.5f * best - least) * bins_per_score) : -1;
  const int beyond = __syncthreads_count(counts) - part;
  uint32_t bound = order_key(kLowest);
  if (beyond > 0) {
    Histogram* const histogram = block.start_histogram();
    if (counts) histogram->add(min(bin, kBins - 1), 1);
    const auto removed = [&](uint64_t sum) { return static_cast<int>(sum) <= beyond; };
    const int first = find_bin(block.merge(histogram), 0, removed).index;
    bound = block_min(order_key(bin >= first ? best : kInfinity), scratch);
  }
  return cluster.combine(number_of_key(bound), Min{});
}

struct Parameters {
  float temperature, tail;
  int top_k;  // the number of classes for no such filter
};

struct Candidates {
  Masses masses;
  int count;
};

// Lists the quotients of the scores that are not below `threshold`, a bound of them.
template <class Element>
TRIMTAB_DEVICE int list_from(SampleCluster& cluster, const SampleSource<Element>& source,
                             const ScoreSlice& row, float best, float bound, float temperature,
                             float threshold) {
  ListWriter list(cluster);
  // Also what the division makes equal to the bound: it rounds to 24 bits, or to 2**-149.
  const float loose = bound - (fabsf(bound) * 0x1p-20f + temperature * 0x1p-140f);
  if (best >= loose)
    source.sweep(row, [&](auto count, int v) {
      const Numbers<count> z = row.get<count>(v);
      unsigned chosen = 0;
#pragma unroll
      for (int e = 0; e < count; ++e) chosen |= (z.at[e] >= loose ? 1u : 0u) << e;
      row.visit_chosen(v, chosen, [&](float x, int of) {
        const float s = x / temperature;
        if (s >= threshold) list.add(s, of);
      });
    });
  return cluster.combine(block_sum(list.count(), cluster.scratch<int>()), Add{});
}
// The same, with the masses of all scores and of those below.
TRIMTAB_DEVICE Candidates list_and_weigh(SampleCluster& cluster, const ScoreSlice& row,
                                         float temperature, const Kept& kept) {
  ListWriter list(cluster);
  Masses own{0, 0};
  row.sweep([&](const Vector<float, 4>& scores, const auto& classes) {
    unsigned chosen = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float s = scores.at[e] / temperature;
      const bool above = s >= kept.threshold;
      chosen |= (above ? 1u : 0u) << e;
      if (!(s >= kLowest)) continue;
      const auto weight = static_cast<double>(exp_of_nonpositive(s - kept.top));
      own.total += weight;
      own.under += above ? 0.0 : weight;
    }
    row.visit_chosen(classes[0], chosen, [&](float x, int v) { list.add(x / temperature, v); });
  });
  const Candidates block{{block_sum(own.total, cluster.scratch<double>()),
                          block_sum(own.under, cluster.scratch<double>())},
                         block_sum(list.count(), cluster.scratch<int>())};
  return cluster.combine(block, [](const Candidates& a, const Candidates& b) {
    return Candidates{{a.masses.total + b.masses.total, a.masses.under + b.masses.under},
                      a.count + b.count};
  });
}

// Lists the candidates of top-k or top-p, which are few in most rows, and sets the threshold that
// they are not below. More than kListed if the list can't have all that stays. `best`: the largest
// of the thread.
template <class Element>
TRIMTAB_DEVICE Candidates list_candidates(SampleCluster& cluster,
                                          const SampleSource<Element>& source,
                                          const ScoreSlice& row, float best,
                                          const Parameters& given, int classes, Kept& kept) {
  constexpr Candidates none{{0, 0}, kListed + 1};
  const int threads = static_cast<int>(blockDim.x * cluster.size());
  const bool ranked = given.top_k < classes;
  // For top-p half of what there is room for: a thread may have more than one score above the
  // bound.
  const int wanted = ranked ? given.top_k : min(threads, kListed) / 2;
  if ((!ranked && !(given.tail >= 0)) || wanted > threads) return none;
  // No block is at the list of a mask any more, and none at this one yet.
  if (threadIdx.x == 0) cluster.shared()->listed = 0;
  const float bound = bound_of_top_k(cluster, best, wanted);
  const float temperature = given.temperature;
  kept.threshold = max(bound / temperature, kLowest);
  if (ranked)
    return {{0, 0}, list_from(cluster, source, row, best, bound, temperature, kept.threshold)};
  const Candidates found = list_and_weigh(cluster, row, temperature, kept);
  // The nucleus may reach further down than the list.
  return in_tail(found.masses.under, found.masses.total, given.tail) ? found : none;
}

}  // namespace
}  // namespace trimtab
