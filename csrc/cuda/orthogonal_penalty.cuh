// The penalty: G = P C^T, its norm, and S^T P, where S is the sign of G or G itself.
//
// A module's width is cut into slices. Where the blocks of all slices form a cluster, they add up G
// through distributed shared memory and use the rows of P that they hold a second time: memory is
// read once. Else one kernel makes the parts of G and another adds them up and reads P again.
#pragma once

#include "cuda/orthogonal_products.cuh"

namespace trimtab {
namespace {

struct PenaltyWork {
  Table table;
  int shared_bytes;      // of a block; a tile has as many rows as there is room for
  int most_rows, chunk;  // the most rows and columns of a tile
  bool squared;
  int terms;            // see set_factor
  const float* weight;  // of each module, or null for ones
  float* products;      // parts of G
  float* factors;       // S, where the gradient of P is wanted; else null
  float* partial;       // gradients of parts of rows
  double* values;       // one of each block
};

// Byte offsets in shared memory, where a Frame comes first.
template <class Arithmetic>
struct Layout {
  int pitch, previous_places, current_places, previous, current, sums, factors, bytes;

  TRIMTAB_HD Layout(int frame, int most_rows, int width, int ranks) {
    using Element = typename Arithmetic::Element;
    pitch = width + Arithmetic::kPad;
    previous_places = frame;
    current_places = previous_places + most_rows * static_cast<int>(sizeof(Place));
    previous = current_places + ranks * static_cast<int>(sizeof(Place));
    current = previous + most_rows * pitch * static_cast<int>(sizeof(Element));
    sums = current + ranks * pitch * static_cast<int>(sizeof(Element));
    factors = sums + 4 * Arithmetic::kParts * most_rows * ranks;
    bytes = factors + Arithmetic::factor_bytes(most_rows, ranks);
  }
};

// What a block works on: one slice of the columns, some ranks and some rows of a module. In shared
// memory, because the sums need the registers.
template <class Arithmetic>
struct alignas(16) Frame {
  Module module;
  Layout<Arithmetic> layout;
  int number;  // of the module
  int slice, part;
  int first_rank, ranks;
  int begin, end, step;  // rows of P, and how many of them are a tile
  int most_rows;         // of a tile, by the room there is
  int first_column, valid;
  Tile tile;
  double norm[kWarps];  // of what each warp has made so far

  // Rows of the tile that begins at one.
  TRIMTAB_DEVICE int count(int row) const { return min(step, end - row); }

  TRIMTAB_HD static Layout<Arithmetic> layout_of(int most_rows, int width, int ranks) {
    return {static_cast<int>(sizeof(Frame)), most_rows, width, ranks};
  }

  TRIMTAB_DEVICE void set(const PenaltyWork& work) {
    const int width = min(module.slice, work.chunk);
    const int fixed = layout_of(0, width, module.cut).bytes;
    const int side = layout_of(kSide, width, module.cut).bytes - fixed;
    most_rows = min(work.most_rows, (work.shared_bytes - fixed) / side * kSide);
    layout = layout_of(most_rows, width, module.cut);
    int place = static_cast<int>(blockIdx.x) - module.first_block;
    slice = place % module.slices;
    place /= module.slices;
    first_rank = place % module.cuts() * module.cut;
    ranks = min(module.cut, module.ranks - first_rank);
    part = place / module.cuts();
    begin = part * module.part;
    end = min(module.rows, begin + module.part);
    const int tiles = ceil_div(end - begin, most_rows);
    step = tiles > 0 ? round_up(ceil_div(end - begin, tiles), kSide) : kSide;
    first_column = slice * module.slice;
    valid = max(0, min(module.slice, module.columns - first_column));
    for (int warp = 0; warp < kWarps; ++warp) norm[warp] = 0;
  }
};

template <class Arithmetic>
struct Block {
  using Element = typename Arithmetic::Element;
  const PenaltyWork& work;

  TRIMTAB_DEVICE explicit Block(const PenaltyWork& work) : work(work) {
    Frame<Arithmetic>& frame = *shared_memory<Frame<Arithmetic>>();
    find_module(work.table, &Module::first_block, static_cast<int>(blockIdx.x), frame.module,
                frame.number);
    if (threadIdx.x == 0) frame.set(work);
    __syncthreads();
  }

  TRIMTAB_DEVICE static const Frame<Arithmetic>& frame() {
    return *shared_memory<Frame<Arithmetic>>();
  }
  TRIMTAB_DEVICE static const Module& module() { return frame().module; }
  template <class T>
  TRIMTAB_DEVICE static T* at(int offset) {
    return reinterpret_cast<T*>(shared_memory<unsigned char>() + offset);
  }
  TRIMTAB_DEVICE static Element* previous() { return at<Element>(frame().layout.previous); }
  TRIMTAB_DEVICE static Element* current() { return at<Element>(frame().layout.current); }
  TRIMTAB_DEVICE static float* sums() { return at<float>(frame().layout.sums); }
  TRIMTAB_DEVICE static unsigned char* factors() {
    return at<unsigned char>(frame().layout.factors);
  }
  TRIMTAB_DEVICE float weight() const { return work.weight ? work.weight[frame().number] : 1.0f; }

