// The log-probability of each row's target under the combination and the way back, on a GPU. See
// common/token_loss.h for what the sums mean.
//
// A block takes a row. One sweep keeps in each thread the largest z that it has met and the sum of
// the others' exponentials relative to it. The way back sweeps once more for the gradients.
#pragma once

#include <cmath>

#include "common/token_loss.h"
#include "cuda/contrast.cuh"

namespace trimtab {
namespace {

constexpr int kLogpThreads = 512;
// One block to a multiprocessor: of two, half as much of the rows would be left in the L2 cache
// when the second sweep comes.
constexpr int kBackwardThreads = 1024;
constexpr float kLowest = std::numeric_limits<float>::lowest();

// exp(difference / T). Rows of 16 bits have the exponential of the hardware.
template <class Element>
struct Tempered {
  static constexpr bool precise = sizeof(Element) == 4;
  float factor;

  // Below about 1e-38 temperatures have no finite reciprocal, and inf * 0 is NaN.
  TRIMTAB_DEVICE explicit Tempered(float temperature) {
    constexpr float log2e = 1.44269504088896341f;
    factor = fminf((precise ? 1.0f : log2e) / temperature, -kLowest);
  }
  TRIMTAB_DEVICE float operator()(float difference) const {
    if constexpr (precise) return std::exp(difference * factor);
    return exp2_approximate(difference * factor);
  }
};

// `rest` is the sum of exp((z_v - largest) / T). It starts from the lowest number, not from -inf,
// so that no difference is that of two infinities but of +inf, which makes it NaN, as a NaN does.
struct OnlineSum {
  float largest = kLowest, rest = 0;

  template <class Element>
  TRIMTAB_DEVICE void move_to(float other, const Tempered<Element>& power) {
    rest *= power(largest - other);
    largest = other;
  }
};

// Of all tokens but the target.
template <class Element>
TRIMTAB_DEVICE OnlineSum sum_of_block(const ContrastRow<Element>& row, int target,
                                      const Tempered<Element>& power) {
  OnlineSum sum;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  row.sweep(thread, threads, [&](auto& z, const auto&, int v) {
    constexpr int n = sizeof(z.at) / sizeof(float);
    if (target >= v && target < v + n) {
#pragma unroll
      for (int e = 0; e < n; ++e)
        if (v + e == target) z.at[e] = -kInfinity;
    }
    float largest = z.at[0];
#pragma unroll
    for (int e = 1; e < n; ++e) largest = fmaxf(largest, z.at[e]);
    if (largest > sum.largest) sum.move_to(largest, power);
    float rest = 0;
#pragma unroll
    for (int e = 0; e < n; ++e) rest += power(z.at[e] - sum.largest);
    sum.rest += rest;
  });
  float* scratch = shared_memory<float>();
  sum.move_to(block_max(sum.largest, scratch), power);
  sum.rest = block_sum(sum.rest, scratch);
  return sum;
}

// What every thread knows of its row.
template <class Element>
struct LogpRow {
  bool good;
  float temperature, largest;
  typename ContrastRow<Element>::Point target;
  Tempered<Element> power;
  RowStatistics<float> statistics;

  TRIMTAB_DEVICE LogpRow(const ContrastRow<Element>& row, int target_class, float temperature)
      : temperature(temperature), target(row.point(target_class)), power(temperature) {
    OnlineSum sum = sum_of_block(row, target_class, power);
    sum.move_to(larger(sum.largest, target.z), power);
    largest = sum.largest;
    RowSums<float> sums{};
    sums.maximum = largest / temperature;
    sums.rest = sum.rest;
    sums.target_shift = (target.z - largest) / temperature;
    statistics = row_statistics(sums);
    const bool all_masked = target.z == -kInfinity && sum.rest == 0;
    good =
        temperature > 0 && !all_masked && fabsf(sums.maximum) < kInfinity && sum.rest == sum.rest;
  }
};

// What a row without a sweep gets: whether it is one, and the value.
struct Fixed {
  bool is;
  float value;
  TRIMTAB_DEVICE Fixed(int64_t target, int64_t ignore_index, int64_t classes) {
    is = target == ignore_index || target < 0 || target >= classes;
    value = target == ignore_index ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
};

template <class Element>
__global__ void __launch_bounds__(kLogpThreads, 2)
    contrastive_logp_kernel(ContrastiveLogp<Element> rows, int64_t count) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t target = rows.target[i];
    const Fixed fixed(target, rows.ignore_index, rows.inputs.classes);
    float logp = fixed.value;
    if (!fixed.is) {
      const LogpRow<Element> row(ContrastRow<Element>(rows.inputs, i), static_cast<int>(target),
                                 at(rows.temperature, i));
      if (row.good) logp = -row.statistics.nll;
    }
    if (threadIdx.x == 0) rows.logp[i] = logp;
  }
}

template <class Element>
TRIMTAB_DEVICE void fill_grads(const ContrastiveLogp<Element>& rows, int64_t i, float value) {
  for (const auto* grad : {&rows.grad_positive, &rows.grad_negative, &rows.grad_anchor})
    if (grad->data)
      fill(grad->data + i * grad->stride, static_cast<int>(rows.inputs.classes), value,
           static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
}

template <class Element, int N>
TRIMTAB_DEVICE void write_grad(const GradRows<Element>& grad, int64_t i, int v,
                               const Numbers<N>& ds, float factor, bool plus_one) {
  if (!grad.data) return;
  Numbers<N> d;
#pragma unroll
  for (int e = 0; e < N; ++e) d.at[e] = plus_one ? ds.at[e] * factor + ds.at[e] : ds.at[e] * factor;
  write(grad.data + i * grad.stride, v, d);
}

template <class Element>
__global__ void __launch_bounds__(kBackwardThreads)
    contrastive_logp_backward_kernel(ContrastiveLogp<Element> rows, int64_t count) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t target_class = rows.target[i];
    const Fixed fixed(target_class, rows.ignore_index, rows.inputs.classes);
    if (fixed.is) {
      fill_grads(rows, i, fixed.value);
      continue;
    }
    const int target = static_cast<int>(target_class);
    const ContrastRow<Element> inputs(rows.inputs, i);
    const LogpRow<Element> row(inputs, target, at(rows.temperature, i));
    if (!row.good) {
      fill_grads(rows, i, std::numeric_limits<float>::quiet_NaN());
      continue;
    }
    const float alpha = at(rows.inputs.alpha, i);
    const float upstream = rows.grad_logp[i] / row.temperature;
    const float factor = -upstream / row.statistics.total;
    // A token at -inf in the anchor stays there whatever the others are.
    const float at_target =
        row.target.anchor == -kInfinity ? 0.0f : upstream * row.statistics.target_miss;
    inputs.sweep_back(threadIdx.x, blockDim.x, [&](const auto& z, const auto&, int v) {
      constexpr int n = sizeof(z.at) / sizeof(float);
      Numbers<n> ds;
#pragma unroll
      for (int e = 0; e < n; ++e) ds.at[e] = row.power(z.at[e] - row.largest) * factor;
      if (target >= v && target < v + n) {
#pragma unroll
        for (int e = 0; e < n; ++e)
          if (v + e == target) ds.at[e] = at_target;
      }
      write_grad(rows.grad_positive, i, v, ds, alpha, !rows.inputs.anchor.given);
      write_grad(rows.grad_negative, i, v, ds, -alpha, false);
      write_grad(rows.grad_anchor, i, v, ds, 1.0f, false);
    });
  }
}

}  // namespace
}  // namespace trimtab
