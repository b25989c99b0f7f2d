// Orthogonality on the CPU: checks, the cut into slices, threads, registration.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "cpu/orthogonal_rows.h"
#include "torch_api.h"

namespace trimtab {
namespace {

using Tensors = std::vector<Tensor>;

const OrthogonalTable& orthogonal_for_this_processor() {
#if defined(__x86_64__)
  return table_for_this_processor(generic_orthogonal, avx2_orthogonal, avx512_orthogonal,
                                  &avx512bf16_orthogonal);
#else
  refuse_unless_allowed(generic_orthogonal.name);
  return generic_orthogonal;
#endif
}

template <class Element>
const OrthogonalFunctions<Element>& functions() {
  static const OrthogonalTable& table = orthogonal_for_this_processor();
  return functions_of<Element>(table);
}

// Below this many products a second thread costs more than it does.
constexpr int64_t kProductsPerThread = 131072;
// Rows that one thread takes of a module: those of two megabytes of float32, or 16 tasks of rank 8.
constexpr int64_t kSliceNumbers = 524288, kSliceRows = 128;

// Both depend on one module's shapes alone, so that its bits do.
int64_t rows_in_slice(int64_t width) {
  return std::max(kSliceRows, kSliceNumbers / std::max<int64_t>(width, 1));
}

template <class Element>
constexpr ScalarType dtype_of =
    std::is_same_v<Element, double> ? ScalarType::Double : ScalarType::Float;

// The rows of matrices of one dtype and width, one after the other.
class RowList {
 public:
  void add(const char* argument, const Tensor& matrix, ScalarType dtype, int64_t width) {
    STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(1) == width, argument,
                    " must be matrices with rows of ", width);
    STD_TORCH_CHECK(matrix.scalar_type() == dtype, argument, " must be of one dtype, got ",
                    torch::headeronly::toString(matrix.scalar_type()), " beside ",
                    torch::headeronly::toString(dtype));
    const char* row = static_cast<const char*>(matrix.data_ptr());
    STD_TORCH_CHECK(row || matrix.numel() == 0, argument, " must have memory, got freed storage");
    const int64_t count = matrix.size(0), stride = matrix.stride(1);
    const int64_t step = matrix.stride(0) * static_cast<int64_t>(matrix.element_size());
    for (int64_t i = 0; i < count; ++i, row += step) rows_.push_back({row, stride});
  }
  int64_t size() const { return static_cast<int64_t>(rows_.size()); }
  const RowRef* at(int64_t i) const { return rows_.data() + i; }

 private:
  std::vector<RowRef> rows_;
};

// Slices in the order of the modules, and what each costs.
template <class Slice>
struct Work {
  std::vector<Slice> slices;
  std::vector<int64_t> begin{0};  // products before each slice

  void add(const Slice& slice, int64_t products) {
    slices.push_back(slice);
    begin.push_back(begin.back() + std::max<int64_t>(products, 1));
  }
  // Calls f(slice) for all; a thread takes those that begin in its share of the products.
  template <class F>
  void run(F&& f) {
    torch::stable::parallel_for(0, begin.back(), kProductsPerThread, [&](int64_t from, int64_t to) {
      const auto starts = begin.begin();
      auto i = std::lower_bound(starts, begin.end() - 1, from) - starts;
      for (; i < static_cast<int64_t>(slices.size()) && begin[i] < to; ++i) f(slices[i]);
    });
  }
};

template <class Real>
Real* flat_output(const char* argument, const OptionalTensor& out, const Tensors& like) {
  if (!out.has_value()) return nullptr;
  int64_t count = 0;
  for (const Tensor& tensor : like) count += tensor.numel();
  check_vector(argument, *out, count, dtype_of<Real>);
  return static_cast<Real*>(out->data_ptr());
}

// The parts of a module's gradient that its slices made, beyond the first.
template <class Real>
struct Sum {
  size_t first_slice;
  Real* total;
  const Real* parts;
  int64_t count, size;
};

// The penalty's slices with their memory.
template <class Real>
struct Penalty {
  Work<OverlapSlice<Real>> work;
  std::vector<Sum<Real>> sums;
  std::vector<Real> parts;

