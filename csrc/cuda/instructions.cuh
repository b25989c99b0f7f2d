// What only the hardware can do, one function for each instruction. Without a GPU
// tests/cuda_on_cpu/instructions.h stands in for this file.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define TRIMTAB_DEVICE __device__ __forceinline__

namespace trimtab {

// The launch's dynamic shared memory; every pointer into it starts from here.
template <class T>
TRIMTAB_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char trimtab_shared_memory[];
  return reinterpret_cast<T*>(trimtab_shared_memory);
}

TRIMTAB_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// One access of a whole vector of at most 16 bytes.
template <class Raw>
TRIMTAB_DEVICE Raw load_raw(const void* global) {
  return *static_cast<const Raw*>(global);
}
template <class Raw>
TRIMTAB_DEVICE void store_raw(void* global, Raw raw) {
  *static_cast<Raw*>(global) = raw;
}

// Read once: passes the first-level cache by.
TRIMTAB_DEVICE uint4 load_raw_stream(const uint4* global) {
  uint4 raw;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(global));
  return raw;
}
template <class Raw>
TRIMTAB_DEVICE Raw load_raw_stream(const Raw* global) {
  return __ldg(global);
}
template <class Raw>
TRIMTAB_DEVICE void store_raw_stream(Raw* global, Raw raw) {
  __stcs(global, raw);
}

// Copies Bytes from global to shared memory past the registers; what is beyond `valid` becomes 0.
// The thread that asked sees the bytes after copy_async_wait, the others after a barrier that
// follows it.
template <int Bytes>
TRIMTAB_DEVICE void copy_async(void* shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(Bytes), "r"(valid)
                 : "memory");
}
// Closes a group of copies.
TRIMTAB_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last Pending groups of this thread are under way.
template <int Pending>
TRIMTAB_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 2**x within 2 ulp (CUDA C++ Programming Guide, exp2f), 0 where that would be subnormal.
TRIMTAB_DEVICE float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
// Unlike that of fmaxf, the larger of a NaN and anything is the NaN.
TRIMTAB_DEVICE float larger(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// Clusters exist from sm_90 on; before, every block is a cluster of its own.
TRIMTAB_DEVICE unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
TRIMTAB_DEVICE unsigned cluster_size() {
  unsigned size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
// Every thread of every block of the cluster must reach it.
TRIMTAB_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}
// The last cluster_sync of a kernel: no block leaves while another may read its shared memory. What
// a thread has read there it must have used before. Unlike cluster_sync it waits for no writes.
TRIMTAB_DEVICE void cluster_leave() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}
// The same place in the shared memory of another block of the cluster. Valid between two
// cluster_syncs: before the first that block may not run yet, after the last it may have left.
template <class T>
TRIMTAB_DEVICE T* at_rank(T* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return shared;
#endif
}

// Programmatic dependent launch. Nothing that an earlier kernel wrote may be read, and nothing that
// it reads may be written, before the wait.
TRIMTAB_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
TRIMTAB_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// d += a b for a (16, k) row by row, b (k, 8) column by column, d (16, 8), of a whole warp. With g
// = lane / 4 and t = lane % 4 a lane holds, for 16-bit elements (k = 16, two to a register, the
// lower column first):
//   a[0] = (g, 2t), a[1] = (g + 8, 2t), a[2] = (g, 2t + 8), a[3] = (g + 8, 2t + 8)
//   b[0] = (2t, g), b[1] = (2t + 8, g)          d = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t +
//   1)
// and for tf32 (k = 8), with d as above:
//   a[0] = (g, t), a[1] = (g + 8, t), a[2] = (g, t + 4), a[3] = (g + 8, t + 4)
//   b[0] = (t, g), b[1] = (t + 4, g)
#define TRIMTAB_MMA(name, shape)                                                            \
  TRIMTAB_DEVICE void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape                                                  \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));       \
  }
TRIMTAB_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
TRIMTAB_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
TRIMTAB_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef TRIMTAB_MMA

// The nearest tf32, as the bits of a float; mma_tf32 would cut the rest off.
TRIMTAB_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Four (two) matrices of 8 x 8 16-bit elements. Lane 8 m + r gives the address of row r of matrix m
// (16 bytes, aligned); lane l receives elements 2 (l % 4) and the next of row l / 4 of each. Of the
// transposed form, row and column change places. The lanes from 16 on give no address for two.
#define TRIMTAB_LDMATRIX(name, suffix)                                                        \
  TRIMTAB_DEVICE void name(uint32_t (&r)[4], const void* row) {                               \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" suffix ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                             \
                 : "r"(shared_address(row))                                                   \
                 : "memory");                                                                 \
  }                                                                                           \
  TRIMTAB_DEVICE void name(uint32_t (&r)[2], const void* row) {                               \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" suffix ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(r[0]), "=r"(r[1])                                                     \
                 : "r"(shared_address(row))                                                   \
                 : "memory");                                                                 \
  }
TRIMTAB_LDMATRIX(ldmatrix, "")
TRIMTAB_LDMATRIX(ldmatrix_transposed, ".trans")
#undef TRIMTAB_LDMATRIX

}  // namespace trimtab