  // At most `chunk` columns of the slice.
  TRIMTAB_DEVICE Columns columns_from(int column) const {
    const int count = min(frame().valid - column, work.chunk);
    return {int64_t{frame().first_column} + column, count, round_up(count, kSide)};
  }

  TRIMTAB_DEVICE Tile tile_of(int count, const Columns& columns) const {
    return {round_up(count, kSide), columns.width, frame().layout.pitch,
            round_up(frame().ranks, kGroup), frame().most_rows};
  }

  // All threads must be done with the tile before.
  TRIMTAB_DEVICE void load_current(const Columns& columns) const {
    auto* places = at<Place>(frame().layout.current_places);
    const Kind kind = work.table.current;
    const int rows = round_up(frame().ranks, kGroup);
    const bool apart = set_places(places, rows, kind, [&](int j) {
      return j < frame().ranks ? current_row(module(), frame().first_rank + j) : Place{nullptr, 0};
    });
    load_rows(places, rows, apart, kind, columns, current(), frame().layout.pitch);
  }

  // Also waits for all copies. The tile goes through shared memory: what is worked out from it
  // would else be worked out once for all tiles, and kept in registers.
  TRIMTAB_DEVICE Tile load_previous(int row, const Columns& columns) const {
    const int count = frame().count(row);
    auto* places = at<Place>(frame().layout.previous_places);
    const Kind kind = work.table.previous;
    const bool apart = set_places(places, round_up(count, kSide), kind, [&](int i) {
      return i < count ? previous_row(work.table, module(), row + i) : Place{nullptr, 0};
    });
    const Tile tile = tile_of(count, columns);
    if (threadIdx.x == 0) shared_memory<Frame<Arithmetic>>()->tile = tile;
    load_rows(places, tile.rows, apart, kind, columns, previous(), tile.pitch);
    copy_async_wait<0>();
    __syncthreads();
    return frame().tile;
  }

  TRIMTAB_DEVICE static int64_t pair(int row, int i, int j) {
    return int64_t{row + i} * module().ranks + frame().first_rank + j;
  }

  // Makes S of elements [first, last) of the tile of G, which `product(i, j)` gives, hands it to
  // `set(i, j, s)`, and adds to the norm. As torch has it, the sign of NaN is 0.
  template <class Product, class Set>
  TRIMTAB_DEVICE void make_factors(int row, int first, int last, bool counts, Product&& product,
                                   Set&& set) const {
    const int ranks = frame().ranks;
    double norm = 0;
    for (int e = first + static_cast<int>(threadIdx.x); e < last; e += static_cast<int>(kThreads)) {
      const int i = e / ranks, j = e % ranks;
      const float g = product(i, j);
      norm += work.squared ? double{g} * g : double{g < 0 ? -g : g};
      const float s = work.squared ? g : g > 0 ? 1.0f : g < 0 ? -1.0f : 0.0f;
      set(i, j, s);
      if (counts && work.factors) work.factors[module().factors + pair(row, i, j)] = s;
    }
    norm = warp_sum(norm);
    if (counts && lane_index() == 0) shared_memory<Frame<Arithmetic>>()->norm[warp_index()] += norm;
  }

  // The rows that fill the tile up count for nothing.
  TRIMTAB_DEVICE void clear_factors(const Tile& tile, int row) const {
    const int count = frame().count(row);
    const int empty = (tile.rows - count) * tile.ranks;
    for (int e = static_cast<int>(threadIdx.x); e < empty; e += static_cast<int>(kThreads))
      Arithmetic::set_factor(tile, factors(), count + e / tile.ranks, e % tile.ranks, 0.0f,
                             work.terms);
  }

  TRIMTAB_DEVICE void store(const Tile& tile, const typename Arithmetic::Sums& sums) const {
    if (!module().grad_current) return;
    const bool whole = module().parts() == 1;
    const float factor = !whole ? 1.0f : work.squared ? 2.0f * weight() : weight();
    float* out = whole ? module().grad_current
                       : work.partial + module().partial + frame().part * module().size();
    const int64_t columns = module().columns;
    out += frame().first_rank * columns + frame().first_column;
    const int ranks = frame().ranks, valid = frame().valid;
    Arithmetic::for_each(tile, sums, [&](int rank, int column, float sum) {
      if (rank < ranks && column < valid) out[rank * columns + column] = factor * sum;
    });
  }

