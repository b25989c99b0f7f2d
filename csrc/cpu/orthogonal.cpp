// Orthogonality on the CPU: checks, threads, registration.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/orthogonal_rows.h"
#include "orthogonal_arguments.h"

namespace trimtab {
namespace {

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

template <class Element>
constexpr ScalarType dtype_of = std::is_same_v<Element, float>      ? ScalarType::Float
                                : std::is_same_v<Element, double>   ? ScalarType::Double
                                : std::is_same_v<Element, BFloat16> ? ScalarType::BFloat16
                                                                    : ScalarType::Half;

// Below this many multiplications a second thread costs more than it does.
constexpr double kPerThread = 1 << 19;

// Has the threads take items from one counter. Which thread takes which item changes no result.
template <class F>
void share_items(int64_t items, double multiplications, F&& work) {
  const int64_t useful = 1 + static_cast<int64_t>(multiplications / kPerThread);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(items, useful), 1, [&](int64_t, int64_t) { work(next); });
}

template <class Element>
Rows<Element> rows_of(const GivenMatrix& matrix) {
  return {reinterpret_cast<const Element*>(matrix.data), matrix.rows, matrix.row_stride,
          matrix.column_stride};
}

// How `current` is read, whose dtype need not be that of `previous`.
template <class Real>
struct CurrentType {
  ScalarType dtype;
  int64_t size;
  decltype(PackableRows<Real>::pack) pack;
};

template <class Real>
CurrentType<Real> current_type(const Tensor& like) {
  CurrentType<Real> type{};
  dispatch_floating("current", like, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    if constexpr (std::is_same_v<typename Accumulate<Element>::type, Real>)
      type = {dtype_of<Element>, sizeof(Element), functions<Element>().pack};
  });
  STD_TORCH_CHECK(type.pack, "current must be float64 where previous is, and only there");
  return type;
}

template <class Element>
struct Penalty {
  std::vector<Rows<Element>> previous;
  std::vector<PenaltyModule<Element>> modules;
  std::vector<Span> inputs;
  int64_t current_elements = 0, previous_elements = 0;
  double multiplications = 0;
};

template <class Element>
Penalty<Element> read_penalty(const PenaltyArguments& arguments) {
  using Real = typename Accumulate<Element>::type;
  const Tensors& current = arguments.current;
  const auto type = current_type<Real>(current[0]);
  const Tensor& like = current[0];
  Penalty<Element> penalty;
  penalty.previous.reserve(arguments.previous.size());
  penalty.modules.reserve(current.size());
  penalty.inputs.reserve(arguments.previous.size() + current.size());
  auto next = arguments.previous.begin();
  for (size_t m = 0; m < current.size(); ++m) {
    const GivenMatrix c = given_matrix("current", current[m], type.dtype, type.size, like);
    penalty.inputs.push_back(c.span);
    int64_t rows = 0;
    const Rows<Element>* const first = penalty.previous.data() + penalty.previous.size();
    for (const auto end = next + arguments.counts[m]; next != end; ++next) {
      const GivenMatrix p =
          given_matrix("previous", *next, dtype_of<Element>, sizeof(Element), like);
      STD_TORCH_CHECK(p.columns == c.columns, "previous must have rows of ", c.columns,
                      " as current has, got ", p.columns);
      penalty.inputs.push_back(p.span);
      penalty.previous.push_back(rows_of<Element>(p));
      rows += p.rows;
    }
    penalty.modules.push_back(
        {first, rows, {rows_of<void>(c), type.pack}, c.columns, 0, nullptr, nullptr});
    penalty.current_elements += c.rows * c.columns;
    penalty.previous_elements += rows * c.columns;
    // Four for each element of `current` are about what it costs to pack them.
    penalty.multiplications += (rows + 4.0) * c.rows * c.columns;
  }
  return penalty;
}

// Gives the modules their weights and places for gradients.
template <class Element, class Real>
void set_outputs(PenaltyOutputs<Real> outputs, Penalty<Element>& penalty) {
  for (auto& module : penalty.modules) {
    module.weight = outputs.weight ? *outputs.weight++ : Real{1};
    if (outputs.grad_current) {
      module.grad_current = outputs.grad_current;
      outputs.grad_current += module.current.rows.count * module.columns;
    }
    if (outputs.grad_previous) {
      module.grad_previous = outputs.grad_previous;
      outputs.grad_previous += module.rows * module.columns;
    }
  }
}

// Modules of many rows are worked on in parts, so that one module keeps all threads busy and that
// sums stay short, which rounds less. What a part holds depends on the module alone.
int64_t rows_of_part(int64_t rows, int64_t current_rows) {
  const int64_t most = std::clamp<int64_t>(16 * current_rows, 128, 512);
  const int64_t parts = (rows + most - 1) / most;
  return parts <= 1 ? rows : (rows + parts - 1) / parts;
}

