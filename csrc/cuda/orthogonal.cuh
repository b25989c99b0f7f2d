// What the kernels of orthogonality share: the table that tells blocks where rows are, and how rows
// get to shared memory.
#pragma once

#include "common/dtype.h"
#include "cuda/device.cuh"

namespace trimtab {

constexpr unsigned kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Rows of C that are worked on together, and rows or columns of P: the tiles of the tensor cores.
constexpr int kGroup = 8, kSide = 16;

TRIMTAB_HD int ceil_div(int64_t a, int b) { return static_cast<int>((a + b - 1) / b); }
// In 64 bits a GPU divides slowly.
TRIMTAB_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }
TRIMTAB_HD int round_up(int a, int b) { return ceil_div(a, b) * b; }

enum class Kind : int { float32, bfloat16, float16 };

TRIMTAB_HD int size_of(Kind kind) { return kind == Kind::float32 ? 4 : 2; }

// Rows of one tensor; strides in bytes.
struct Matrix {
  const char* data;
  int64_t row_stride, column_stride;
};

// One of the previous tensors of a module; `end` counts its rows and those of the ones before.
struct Task {
  Matrix rows;
  int64_t end;
};

// G = P C^T for `rows` rows of P, which are those of several tasks, and `ranks` rows of C. Blocks
// take `slice` columns, `cut` ranks and `part` rows of it each.
struct alignas(16) Module {
  Matrix current;
  int columns, rows, ranks;
  int first_task, tasks;
  int slice, slices, cut, part;
  int first_block;  // of the kernels that make G or combine rows of P
  int first_piece;  // of a gradient that is added up from several parts; see kPiece
  int first_tile;   // of the kernel that combines rows of C
  float* grad_current;
  char* out;                  // combinations of rows of C: the gradient of P, or a projection
  int64_t products, factors;  // first element of G, slice by slice, and of S
  int64_t partial;            // of the gradients of parts of rows

  TRIMTAB_HD int cuts() const { return ceil_div(ranks, cut); }
  TRIMTAB_HD int parts() const { return rows > part ? ceil_div(rows, part) : 1; }
  TRIMTAB_HD int64_t size() const { return int64_t{ranks} * columns; }
  TRIMTAB_HD int64_t pairs() const { return int64_t{rows} * ranks; }
};

struct Table {
  const Module* modules;
  const Task* tasks;
  int count;
  Kind previous, current;
};

// A table comes to the device as arguments of kernels, so that graphs hold it and nobody waits. It
// is cut where one kernel's arguments end: at 32,764 bytes from CUDA 12.1 and its drivers on. What
// is left goes as the smallest of these, because arguments are copied whole.
constexpr int kFewWords = 254, kSomeWords = 1016, kMostWords = 2032;

template <int kWords>
struct TableChunk {
  uint4 words[kWords];
};

template <int kWords>
__global__ void store_table(const __grid_constant__ TableChunk<kWords> chunk, uint4* table,
                            int words) {
  // Others may still read what the memory held before.
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < static_cast<unsigned>(words);
       i += gridDim.x * blockDim.x)
    table[i] = chunk.words[i];
}

// Copies the module that a block belongs to, and its number, to shared memory; `first` is the
// member that counts the blocks.
TRIMTAB_DEVICE void find_module(const Table& table, int Module::* first, int block, Module& module,
                                int& number) {
  for (int m = static_cast<int>(threadIdx.x); m < table.count; m += static_cast<int>(blockDim.x))
    if (table.modules[m].*first <= block &&
        (m + 1 == table.count || block < table.modules[m + 1].*first))
      number = m;
  __syncthreads();
  constexpr unsigned words = sizeof(Module) / sizeof(uint4);
  if (threadIdx.x < words)
    reinterpret_cast<uint4*>(&module)[threadIdx.x] =
        reinterpret_cast<const uint4*>(table.modules + number)[threadIdx.x];
  __syncthreads();
}

struct alignas(16) FoundModule {
  Module module;
  int number;
};

// Where a row is; without data it is one of zeros.
struct Place {
  const char* data;
  int64_t step;  // bytes from column to column
};

TRIMTAB_DEVICE Place previous_row(const Table& table, const Module& module, int row) {
  if (row >= module.rows) return {nullptr, 0};
  const Task* tasks = table.tasks + module.first_task;
  int low = 0, high = module.tasks - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (tasks[middle].end > row)
      high = middle;
    else
      low = middle + 1;
  }
  const Matrix rows = tasks[low].rows;
  const int64_t before = low > 0 ? tasks[low - 1].end : 0;
  return {rows.data + (row - before) * rows.row_stride, rows.column_stride};
}

TRIMTAB_DEVICE Place current_row(const Module& module, int row) {
  if (row >= module.ranks) return {nullptr, 0};
  return {module.current.data + row * module.current.row_stride, module.current.column_stride};
}

