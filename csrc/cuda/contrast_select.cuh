// One row of scores over the blocks of a cluster: what the blocks tell each other, and the search
// for the threshold of a filter.
//
// Nothing is sorted, and nothing that decides depends on the order of threads: bins are sums of
// integers, and sums of doubles are added in the order of threads, warps and ranks.
#pragma once

#include "cuda/contrast.cuh"

namespace trimtab {
namespace {

constexpr unsigned kLargestCluster = 8;
constexpr int kBinBits = 8, kBins = 1 << kBinBits, kListed = 1024;
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Sums of 64 bits, added to by two 32-bit atomics: the hardware has none of 64 bits in shared
// memory. The one addition that makes a low word wrap sees it and carries.
struct Histogram {
  uint32_t low[kBins], high[kBins];

  TRIMTAB_DEVICE void clear() {
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) low[bin] = high[bin] = 0;
  }
  TRIMTAB_DEVICE void add(unsigned bin, uint64_t weight) {
    const auto part = static_cast<uint32_t>(weight);
    const uint32_t before = atomicAdd(&low[bin], part);
    const uint32_t carry = before + part < before;
    const uint32_t rest = static_cast<uint32_t>(weight >> 32) + carry;
    if (rest != 0) atomicAdd(&high[bin], rest);
  }
};

// Sums of bins, a lane of a warp reading kBinsOfLane that follow each other. One place in nine is
// empty, or the lanes would meet in two banks of the shared memory.
struct MergedBins {
  static constexpr int kBinsOfLane = kBins / static_cast<int>(kWarp);
  uint64_t sum[kBins + kWarp];

  TRIMTAB_DEVICE uint64_t& operator[](int bin) { return sum[bin + bin / kBinsOfLane]; }
  TRIMTAB_DEVICE uint64_t operator[](int bin) const { return sum[bin + bin / kBinsOfLane]; }
};

// What a block of the cluster shows to the others. Slots and histograms have two copies: while the
// slower blocks still read one, the faster write the other. Two cluster_syncs lie between the uses
// of a copy.
struct alignas(16) SampleExchange {
  uint64_t slot[2][kLargestCluster][4];  // written by the block of that rank
  uint64_t scratch[kWarp];
  MergedBins merged;
  Histogram histogram[2];
  float list_score[kListed];
  int list_class[kListed];
  uint32_t listed;   // at least as many as have a place on the list, of the first block
  uint32_t reached;  // the order_key of the largest sum of score and noise so far in this block
};

// Sums of weights in [0, 1], of doubles where the order of what is added is fixed.
struct OrderedSum {
  double sum = 0;
  TRIMTAB_DEVICE void add(float weight) { sum += static_cast<double>(weight); }
  TRIMTAB_DEVICE static double value(double sum) { return sum; }
};
// As integers where it is not; of few weights, whose sum is not small.
struct CountedSum {
  uint64_t sum = 0;
  TRIMTAB_DEVICE void add(float weight) {
    sum += static_cast<uint64_t>(static_cast<double>(weight) * 0x1p52 + 0.5);
  }
  TRIMTAB_DEVICE static double value(uint64_t sum) { return static_cast<double>(sum) * 0x1p-52; }
};

// The scores of the classes [begin, end) that this block has. After them -inf up to a multiple of
// 8.
struct ScoreSlice {
  using Sum = OrderedSum;
  static constexpr int width = 4;  // scores at a time
  static constexpr bool in_order = true;
  float* score;  // of class v at v - begin
  int begin, end;

