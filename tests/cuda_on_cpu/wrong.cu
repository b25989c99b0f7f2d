// Kernels that are wrong on purpose, each beside its right twin: what the harness must notice.
// Each turns the block's 64 numbers round, out[i] = in[63 - i], unless it says otherwise.

#include <string>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace trimtab {
namespace {

constexpr unsigned kThreads = 64;

template <bool Right>
__global__ void missing_barrier(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  shared[i] = in[i];
  if (Right) __syncthreads();
  out[i] = shared[kThreads - 1 - i];
}

// The second round may write only when all have read the first.
template <bool Right>
__global__ void missing_second_barrier(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  shared[i] = in[i];
  __syncthreads();
  const float x = shared[(i + 1) % kThreads];
  if (Right) __syncthreads();
  shared[i] = x;
  __syncthreads();
  out[i] = shared[(2 * kThreads - 2 - i) % kThreads];
}

template <bool Right>
__global__ void missing_warp_barrier(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  shared[i] = in[kThreads - 1 - i];
  if (Right) __syncwarp();
  const float turned = shared[i ^ 1];
  if (Right) __syncwarp();
  out[i ^ 1] = turned;
}

template <bool Right>
__global__ void diverged_barrier(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  shared[i] = in[i];
  if (Right || i < 40)
    __syncthreads();
  else
    __syncthreads();
  out[i] = shared[kThreads - 1 - i];
}

template <bool Right>
__global__ void early_return(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  if (!Right && i >= 48) return;
  shared[i] = in[i];
  __syncthreads();
  out[i] = shared[kThreads - 1 - i];
}

template <bool Right>
__global__ void missing_lane(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  float x = in[kThreads - 1 - i];
  if (Right || i != 39) x = __shfl_xor_sync(kAllLanes, x, 1);
  out[i ^ 1] = x;
}

template <bool Right>
__global__ void mask_without_own_lane(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  out[i ^ 1] = __shfl_xor_sync(Right ? kAllLanes : 0x0fffffffu, in[kThreads - 1 - i], 1);
}

template <bool Right>
__global__ void two_masks(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  const unsigned half = i % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const unsigned mask = Right || i % 32 >= 16 ? half : kAllLanes;
  out[i ^ 1] = __shfl_xor_sync(mask, in[kThreads - 1 - i], 1);
}

template <bool Right>
__global__ void two_calls(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  float x = in[kThreads - 1 - i];
  if (Right || i % 2)
    x = __shfl_xor_sync(kAllLanes, x, 1);
  else
    x = __shfl_xor_sync(kAllLanes, x, 1);
  out[i ^ 1] = x;
}

template <bool Right>
__global__ void lane_outside_mask(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  const unsigned half = i % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const unsigned distance = Right ? 1 : 16;
  out[i ^ distance] = __shfl_xor_sync(half, in[kThreads - 1 - i], distance);
}

template <bool Right>
__global__ void reads_beyond_input(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  const float x = in[i + (Right ? 0 : 1)];
  out[kThreads - 1 - i] = x;
}

template <bool Right>
__global__ void writes_beyond_output(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  out[kThreads - 1 - i + (Right ? 0 : 1)] = in[i];
}

template <bool Right>
__global__ void writes_beyond_shared(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  shared[i] = in[i];
  if (!Right && i == 5) shared[kThreads] = 1;
  __syncthreads();
  out[i] = shared[kThreads - 1 - i];
}

template <bool Right>
__global__ void reads_beyond_shared(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  shared[i] = in[i];
  __syncthreads();
  out[i] = shared[kThreads - 1 - i + (Right ? 0 : 1)];
}

template <bool Right>
__global__ void uninitialised_shared(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  if (Right) shared[i] = 0;
  shared[i] += in[kThreads - 1 - i];
  out[i] = shared[i];
}

template <bool Right>
__global__ void no_shared_memory(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  if (!Right) shared_memory<float>()[i] = 0;
  out[i] = in[kThreads - 1 - i];
}

template <bool Right>
__global__ void read_before_wait(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  if (i % 4 == 0) copy_async<16>(shared + i, in + i);
  copy_async_commit();
  if (Right) copy_async_wait<0>();
  __syncthreads();
  out[i] = shared[kThreads - 1 - i];
  copy_async_wait<0>();
}

// Two groups, of which the wait lets one be late.
template <bool Right>
__global__ void waits_for_too_few(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  for (unsigned part = 0; part < 2; ++part) {
    if (i / 32 == part && i % 4 == 0) copy_async<16>(shared + i, in + i);
    copy_async_commit();
  }
  copy_async_wait<Right ? 0 : 1>();
  __syncthreads();
  out[i] = shared[kThreads - 1 - i];
  copy_async_wait<0>();
}

template <bool Right>
__global__ void never_waits(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x;
  copy_async<4>(shared + i, in + i);
  copy_async_commit();
  if (Right) copy_async_wait<0>();
  out[i] = in[kThreads - 1 - i];
}

template <bool Right>
__global__ void misaligned_load(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  const auto four = load<4>(in + (Right ? i / 4 * 4 : (i < 60 ? i : 60)));
  out[kThreads - 1 - i] = four.at[Right ? i % 4 : 0];
}

template <bool Right>
__global__ void misaligned_store(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  if (i % 2 == 0 && !Right && i < 62) store(out + i + 1, Vector<float, 2>{{0, 0}});
  if (i % 2 == 0) store(out + i, Vector<float, 2>{{in[kThreads - 1 - i], in[kThreads - 2 - i]}});
}

// What only the sanitiser for undefined behaviour sees: a cast past `load`.
template <bool Right>
__global__ void misaligned_pointer(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  const unsigned pair = Right || i == 63 ? i / 2 * 2 : i;
  const uint2 both = *reinterpret_cast<const uint2*>(in + pair);
  out[kThreads - 1 - i] = __uint_as_float(i == pair ? both.x : both.y);
}

template <bool Right>
__global__ void index_overflow(const float* in, float* out) {
  const int i = static_cast<int>(threadIdx.x);
  volatile int far = i;  // or the compiler takes back what was added
  if (!Right) {
    far = far + 0x7fffffff;
    far = far - 0x7fffffff;
  }
  out[63 - i] = in[far];
}

// The blocks of a cluster of two read each other's numbers; each has half of them.
template <bool Right>
__global__ void leaves_early(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x, half = kThreads / 2, rank = cluster_rank();
  shared[i] = in[rank * half + i];
  cluster_sync();
  out[rank * half + i] = at_rank(shared, 1 - rank)[half - 1 - i];
  if (Right) cluster_sync();
}

template <bool Right>
__global__ void reaches_before_sync(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x, half = kThreads / 2, rank = cluster_rank();
  if (Right) cluster_sync();
  at_rank(shared, 1 - rank)[half - 1 - i] = in[rank * half + i];
  cluster_sync();
  out[rank * half + i] = shared[i];
}

template <bool Right>
__global__ void one_block_skips_a_sync(const float* in, float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  cluster_sync();
  out[i] = in[kThreads - 1 - i];
  if (Right || cluster_rank() == 0) cluster_sync();
}

// A pointer that was valid when it was made.
template <bool Right>
__global__ void keeps_a_pointer(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x, half = kThreads / 2, rank = cluster_rank();
  shared[i] = in[rank * half + i];
  cluster_sync();
  const float* other = at_rank(shared, 1 - rank);
  cluster_sync();
  out[rank * half + i] = other[half - 1 - i];
  if (Right) cluster_sync();
}

template <bool Right>
__global__ void rank_outside_cluster(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned i = threadIdx.x, half = kThreads / 2, rank = cluster_rank();
  shared[i] = in[rank * half + i];
  cluster_sync();
  out[rank * half + i] = at_rank(shared, Right ? 1 - rank : 2)[half - 1 - i];
  cluster_sync();
}

// out[0]: the sum; the order in which atomics add is nobody's promise.
template <bool Right>
__global__ void sum_in_any_order(const float* in, float* out) {
  const float x = in[threadIdx.x];
  if (Right) {
    const float sum = block_sum(x, shared_memory<float>());
    if (threadIdx.x == 0) out[0] = sum;
  } else {
    if (threadIdx.x == 0) out[0] = 0;
    __syncthreads();
    atomicAdd(out, x);
  }
}

template <bool Right>
__global__ void does_not_wait_for_previous(const float* in, float* out) {
  if (Right) wait_for_previous_kernel();
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
}

// out[0]: the sum of `blockDim.x` numbers.
template <bool Right>
__global__ void half_a_warp(const float* in, float* out) {
  const float sum = warp_sum(in[threadIdx.x]);
  if (threadIdx.x == 0) out[0] = sum;
}

void run(std::string name, bool right, const Tensor& input, const Tensor& output) {
  const Guard guard(input);
  const auto* in = static_cast<const float*>(input.data_ptr());
  auto* out = static_cast<float*>(output.data_ptr());
  const Shape plain{dim3(1), kThreads, kThreads * sizeof(float)};
  const Shape pair{dim3(2), kThreads / 2, kThreads / 2 * sizeof(float), 2};
  const auto go = [&](auto right_kernel, auto wrong_kernel, const Shape& shape) {
    launch(right ? right_kernel : wrong_kernel, shape, stream_of(input), in, out);
  };
#define TWINS(kernel, shape) \
  if (name == #kernel) return go(kernel<true>, kernel<false>, shape)
  TWINS(missing_barrier, plain);
  TWINS(missing_second_barrier, plain);
  TWINS(missing_warp_barrier, plain);
  TWINS(diverged_barrier, plain);
  TWINS(early_return, plain);
  TWINS(missing_lane, plain);
  TWINS(mask_without_own_lane, plain);
  TWINS(two_masks, plain);
  TWINS(two_calls, plain);
  TWINS(lane_outside_mask, plain);
  TWINS(reads_beyond_input, plain);
  TWINS(writes_beyond_output, plain);
  TWINS(writes_beyond_shared, plain);
  TWINS(reads_beyond_shared, plain);
  TWINS(uninitialised_shared, plain);
  TWINS(no_shared_memory, (Shape{dim3(1), kThreads}));
  TWINS(read_before_wait, plain);
  TWINS(waits_for_too_few, plain);
  TWINS(never_waits, plain);
  TWINS(misaligned_load, plain);
  TWINS(misaligned_store, plain);
  TWINS(misaligned_pointer, plain);
  TWINS(index_overflow, plain);
  TWINS(leaves_early, pair);
  TWINS(reaches_before_sync, pair);
  TWINS(one_block_skips_a_sync, pair);
  TWINS(keeps_a_pointer, pair);
  TWINS(rank_outside_cluster, pair);
  TWINS(sum_in_any_order, plain);
  TWINS(does_not_wait_for_previous, (Shape{dim3(1), kThreads, 0, 1, true}));
  TWINS(half_a_warp, (Shape{dim3(1), right ? 32u : 48u}));
#undef TWINS
  // The rest are right kernels with a wrong launch.
  const auto launch_as = [&](Shape right_shape, Shape wrong_shape) {
    launch(missing_barrier<true>, right ? right_shape : wrong_shape, stream_of(input), in, out);
  };
  if (name == "too_much_shared_memory")
    return launch_as({dim3(1), kThreads, 227 << 10}, {dim3(1), kThreads, (227 << 10) + 1});
  if (name == "too_many_threads") return launch_as(plain, {dim3(1), 1056, 8192});
  if (name == "cluster_does_not_divide_the_grid")
    return launch_as(plain, {dim3(3), kThreads, kThreads * sizeof(float), 2});
  if (name == "cluster_too_large")
    return launch_as(plain, {dim3(16), kThreads, kThreads * sizeof(float), 16});
  if (name == "empty_grid") return launch_as(plain, {dim3(0), kThreads, 1 << 20});
  STD_TORCH_CHECK(false, "no kernel is called ", name);
}

}  // namespace
}  // namespace trimtab

TRIMTAB_REGISTER_CUDA(library) { library.impl("wrong", TORCH_BOX(&trimtab::run)); }
