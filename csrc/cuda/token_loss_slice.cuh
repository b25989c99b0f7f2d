// One row of token loss in the shared memory of a cluster, and the sweeps over it.
#pragma once

#include "cuda/numbers.cuh"

namespace trimtab {
namespace {

// How a launch cuts its rows. It depends on the device and the length of a row, never on their
// number: a row's bits are the same in every batch.
struct Cut {
  int64_t first_row;
  int slice;  // vectors of 16 bytes to a block
  int held;   // how many of them have a place in shared memory
  int log2_cluster;
};

// 16 bytes of a row.
using Words = Vector<uint32_t, 4>;

template <class Element>
TRIMTAB_DEVICE Words load_words(const Element* from) {
  return load<4>(reinterpret_cast<const uint32_t*>(from));
}

template <class Element>
TRIMTAB_DEVICE auto to_numbers(const Words& words) {
  return to_numbers(bit_cast<Vector<Element, 16 / sizeof(Element)>>(words));
}

// Which elements of a vector are in the row, and which is the target. NoEdge: all, and none.
struct Edge {
  static constexpr bool exists = true;
  int left, target;
  TRIMTAB_DEVICE bool inside(int e) const { return e < left; }
  TRIMTAB_DEVICE bool is_target(int e) const { return e == target; }
};
struct NoEdge {
  static constexpr bool exists = false;
  TRIMTAB_DEVICE bool inside(int) const { return true; }
  TRIMTAB_DEVICE bool is_target(int) const { return false; }
};

// The vectors of one row that a block takes, dealt out to its threads. Places are counted in
// classes; all but the row's end are multiples of `width`.
template <class Element>
class Slice {
 public:
  static constexpr int width = 16 / static_cast<int>(sizeof(Element));

  // `shared` has room for cut.held vectors.
  TRIMTAB_DEVICE Slice(const Element* row, int classes, const Cut& cut, Element* shared)
      : row_(row), classes_(classes) {
    begin_ = static_cast<int>(cluster_rank()) * cut.slice * width;
    end_ = min(begin_ + cut.slice * width, classes);
    held_end_ = min(begin_ + cut.held * width, end_);
    shared_ = shared - begin_;
  }

  // Between the two, the row is on its way.
  TRIMTAB_DEVICE void start_reading() const {
    if (is_aligned(row_)) {
      int v = first();
      for (; v + width <= held_end_; v += step()) copy_async<16>(shared_ + v, row_ + v);
      if (v < held_end_)
        copy_async<16>(shared_ + v, row_ + v, (held_end_ - v) * static_cast<int>(sizeof(Element)));
      copy_async_commit();
    } else {
      copy_elements(row_, shared_);
    }
  }
  TRIMTAB_DEVICE void finish_reading() const {
    // A thread sweeps the vectors that it has copied.
    if (is_aligned(row_))
      copy_async_wait<0>();
    else
      __syncthreads();
  }

  // Calls f(words, class of the first element, edge) for each vector of this thread.
  template <class F>
  TRIMTAB_DEVICE void sweep(int target, F&& f) const {
    const int of_target = target / width * width, cut_off = classes_ / width * width;
    int v = first();
    for (; v < held_end_; v += step()) {
      const Words words = load_words(shared_ + v);
      if (v != of_target && v != cut_off)
        f(words, v, NoEdge{});
      else
        f(words, v, Edge{classes_ - v, target - v});
    }
    for (; v < end_; v += step()) f(read_again(v), v, Edge{classes_ - v, target - v});
  }

  // In a sweep, after all reads of this vector. `grad` may be the row itself.
  template <class E>
  TRIMTAB_DEVICE void write(Element* grad, int v, const Vector<Element, width>& vector,
                            const E& edge) const {
    if (is_aligned(grad) && edge.inside(width - 1))
      store_stream(grad + v, vector);
    else if (!is_aligned(grad) && v < held_end_)
      store(shared_ + v, vector);
    else
      for (int e = 0; e < width; ++e)
        if (edge.inside(e)) grad[v + e] = vector.at[e];
  }
  // After the sweep.
  TRIMTAB_DEVICE void finish_writing(Element* grad) const {
    if (is_aligned(grad)) return;
    __syncthreads();
    copy_elements(shared_, grad);
  }

  TRIMTAB_DEVICE void fill(Element* grad, float value) const {
    const Element element = from_real<Element>(value);
    Vector<Element, width> vector;
    for (int e = 0; e < width; ++e) vector.at[e] = element;
    int v = begin_;
    if (is_aligned(grad)) {
      for (int w = first(); w + width <= end_; w += step()) store_stream(grad + w, vector);
      v = max(end_ / width * width, begin_);
    }
    for (v += threadIdx.x; v < end_; v += blockDim.x) grad[v] = element;
  }

 private:
  TRIMTAB_DEVICE int first() const { return begin_ + static_cast<int>(threadIdx.x) * width; }
  TRIMTAB_DEVICE static int step() { return static_cast<int>(blockDim.x) * width; }

  // Of rows that do not start on 16 bytes: neighbouring threads access neighbouring elements, and
  // many are on their way at a time.
  TRIMTAB_DEVICE void copy_elements(const Element* from, Element* to) const {
    constexpr int batch = 16;
    const int apart = blockDim.x;
    for (int v = begin_ + threadIdx.x; v < held_end_; v += batch * apart) {
      Element elements[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i)
        if (v + i * apart < held_end_) elements[i] = from[v + i * apart];
#pragma unroll
      for (int i = 0; i < batch; ++i)
        if (v + i * apart < held_end_) to[v + i * apart] = elements[i];
    }
  }

  TRIMTAB_DEVICE Words read_again(int v) const {
    if (is_aligned(row_) && v + width <= classes_) return load_words(row_ + v);
    Vector<Element, width> vector{};
#pragma unroll
    for (int e = 0; e < width; ++e)
      if (v + e < classes_) vector.at[e] = row_[v + e];
    return bit_cast<Words>(vector);
  }

  const Element* row_;
  Element* shared_;
  int classes_, begin_, end_, held_end_;
};

}  // namespace
}  // namespace trimtab