  struct Classes {
    int first;
    TRIMTAB_DEVICE int operator[](int e) const { return first + e; }
  };
  // Calls f(N scores, their classes) for the vectors of this thread.
  template <int N = width, class F>
  TRIMTAB_DEVICE void sweep(F&& f) const {
    const int count = end - begin, step = N * static_cast<int>(blockDim.x);
    for (int i = N * static_cast<int>(threadIdx.x); i < count; i += step)
      f(load<N>(score + i), Classes{begin + i});
  }
  // Calls f(score of class v) in one thread of the cluster.
  template <class F>
  TRIMTAB_DEVICE void visit(int v, F&& f) const {
    if (threadIdx.x == 0 && v >= begin && v < end) f(score[v - begin]);
  }
  // Calls f(score, class) for those of the classes from v on whose bit is set, which are few.
  template <class F>
  TRIMTAB_DEVICE void visit_chosen(int v, unsigned bits, F&& f) const {
    for (; bits != 0; bits &= bits - 1) {
      const int chosen = v + __ffs(static_cast<int>(bits)) - 1;
      f(score[chosen - begin], chosen);
    }
  }
  // The scores from class v on.
  template <int N>
  TRIMTAB_DEVICE Numbers<N> get(int v) const {
    constexpr int each = N < 4 ? N : 4;
    Numbers<N> numbers;
#pragma unroll
    for (int e = 0; e < N; e += each) {
      const auto part = load<each>(score + (v - begin) + e);
#pragma unroll
      for (int i = 0; i < each; ++i) numbers.at[e + i] = part.at[i];
    }
    return numbers;
  }
  template <int N>
  TRIMTAB_DEVICE void put(int v, const Numbers<N>& numbers) const {
    constexpr int each = N < 4 ? N : 4;
#pragma unroll
    for (int e = 0; e < N; e += each) {
      Vector<float, each> part;
#pragma unroll
      for (int i = 0; i < each; ++i) part.at[i] = numbers.at[e + i];
      store(score + (v - begin) + e, part);
    }
  }
  TRIMTAB_DEVICE void divide(float by) const {
    sweep([&](Vector<float, 4> scores, Classes classes) {
#pragma unroll
      for (float& s : scores.at) s = s / by;
      store(score + (classes.first - begin), scores);
    });
    __syncthreads();  // sweeps of another width deal the scores out otherwise
  }
};

// Scores in any order. Few: each has a thread of its own as long as there are any.
struct ScoreList {
  using Sum = CountedSum;
  static constexpr int width = 1;
  static constexpr bool in_order = false;
  const float* score;
  const int* class_of;
  int count;

  // Calls f(one score, its class) likewise.
  template <int N = width, class F>
  TRIMTAB_DEVICE void sweep(F&& f) const {
    static_assert(N == 1);
    for (int i = threadIdx.x; i < count; i += blockDim.x) f(load<1>(score + i), class_of + i);
  }
  template <class F>
  TRIMTAB_DEVICE void visit(int v, F&& f) const {
    for (int i = threadIdx.x; i < count; i += blockDim.x)
      if (class_of[i] == v) f(score[i]);
  }
};

// The blocks that work on a row. They reach into each other's shared memory only before the
// cluster_sync of a `combine`: whoever comes out of one may leave, unless a `merge` follows.
class SampleCluster {
 public:
  TRIMTAB_DEVICE explicit SampleCluster(SampleExchange* shared)
      : shared_(shared), size_(cluster_size()), turn_(0) {}
  // This block without the others. The copy of what it shows is the one that no other reads.
  TRIMTAB_DEVICE SampleCluster alone() const {
    SampleCluster block = *this;
    block.size_ = 1;
    return block;
  }

  TRIMTAB_DEVICE unsigned size() const { return size_; }
  // As cluster_rank(), but cheap enough to be worked out anew rather than kept in a register:
  // clusters are along x, their sizes powers of two.
  TRIMTAB_DEVICE unsigned rank() const { return blockIdx.x & (size_ - 1); }
  TRIMTAB_DEVICE SampleExchange* shared() const { return shared_; }
  // By one thread, before the first barrier of the row.
  TRIMTAB_DEVICE void start_row() const {
    shared_->listed = 0;
    shared_->reached = order_key(kSmallestGumbel);
  }
  template <class T>
  TRIMTAB_DEVICE T* scratch() const {
    return reinterpret_cast<T*>(shared_->scratch);
  }
  template <class T>
  TRIMTAB_DEVICE T* at(T* place, unsigned rank) const {
    return size_ == 1 ? place : at_rank(place, rank);
  }
  TRIMTAB_DEVICE void sync() const {
    if (size_ == 1)
      __syncthreads();
    else
      cluster_sync();
  }