  // Appends the slices of a module. `parts` has to be given its memory afterwards.
  void add_module(OverlapSlice<Real> module) {
    const int64_t rows = module.previous_count, step = rows_in_slice(module.width);
    const int64_t block = module.current_count * module.width;
    if (module.grad_current && rows > step)
      sums.push_back({work.slices.size(), module.grad_current, nullptr, (rows - 1) / step, block});
    for (int64_t first = 0; first < std::max<int64_t>(rows, 1); first += step) {
      OverlapSlice<Real> slice = module;
      slice.previous += first;
      slice.previous_count = std::min(step, rows - first);
      if (module.grad_previous) slice.grad_previous += first * module.width;
      if (first > 0) slice.grad_current = nullptr;
      work.add(slice, slice.previous_count * block);
    }
  }

  // Gives every slice but a module's first a part of its own.
  void place_parts() {
    int64_t total = 0;
    for (const Sum<Real>& sum : sums) total += sum.count * sum.size;
    parts.resize(static_cast<size_t>(total));
    Real* next = parts.data();
    for (Sum<Real>& sum : sums) {
      sum.parts = next;
      for (int64_t i = 1; i <= sum.count; ++i, next += sum.size)
        work.slices[sum.first_slice + i].grad_current = next;
    }
  }

  double run(void (*overlap)(OverlapSlice<Real>&)) {
    place_parts();
    work.run(overlap);
    Work<Sum<Real>> totals;
    for (const Sum<Real>& sum : sums) totals.add(sum, sum.count * sum.size);
    totals.run([](const Sum<Real>& sum) {
      for (int64_t part = 0; part < sum.count; ++part)
        for (int64_t i = 0; i < sum.size; ++i) sum.total[i] += sum.parts[part * sum.size + i];
    });
    double value = 0, rounded_away = 0;
    for (const auto& slice : work.slices) {
      const double next = value + slice.value;
      rounded_away += std::abs(value) > std::abs(slice.value) ? (value - next) + slice.value
                                                              : (slice.value - next) + value;
      value = next;
    }
    // Of an infinite sum nothing was rounded away.
    return std::isfinite(rounded_away) ? value + rounded_away : value;
  }
};

template <class Real>
const Real* weights_of(const OptionalTensor& weight, int64_t modules) {
  if (!weight.has_value()) return nullptr;
  check_vector("weight", *weight, modules, dtype_of<Real>);
  return static_cast<const Real*>(weight->data_ptr());
}

int64_t width_of(const Tensor& matrix) {
  STD_TORCH_CHECK(matrix.dim() == 2, "current must be matrices");
  return matrix.size(1);
}

void orthogonal_penalty_rows(Tensors previous, std::vector<int64_t> counts, Tensors current,
                             const OptionalTensor& weight, bool squared, const Tensor& value,
                             const OptionalTensor& grad_current,
                             const OptionalTensor& grad_previous) {
  const int64_t modules = static_cast<int64_t>(current.size());
  STD_TORCH_CHECK(modules > 0, "current must have a module or more");
  STD_TORCH_CHECK(static_cast<int64_t>(counts.size()) == modules,
                  "counts must have a number for each of ", modules, " modules");
  int64_t total = 0;
  for (int64_t count : counts) {
    STD_TORCH_CHECK(count >= 0 && count <= static_cast<int64_t>(previous.size()) - total,
                    "counts must be of the tensors of previous, got ", count);
    total += count;
  }
  STD_TORCH_CHECK(total == static_cast<int64_t>(previous.size()),
                  "counts must add up to the tensors of previous, got ", total);
  const Tensor& first_previous = previous.empty() ? current[0] : previous[0];
  dispatch_floating("current", current[0], [&](auto current_tag) {
    using Current = typename decltype(current_tag)::type;
    using Real = typename Accumulate<Current>::type;
    dispatch_floating("previous", first_previous, [&](auto previous_tag) {
      using Previous = typename decltype(previous_tag)::type;
      if constexpr (!std::is_same_v<typename Accumulate<Previous>::type, Real>) {
        STD_TORCH_CHECK(false, "previous must be float64 where current is, and only there");
      } else {
        STD_TORCH_CHECK(value.numel() == 1 && value.scalar_type() == dtype_of<Real>,
                        "value must be one number of the result's dtype");
        const Real* const factors = weights_of<Real>(weight, modules);
        Real* to_current = flat_output<Real>("grad_current", grad_current, current);
        Real* to_previous = flat_output<Real>("grad_previous", grad_previous, previous);
        RowList earlier, later;
        std::vector<OverlapSlice<Real>> slices;
        size_t tensor = 0;
        for (int64_t m = 0; m < modules; ++m) {
          const int64_t width = width_of(current[m]), before = earlier.size();
          for (int64_t i = 0; i < counts[m]; ++i)
            earlier.add("previous", previous[tensor++], first_previous.scalar_type(), width);
          later.add("current", current[m], current[0].scalar_type(), width);
          const int64_t rows = earlier.size() - before, ranks = current[m].size(0);
          slices.push_back({nullptr, rows, functions<Previous>().read, nullptr, ranks,
                            functions<Current>().read, width, factors ? factors[m] : Real{1},
                            squared, 0.0, to_current, to_previous});
          if (to_current) to_current += ranks * width;
          if (to_previous) to_previous += rows * width;
        }
        // The lists have stopped growing: their rows stay where they are.
        Penalty<Real> penalty;
        int64_t row = 0, rank = 0;
        for (OverlapSlice<Real>& module : slices) {
          module.previous = earlier.at(row);
          module.current = later.at(rank);
          row += module.previous_count;
          rank += module.current_count;
          penalty.add_module(module);
        }
        using Common = std::conditional_t<std::is_same_v<Previous, Current>, Current, Real>;
        const double sum = penalty.run(functions<Common>().overlap);
        *static_cast<Real*>(value.data_ptr()) = static_cast<Real>(sum);
      }
    });
  });
}

void project_out_rows(Tensors tensors, Tensors bases, Tensors outs) {
  STD_TORCH_CHECK(tensors.size() == bases.size() && tensors.size() == outs.size(),
                  "tensors, bases and outs must be of one length");
  for (size_t m = 0; m < tensors.size(); ++m) {
    const Tensor &tensor = tensors[m], &out = outs[m];
    STD_TORCH_CHECK(tensor.dim() == 2, "tensors must be matrices");
    STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == tensor.size(0) &&
                        out.size(1) == tensor.size(1) && out.is_contiguous() &&
                        out.scalar_type() == tensor.scalar_type(),
                    "outs must be contiguous and of the shapes and dtypes of tensors");
  }
  if (tensors.empty()) return;
  dispatch_floating("tensors", tensors[0], [&](auto tag) {
    using Element = typename decltype(tag)::type;
    RowList rows, spans;
    for (size_t m = 0; m < tensors.size(); ++m) {
      const int64_t width = tensors[m].size(1);
      rows.add("tensors", tensors[m], tensors[0].scalar_type(), width);
      spans.add("bases", bases[m], tensors[0].scalar_type(), width);
    }
    Work<ProjectionSlice> work;
    int64_t row = 0, rank = 0;
    for (size_t m = 0; m < tensors.size(); ++m) {
      const int64_t count = tensors[m].size(0), width = tensors[m].size(1);
      const int64_t ranks = bases[m].size(0), step = rows_in_slice(width);
      Element* const out = static_cast<Element*>(outs[m].data_ptr());
      for (int64_t first = 0; first < count; first += step) {
        const int64_t some = std::min(step, count - first);
        work.add({rows.at(row + first), some, spans.at(rank), ranks, width, out + first * width},
                 some * (ranks + 1) * width);
      }
      row += count;
      rank += ranks;
    }
    work.run(functions<Element>().project);
  });
}

}  // namespace
}  // namespace trimtab

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, library) {
  library.impl("orthogonal_penalty_rows", TORCH_BOX(&trimtab::orthogonal_penalty_rows));
  library.impl("project_out_rows", TORCH_BOX(&trimtab::project_out_rows));
}
