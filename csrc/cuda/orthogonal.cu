// Orthogonality on a GPU: checks, how modules are cut, launches, registration.

#include <utility>
#include <vector>

#include "cuda/orthogonal_penalty.cuh"
#include "cuda/orthogonal_spread.cuh"
#include "cuda/orthogonal_table.h"

namespace trimtab {
namespace {

constexpr int kCluster = 8;
constexpr int kMostRows = 128;  // of a tile
// Columns of a slice where eight would be too wide.
constexpr int kWideSlice = 512;
// A projection's products are made of tiles of so many rows, ranks and columns.
constexpr int kProjectRows = 64, kProjectRanks = 64, kProjectColumns = 128;

Kind kind_of(const char* argument, const Tensor& tensor) {
  Kind kind{};
  dispatch_to_cuda(argument, tensor, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    kind = std::is_same_v<Element, BFloat16>  ? Kind::bfloat16
           : std::is_same_v<Element, Float16> ? Kind::float16
                                              : Kind::float32;
  });
  return kind;
}

// Calls f(Tag<arithmetic>) for the products of P and C.
template <class F>
void dispatch_products(Kind previous, Kind current, bool exact_factors, F&& f) {
  if (previous == current && previous == Kind::bfloat16) return f(Tag<TensorCore<BFloat16>>{});
  // Three numbers of float16 hold no float32: its range is too small.
  if (previous == current && previous == Kind::float16 && exact_factors)
    return f(Tag<TensorCore<Float16>>{});
  f(Tag<Plain>{});
}

// How a module is cut depends on its own shape, so that its bits do. Eight slices where a block can
// hold that many columns, else more.
template <class Arithmetic>
void cut_module(Module& module, const Device& device) {
  const auto fits = [&](int groups) {
    return module.slice / kSide * groups <= kMostUnits &&
           Frame<Arithmetic>::layout_of(kSide, module.slice, groups * kGroup).bytes <=
               device.shared_per_block;
  };
  module.slices = kCluster;
  module.slice = std::max(kSide, round_up(ceil_div(module.columns, kCluster), kSide));
  if (!fits(1)) {
    module.slice = kWideSlice;
    module.slices = ceil_div(module.columns, kWideSlice);
  }
  int groups = std::clamp(ceil_div(module.ranks, kGroup), 1, kMostGroups);
  while (groups > 1 && !fits(groups)) --groups;
  module.cut = groups * kGroup;
  // Sums stay short, which rounds less, and a module alone keeps more of the GPU busy.
  const int most = std::clamp(kSide * std::min(module.ranks, 512), 128, 512);
  const int parts = std::max(1, ceil_div(module.rows, most));
  module.part = std::max(kSide, round_up(ceil_div(module.rows, parts), kSide));
}

// What blocks of all modules can be launched with.
template <class Arithmetic>
class Needs {
 public:
  bool few_units = true;

  void include(const Module& module) {
    const int rows = std::min(module.part, round_up(module.rows, kSide));
    longest_ = std::clamp(rows, longest_, kMostRows);
    const int units = module.slice / kSide * (module.cut / kGroup);
    few_units = few_units && units <= kFewUnits;
    // Most modules are like the one before.
    const std::pair<int, int> shape{module.slice, module.cut};
    if (shapes_.empty() || shapes_.back() != shape) shapes_.push_back(shape);
  }

  // What leaves room for so many blocks on a multiprocessor or, where that isn't enough, for one.
  int shared_bytes(const Device& device, int blocks) const {
    const int64_t share = device.shared_per_multiprocessor / blocks - 1024;
    int64_t room = std::min(share, device.shared_per_block);
    if (for_rows(kSide) > room) room = device.shared_per_block;
    return static_cast<int>(std::min(room, for_rows(longest_)));
  }

 private:
  int64_t for_rows(int rows) const {
    int64_t most = 0;
    for (const auto& [slice, cut] : shapes_)
      most = std::max<int64_t>(most, Frame<Arithmetic>::layout_of(rows, slice, cut).bytes);
    return most;
  }

