// The rows of token loss on a GPU. See common/token_loss.h for the arithmetic.
//
// A cluster of blocks takes a row. Each block keeps its slice in shared memory and sweeps it three
// times: maximum, sums, gradient. So memory sees one read and one write, and several blocks to a
// multiprocessor keep it busy while one of them waits or computes. What has no place in shared
// memory (long rows on devices without clusters) is read again, from the L2 cache.
#pragma once

#include <climits>
#include <cmath>

#include "common/token_loss.h"
#include "common/token_loss_rows.h"
#include "cuda/token_loss_slice.cuh"

namespace trimtab {
namespace {

constexpr unsigned kMostThreads = 512;
constexpr float kLn2 = 0.69314718055994531f, kLog2e = 1.44269504088896341f;
// A shift whose exponential is 0, and 0 times it is 0: with -inf that product is NaN.
constexpr float kFloor = -1.0e4f;

// What a block leaves of its slice; of the row, after the blocks' are merged.
struct PartialSums {
  float rest, entropy_shift, class_weight_sum, weighted_shift;  // as in RowSums
  int first_maximum;
};

// What every element's gradient has in common.
struct GradientScalars {
  float flat, tilt, smooth, at_target;
};

// The start of a block's shared memory; its slice of the row follows.
struct alignas(16) Exchange {
  float largest_of_warps[kMostThreads / kWarp], largest;
  PartialSums of_warps[kMostThreads / kWarp], of_block;
  GradientScalars scalars;
};

template <class Element>
TRIMTAB_DEVICE Element* place_of_row() {
  return reinterpret_cast<Element*>(shared_memory<Exchange>() + 1);
}

// From raw logits to shifts, s = z - max z, and the slope of z. z is a constant times u, where u is
// the logit or, with a softcap, its tanh. Subtracting the largest u before the product makes s
// exactly 0 at the maximum, whatever the constant.
template <class Element, bool capped>
struct RowTransform {
  // Rows of 16 bits have shifts to base 2 and the exponential of the hardware.
  static constexpr bool precise = sizeof(Element) == 4;
  static constexpr float unit = precise ? 1.0f : kLn2;
  float argument, factor, factor_in_units, row_slope, largest_u = 0;

  TRIMTAB_DEVICE explicit RowTransform(const LogitTransform<float>& z, float inv_temperature)
      : argument(z.scale),
        factor((capped ? z.softcap : z.scale) * inv_temperature),
        factor_in_units(precise ? factor : factor * kLog2e),
        row_slope(z.scale * inv_temperature) {
    if constexpr (capped) argument = z.scale / z.softcap;
  }
  TRIMTAB_DEVICE float u(float raw) const {
    if constexpr (capped) return std::tanh(raw * argument);
    return raw;
  }
  TRIMTAB_DEVICE float shift_of_u(float u) const { return (u - largest_u) * factor_in_units; }
  TRIMTAB_DEVICE float shift(float raw) const { return shift_of_u(u(raw)); }
  TRIMTAB_DEVICE float natural_shift(float raw) const { return (u(raw) - largest_u) * factor; }
  // The natural shift where the other is known. To base 2 that of the lowest bfloat16 is infinite,
  // and its product with a class weight of 0 NaN.
  TRIMTAB_DEVICE float natural(float raw, float shift) const {
    if constexpr (capped || precise) return shift * unit;
    return natural_shift(raw);
  }
  TRIMTAB_DEVICE static float exponential(float shift) {
    if constexpr (precise) return std::exp(shift);
    return exp2_approximate(shift);
  }

