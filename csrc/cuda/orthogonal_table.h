// The table of the modules: put together on the host, written to the device by kernels.
#pragma once

#include <algorithm>
#include <climits>
#include <cstring>
#include <vector>

#include "cuda/launch.h"
#include "cuda/orthogonal.cuh"
#include "orthogonal_arguments.h"

namespace trimtab {

// Memory of one call, cut into pieces of whole cache lines. It is torch's: what later calls on the
// stream do with it comes after this call's kernels.
class Workspace {
 public:
  // The place of `count` numbers.
  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t begin = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return begin;
  }
  void allocate(const Tensor& like) {
    memory_ = torch::stable::new_empty(like, {bytes_}, ScalarType::Byte);
  }
  template <class T>
  T* at(int64_t place) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_->data_ptr()) + place);
  }

 private:
  int64_t bytes_ = 0;
  OptionalTensor memory_;
};

class HostTable {
 public:
  std::vector<Module> modules;
  Kind previous, current;

  // A module of so many rows, to which add_task adds.
  void add_module(const GivenMatrix& current_rows) {
    Module module{};
    module.current = matrix(current_rows, current);
    module.columns = checked(current_rows.columns);
    module.ranks = checked(current_rows.rows);
    module.first_task = static_cast<int>(tasks_.size());
    modules.push_back(module);
  }
  void add_task(const GivenMatrix& rows) {
    Module& module = modules.back();
    module.rows = checked(module.rows + rows.rows);
    ++module.tasks;
    tasks_.push_back({matrix(rows, previous), module.rows});
  }

  int64_t words() const {
    return (modules.size() * sizeof(Module) + tasks_.size() * sizeof(Task)) / sizeof(uint4);
  }

  // Launches the kernels that write the table to `memory`, of so many words.
  Table store(uint4* memory, cudaStream_t stream) const {
    std::vector<uint4> packed(static_cast<size_t>(words()));
    const size_t bytes = modules.size() * sizeof(Module);
    auto* to = reinterpret_cast<char*>(packed.data());
    std::memcpy(to, modules.data(), bytes);
    if (!tasks_.empty()) std::memcpy(to + bytes, tasks_.data(), tasks_.size() * sizeof(Task));
    for (size_t first = 0; first < packed.size(); first += kMostWords) {
      const auto count = static_cast<int>(std::min<size_t>(kMostWords, packed.size() - first));
      const auto* words = packed.data() + first;
      // The first comes after all of the stream, the next only after the one before.
      const bool dependent = first > 0;
      if (count <= kFewWords)
        store_chunk<kFewWords>(words, count, memory + first, dependent, stream);
      else if (count <= kSomeWords)
        store_chunk<kSomeWords>(words, count, memory + first, dependent, stream);
      else
        store_chunk<kMostWords>(words, count, memory + first, dependent, stream);
    }
    const auto* from = reinterpret_cast<const char*>(memory);
    return {reinterpret_cast<const Module*>(from), reinterpret_cast<const Task*>(from + bytes),
            static_cast<int>(modules.size()), previous, current};
  }

 private:
  static_assert(sizeof(Module) % sizeof(uint4) == 0 && sizeof(Task) % sizeof(uint4) == 0);

  template <int kWords>
  static void store_chunk(const uint4* words, int count, uint4* memory, bool dependent,
                          cudaStream_t stream) {
    TableChunk<kWords> chunk;
    std::memcpy(chunk.words, words, static_cast<size_t>(count) * sizeof(uint4));
    launch(store_table<kWords>, {dim3(ceil_div(count, 128)), 128, 0, 1, dependent}, stream, chunk,
           memory, count);
  }

  static Matrix matrix(const GivenMatrix& given, Kind kind) {
    const int64_t size = size_of(kind);
    return {given.data, given.row_stride * size, given.column_stride * size};
  }
  static int checked(int64_t size) {
    STD_TORCH_CHECK(size < int64_t{1} << 30,
                    "tensors must have less than 2**30 rows and columns on CUDA, got ", size,
                    "; use impl='reference'");
    return static_cast<int>(size);
  }

  std::vector<Task> tasks_;
};

// Adds up how many blocks the modules before have, and gives each its first.
template <class F>
int number_blocks(std::vector<Module>& modules, int Module::* first, F&& count) {
  int64_t blocks = 0;
  for (Module& module : modules) {
    module.*first = static_cast<int>(blocks);
    blocks += count(module);
    STD_TORCH_CHECK(blocks < INT_MAX, "tensors must be smaller on CUDA; use impl='reference'");
  }
  return static_cast<int>(blocks);
}

}  // namespace trimtab