  // Each thread of each block receives the combination of all blocks' values, in order of ranks.
  // The threads of a block have the same `own`. A barrier of the block must lie before it.
  template <class T, class Combine>
  TRIMTAB_DEVICE T combine(const T& own, Combine&& merge) {
    static_assert(sizeof(T) <= sizeof(shared_->slot[0][0]));
    if (size_ == 1) return own;
    auto* const slots = shared_->slot[turn_];
    take_turn();
    // Written to the others, not read from them: nobody waits for eight answers in a row.
    if (threadIdx.x < size_) *at_rank(reinterpret_cast<T*>(slots[rank()]), threadIdx.x) = own;
    cluster_sync();
    T all = *reinterpret_cast<const T*>(slots[0]);
    for (unsigned rank = 1; rank < size_; ++rank)
      all = merge(all, *reinterpret_cast<const T*>(slots[rank]));
    return all;
  }
  template <class T>
  TRIMTAB_DEVICE T sum(T x) {
    return combine(block_sum(x, scratch<T>()), Add{});
  }
  template <class T>
  TRIMTAB_DEVICE T maximum(T x) {
    return combine(block_max(x, scratch<T>()), Max{});
  }

  // A histogram without weights, which nobody reads any more.
  TRIMTAB_DEVICE Histogram* start_histogram() {
    Histogram* const histogram = &shared_->histogram[turn_];
    histogram->clear();
    __syncthreads();
    return histogram;
  }
  // The sums of all blocks.
  TRIMTAB_DEVICE const MergedBins& merge(Histogram* histogram) {
    take_turn();
    sync();
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
      uint64_t sum = 0;
      for (unsigned rank = 0; rank < size_; ++rank) {
        const Histogram* const part = at(histogram, rank);
        sum += static_cast<uint64_t>(part->high[bin]) << 32 | part->low[bin];
      }
      shared_->merged[bin] = sum;
    }
    __syncthreads();
    return shared_->merged;
  }

 private:
  TRIMTAB_DEVICE void take_turn() {
    if (size_ > 1) turn_ ^= 1;
  }

  SampleExchange* shared_;
  unsigned size_, turn_;
};

// Where the removed keys end: all below `key` go.
struct Boundary {
  uint32_t key;
  uint64_t below;  // sum of the weights of what is below `key`
  bool reached;    // false: all keys go, and `key` is the last
};

struct Bin {
  int index;
  uint64_t below;
  bool reached;
};

// The sum over lanes up to and with this one.
TRIMTAB_DEVICE uint64_t warp_prefix_sum(uint64_t x) {
#pragma unroll
  for (unsigned distance = 1; distance < kWarp; distance *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, x, distance);
    if (lane_index() >= distance) x += other;
  }
  return x;
}

// The first bin for which `removed(below + sum of the weights up to and with it)` is false, or the
// last that has any weight. All threads of a warp take part, and every warp finds the same.
template <class Removed>
TRIMTAB_DEVICE Bin find_bin(const MergedBins& bins, uint64_t below, Removed&& removed) {
  constexpr int each = MergedBins::kBinsOfLane;
  const int own = static_cast<int>(lane_index());
  uint64_t part = 0;
  int last = 0;
#pragma unroll 4
  for (int bin = own * each; bin < (own + 1) * each; ++bin) {
    part += bins[bin];
    if (bins[bin] != 0) last = bin;
  }
  const uint64_t upto = below + warp_prefix_sum(part);
  last = warp_max(last);
  // Sums grow with the lane, so what holds for one holds for all above it.
  const unsigned reaching = __ballot_sync(kAllLanes, !removed(upto));
  const bool reached = reaching != 0;
  const int lane = reached ? __ffs(static_cast<int>(reaching)) - 1 : last / each;
  below = __shfl_sync(kAllLanes, upto - part, lane);
  // The same for the bins of that lane.
  const int first = lane * each;
  const uint64_t weight = own < each ? bins[first + own] : 0;
  const uint64_t upto_bin = below + warp_prefix_sum(weight);
  const unsigned bin_reaching = __ballot_sync(kAllLanes, !removed(upto_bin));
  const int index = reached ? __ffs(static_cast<int>(bin_reaching)) - 1 : last % each;
  return {first + index, __shfl_sync(kAllLanes, upto_bin - weight, index), reached};
}