  struct Point {
    float shift, slope;  // slope in units of row_slope
  };
  TRIMTAB_DEVICE Point point(float raw) const {
    if constexpr (!capped) {
      return {shift(raw), 1};
    } else if constexpr (precise) {
      const float t = u(raw);
      return {shift_of_u(t), (1 - t) * (1 + t)};
    } else {
      // Fewer instructions, and near 0 without tanh's relative accuracy: the gradient has 16 bits.
      const float e = exp2_approximate(fminf(raw * (argument * 2 * kLog2e), 60.0f));
      const float r = __fdividef(1, 1 + e);
      return {shift_of_u(1 - 2 * r), 4 * e * r * r};
    }
  }
  TRIMTAB_DEVICE float slope_of_one(float raw) const {
    if constexpr (!capped) return row_slope;
    const float t = u(raw);
    return (1 - t) * (1 + t) * row_slope;
  }
};

template <int N>
TRIMTAB_DEVICE Numbers<N> load_floats(const float* from) {
  Numbers<N> numbers;
#pragma unroll
  for (int e = 0; e < N; e += 4) {
    const auto four = load<4>(from + e);
    memcpy(numbers.at + e, &four, sizeof(four));
  }
  return numbers;
}

template <int N>
TRIMTAB_DEVICE void store_floats(float* to, const Numbers<N>& numbers) {
#pragma unroll
  for (int e = 0; e < N; e += 4) {
    Vector<float, 4> four;
    memcpy(&four, numbers.at + e, sizeof(four));
    store(to + e, four);
  }
}

// Class weights from class v on; those that are not given and those beyond the row are 1.
template <int N>
TRIMTAB_DEVICE Numbers<N> weights_from(const float* weight, int v, int classes) {
  if (weight != nullptr && is_aligned(weight) && v + N <= classes)
    return load_floats<N>(weight + v);
  Numbers<N> weights;
#pragma unroll
  for (int e = 0; e < N; ++e)
    weights.at[e] = weight != nullptr && v + e < classes ? weight[v + e] : 1.0f;
  return weights;
}

// Of a transform with a negative scale the smallest logit counts: then all have their signs turned.
struct Direction {
  bool down;
  TRIMTAB_DEVICE explicit Direction(const LogitTransform<float>& z) : down(z.scale < 0) {}
  TRIMTAB_DEVICE float operator()(float raw) const { return down ? -raw : raw; }
  template <class Element>
  TRIMTAB_DEVICE Words turn(Words words) const {
    const uint32_t signs = sizeof(Element) == 4 ? 0x80000000u : 0x80008000u;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] ^= down ? signs : 0;
    return words;
  }
};

// The largest directed logit; NaN if there is one.
template <class Element>
TRIMTAB_DEVICE float largest_of_thread(const Slice<Element>& slice, const Direction& directed) {
  float largest = -std::numeric_limits<float>::infinity();
  slice.sweep(-Slice<Element>::width, [&](const Words& words, int, const auto& edge) {
    const auto raw = to_numbers<Element>(directed.turn<Element>(words));
#pragma unroll
    for (int e = 0; e < Slice<Element>::width; ++e)
      if (!edge.exists || edge.inside(e)) largest = larger(largest, raw.at[e]);
  });
  return largest;
}

// Every thread of the cluster receives the same.
TRIMTAB_DEVICE float largest_of_cluster(float largest) {
  Exchange* exchange = shared_memory<Exchange>();
  largest = block_max(largest, exchange->largest_of_warps);
  if (cluster_size() == 1) return largest;
  if (threadIdx.x == 0) exchange->largest = largest;
  cluster_sync();
  // All ranks at a time: one after the other, each would be waited for.
  const unsigned rank = lane_index();
  return warp_max(rank < cluster_size() ? *at_rank(&exchange->largest, rank) : largest);
}

// The target stays out of `rest` and `entropy_shift`, which is in the units of the transform.
template <bool entropy, class Element, bool capped>
TRIMTAB_DEVICE PartialSums sums_of_thread(const Slice<Element>& slice,
                                          const RowTransform<Element, capped>& transform,
                                          int target, int classes, const float* weight,
                                          bool smoothing) {
  constexpr int width = Slice<Element>::width;
  PartialSums sums{};
  slice.sweep(target, [&](const Words& words, int v, const auto& edge) {
    const auto raw = to_numbers<Element>(words);
    Numbers<width> shift;
    float rest = 0, bent = 0;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      shift.at[e] = transform.shift(raw.at[e]);
      const float power = transform.exponential(shift.at[e]);
      // What fills the last vector up may have an infinite shift: no factor of 0 takes it out.
      const bool counts = !edge.exists || (edge.inside(e) && !edge.is_target(e));
      rest += counts ? power : 0.0f;
      if constexpr (entropy) bent += counts ? power * fmaxf(shift.at[e], kFloor) : 0.0f;
    }
    sums.rest += rest;
    sums.entropy_shift += bent;
    if (entropy || !smoothing) return;
    const auto weights = weights_from<width>(weight, v, classes);
    float total = 0, shifted = 0;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const bool counts = !edge.exists || edge.inside(e);
      total += counts ? weights.at[e] : 0.0f;
      shifted += counts ? weights.at[e] * transform.natural(raw.at[e], shift.at[e]) : 0.0f;
    }
    sums.class_weight_sum += total;
    sums.weighted_shift += shifted;
  });
  return sums;
}

