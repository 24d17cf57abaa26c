// What decoders and encoders share: a team, its memory, and products of all rows with a matrix. Included once for each
// instruction set.
#pragma once

// Memory that grows and is aligned to a cache line.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // At least `count` items; their contents are unspecified.
  T* of(int64_t count) {
    if (count > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = count;
    }
    return data_;
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Memory of zeros, which is taken from the machine page by page as it is written.
class Zeros {
 public:
  explicit Zeros(size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Zeros() { munmap(data_, bytes_); }
  Zeros(const Zeros&) = delete;
  Zeros& operator=(const Zeros&) = delete;

  template <typename T>
  T* of() const {
    return static_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  void* data_;
};

class RoundedBuffer {
 public:
  // Room for rows of `columns` numbers, in the format that products with tiles of `format` read.
  Rounded& of(int64_t rows, int64_t columns, int32_t format = kInt8) {
    rounded_.groups = (columns + kGroup - 1) / kGroup;
    if (format == kBF16 && kHasBF16) {
      rounded_.bf16 = bf16_.of(rows * rounded_.groups * kGroup);
      return rounded_;
    }
    if (format == kBF16 || format == kFP32) {
      rounded_.fp32 = scales_.of(rows * rounded_.groups * kGroup);
      return rounded_;
    }
    rounded_.q = q_.of(rows * rounded_.groups * kGroup);
    rounded_.scales = scales_.of(rows * rounded_.groups);
    rounded_.sums = sums_.of(rows * rounded_.groups);
    rounded_.starts = starts_.of(rows * rounded_.groups);
    return rounded_;
  }

 private:
  Rounded rounded_;
  Buffer<int8_t> q_;
  Buffer<uint16_t> bf16_;
  Buffer<float> scales_, sums_;
  Buffer<int32_t> starts_;
};

class Machine {
 protected:
  explicit Machine(int64_t threads) : team_(static_cast<int>(threads)) {}

  // Calls `each` with the pieces of 0..count that fall to this thread, then waits for the others.
  template <typename Each>
  void share(int64_t count, int64_t piece, Each each) {
    for (;;) {
      const int64_t begin = team_.take() * piece;
      if (begin >= count) break;
      each(begin, std::min(begin + piece, count));
    }
    team_.barrier();
  }

  // As `share`, of a step's tokens: many are taken in runs, so that threads seldom write to the same cache line.
  template <typename Each>
  void share_tokens(int64_t count, Each each) {
    share(count, count >= 64 * team_.threads() ? 16 : 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) each(t);
    });
  }

  // Calls `each(token, row)` for a step's tokens, where `row` is one of a buffer of rounded rows. A single token is prepared by
  // every thread, in a row of its own, see `own`: so the threads need not wait for each other before the product.
  template <typename Each>
  void prepare(int64_t count, int thread, Each each) {
    if (count == 1) return each(0, thread);
    share_tokens(count, [&](int64_t t) { each(t, t); });
  }

  // The first row that `prepare` has prepared for a thread, and the rows that it needs.
  static int64_t own(int64_t count, int thread) { return count == 1 ? thread : 0; }
  int64_t prepared_rows(int64_t count) const { return count == 1 ? team_.threads() : count; }

  // Tiles that a thread takes at a time: pairs, unless there are too few of them for the threads to end together.
  int64_t piece(int64_t tiles) const {
    const int64_t few = tiles >= team_.threads() * 8 ? 2 : 1;
    return std::max(few, tiles / (team_.threads() * 16) / 2 * 2);
  }

  // Products of rows from `first` on, a few tiles at a time: few enough that the threads end together.
  template <typename Each>
  void multiply(const Matrix& m, const Rounded& x, int64_t rows, Each each, int64_t first = 0) {
    share(m.count(), piece(m.count()), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        if (m.is_float()) {
          float_tiles(m, tile, std::min<int64_t>(end - tile, 2), x, first, rows,
                      [&](int64_t row, int64_t at, f32x16 y) { each(row - first, at * kTile, y); });
          ++tile;
        } else if (tile + 2 <= end && alike(m, tile)) {
          tiles_of_rows<2, kRows<2>>(m, tile, x, first, rows, [&](int64_t row, auto y) {
            each(row - first, tile * kTile, y(0));
            each(row - first, (tile + 1) * kTile, y(1));
          });
          ++tile;
        } else {
          tiles_of_rows<1, kRows<1>>(m, tile, x, first, rows, [&](int64_t row, auto y) { each(row - first, tile * kTile, y(0)); });
        }
      }
    });
  }

  static void put(float* to, int64_t at, int64_t size, f32x16 y) {
    if (at + kTile <= size) {
      store(to + at, y);
      return;
    }
    float whole[kTile];
    store(whole, y);
    for (int64_t i = at; i < size; ++i) to[i] = whole[i - at];
  }

  static void add(float* to, int64_t at, int64_t size, f32x16 y) {
    if (at + kTile <= size) {
      store(to + at, load<f32x16>(to + at) + y);
      return;
    }
    float whole[kTile];
    store(whole, y);
    for (int64_t i = at; i < size; ++i) to[i] += whole[i - at];
  }

  // Row `token` of a table.
  static void row(const Matrix& m, uint32_t token, float* to) {
    if (m.is_float()) return float_row(m, token, to);
    const bool four = m.tiles[token / kTile].format == kInt4;
    const uint8_t* numbers = m.tiles[token / kTile].data;
    const auto* scales = reinterpret_cast<const uint16_t*>(numbers + m.groups() * (four ? kNumbers<kInt4> : kNumbers<kInt8>));
    const int64_t lane = token % kTile;
    for (int64_t group = 0; group < m.groups(); ++group) {
      float scale[16], minimum[16];
      store(scale, load_half(scales + group * (four ? kScales<kInt4> : kScales<kInt8>)));
      if (four) store(minimum, load_half(scales + group * 32 + 16));
      for (int64_t i = 0; i < kGroup && group * kGroup + i < m.inputs; ++i) {
        float value;
        if (four) {
          const uint8_t byte = numbers[group * 256 + i / 4 % 4 * 64 + lane * 4 + i % 4];
          value = static_cast<float>(i < 16 ? byte & 15 : byte >> 4) * scale[lane] + minimum[lane];
        } else {
          value = static_cast<float>(static_cast<int>(numbers[group * 512 + i / 4 * 64 + lane * 4 + i % 4]) - 128) * scale[lane];
        }
        to[group * kGroup + i] = value;
      }
    }
  }

  athanor::Team team_;
};
