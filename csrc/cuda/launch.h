// How kernels are launched: on the stream and the device of a tensor, with what the device has.
#pragma once

#if defined(TRIMTAB_CUDA_ON_CPU)
#include "cuda_on_cpu/host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "torch_api.h"

namespace trimtab {

// In tests/cuda_on_cpu the kernels run on CPU tensors, under a namespace of their own.
#if defined(TRIMTAB_CUDA_ON_CPU)
#define TRIMTAB_REGISTER_CUDA(library) STABLE_TORCH_LIBRARY_IMPL(trimtab_cuda_on_cpu, CPU, library)
inline int device_index(const Tensor&) { return cuda_on_cpu::device_number(); }
inline cudaStream_t stream_of(const Tensor&) { return nullptr; }
struct Guard {
  explicit Guard(const Tensor&) {}
  ~Guard() {}
};
#else
#define TRIMTAB_REGISTER_CUDA(library) STABLE_TORCH_LIBRARY_IMPL(trimtab, CUDA, library)
inline int device_index(const Tensor& tensor) { return tensor.get_device_index(); }

// The stream's id, which the stable ABI offers too, is no pointer.
inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(device_index(tensor), &stream);
  STD_TORCH_CHECK(error == 0, "torch has no current CUDA stream for device ", device_index(tensor));
  return static_cast<cudaStream_t>(stream);
}

// Makes the tensor's device current, and restores the earlier one at the end.
class Guard {
 public:
  explicit Guard(const Tensor& tensor) : guard_(device_index(tensor)) {
    // The CUDA runtime in this library is not torch's: what torch sets it need not see.
    int current = -1;
    if (cudaGetDevice(&current) != cudaSuccess || current != device_index(tensor))
      STD_TORCH_CHECK(cudaSetDevice(device_index(tensor)) == cudaSuccess, "CUDA device ",
                      device_index(tensor), " can't be made current");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or torch would meet it again
  STD_TORCH_CHECK(false, what, ": ", cudaGetErrorString(error));
}

struct Device {
  int multiprocessors;
  int64_t shared_per_block;           // the most that a launch can ask for
  int64_t shared_per_multiprocessor;  // each resident block takes 1 KB more than it asks for
  int64_t l2_bytes;
  int major, minor;  // compute capability, no later than that of the code
};

// Tells what this file was compiled for.
static __global__ void architecture_probe() {}

inline Device read_device(int index) {
  const auto read = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, attribute, index), "a CUDA device can't be asked");
    return value;
  };
  Device device{read(cudaDevAttrMultiProcessorCount),
                read(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                read(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                read(cudaDevAttrL2CacheSize),
                read(cudaDevAttrComputeCapabilityMajor),
                read(cudaDevAttrComputeCapabilityMinor)};
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, architecture_probe),
             "this library has no code for the CUDA device; see TRIMTAB_CUDA_ARCHS in setup.py");
  // A device without machine code of its own runs what was compiled for an older one, in which the
  // instructions of the newer are left out.
  if (code.ptxVersion < 10 * device.major + device.minor) {
    device.major = code.ptxVersion / 10;
    device.minor = code.ptxVersion % 10;
  }
  return device;
}

inline const Device& device_at(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(index);
  if (found == known.end()) found = known.emplace(index, read_device(index)).first;
  return found->second;
}
// To be called under a Guard: the probe is asked on the current device.
inline const Device& device_of(const Tensor& tensor) { return device_at(device_index(tensor)); }

// Calls f(Tag<element>) for the dtypes that have CUDA kernels.
template <class F>
void dispatch_to_cuda(const char* argument, const Tensor& tensor, F&& f) {
  STD_TORCH_CHECK(tensor.scalar_type() != ScalarType::Double, argument,
                  " must be float32, bfloat16 or float16 on CUDA, got Double; use "
                  "impl='reference'");
  dispatch_floating(argument, tensor, [&](auto tag) {
    if constexpr (!std::is_same_v<typename decltype(tag)::type, double>) f(tag);
  });
}

struct Shape {
  dim3 grid;
  unsigned threads;         // of a block, along x
  size_t shared_bytes = 0;  // dynamic shared memory of a block
  unsigned cluster = 1;     // blocks along x that form a cluster; more than 1 from sm_90 on
  bool dependent = false;   // from sm_90 on: may start before the stream's previous kernel ends
};

// More than 48 KB of shared memory must be asked for, once for each kernel and device.
inline void allow_shared_memory(const void* kernel, int device, size_t bytes) {
  constexpr size_t free_of_asking = 48 << 10;
  if (bytes <= free_of_asking) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             "a CUDA kernel asks for more shared memory than there is");
  most = bytes;
}

// Does not wait for the kernel. A grid without blocks is no error: there is nothing to do.
template <class... P, class... A>
void launch(void (*kernel)(P...), const Shape& shape, cudaStream_t stream, A&&... args) {
  static_assert((size_t{0} + ... + sizeof(P)) <= 32764, "more than a kernel can be passed");
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "no CUDA device is current");
  allow_shared_memory(reinterpret_cast<const void*>(kernel), device, shape.shared_bytes);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (shape.dependent && device_at(device).major >= 9) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(args))...),
             "a CUDA kernel does not start");
}

}  // namespace trimtab