// The first class of this thread that has the largest u; of a row with NaNs, the first of those.
template <class Element, bool capped>
TRIMTAB_DEVICE int first_maximum_of_thread(const Slice<Element>& slice,
                                           const RowTransform<Element, capped>& transform,
                                           float largest_raw) {
  int first = INT_MAX;
  const bool has_nan = transform.largest_u != transform.largest_u;
  // Few threads have to look.
  if (!has_nan && transform.u(largest_raw) != transform.largest_u) return first;
  slice.sweep(-Slice<Element>::width, [&](const Words& words, int v, const auto& edge) {
    const auto raw = to_numbers<Element>(words);
    for (int e = 0; e < Slice<Element>::width; ++e) {
      const float x = raw.at[e];
      const bool hit = has_nan ? x != x : transform.u(x) == transform.largest_u;
      if (hit && edge.inside(e)) first = min(first, v + e);
    }
  });
  return first;
}

// Over the lanes of a warp that take part.
template <bool entropy>
TRIMTAB_DEVICE PartialSums merge_lanes(bool takes_part, const PartialSums& sums) {
  PartialSums all{};
  all.rest = warp_sum(takes_part ? sums.rest : 0.0f);
  if constexpr (entropy) {
    all.entropy_shift = warp_sum(takes_part ? sums.entropy_shift : 0.0f);
    all.first_maximum = warp_min(takes_part ? sums.first_maximum : INT_MAX);
  } else {
    all.class_weight_sum = warp_sum(takes_part ? sums.class_weight_sum : 0.0f);
    all.weighted_shift = warp_sum(takes_part ? sums.weighted_shift : 0.0f);
  }
  return all;
}

// The first warp of a block that needs them receives the sums of the row. It uses all that it reads
// of other blocks, wanted or not: by the time a block leaves, that must have arrived.
template <bool entropy>
TRIMTAB_DEVICE PartialSums merge(PartialSums sums, bool needed) {
  Exchange* exchange = shared_memory<Exchange>();
  const unsigned lane = lane_index();
  sums = merge_lanes<entropy>(true, sums);
  if (lane == 0) exchange->of_warps[warp_index()] = sums;
  __syncthreads();
  if (warp_index() == 0) {
    const bool is_warp = lane < warp_count();
    sums = merge_lanes<entropy>(is_warp, exchange->of_warps[is_warp ? lane : 0]);
  }
  if (cluster_size() == 1) return sums;
  if (threadIdx.x == 0) exchange->of_block = sums;
  cluster_sync();
  if (!needed || warp_index() != 0) return sums;
  const bool is_rank = lane < cluster_size();
  return merge_lanes<entropy>(is_rank, *at_rank(&exchange->of_block, is_rank ? lane : 0));
}

template <class Element, bool capped>
TRIMTAB_DEVICE RowSums<float> row_sums(const PartialSums& sums,
                                       const RowTransform<Element, capped>& transform,
                                       float raw_target) {
  RowSums<float> row{};
  row.maximum = transform.largest_u * transform.factor;
  row.rest = sums.rest;
  row.target_shift = transform.natural_shift(raw_target);
  row.target_class_weight = 1;
  row.class_weight_sum = sums.class_weight_sum;
  row.weighted_shift = sums.weighted_shift;
  row.entropy_shift = sums.entropy_shift * transform.unit;
  if (row.target_shift > -80) row.entropy_shift += std::exp(row.target_shift) * row.target_shift;
  return row;
}

template <class Element, bool capped>
TRIMTAB_DEVICE GradientScalars gradient_scalars(const RowSums<float>& sums,
                                                const RowStatistics<float>& row,
                                                const RowGradient<float>& gradient,
                                                const RowTransform<Element, capped>& transform,
                                                float raw_target) {
  // Of e = exp(s), not of p: the division by the total is in the scalars.
  const float slope = transform.row_slope, of_power = slope / row.total;
  GradientScalars scalars;
  scalars.flat =
      (gradient.pull + gradient.push + gradient.smooth * gradient.class_weight_sum) * of_power;
  scalars.tilt = gradient.tilt * of_power * transform.unit;
  scalars.smooth = gradient.smooth * slope;
  scalars.at_target = target_gradient(sums, row, gradient) * transform.slope_of_one(raw_target);
  return scalars;
}

