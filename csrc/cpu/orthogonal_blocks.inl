// The operands of the products of orthogonal_rows.inl: where they lie, and how they get there.

namespace trimtab {
namespace TRIMTAB_ISA {
namespace {

// Rows of C that are worked on together.
constexpr int64_t kGroup = 4;
// Rows of P, and vectors of columns: kTile * kGroup partial sums fill half of the registers.
constexpr int64_t kTile = TRIMTAB_WIDTH == 16 ? 4 : 2;
// Rows of the largest block.
constexpr int64_t kBlockRows = 32;
constexpr int64_t kBlockProducts = kBlockRows * kGroup;
// Vectors of columns that are summed at a time; those of a block and of two groups have room in the
// L1 cache.
constexpr int64_t kStep = 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Number>
void fill_zero(Number* numbers, int64_t count) {
  using L = Lanes<Number>;
  for (int64_t i = 0; i < count; i += L::width) L::store(numbers + i, typename L::Vector{});
}

// Rows of C, or of its gradient, as [group][vector of columns][kGroup][lane]; zeros fill it up.
template <class Number>
struct Packing {
  using L = Lanes<Number>;
  int64_t rows, columns;
  int64_t groups() const { return ceil_div(rows, kGroup); }
  int64_t vectors() const { return ceil_div(columns, L::width); }
  int64_t size() const { return groups() * vectors() * kGroup * L::width; }
  // Few rows of C leave room in 1 MB of L2 cache for the next block, with 4096 columns. Many make a
  // pass over them and their gradient worth more rows of P.
  bool is_small() const { return groups() <= 2; }
  // Of the first row of a group.
  int64_t at(int64_t group, int64_t vector) const {
    return (group * vectors() + vector) * kGroup * L::width;
  }

  // Calls f(row, first column of the vector, its place) for every vector of every row.
  template <class F>
  void for_each(F&& f) const {
    for (int64_t g = 0; g < groups(); ++g)
      for (int64_t v = 0; v < vectors(); ++v)
        for (int64_t row = g * kGroup; row < (g + 1) * kGroup && row < rows; ++row)
          f(row, v * L::width, at(g, v) + row % kGroup * L::width);
  }
};

// Brings a row into the cache in the order of memory, which the processor foresees: one core reads
// 34 GB/s so, and 13 where the rows of a tile come side by side.
template <class Element>
void touch(const Element* row, int64_t columns) {
  const volatile char* const bytes = reinterpret_cast<const volatile char*>(row);
  for (size_t byte = 0; byte < columns * sizeof(Element); byte += 64) (void)bytes[byte];
}

template <class Number, class Element>
void pack(const Rows<void>& rows, int64_t columns, Number* packed) {
  using L = Lanes<Number>;
  const Packing<Number> packing{rows.count, columns};
  if (rows.count % kGroup) {
    const int64_t last = packing.at(packing.groups() - 1, 0);
    fill_zero(packed + last, packing.size() - last);
  }
  const auto* const data = static_cast<const Element*>(rows.data);
  for (int64_t row = 0; rows.column_stride == 1 && row < rows.count; ++row)
    touch(data + row * rows.row_stride, columns);
  packing.for_each([&](int64_t row, int64_t first, int64_t at) {
    const Element* from = data + row * rows.row_stride + first * rows.column_stride;
    const int64_t left = columns - first;
    Element lanes[L::width] = {};
    if (rows.column_stride != 1 || left < L::width) {
      for (int64_t i = 0; i < L::width && i < left; ++i) lanes[i] = from[i * rows.column_stride];
      from = lanes;
    }
    L::store(packed + at, L::load(from));
  });
}

// Distance of gathered rows, so that they are not all in the same sets of the L1 cache.
constexpr int64_t pitch_of(int64_t columns) { return ceil_div(columns, 32) * 32 + 32; }

// Copies rows whose elements are apart, in the order that they have in memory.
template <class Element>
void gather_rows(const Rows<Element>& from, int64_t columns, Element* to) {
  const auto copy = [&](int64_t row, int64_t column) {
    to[row * pitch_of(columns) + column] =
        from.data[row * from.row_stride + column * from.column_stride];
  };
  if (from.row_stride < from.column_stride) {
    // Too few numbers are on their way from memory at a time without asking for them early: 0.5 ns
    // a number instead of 0.2, of 8 rows.
    constexpr int64_t early = 128;
    for (int64_t column = 0; column < columns; ++column) {
      __builtin_prefetch(from.data + (column + early) * from.column_stride);
      for (int64_t row = 0; row < from.count; ++row) copy(row, column);
    }
    return;
  }
  for (int64_t row = 0; row < from.count; ++row)
    for (int64_t column = 0; column < columns; ++column) copy(row, column);
}

// Goes over the rows of several tensors as if they were one.
template <class Element>
class Cursor {
 public:
  Cursor(const Rows<Element>* tensors, int64_t row) : tensor_(tensors), row_(row) {
    for (; row_ > 0 && row_ >= tensor_->count; ++tensor_) row_ -= tensor_->count;
  }
  // The next rows, of one tensor and at most so many; there must be one.
  Rows<Element> take(int64_t most) {
    for (; row_ == tensor_->count; ++tensor_) row_ = 0;
    Rows<Element> taken = *tensor_;
    taken.data += row_ * taken.row_stride;
    taken.count = taken.count - row_ < most ? taken.count - row_ : most;
    row_ += taken.count;
    return taken;
  }

