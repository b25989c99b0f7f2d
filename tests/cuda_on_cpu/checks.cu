// Kernels that do each thing of device.cuh once, for tests that know the result.

#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace trimtab {
namespace {

constexpr int kColumns = 17;

// out (threads, kColumns): what each thread receives of its neighbours' `in`.
__global__ void collectives(const int64_t* in, int64_t* out) {
  const int64_t x = in[threadIdx.x];
  const int small = static_cast<int>(x);
  const unsigned half = lane_index() < 16 ? 0x0000ffffu : 0xffff0000u;
  int64_t* row = out + threadIdx.x * kColumns;
  row[0] = __shfl_sync(kAllLanes, x, 5);
  row[1] = __shfl_sync(kAllLanes, x, static_cast<int>(lane_index()) + 3, 8);
  row[2] = __shfl_xor_sync(kAllLanes, x, 9);
  row[3] = __shfl_up_sync(kAllLanes, x, 3);
  row[4] = __shfl_down_sync(kAllLanes, x, 3);
  row[5] = __shfl_up_sync(half, x, 3, 8);
  row[6] = __shfl_down_sync(half, x, 3, 8);
  row[7] = __ballot_sync(kAllLanes, small % 3 == 0);
  row[8] = __any_sync(half, small % 7 == 0);
  row[9] = __all_sync(half, small >= 0);
  row[10] = __reduce_add_sync(half, small);
  row[11] = __reduce_max_sync(kAllLanes, small);
  row[12] = __reduce_min_sync(kAllLanes, static_cast<unsigned>(small));
  row[13] = __syncthreads_or(threadIdx.x == 33 && small != 0);
  row[14] = __syncthreads_and(small >= 0);
  row[15] = __syncthreads_count(small % 3 == 0);
  row[16] = warp_min(static_cast<uint64_t>(x));
}

// out[0..4]: sum, maximum and minimum of a block, and sum and maximum of a thread's warp.
template <class T>
__global__ void reductions(const T* in, T* out) {
  T* scratch = shared_memory<T>();
  const T x = in[threadIdx.x];
  T* row = out + threadIdx.x * 5;
  row[0] = block_sum(x, scratch);
  row[1] = block_max(x, scratch);
  row[2] = block_min(x, scratch);
  row[3] = warp_sum(x);
  row[4] = warp_max(x);
}

// Copies `count` numbers in vectors of N, each of the four accesses in turn.
template <int N, class T>
__global__ void vectors(const T* in, T* out, int64_t count) {
  for (int64_t i = threadIdx.x * N; i + N <= count; i += blockDim.x * N) {
    const auto vector = i / N % 2 ? load<N>(in + i) : load_stream<N>(in + i);
    i / N / 2 % 2 ? store(out + i, vector) : store_stream(out + i, vector);
  }
}

// d (16, 8) += a (16, k) b (8, k) transposed, 16 columns of k at a time.
template <class Element, bool Transposed>
__global__ void product16(const Element* a, const Element* b, float* d, int k) {
  Element* tile_a = shared_memory<Element>();
  Element* tile_b = tile_a + 16 * 16;
  const unsigned lane = lane_index();
  float sums[4] = {};
  for (int first = 0; first < k; first += 16) {
    for (unsigned i = lane; i < 16 * 16; i += kWarp)
      tile_a[Transposed ? i % 16 * 16 + i / 16 : i] = a[i / 16 * k + first + i % 16];
    for (unsigned i = lane; i < 8 * 16; i += kWarp)
      tile_b[Transposed ? i % 16 * 8 + i / 16 : i] = b[i / 16 * k + first + i % 16];
    __syncwarp();
    uint32_t left[4], right[2];
    if constexpr (Transposed) {
      ldmatrix_transposed(left, tile_a + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
      ldmatrix_transposed(right, tile_b + lane % 16 * 8);
    } else {
      ldmatrix(left, tile_a + lane % 16 * 16 + lane / 16 * 8);
      ldmatrix(right, tile_b + lane % 8 * 16 + lane / 8 % 2 * 8);
    }
    if constexpr (std::is_same_v<Element, BFloat16>)
      mma_bf16(sums, left, right);
    else
      mma_f16(sums, left, right);
    __syncwarp();
  }
  for (unsigned i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// The same for float32 numbers as tf32, 8 columns at a time.
__global__ void product_tf32(const float* a, const float* b, float* d, int k) {
  const unsigned lane = lane_index(), g = lane / 4, t = lane % 4;
  float sums[4] = {};
  for (int first = 0; first < k; first += 8) {
    uint32_t left[4], right[2];
    for (unsigned i = 0; i < 4; ++i)
      left[i] = to_tf32(a[(g + i % 2 * 8) * k + first + t + i / 2 * 4]);
    for (unsigned i = 0; i < 2; ++i) right[i] = to_tf32(b[g * k + first + t + i * 4]);
    mma_tf32(sums, left, right);
  }
  for (unsigned i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sums[i];
}

// Copies a row through two buffers, so that one is filled while the other is read.
__global__ void pipeline(const float* in, float* out, int count) {
  float* buffers = shared_memory<float>();
  const int width = static_cast<int>(blockDim.x) * 4, place = static_cast<int>(threadIdx.x) * 4;
  const auto fetch = [&](int step) {
    const int left = count - step * width - place;
    const int valid = left <= 0 ? 0 : left >= 4 ? 16 : left * 4;
    if (step * width < count)
      copy_async<16>(buffers + step % 2 * width + place,
                     in + (valid > 0 ? step * width + place : 0), valid);
    copy_async_commit();
  };
  fetch(0);
  for (int step = 0; step * width < count; ++step) {
    fetch(step + 1);
    copy_async_wait<1>();
    __syncthreads();
    const float* buffer = buffers + step % 2 * width;
    for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
      const int other = width - 1 - i;
      if (step * width + other < count)
        out[step * width + other] = buffer[other];
      else if (buffer[other] != 0)
        out[0] = -1;
    }
    __syncthreads();
  }
  copy_async_wait<0>();
}

// out (rows): the sum of each row of in (rows, blocks of a cluster, threads), from every block.
__global__ void cluster_sums(const float* in, float* out) {
  float* shared = shared_memory<float>();
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
  const float part = block_sum(in[block * blockDim.x + threadIdx.x], shared + 1);
  if (threadIdx.x == 0) shared[0] = part;
  cluster_sync();
  float sum = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += *at_rank(shared, rank);
  cluster_sync();
  if (threadIdx.x == 0)
    out[blockIdx.y * gridDim.x + blockIdx.x] = cluster_rank() == blockIdx.x ? sum : -1;
}

struct Numbers {
  int64_t at[32];
};

// out (blocks, threads, 8): where each thread is, a number that the launch passed, and its turn.
__global__ void places(const __grid_constant__ Numbers numbers, int64_t* out,
                       unsigned long long* turn) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int64_t* row = out + (block * blockDim.x + threadIdx.x) * 8;
  row[0] = blockIdx.x;
  row[1] = blockIdx.y;
  row[2] = blockIdx.z;
  row[3] = threadIdx.x;
  row[4] = gridDim.x * 10000 + gridDim.y * 100 + gridDim.z;
  row[5] = blockDim.x;
  row[6] = numbers.at[threadIdx.x % 32];
  row[7] = static_cast<int64_t>(atomicAdd(turn, 1ull));
}

// An array that is indexed at run time lies in local memory: what a budget must notice.
__global__ void local_array(const int64_t* in, int64_t* out) {
  int64_t numbers[32];
  for (int i = 0; i < 32; ++i) numbers[i] = in[i * 2];
  out[threadIdx.x] = numbers[in[threadIdx.x] & 31];
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
void copy_vectors(const Tensor& in, const Tensor& out) {
  constexpr int widest = 16 / sizeof(T);
  launch(vectors<widest, T>, {dim3(1), 32}, stream_of(in), data<T>(in), data<T>(out), in.numel());
  launch(vectors<2, T>, {dim3(1), 32}, stream_of(in), data<T>(in), data<T>(out) + in.numel(),
         in.numel());
}

void run(std::string name, std::vector<Tensor> in, const Tensor& out) {
  const Guard guard(out);
  const auto stream = stream_of(out);
  if (name == "collectives")
    return launch(collectives, {dim3(1), 64}, stream, data<int64_t>(in[0]), data<int64_t>(out));
  if (name == "local_array")
    return launch(local_array, {dim3(1), 64}, stream, data<int64_t>(in[0]), data<int64_t>(out));
  if (name == "reductions") {
    const Shape shape{dim3(1), static_cast<unsigned>(in[0].numel()), 256};
    switch (in[0].scalar_type()) {
      case ScalarType::Float:
        return launch(reductions<float>, shape, stream, data<float>(in[0]), data<float>(out));
      case ScalarType::Double:
        return launch(reductions<double>, shape, stream, data<double>(in[0]), data<double>(out));
      case ScalarType::Int:
        return launch(reductions<int>, shape, stream, data<int>(in[0]), data<int>(out));
      default:
        return launch(reductions<uint64_t>, shape, stream, data<uint64_t>(in[0]),
                      data<uint64_t>(out));
    }
  }
  if (name == "vectors")
    return in[0].scalar_type() == ScalarType::Float ? copy_vectors<float>(in[0], out)
                                                    : copy_vectors<BFloat16>(in[0], out);
  if (name == "product" || name == "product_transposed") {
    const Shape shape{dim3(1), 32, 24 * 16 * 2};
    const int k = static_cast<int>(in[0].size(1));
    const auto go = [&](auto kernel, auto element) {
      using T = decltype(element);
      launch(kernel, shape, stream, data<T>(in[0]), data<T>(in[1]), data<float>(out), k);
    };
    const bool transposed = name != "product";
    if (in[0].scalar_type() == ScalarType::Float) return go(product_tf32, float{});
    if (in[0].scalar_type() == ScalarType::Half)
      return go(transposed ? product16<Float16, true> : product16<Float16, false>, Float16{});
    return go(transposed ? product16<BFloat16, true> : product16<BFloat16, false>, BFloat16{});
  }
  if (name == "pipeline")
    return launch(pipeline, {dim3(1), 64, 2 * 64 * 16}, stream, data<float>(in[0]),
                  data<float>(out), static_cast<int>(in[0].numel()));
  if (name == "cluster_sums")
    return launch(cluster_sums,
                  {dim3(static_cast<unsigned>(in[0].size(1)), static_cast<unsigned>(in[0].size(0))),
                   static_cast<unsigned>(in[0].size(2)), 256, static_cast<unsigned>(in[0].size(1))},
                  stream, data<float>(in[0]), data<float>(out));
  if (name == "places") {
    Numbers numbers;
    for (int i = 0; i < 32; ++i) numbers.at[i] = data<int64_t>(in[0])[i];
    return launch(places, {dim3(3, 4, 5), 40}, stream, numbers, data<int64_t>(out),
                  data<unsigned long long>(in[1]));
  }
  if (name == "device") {
    const Device& device = device_of(out);
    const int64_t facts[] = {device.multiprocessors,
                             device.shared_per_block,
                             device.shared_per_multiprocessor,
                             device.l2_bytes,
                             device.major,
                             device.minor};
    for (int i = 0; i < 6; ++i) data<int64_t>(out)[i] = facts[i];
    return;
  }
  STD_TORCH_CHECK(false, "no kernel is called ", name);
}

}  // namespace
}  // namespace trimtab

TRIMTAB_REGISTER_CUDA(library) { library.impl("check", TORCH_BOX(&trimtab::run)); }