// Writes the gradient for the raw logits; `grad` may be the row itself.
template <bool entropy, class Element, bool capped>
TRIMTAB_DEVICE void write_gradient(const Slice<Element>& slice,
                                   const RowTransform<Element, capped>& transform, int target,
                                   int classes, const float* weight, Element* grad) {
  constexpr int width = Slice<Element>::width;
  const GradientScalars scalars = shared_memory<Exchange>()->scalars;
  const bool smoothing = !entropy && scalars.smooth != 0;
  slice.sweep(target, [&](const Words& words, int v, const auto& edge) {
    const auto raw = to_numbers<Element>(words);
    Numbers<width> gradient, slope;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const auto point = transform.point(raw.at[e]);
      float factor = scalars.flat;
      if constexpr (entropy) factor += scalars.tilt * fmaxf(point.shift, kFloor);
      gradient.at[e] = transform.exponential(point.shift) * factor;
      slope.at[e] = point.slope;
    }
    if (smoothing) {
      const auto weights = weights_from<width>(weight, v, classes);
#pragma unroll
      for (int e = 0; e < width; ++e) gradient.at[e] -= scalars.smooth * weights.at[e];
    }
    Vector<Element, width> vector;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      float d = gradient.at[e];
      if constexpr (capped) d *= slope.at[e];
      if (edge.exists && edge.is_target(e)) d = scalars.at_target;
      vector.at[e] = from_real<Element>(d);
    }
    slice.write(grad, v, vector, edge);
  });
  slice.finish_writing(grad);
}

template <class Element, bool capped>
__global__ void __launch_bounds__(kMostThreads, 2)
    loss_kernel(LossRows<Element> rows, LogitTransform<float> z, LossOptions<float> options,
                Cut cut) {
  const int64_t i = cut.first_row + (blockIdx.x >> cut.log2_cluster);
  const int classes = static_cast<int>(rows.classes);
  const Element* row = rows.logits + i * rows.logits_stride;
  Element* grad = rows.grad ? rows.grad + i * rows.grad_stride : nullptr;
  const Slice<Element> slice(row, classes, cut, place_of_row<Element>());
  const int64_t class_of_target = rows.target[i];
  const bool writes_loss = cluster_rank() == 0 && threadIdx.x == 0;
  if (class_of_target < 0 || class_of_target >= classes || class_of_target == rows.ignore_index) {
    const bool ignored = class_of_target == rows.ignore_index;
    const float value = ignored ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    if (writes_loss) rows.loss[i] = value;
    if (grad) slice.fill(grad, value);
    return;
  }
  const int target = static_cast<int>(class_of_target);
  slice.start_reading();
  // What one thread needs in the end is asked for here, where nobody waits for it.
  const float raw_target = to_real(row[target]);
  const float coef = rows.coef ? rows.coef[i] : 1.0f;
  const float target_class_weight = rows.class_weight ? rows.class_weight[target] : 1.0f;
  RowTransform<Element, capped> transform(z, 1);
  slice.finish_reading();
  const Direction directed(z);
  transform.largest_u =
      transform.u(directed(largest_of_cluster(largest_of_thread(slice, directed))));
  const bool smoothing = options.label_smoothing > 0;
  const bool needs_sums = grad || cluster_rank() == 0;
  const PartialSums sums = merge<false>(
      sums_of_thread<false>(slice, transform, target, classes, rows.class_weight, smoothing),
      needs_sums);
  if (needs_sums && threadIdx.x == 0) {
    RowSums<float> all = row_sums(sums, transform, raw_target);
    all.target_class_weight = target_class_weight;
    const auto statistics = row_statistics(all);
    if (writes_loss) rows.loss[i] = row_loss(all, statistics, options, rows.classes);
    const auto gradient = loss_gradient(all, statistics, options, rows.classes, coef);
    shared_memory<Exchange>()->scalars =
        gradient_scalars(all, statistics, gradient, transform, raw_target);
  }
  if (grad) {
    __syncthreads();
    write_gradient<false>(slice, transform, target, classes, rows.class_weight, grad);
  }
  if (cluster_size() > 1) cluster_leave();
}