 private:
  const Rows<Element>* tensor_;
  int64_t row_;
};

// Some rows of P, each contiguous: the vectors of columns that are whole, and the last one filled
// up with zeros. After the last row it is repeated.
template <class Number, class Element>
struct Block {
  using L = Lanes<Number>;
  int64_t count, used, whole_vectors;
  bool has_tail;
  bool is_first;  // the gradient begins with it
  const Element* row[kBlockRows];
  const Element* tail[kBlockRows];
  Element tails[kBlockRows][L::width];

  const Element* vector(int64_t i, int64_t v) const {
    return v < whole_vectors ? row[i] + v * L::width : tails[i];
  }
  // `cold`: nothing has fetched the rows.
  void fill(Cursor<Element>& cursor, int64_t rows, int64_t columns, Element* gathered, bool cold) {
    count = rows;
    for (int64_t i = 0; i < count;) {
      const Rows<Element> part = cursor.take(count - i);
      const bool in_place = part.column_stride == 1;
      if (!in_place) gather_rows(part, columns, gathered + i * pitch_of(columns));
      for (int64_t j = 0; j < part.count; ++j, ++i) {
        row[i] = in_place ? part.data + j * part.row_stride : gathered + i * pitch_of(columns);
        if (in_place && cold) touch(row[i], columns);
      }
    }
    used = ceil_div(count, kTile) * kTile;
    for (int64_t i = count; i < used; ++i) row[i] = row[count - 1];
    whole_vectors = columns / L::width;
    has_tail = columns % L::width;
    const int64_t first = whole_vectors * L::width;
    for (int64_t i = 0; has_tail && i < used; ++i) {
      for (int64_t lane = 0; lane < L::width; ++lane) tails[i][lane] = Element{};
      copy_elements(row[i] + first, tails[i], columns - first);
      tail[i] = tails[i];
    }
  }
};

// The block after this one. It is fetched while the gradient keeps the arithmetic busy and the
// memory idle: 4.5 ms instead of 6.7 for 64 modules of 112 x 4096 and 8 x 4096 on two cores.
template <class Element>
class Ahead {
 public:
  Ahead(Cursor<Element> cursor, int64_t rows) {
    while (rows > 0) {
      const Rows<Element> part = cursor.take(rows);
      for (int64_t i = 0; i < part.count && part.column_stride == 1; ++i)
        row_[count_++] = part.data + i * part.row_stride;
      rows -= part.count;
    }
  }
  void fetch(int64_t column, int64_t columns) const {
    constexpr int64_t line = 64 / sizeof(Element);
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t k = 0; k < columns; k += line) __builtin_prefetch(row_[i] + column + k);
  }

 private:
  int64_t count_ = 0;
  const Element* row_[kBlockRows];
};

// Memory of a thread, for the largest of its items.
template <class Element>
class Workspace {
 public:
  using Real = RealOf<Element>;
  Real *packed, *grad, *sums, *products;
  Element* gathered;

  Workspace() = default;
  ~Workspace() { ::operator delete(memory_, kAlignment); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void include(const Packing<Real>& packing) {
    const auto raise = [](int64_t& size, int64_t least) { size = size > least ? size : least; };
    raise(packed_size_, packing.size());
    raise(products_size_, packing.groups() * kBlockProducts);
    raise(gathered_size_, pitch_of(packing.columns) * kBlockRows);
  }
  // In one piece: of several the allocator gives the largest back to the system every time, and
  // finding the pages anew took as long as the rest at 64 x 512 and 64 x 512.
  void allocate() {
    const int64_t reals = 2 * packed_size_ + (Lanes<Real>::width + 1) * products_size_;
    memory_ = ::operator new(reals * sizeof(Real) + gathered_size_ * sizeof(Element), kAlignment);
    packed = static_cast<Real*>(memory_);
    grad = packed + packed_size_;
    sums = grad + packed_size_;
    products = sums + Lanes<Real>::width * products_size_;
    gathered = reinterpret_cast<Element*>(products + products_size_);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  int64_t packed_size_ = 0, products_size_ = 0, gathered_size_ = 0;
  void* memory_ = nullptr;
};

}  // namespace
}  // namespace TRIMTAB_ISA
}  // namespace trimtab