  TRIMTAB_DEVICE void store_value() const {
    __syncthreads();
    if (threadIdx.x != 0) return;
    double norm = 0;
    for (int warp = 0; warp < kWarps; ++warp) norm += frame().norm[warp];
    work.values[blockIdx.x] = weight() * norm;
  }
};

// A cluster for all slices of some rows and ranks.
template <class Arithmetic>
__global__ void __launch_bounds__(kThreads, Arithmetic::kBlocks)
    fused_kernel(const PenaltyWork work) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  Block<Arithmetic> block(work);
  const auto& frame = block.frame();
  if (frame.begin < frame.end) block.load_current(block.columns_from(0));
  typename Arithmetic::Sums sums;
  for (int row = frame.begin; row < frame.end; row += frame.step) {
    const Tile tile = block.load_previous(row, block.columns_from(0));
    Arithmetic::multiply(tile, block.previous(), block.current(), false, block.sums());
    cluster_sync();
    const int blocks = static_cast<int>(cluster_size());
    const auto product = [&](int i, int j) {
      float g = 0;
      for (int rank = 0; rank < blocks; ++rank)
        g += Arithmetic::sum_at(tile, at_rank(block.sums(), rank), i, j);
      return g;
    };
    const auto set = [&](int i, int j, float s) {
#pragma unroll 1
      for (int rank = 0; rank < blocks; ++rank)
        Arithmetic::set_factor(tile, at_rank(block.factors(), rank), i, j, s, work.terms);
    };
    const int pairs = frame.count(row) * frame.ranks, share = ceil_div(pairs, blocks);
    const int first = static_cast<int>(cluster_rank()) * share;
    block.make_factors(row, first, min(pairs, first + share), true, product, set);
    block.clear_factors(tile, row);
    cluster_sync();
    if (block.module().grad_current)
      Arithmetic::combine(tile, block.previous(), block.factors(), work.terms, sums);
  }
  block.store(block.tile_of(0, block.columns_from(0)), sums);
  block.store_value();
}

// The parts of G, of one slice each.
template <class Arithmetic>
__global__ void __launch_bounds__(kThreads, Arithmetic::kBlocks)
    overlap_kernel(const PenaltyWork work) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  Block<Arithmetic> block(work);
  const auto& frame = block.frame();
  const Module& module = block.module();
  const bool once = frame.valid <= work.chunk;
  for (int row = frame.begin; row < frame.end; row += frame.step) {
    Tile tile;
    for (int column = 0; column == 0 || column < frame.valid; column += work.chunk) {
      const Columns columns = block.columns_from(column);
      if (!once || row == frame.begin) block.load_current(columns);
      tile = block.load_previous(row, columns);
      Arithmetic::multiply(tile, block.previous(), block.current(), column > 0, block.sums());
    }
    __syncthreads();
    float* out = work.products + module.products + frame.slice * module.pairs();
    for (int e = static_cast<int>(threadIdx.x); e < frame.count(row) * frame.ranks;
         e += static_cast<int>(kThreads)) {
      const int i = e / frame.ranks, j = e % frame.ranks;
      out[block.pair(row, i, j)] = Arithmetic::sum_at(tile, block.sums(), i, j);
    }
  }
}

// S^T P from the parts of G.
template <class Arithmetic>
__global__ void __launch_bounds__(kThreads, Arithmetic::kBlocks)
    combine_kernel(const PenaltyWork work) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  Block<Arithmetic> block(work);
  const auto& frame = block.frame();
  const Module& module = block.module();
  const Columns columns = block.columns_from(0);
  typename Arithmetic::Sums sums;
  for (int row = frame.begin; row < frame.end; row += frame.step) {
    const Tile tile = block.load_previous(row, columns);
    const auto product = [&](int i, int j) {
      float g = 0;
      const float* part = work.products + module.products + block.pair(row, i, j);
      for (int slice = 0; slice < module.slices; ++slice) g += part[slice * module.pairs()];
      return g;
    };
    const auto set = [&](int i, int j, float s) {
      Arithmetic::set_factor(tile, block.factors(), i, j, s, work.terms);
    };
    block.make_factors(row, 0, frame.count(row) * frame.ranks, frame.slice == 0, product, set);
    block.clear_factors(tile, row);
    __syncthreads();
    if (module.grad_current)
      Arithmetic::combine(tile, block.previous(), block.factors(), work.terms, sums);
  }
  block.store(block.tile_of(0, columns), sums);
  block.store_value();
}

// Elements of a gradient that a block of finish_kernel adds up.
constexpr int kPiece = 1024;

// The value, by the first block, and the gradients of modules whose rows were cut into parts.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const PenaltyWork work, int values, float* value) {
  wait_for_previous_kernel();
  if (work.factors) let_next_kernel_start();
  if (blockIdx.x == 0) {
    double sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < values; i += static_cast<int>(kThreads))
      sum += work.values[i];
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x == 0) *value = static_cast<float>(sum);
    return;
  }
  const int block = static_cast<int>(blockIdx.x) - 1;
  auto& found = *shared_memory<FoundModule>();
  find_module(work.table, &Module::first_piece, block, found.module, found.number);
  const Module& module = found.module;
  const float weight = work.weight ? work.weight[found.number] : 1.0f;
  const float slope = work.squared ? 2.0f * weight : weight;
  const int64_t first = int64_t{block - module.first_piece} * kPiece;
  for (int64_t e = first + threadIdx.x; e < min(first + kPiece, module.size()); e += kThreads) {
    const float* part = work.partial + module.partial + e;
    float sum = 0;
    for (int i = 0; i < module.parts(); ++i) sum += part[i * module.size()];
    module.grad_current[e] = slope * sum;
  }
}

}  // namespace
}  // namespace trimtab