// Going up from key `first`: the first key for which `removed(sum of the weights up to and with
// it)` is false, or `last`, the largest of all keys that has a weight. `removed` must not become
// true again with more weight. `key_of(score, class)`, beyond `last` for what does not count;
// `weigh(score)`. All threads of the cluster take part and receive the same.
template <class Scores, class KeyOf, class Weigh, class Removed>
TRIMTAB_DEVICE Boundary find_boundary(SampleCluster& cluster, const Scores& row, uint32_t first,
                                      uint32_t last, KeyOf&& key_of, Weigh&& weigh,
                                      Removed&& removed) {
  uint64_t below = 0;
  for (;;) {
    const uint32_t span = last - first;
    const int width = 32 - __clz(static_cast<int>(span));
    const int shift = width > kBinBits ? width - kBinBits : 0;
    Histogram* const histogram = cluster.start_histogram();
    row.sweep([&](const auto& scores, const auto& classes) {
#pragma unroll
      for (int e = 0; e < Scores::width; ++e) {
        const uint32_t offset = key_of(scores.at[e], classes[e]) - first;
        if (offset <= span) histogram->add(offset >> shift, weigh(scores.at[e]));
      }
    });
    const Bin bin = find_bin(cluster.merge(histogram), below, removed);
    below = bin.below;
    first += static_cast<uint32_t>(bin.index) << shift;
    if (shift == 0) return {first, below, bin.reached};
    const uint32_t rest = (uint32_t{1} << shift) - 1;
    if (last - first > rest) last = first + rest;
  }
}

// exp(x) for x <= 0, the bits of csrc/cpu/simd.h; exactly 0 below -87.3.
TRIMTAB_DEVICE float exp_of_nonpositive(float x) {
  const float n = (times(x, 1.44269504088896341f) + 12582912.0f) - 12582912.0f;
  const float r = (x - times(n, 0.693359375f)) - times(n, -2.12194440e-4f);
  float q = 1.9875691500e-4f;
  q = times(q, r) + 1.3981999507e-3f;
  q = times(q, r) + 8.3334519073e-3f;
  q = times(q, r) + 4.1665795894e-2f;
  q = times(q, r) + 1.6666665459e-1f;
  q = times(q, r) + 5.0000001201e-1f;
  const float p = (times(q, times(r, r)) + r) + 1.0f;
  // For the smallest x n is -126: a normal power.
  return x < -87.3f ? 0.0f : times(p, bit_cast<float>((static_cast<int>(n) + 127) << 23));
}

// Which scores are left. Without a filter: those above -inf.
struct Kept {
  float top;
  float log_min_p = -kInfinity;
  float threshold = kLowest;
  int first_equal = 0;  // of those equal to the threshold, the first class that stays

  TRIMTAB_DEVICE bool holds(float s, int v) const {
    return s >= threshold && s - top >= log_min_p && (s > threshold || v >= first_equal);
  }
};

template <class Scores>
TRIMTAB_DEVICE void keep_top_k(SampleCluster& cluster, const Scores& row, int k, Kept& kept) {
  int count = 0;
  row.sweep([&](const auto& scores, const auto&) {
    for (float s : scores.at) count += s >= kept.threshold;
  });
  const int beyond = cluster.sum(count) - k;
  if (beyond <= 0) return;
  const auto key_of = [](float s, int) { return order_key(s); };
  const auto removed = [&](uint64_t sum) { return static_cast<int>(sum) <= beyond; };
  const auto boundary = find_boundary(
      cluster, row, order_key(kept.threshold), order_key(kept.top), key_of,
      [](float) { return uint64_t{1}; }, removed);
  kept.threshold = number_of_key(boundary.key);
}