template <class Element, bool capped>
__global__ void __launch_bounds__(kMostThreads, 2)
    logp_kernel(LogpRows<Element> rows, LogitTransform<float> z, Cut cut) {
  const int64_t i = cut.first_row + (blockIdx.x >> cut.log2_cluster);
  const int classes = static_cast<int>(rows.classes);
  const Element* row = rows.logits + i * rows.logits_stride;
  Element* grad = rows.grad ? rows.grad + i * rows.grad_stride : nullptr;
  const Slice<Element> slice(row, classes, cut, place_of_row<Element>());
  const int64_t class_of_target = rows.target[i];
  const bool forward = rows.logp != nullptr;
  const bool writes_values = forward && cluster_rank() == 0 && threadIdx.x == 0;
  if (class_of_target < 0 || class_of_target >= classes || class_of_target == rows.ignore_index) {
    const bool ignored = class_of_target == rows.ignore_index;
    const float value = ignored ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    if (writes_values) {
      rows.logp[i] = rows.entropy[i] = rows.lse[i] = value;
      rows.predicted[i] = -1;
    }
    if (grad) slice.fill(grad, value);
    return;
  }
  const int target = static_cast<int>(class_of_target);
  slice.start_reading();
  // What one thread needs in the end is asked for here, where nobody waits for it.
  const float raw_target = to_real(row[target]);
  const float grad_logp = forward ? 1.0f : rows.grad_logp ? rows.grad_logp[i] : 0.0f;
  const float grad_entropy = rows.grad_entropy ? rows.grad_entropy[i] : 0.0f;
  const float grad_lse = rows.grad_lse ? rows.grad_lse[i] : 0.0f;
  RowTransform<Element, capped> transform(z, rows.inv_temperature ? rows.inv_temperature[i] : 1.0f);
  slice.finish_reading();
  const Direction directed(z);
  const float largest = largest_of_thread(slice, directed);
  transform.largest_u = transform.u(directed(largest_of_cluster(largest)));
  PartialSums sums = sums_of_thread<true>(slice, transform, target, classes, nullptr, false);
  if (forward) sums.first_maximum = first_maximum_of_thread(slice, transform, directed(largest));
  const bool needs_sums = grad || cluster_rank() == 0;
  sums = merge<true>(sums, needs_sums);
  if (needs_sums && threadIdx.x == 0) {
    const RowSums<float> all = row_sums(sums, transform, raw_target);
    const auto statistics = row_statistics(all);
    if (writes_values) {
      rows.logp[i] = -statistics.nll;
      rows.entropy[i] = row_entropy(all, statistics);
      rows.lse[i] = statistics.lse;
      rows.predicted[i] = sums.first_maximum == INT_MAX ? 0 : sums.first_maximum;
    }
    const auto gradient = logp_gradient(all, statistics, grad_logp, grad_entropy, grad_lse);
    shared_memory<Exchange>()->scalars =
        gradient_scalars(all, statistics, gradient, transform, raw_target);
  }
  if (grad) {
    __syncthreads();
    write_gradient<true>(slice, transform, target, classes, nullptr, grad);
  }
  if (cluster_size() > 1) cluster_leave();
}

// One vector of the part to a thread at a time; `wide` where everything starts on 16 bytes.
template <class Element>
__global__ void __launch_bounds__(kMostThreads)
    accumulate_kernel(PartialSum<Element> sums, int64_t count, bool wide) {
  constexpr int width = 16 / static_cast<int>(sizeof(Element));
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * width;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * width;
  for (; i < count; i += step) {
    if (!wide || i + width > count) {
      for (int64_t k = i; k < min(i + width, count); ++k) {
        float sum = to_real(sums.part[k]);
        if (sums.previous) sum += to_real(sums.previous[k]);
        if (sums.previous_wide) sum += sums.previous_wide[k];
        if (sums.sum_wide)
          sums.sum_wide[k] = sum;
        else
          sums.sum[k] = from_real<Element>(sum);
      }
      continue;
    }
    auto sum = to_numbers<Element>(load_words(sums.part + i));
    if (sums.previous || sums.previous_wide) {
      const auto previous = sums.previous_wide ? load_floats<width>(sums.previous_wide + i)
                                               : to_numbers<Element>(load_words(sums.previous + i));
#pragma unroll
      for (int e = 0; e < width; ++e) sum.at[e] += previous.at[e];
    }
    if (sums.sum_wide) {
      store_floats(sums.sum_wide + i, sum);
    } else {
      Vector<Element, width> rounded;
#pragma unroll
      for (int e = 0; e < width; ++e) rounded.at[e] = from_real<Element>(sum.at[e]);
      store(sums.sum + i, rounded);
    }
  }
}

}  // namespace
}  // namespace trimtab
