// The part of the CUDA runtime that csrc/cuda/launch.h calls, for a device that a test describes.
#pragma once

#include <map>
#include <tuple>
#include <utility>

#include "cuda_on_cpu/machine.h"

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrL2CacheSize,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaOnCpuCompiledFor,
  cudaOnCpuAttributes
};
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_cpu {

struct Host {
  std::array<int, cudaOnCpuAttributes> device{132, 227 << 10, 228 << 10, 50 << 20, 9, 0, 90};
  int number = 0;  // another device, another number: nobody keeps what an earlier one had
  std::map<const void*, size_t> allowed;
  std::string error;
  uint64_t launches = 0;
  std::array<int64_t, 4> last{};  // blocks, threads, blocks of a cluster, bytes of shared memory
};

inline Host& host() {
  static Host host;
  return host;
}
inline int device_number() { return host().number; }

inline cudaError_t refuse(const void* kernel, const std::string& reason) {
  host().error = "kernel " + name_of_function(kernel) + ": " + reason;
  return cudaErrorInvalidValue;
}

inline cudaError_t check_launch(const Launch& launch, dim3 block) {
  const auto number = [](uint64_t value) { return std::to_string(value); };
  const auto& device = host().device;
  const auto found = host().allowed.find(launch.kernel);
  const size_t allowed = found == host().allowed.end() ? 48 << 10 : found->second;
  const bool before_hopper = device[cudaDevAttrComputeCapabilityMajor] < 9;
  if (block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1)
    return refuse(launch.kernel,
                  "a block must have 1 to 1024 threads along x, got " + number(block.x));
  if (launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535)
    return refuse(launch.kernel, "the grid must be at most 2147483647 x 65535 x 65535, got " +
                                     number(launch.grid.x) + " x " + number(launch.grid.y) + " x " +
                                     number(launch.grid.z));
  if (launch.shared_bytes > allowed)
    return refuse(launch.kernel, "shared memory must be at most the " + number(allowed) +
                                     " bytes that were asked for, got " +
                                     number(launch.shared_bytes));
  if (launch.cluster > 1 && before_hopper)
    return refuse(launch.kernel,
                  "clusters need compute capability 9.0, the device has " +
                      number(static_cast<uint64_t>(device[cudaDevAttrComputeCapabilityMajor])) +
                      ".x");
  if (launch.cluster == 0 || launch.cluster > 8 || launch.grid.x % launch.cluster != 0)
    return refuse(launch.kernel,
                  "a cluster must be of 1 to 8 blocks and divide the grid along x, got " +
                      number(launch.cluster) + " in a grid of " + number(launch.grid.x));
  if (launch.dependent && before_hopper)
    return refuse(launch.kernel, "programmatic dependent launch needs compute capability 9.0");
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::host().error.c_str(); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::device_number();
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = cuda_on_cpu::host().device[attribute];
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  attributes->ptxVersion = cuda_on_cpu::host().device[cudaOnCpuCompiledFor];
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const int most = cuda_on_cpu::host().device[cudaDevAttrMaxSharedMemoryPerBlockOptin];
  if (bytes > most)
    return cuda_on_cpu::refuse(kernel, "shared memory of a block must be at most " +
                                           std::to_string(most) + " bytes on this device, got " +
                                           std::to_string(bytes));
  cuda_on_cpu::host().allowed[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... args) {
  using Call = std::pair<void (*)(P...), std::tuple<std::decay_t<P>...>>;
  Call call{kernel, {static_cast<P>(std::forward<A>(args))...}};
  cuda_on_cpu::Launch launch{reinterpret_cast<const void*>(kernel),
                             config->gridDim,
                             config->blockDim.x,
                             1,
                             config->dynamicSmemBytes,
                             false,
                             nullptr,
                             &call};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      launch.cluster = attribute.val.clusterDim.x;
    else
      launch.dependent = attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  launch.call = [](void* arguments) {
    const Call& call = *static_cast<Call*>(arguments);
    std::apply(call.first, call.second);
  };
  const dim3 grid = config->gridDim;
  cuda_on_cpu::host().last = {int64_t{grid.x} * grid.y * grid.z, config->blockDim.x, launch.cluster,
                              static_cast<int64_t>(config->dynamicSmemBytes)};
  const cudaError_t error = cuda_on_cpu::check_launch(launch, config->blockDim);
  if (error == cudaSuccess) {
    ++cuda_on_cpu::host().launches;
    cuda_on_cpu::machine().run(launch);
  }
  return error;
}

// What library.py sets and asks.
#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default"), used)) inline
CUDA_ON_CPU_EXPORT void cuda_on_cpu_set_schedule(int order, uint64_t seed) {
  cuda_on_cpu::machine().order = static_cast<cuda_on_cpu::Order>(order);
  cuda_on_cpu::machine().seed = seed;
}
CUDA_ON_CPU_EXPORT void cuda_on_cpu_set_device(const int* attributes) {
  auto& host = cuda_on_cpu::host();
  std::copy(attributes, attributes + cudaOnCpuAttributes, host.device.begin());
  host.allowed.clear();
  ++host.number;
}
CUDA_ON_CPU_EXPORT void cuda_on_cpu_last_launch(int64_t* numbers) {
  const auto& last = cuda_on_cpu::host().last;
  std::copy(last.begin(), last.end(), numbers);
}
CUDA_ON_CPU_EXPORT uint64_t cuda_on_cpu_launches() { return cuda_on_cpu::host().launches; }
#undef CUDA_ON_CPU_EXPORT