  int longest_ = kSide;
  std::vector<std::pair<int, int>> shapes_;
};

// A call of the penalty.
struct Penalty {
  HostTable table;
  PenaltyOutputs<float> outputs;
  bool squared;
};

Penalty read_penalty(const PenaltyArguments& arguments) {
  check_counts(arguments);
  const Tensors &previous = arguments.previous, &current = arguments.current;
  const Tensor& like = current[0];
  Penalty penalty{{}, {}, arguments.squared};
  HostTable& table = penalty.table;
  table.previous = kind_of("previous", previous.empty() ? like : previous[0]);
  table.current = kind_of("current", like);
  std::vector<Span> inputs;
  int64_t elements[2] = {0, 0};
  auto next = previous.begin();
  for (size_t m = 0; m < current.size(); ++m) {
    const auto c =
        given_matrix("current", current[m], like.scalar_type(), size_of(table.current), like);
    inputs.push_back(c.span);
    table.add_module(c);
    elements[0] += c.rows * c.columns;
    for (const auto end = next + arguments.counts[m]; next != end; ++next) {
      const auto p =
          given_matrix("previous", *next, previous[0].scalar_type(), size_of(table.previous), like);
      STD_TORCH_CHECK(p.columns == c.columns, "previous must have rows of ", c.columns,
                      " as current has, got ", p.columns);
      inputs.push_back(p.span);
      table.add_task(p);
      elements[1] += p.rows * p.columns;
    }
  }
  penalty.outputs = penalty_outputs<float>(arguments, elements[0], elements[1], inputs, like);
  float* to_current = penalty.outputs.grad_current;
  float* to_previous = penalty.outputs.grad_previous;
  for (Module& module : table.modules) {
    module.grad_current = to_current;
    module.out = reinterpret_cast<char*>(to_previous);
    if (to_current) to_current += module.size();
    if (to_previous) to_previous += int64_t{module.rows} * module.columns;
  }
  return penalty;
}

// How a penalty is launched, and the numbers that kernels pass on.
struct PenaltyPlan {
  bool fused, few_units;
  int shared_bytes;
  int blocks, pieces, tiles;
  int64_t products = 0, factors = 0, partial = 0;
};

template <class Arithmetic>
PenaltyPlan plan_penalty(Penalty& penalty, const Device& device) {
  auto& modules = penalty.table.modules;
  PenaltyPlan plan{};
  Needs<Arithmetic> needs;
  plan.fused = device.major >= 9;
  for (Module& module : modules) {
    cut_module<Arithmetic>(module, device);
    plan.fused = plan.fused && module.slices == kCluster;
    needs.include(module);
  }
  plan.few_units = plan.fused && needs.few_units;
  plan.shared_bytes =
      needs.shared_bytes(device, plan.few_units ? Arithmetic::Few::kBlocks : Arithmetic::kBlocks);
  for (Module& module : modules) {
    module.products = plan.products;
    module.factors = plan.factors;
    module.partial = plan.partial;
    if (!plan.fused) plan.products += module.slices * module.pairs();
    if (penalty.outputs.grad_previous) plan.factors += module.pairs();
    if (module.grad_current && module.parts() > 1) plan.partial += module.parts() * module.size();
  }
  plan.blocks = number_blocks(modules, &Module::first_block, [](const Module& module) {
    return module.size() > 0 ? int64_t{module.parts()} * module.cuts() * module.slices : 0;
  });
  plan.pieces = number_blocks(modules, &Module::first_piece, [](const Module& module) {
    return module.grad_current && module.parts() > 1 ? ceil_div(module.size(), kPiece) : 0;
  });
  plan.tiles = number_blocks(modules, &Module::first_tile, [](const Module& module) {
    return module.out ? int64_t{ceil_div(module.rows, kSpreadRows)} *
                            ceil_div(module.columns, kSpreadColumns)
                      : 0;
  });
  return plan;
}

void launch_spread(const SpreadWork& work, int tiles, cudaStream_t stream) {
  const bool brain = work.table.current == Kind::bfloat16;
  const auto kernel = brain ? spread_kernel<TensorSpread> : spread_kernel<PlainSpread>;
  const size_t bytes = brain ? SpreadLayout<TensorSpread>::bytes : SpreadLayout<PlainSpread>::bytes;
  launch(kernel, {dim3(tiles), kThreads, bytes, 1, true}, stream, work);
}

template <class Arithmetic>
void run_penalty(Penalty& penalty, const Tensor& like) {
  const Guard guard(like);
  const auto plan = plan_penalty<Arithmetic>(penalty, device_of(like));
  const auto stream = stream_of(like);
  Workspace workspace;
  const int64_t words = workspace.reserve<uint4>(penalty.table.words());
  const int64_t values = workspace.reserve<double>(plan.blocks);
  const int64_t products = workspace.reserve<float>(plan.products);
  const int64_t factors = workspace.reserve<float>(plan.factors);
  const int64_t partial = workspace.reserve<float>(plan.partial);
  workspace.allocate(like);
  const auto& outputs = penalty.outputs;
  const PenaltyWork work{penalty.table.store(workspace.at<uint4>(words), stream),
                         plan.shared_bytes,
                         kMostRows,
                         INT_MAX,
                         penalty.squared,
                         penalty.squared ? 3 : 1,
                         outputs.weight,
                         workspace.at<float>(products),
                         outputs.grad_previous ? workspace.at<float>(factors) : nullptr,
                         workspace.at<float>(partial),
                         workspace.at<double>(values)};
  Shape shape{dim3(plan.blocks), kThreads, static_cast<size_t>(plan.shared_bytes), 1, true};
  if (plan.fused) {
    using Few = typename Arithmetic::Few;
    shape.cluster = kCluster;
    launch(plan.few_units ? fused_kernel<Few> : fused_kernel<Arithmetic>, shape, stream, work);
  } else {
    launch(overlap_kernel<Arithmetic>, shape, stream, work);
    launch(combine_kernel<Arithmetic>, shape, stream, work);
  }
  launch(finish_kernel, {dim3(1 + plan.pieces), kThreads, sizeof(FoundModule), 1, true}, stream,
         work, plan.blocks, outputs.value);
  if (outputs.grad_previous)
    launch_spread({work.table, false, work.squared, work.weight, work.factors, work.terms},
                  plan.tiles, stream);
}

void orthogonal_penalty_rows(const Tensors& previous, const std::vector<int64_t>& counts,
                             const Tensors& current, const OptionalTensor& weight, bool squared,
                             const Tensor& value, const OptionalTensor& grad_current,
                             const OptionalTensor& grad_previous) {
  Penalty penalty = read_penalty(
      {previous, counts, current, weight, squared, value, grad_current, grad_previous});
  dispatch_products(penalty.table.previous, penalty.table.current, !squared, [&](auto tag) {
    run_penalty<typename decltype(tag)::type>(penalty, current[0]);
  });
}

// P is a tensor, C its basis.
void cut_projection(Module& module) {
  module.part = kProjectRows;
  module.cut = std::min(kProjectRanks, std::max(kGroup, round_up(module.ranks, kGroup)));
  const int64_t blocks = std::max<int64_t>(1, int64_t{module.parts()} * module.cuts());
  const int64_t most = std::max(1, ceil_div(module.columns, kWideSlice));
  const int slices = static_cast<int>(std::clamp<int64_t>(64 / blocks, 1, most));
  module.slice =
      std::max(kProjectColumns, round_up(ceil_div(module.columns, slices), kProjectColumns));
  module.slices = ceil_div(module.columns, module.slice);
}

template <class Arithmetic>
void launch_overlap(const PenaltyWork& work, int blocks, cudaStream_t stream) {
  const auto layout = Frame<Arithmetic>::layout_of(kProjectRows, kProjectColumns, kProjectRanks);
  launch(overlap_kernel<Arithmetic>,
         {dim3(blocks), kThreads, static_cast<size_t>(layout.factors), 1, true}, stream, work);
}

void project_tensors(HostTable& table, const Tensor& like) {
  auto& modules = table.modules;
  int64_t products = 0;
  for (Module& module : modules) {
    cut_projection(module);
    module.products = products;
    products += module.slices * module.pairs();
  }
  const int blocks = number_blocks(modules, &Module::first_block, [](const Module& module) {
    return module.pairs() > 0 ? int64_t{module.parts()} * module.cuts() * module.slices : 0;
  });
  const int tiles = number_blocks(modules, &Module::first_tile, [](const Module& module) {
    return int64_t{ceil_div(module.rows, kSpreadRows)} * ceil_div(module.columns, kSpreadColumns);
  });
  const Guard guard(like);
  const auto stream = stream_of(like);
  Workspace workspace;
  const int64_t words = workspace.reserve<uint4>(table.words());
  const int64_t parts = workspace.reserve<float>(products);
  workspace.allocate(like);
  PenaltyWork work{};
  work.table = table.store(workspace.at<uint4>(words), stream);
  work.shared_bytes = INT_MAX;
  work.most_rows = kProjectRows;
  work.chunk = kProjectColumns;
  work.products = workspace.at<float>(parts);
  dispatch_products(table.previous, table.current, true, [&](auto tag) {
    launch_overlap<typename decltype(tag)::type>(work, blocks, stream);
  });
  launch_spread({work.table, true, false, nullptr, work.products, 2}, tiles, stream);
}

void project_out_rows(const Tensors& tensors, const Tensors& bases, const Tensors& outs) {
  for (const Tensor& tensor : tensors) kind_of("tensors", tensor);
  const auto all = given_projections(tensors, bases, outs);
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}) {
    HostTable table;
    for (size_t m = 0; m < all.size(); ++m) {
      if (all[m].dtype != dtype) continue;
      table.previous = table.current = kind_of("tensors", tensors[m]);
      table.add_module(all[m].basis);
      table.add_task(all[m].tensor);
      table.modules.back().out = static_cast<char*>(all[m].out);
    }
    if (!table.modules.empty()) project_tensors(table, tensors[0]);
  }
}

}  // namespace
}  // namespace trimtab

TRIMTAB_REGISTER_CUDA(library) {
  library.impl("orthogonal_penalty_rows", TORCH_BOX(&trimtab::orthogonal_penalty_rows));
  library.impl("project_out_rows", TORCH_BOX(&trimtab::project_out_rows));
}