// The class of the score equal to `value` that `skipped` others come before; if there are no more,
// of the last one where `value` is the largest of the row, else past the end.
template <class Scores>
TRIMTAB_DEVICE int find_equal(SampleCluster& cluster, const Scores& row, float value,
                              int64_t skipped, bool is_largest) {
  constexpr uint32_t past_the_end = 0x7fffffff;
  const auto key_of = [&](float s, int v) {
    return s == value ? static_cast<uint32_t>(v) : past_the_end;
  };
  const auto removed = [&](uint64_t sum) { return static_cast<int64_t>(sum) <= skipped; };
  const auto boundary = find_boundary(
      cluster, row, 0, past_the_end - 1, key_of, [](float) { return uint64_t{1}; }, removed);
  return static_cast<int>(boundary.reached || is_largest ? boundary.key : past_the_end);
}

// Masses as integers, so that their sums have no order. What alone exceeds the tail may count as
// twice the tail. Of at most 2**18 weights none is rounded that is not 2**24 times less than the
// tail shared out among them.
struct MassUnits {
  double most;
  int log2_per_mass;

  TRIMTAB_DEVICE MassUnits(double total, float tail, int weights) {
    constexpr float smallest = 0x1p-149f;
    most = 2.0 * (tail > smallest ? tail : smallest) * total;
    // All together are less than 2**63.
    const double sum = min(total, weights * most);
    log2_per_mass = 62 - (static_cast<int>(bit_cast<uint64_t>(sum) >> 52) - 1023);
  }
  TRIMTAB_DEVICE uint64_t of(float weight) const {
    return static_cast<uint64_t>(min(static_cast<double>(weight), most) * power(log2_per_mass));
  }
  TRIMTAB_DEVICE double mass(uint64_t units) const {
    return static_cast<double>(units) * power(-log2_per_mass);
  }

 private:
  TRIMTAB_DEVICE static double power(int log2) {
    return bit_cast<double>(static_cast<uint64_t>(1023 + log2) << 52);
  }
};

struct Masses {
  double total, under;  // of all that counts, and of what is below the scores that are looked at
};

// The threshold of top-p, which is one of the scores of `row` from `low` on.
template <class Scores>
TRIMTAB_DEVICE void find_top_p(SampleCluster& cluster, const Scores& row, float tail, float low,
                               const Masses& masses, int most, Kept& kept) {
  const auto weigh = [&](float s) { return exp_of_nonpositive(s - kept.top); };
  const MassUnits units(masses.total, tail, most);
  const auto mass = [&](uint64_t sum) { return masses.under + units.mass(sum); };
  const auto boundary = find_boundary(
      cluster, row, order_key(low), order_key(kept.top), [](float s, int) { return order_key(s); },
      [&](float s) { return units.of(weigh(s)); },
      [&](uint64_t sum) { return in_tail(mass(sum), masses.total, tail); });
  kept.threshold = number_of_key(boundary.key);
  const double weight = static_cast<double>(weigh(kept.threshold));
  const int64_t skipped = equals_in_tail(mass(boundary.below), weight, masses.total, tail, most);
  const bool is_largest = kept.threshold == kept.top;
  if (skipped > 0) kept.first_equal = find_equal(cluster, row, kept.threshold, skipped, is_largest);
}

// Sum of the weights of the scores in [low, high).
template <class Scores>
TRIMTAB_DEVICE double sum_between(SampleCluster& cluster, const Scores& row, float low, float high,
                                  float top) {
  typename Scores::Sum sum;
  row.sweep([&](const auto& scores, const auto&) {
    for (float s : scores.at)
      if (s >= low && s < high) sum.add(exp_of_nonpositive(s - top));
  });
  return sum.value(cluster.sum(sum.sum));
}

TRIMTAB_DEVICE void keep_top_p(SampleCluster& cluster, const ScoreSlice& row, float tail,
                               int classes, Kept& kept) {
  const double total = sum_between(cluster, row, kept.threshold, kInfinity, kept.top);
  // Below this even a row full of numbers would be in the tail: their sum is enough.
  const float sure = kept.top + static_cast<float>(log(0.9 * tail * total / classes));
  const float low = sure > kept.threshold ? min(sure, kept.top) : kept.threshold;
  double under = 0;
  if (low > kept.threshold) under = sum_between(cluster, row, kept.threshold, low, kept.top);
  find_top_p(cluster, row, tail, low, {total, under}, classes, kept);
}

}  // namespace
}  // namespace trimtab