TRIMTAB_DEVICE float read_real(const char* from, Kind kind) {
  if (kind == Kind::float32) return *reinterpret_cast<const float*>(from);
  const uint16_t bits = *reinterpret_cast<const uint16_t*>(from);
  return kind == Kind::bfloat16 ? to_real(BFloat16{bits}) : to_real(Float16{bits});
}

TRIMTAB_DEVICE void write_real(char* to, Kind kind, float x) {
  if (kind == Kind::float32)
    *reinterpret_cast<float*>(to) = x;
  else
    *reinterpret_cast<uint16_t*>(to) =
        kind == Kind::bfloat16 ? from_real<BFloat16>(x).bits : from_real<Float16>(x).bits;
}

// Shared memory holds float32, or 16-bit numbers as they are.
TRIMTAB_DEVICE void read_element(float& to, const char* from, Kind kind) {
  to = read_real(from, kind);
}
TRIMTAB_DEVICE void read_element(uint16_t& to, const char* from, Kind) {
  to = *reinterpret_cast<const uint16_t*>(from);
}

// Columns [first, first + valid) of some rows; zeros follow up to `width`, a multiple of 16.
struct Columns {
  int64_t first;
  int valid, width;
};

// Eight 16-bit numbers to shared memory that holds float32.
TRIMTAB_DEVICE void convert_eight(const char* from, Kind kind, float* to) {
  const auto bits = load<8>(reinterpret_cast<const uint16_t*>(from));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vector<float, 4> real;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint16_t x = bits.at[4 * half + k];
      real.at[k] = kind == Kind::bfloat16 ? to_real(BFloat16{x}) : to_real(Float16{x});
    }
    store(to + 4 * half, real);
  }
}
TRIMTAB_DEVICE void convert_eight(const char*, Kind, uint16_t*) {}

// One row whose elements are neighbours, by a warp.
template <class Element>
TRIMTAB_DEVICE void load_row(const char* from, Kind kind, const Columns& columns, Element* to) {
  constexpr int per = 16 / sizeof(Element);
  const int lane = static_cast<int>(lane_index()), size = size_of(kind);
  const bool aligned = is_aligned(from);
  if (size == sizeof(Element) && aligned) {
    for (int c = lane * per; c < columns.width; c += static_cast<int>(kWarp) * per) {
      const int left = max(0, min(per, columns.valid - c));
      copy_async<16>(to + c, left > 0 ? from + c * size : from, left * size);
    }
    return;
  }
  int first = 0;
  if (size < static_cast<int>(sizeof(Element)) && aligned) {
    first = columns.valid / 8 * 8;
#pragma unroll 2
    for (int c = 8 * lane; c < first; c += 8 * static_cast<int>(kWarp))
      convert_eight(from + c * size, kind, to + c);
  }
#pragma unroll 4
  for (int c = first + lane; c < columns.width; c += static_cast<int>(kWarp)) {
    to[c] = Element{};
    if (c < columns.valid) read_element(to[c], from + c * size, kind);
  }
}

// Rows whose elements lie apart, as in a transposed matrix, where those of a column are neighbours.
template <class Element>
TRIMTAB_DEVICE void load_apart(const Place* places, int rows, Kind kind, const Columns& columns,
                               Element* to, int pitch) {
#pragma unroll 4
  for (int e = static_cast<int>(threadIdx.x); e < rows * columns.width;
       e += static_cast<int>(kThreads)) {
    const int i = e % rows, c = e / rows;
    const Place place = places[i];
    if (place.data == nullptr || place.step == size_of(kind)) continue;
    Element x{};
    if (c < columns.valid) read_element(x, place.data + (columns.first + c) * place.step, kind);
    to[i * pitch + c] = x;
  }
}

// `apart`: some rows' elements are no neighbours. The copies may be under way until
// copy_async_wait.
template <class Element>
TRIMTAB_DEVICE void load_rows(const Place* places, int rows, bool apart, Kind kind,
                              const Columns& columns, Element* to, int pitch) {
  const int lane = static_cast<int>(lane_index()), size = size_of(kind);
  for (int i = static_cast<int>(warp_index()); i < rows; i += kWarps) {
    const Place place = places[i];
    if (place.data != nullptr && place.step == size)
      load_row(place.data + columns.first * size, kind, columns, to + i * pitch);
    else if (place.data == nullptr)
      for (int c = lane; c < columns.width; c += static_cast<int>(kWarp))
        to[i * pitch + c] = Element{};
  }
  if (apart) load_apart(places, rows, kind, columns, to, pitch);
  copy_async_commit();
}

// Asks for the places of rows [first, first + rows) with `place_of`, by all threads; whether the
// elements of some lie apart.
template <class F>
TRIMTAB_DEVICE bool set_places(Place* places, int rows, Kind kind, F&& place_of) {
  bool apart = false;
  for (int i = static_cast<int>(threadIdx.x); i < rows; i += static_cast<int>(blockDim.x)) {
    places[i] = place_of(i);
    apart = apart || (places[i].data != nullptr && places[i].step != size_of(kind));
  }
  return __syncthreads_or(apart);
}

}  // namespace trimtab