template <class Element>
void run_penalty(const Penalty<Element>& penalty, bool squared,
                 typename Accumulate<Element>::type* value) {
  using Real = typename Accumulate<Element>::type;
  std::vector<PenaltyChunk<Element>> chunks;
  std::vector<PartialGradients<Real>> partial;
  std::vector<int64_t> first_chunk;
  int64_t length = 0;
  for (const auto& module : penalty.modules) {
    const int64_t step = rows_of_part(module.rows, module.current.rows.count);
    const int64_t size = module.current.rows.count * module.columns;
    const int64_t parts = step ? (module.rows + step - 1) / step : 1;
    const Real slope = squared ? 2 * module.weight : module.weight;
    for (int64_t i = 0; i < parts; ++i)
      chunks.push_back({&module, i * step, std::min(module.rows, (i + 1) * step),
                        parts > 1 ? Real{1} : slope, i == 0 ? module.grad_current : nullptr, 0});
    if (module.grad_current && parts > 1) {
      partial.push_back({nullptr, parts - 1, size, slope, module.grad_current});
      first_chunk.push_back(chunks.size() - parts);
      length += (parts - 1) * size;
    }
  }
  // In one piece, which the allocator keeps: pages that are new every time cost more than the sums.
  const std::unique_ptr<Real[]> memory(new Real[length]);
  Real* next_part = memory.get();
  for (size_t i = 0; i < partial.size(); ++i) {
    partial[i].parts = next_part;
    for (int64_t part = 1; part <= partial[i].count; ++part, next_part += partial[i].length)
      chunks[first_chunk[i] + part].grad_current = next_part;
  }
  const PenaltyWork<Element> work{chunks.data(), static_cast<int64_t>(chunks.size()), squared};
  share_items(work.count, penalty.multiplications,
              [&](auto& next) { functions<Element>().penalty(work, next); });
  for (const auto& grad : partial)
    torch::stable::parallel_for(0, grad.length, 32768, [&](int64_t begin, int64_t end) {
      functions<Element>().add_parts(grad, begin, end);
    });
  double total = 0, rounded_away = 0;
  for (const auto& chunk : chunks) {
    const double part = static_cast<double>(chunk.module->weight) * chunk.value;
    const double next = total + part;
    rounded_away +=
        std::abs(total) > std::abs(part) ? (total - next) + part : (part - next) + total;
    total = next;
  }
  // Of an infinite sum nothing was rounded away.
  if (std::isfinite(rounded_away)) total += rounded_away;
  *value = static_cast<Real>(total);
}

void orthogonal_penalty_rows(const Tensors& previous, const std::vector<int64_t>& counts,
                             const Tensors& current, const OptionalTensor& weight, bool squared,
                             const Tensor& value, const OptionalTensor& grad_current,
                             const OptionalTensor& grad_previous) {
  const PenaltyArguments arguments{previous, counts, current,      weight,
                                   squared,  value,  grad_current, grad_previous};
  check_counts(arguments);
  const Tensor& like = previous.empty() ? current[0] : previous[0];
  dispatch_floating("previous", like, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    using Real = typename Accumulate<Element>::type;
    auto penalty = read_penalty<Element>(arguments);
    const auto outputs = penalty_outputs<Real>(
        arguments, penalty.current_elements, penalty.previous_elements, penalty.inputs, current[0]);
    set_outputs(outputs, penalty);
    run_penalty(penalty, squared, outputs.value);
  });
}

// Rows of one tensor that are worked on together, so many that the basis is read seldom and so few
// that all threads have some. No row's result depends on it.
int64_t rows_together(int64_t rows) {
  const int64_t share = rows / torch::stable::get_num_threads();
  return std::clamp<int64_t>(share / 4 * 4, 4, 16);
}

template <class Element>
void project_tensors(const std::vector<GivenProjection>& all) {
  std::vector<Projection<Element>> items;
  int64_t rows = 0;
  double multiplications = 0;
  for (const auto& given : all)
    if (given.dtype == dtype_of<Element>) rows += given.tensor.rows;
  const int64_t step = rows_together(rows);
  for (const auto& given : all) {
    if (given.dtype != dtype_of<Element>) continue;
    const auto [t, basis] =
        std::pair{rows_of<Element>(given.tensor), rows_of<Element>(given.basis)};
    const int64_t columns = given.tensor.columns;
    for (int64_t row = 0; row < t.count; row += step)
      items.push_back({{t.data + row * t.row_stride, std::min(step, t.count - row), t.row_stride,
                        t.column_stride},
                       basis,
                       columns,
                       static_cast<Element*>(given.out) + row * columns});
    multiplications += (basis.count + 4.0) * t.count * columns;
  }
  const ProjectionWork<Element> work{items.data(), static_cast<int64_t>(items.size())};
  share_items(work.count, multiplications,
              [&](auto& next) { functions<Element>().project(work, next); });
}

void project_out_rows(const Tensors& tensors, const Tensors& bases, const Tensors& outs) {
  const auto all = given_projections(tensors, bases, outs);
  project_tensors<float>(all);
  project_tensors<double>(all);
  project_tensors<BFloat16>(all);
  project_tensors<Float16>(all);
}

}  // namespace
}  // namespace trimtab

STABLE_TORCH_LIBRARY_IMPL(trimtab, CPU, library) {
  library.impl("orthogonal_penalty_rows", TORCH_BOX(&trimtab::orthogonal_penalty_rows));
  library.impl("project_out_rows", TORCH_BOX(&trimtab::project_out_rows));
}
