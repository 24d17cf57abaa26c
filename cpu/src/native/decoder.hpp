// A decoder of the llama family: one call computes a step of many sequences. Included once for each instruction set.
//
// N tokens of all rows, C hidden size, H query heads, K key and value heads of D numbers, I the inner size, V tokens.
#pragma once

static inline void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* y) {
  f32x16 squares{};
  float rest = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const f32x16 v = load<f32x16>(x + i);
    squares = fused(v, v, squares);
  }
  for (; i < count; ++i) rest += x[i] * x[i];
  const float scale = 1.0f / std::sqrt((sum(squares) + rest) / static_cast<float>(count) + eps);
  for (i = 0; i + 16 <= count; i += 16) store(y + i, load<f32x16>(x + i) * scale * load<f32x16>(weight + i));
  for (; i < count; ++i) y[i] = x[i] * scale * weight[i];
}

class Decoder final : public athanor::Decoder, Machine {
 public:
  Decoder(const Shape& shape, const Layer* layers, const Matrix& embeddings,
          const Matrix& head, const float* norm, const float* frequencies)
      : Machine(shape.threads), shape_(shape), embeddings_(embeddings), head_(head), norm_(norm), frequencies_(frequencies),
        layers_(layers, layers + shape.layers), cache_(cache_shape(shape)), keys_(blocks_bytes(cache_.key_block())),
        // Zeros, because a product of a weight 0 with what was never written has to be 0.
        values_(blocks_bytes(cache_.value_block())) {}

  void step(const Row* rows, int64_t count, float* logits) override {
    tokens_.clear();
    wanted_.clear();
    rank_ = 0;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < rows[r].length; ++i) {
        if (i >= rows[r].length - rows[r].logits) wanted_.push_back(static_cast<int64_t>(tokens_.size()));
        tokens_.push_back(Token{rows[r].tokens[i], rows[r].start + i, rows[r].blocks, rows[r].adapter});
      }
      if (rows[r].adapter != nullptr) rank_ = std::max(rank_, rows[r].rank);
    }
    const auto n = static_cast<int64_t>(tokens_.size());
    const int64_t c = shape_.hidden, d = shape_.head_dim;
    x_.of(n * c);
    angles_.of(n * d);
    qkv_.of(n * (shape_.heads + 2 * shape_.key_value_heads) * d);
    context_.of(n * shape_.heads * d);
    inner_.of(n * shape_.intermediate);
    hidden_ = &rounded_hidden_.of(std::max(prepared_rows(n), prepared_rows(static_cast<int64_t>(wanted_.size()))), c, format());
    attended_ = &rounded_context_.of(prepared_rows(n), shape_.heads * d, format());
    activated_ = &rounded_inner_.of(prepared_rows(n), shape_.intermediate, format());
    low_.of(prepared_rows(n) * rank_);
    scratch_.of(team_.threads() * scratch_size());
    scores_.of(team_.threads() * attention_scratch(cache_, capacity()));
    logits_ = logits;
    team_.run([this](int thread) { compute(thread); });
  }

 private:
  struct Token {
    uint32_t id;
    int64_t position;
    const uint32_t* blocks;
    // One for each layer; null: no adapter.
    const AdapterLayer* adapter;
  };

  using Part = LowRank AdapterLayer::*;

  // All matrices have whole numbers, or all have one other format.
  int32_t format() const { return head_.is_float() ? head_.tiles[0].format : kInt8; }

  static CacheShape cache_shape(const Shape& shape) {
    return CacheShape{shape.key_value_heads, shape.head_dim, (shape.head_dim + 15) / 16 * 16};
  }

  // Of all layers' blocks of so many numbers.
  size_t blocks_bytes(int64_t numbers) const { return static_cast<size_t>(shape_.layers * shape_.blocks * numbers) * sizeof(uint16_t); }

  int64_t capacity() const { return (shape_.max_length + kBlock - 1) / kBlock * kBlock; }
  int64_t scratch_size() const { return (std::max(shape_.hidden, shape_.heads * shape_.head_dim) + 63) / 16 * 16; }

  void compute(int thread) {
    const auto n = static_cast<int64_t>(tokens_.size());
    const int64_t c = shape_.hidden, d = shape_.head_dim;
    float* x = x_.get();
    float* scratch = scratch_.get() + thread * scratch_size();
    share_tokens(n, [&](int64_t t) {
      row(embeddings_, tokens_[t].id, x + t * c);
      for (int64_t i = 0; i < d / 2; ++i) {
        const float angle = static_cast<float>(tokens_[t].position) * frequencies_[i];
        angles_.get()[t * d + i] = std::cos(angle);
        angles_.get()[t * d + d / 2 + i] = std::sin(angle);
      }
    });
    for (int64_t l = 0; l < shape_.layers; ++l) layer(l, thread, scratch);
    const auto wanted = static_cast<int64_t>(wanted_.size());
    prepare(wanted, thread, [&](int64_t w, int64_t row) {
      rms_norm(x + wanted_[w] * c, norm_, c, shape_.eps, scratch);
      prepare_row(scratch, c, *hidden_, row);
    });
    const auto put_logits = [&](int64_t row, int64_t at, f32x16 y) { put(logits_ + row * shape_.vocabulary, at, shape_.vocabulary, y); };
    multiply(head_, *hidden_, wanted, put_logits, own(wanted, thread));
  }

  void layer(int64_t index, int thread, float* scratch) {
    const Layer& layer = layers_[index];
    const auto n = static_cast<int64_t>(tokens_.size());
    const int64_t c = shape_.hidden, d = shape_.head_dim, inner = shape_.intermediate;
    const int64_t h = shape_.heads, k = shape_.key_value_heads, width = (h + 2 * k) * d;
    float* x = x_.get();
    float* qkv = qkv_.get();
    uint16_t* keys = keys_.of<uint16_t>() + index * shape_.blocks * cache_.key_block();
    uint16_t* values = values_.of<uint16_t>() + index * shape_.blocks * cache_.value_block();

    // Rounds what a product reads of a token, `y`, and computes its products with A.
    const auto round = [&](const float* y, int64_t inputs, Rounded& to, int64_t t, int64_t row, Part part) {
      prepare_row(y, inputs, to, row);
      const LowRank* adapter = adapter_of(t, index, part);
      if (adapter != nullptr) low_products(*adapter, y, inputs, low_.get() + row * rank_);
    };
    const auto normalise = [&](const float* weight, Part part) {
      prepare(n, thread, [&](int64_t t, int64_t row) {
        rms_norm(x + t * c, weight, c, shape_.eps, scratch);
        round(scratch, c, *hidden_, t, row, part);
      });
    };
    const int64_t first = own(n, thread);
    const auto adapted = [&](Part part, int64_t t, int64_t at, f32x16 y) { return adapt(index, part, t, first, at / kTile, y); };
    const auto add_to_x = [&](Part part) {
      return [&, part](int64_t t, int64_t at, f32x16 y) { add(x + t * c, at, c, adapted(part, t, at, y)); };
    };
    // Rotates the queries and the key of a key head, and stores key and value.
    const auto place = [&](int64_t t, int64_t head) {
      float* row = qkv + t * width;
      for (int64_t q = head * (h / k); q < (head + 1) * (h / k); ++q) turn(row + q * d, layer.query_norm, t);
      turn(row + (h + head) * d, layer.key_norm, t);
      const Token& token = tokens_[t];
      const int64_t block = token.blocks[token.position / kBlock];
      store_key_value(cache_, keys + block * cache_.key_block(), values + block * cache_.value_block(), head, token.position % kBlock,
                      row + (h + head) * d, row + (h + k + head) * d, scratch);
    };

    normalise(layer.input_norm, &AdapterLayer::qkv);
    const auto put_qkv = [&](int64_t t, int64_t at, f32x16 y) { put(qkv + t * width, at, width, adapted(&AdapterLayer::qkv, t, at, y)); };
    multiply(layer.qkv, *hidden_, n, put_qkv, first);
    if (n > 1) {
      share_tokens(n, [&](int64_t t) {
        for (int64_t head = 0; head < k; ++head) place(t, head);
      });
    }
    attention(layer.window, keys, values, thread, [&](int64_t head) {
      if (n == 1) place(0, head);
    });
    prepare(n, thread, [&](int64_t t, int64_t row) {
      round(context_.get() + t * h * d, h * d, *attended_, t, row, &AdapterLayer::output);
    });
    multiply(layer.output, *attended_, n, add_to_x(&AdapterLayer::output), first);
    normalise(layer.post_attention_norm, &AdapterLayer::gate_up);
    gate_and_up(layer.gate_up, n, first, index);
    prepare(n, thread, [&](int64_t t, int64_t row) { round(inner_.get() + t * inner, inner, *activated_, t, row, &AdapterLayer::down); });
    multiply(layer.down, *activated_, n, add_to_x(&AdapterLayer::down), first);
  }

  // What the adapter of a token adds to a matrix; null: nothing.
  const LowRank* adapter_of(int64_t token, int64_t layer, Part part) const {
    const AdapterLayer* adapter = tokens_[token].adapter;
    if (adapter == nullptr || (adapter[layer].*part).rank == 0) return nullptr;
    return &(adapter[layer].*part);
  }

  // The products of a token with a tile, with what its adapter adds. `first`: see `own`.
  f32x16 adapt(int64_t layer, Part part, int64_t token, int64_t first, int64_t tile, f32x16 y) const {
    if (rank_ == 0) return y;
    const LowRank* adapter = adapter_of(token, layer, part);
    if (adapter == nullptr) return y;
    return with_low_rank(adapter->tiles[tile], low_.get() + (first + token) * rank_, y);
  }

  // Tiles of gate and up take turns in their matrix, so that silu(gate) * up needs no memory between.
  void gate_and_up(const Matrix& m, int64_t rows, int64_t first, int64_t layer) {
    const int64_t pairs = m.count() / 2, inner = shape_.intermediate;
    share(pairs, std::max<int64_t>(1, pairs / (team_.threads() * 8)), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const auto write = [&](int64_t row, f32x16 gate, f32x16 up) {
          const int64_t t = row - first;
          gate = adapt(layer, &AdapterLayer::gate_up, t, first, pair * 2, gate);
          up = adapt(layer, &AdapterLayer::gate_up, t, first, pair * 2 + 1, up);
          put(inner_.get() + t * inner, pair * kTile, inner, gate / (exponential(-gate) + 1.0f) * up);
        };
        if (!m.is_float() && alike(m, pair * 2)) {
          tiles_of_rows<2, kRows<2>>(m, pair * 2, *hidden_, first, rows, [&](int64_t row, auto y) { write(row, y(0), y(1)); });
          continue;
        }
        // Rows whose gates wait for their ups.
        constexpr int64_t kPart = 64;
        f32x16 gates[kPart];
        for (int64_t begin_row = first; begin_row < first + rows; begin_row += kPart) {
          const int64_t count = std::min(kPart, first + rows - begin_row);
          if (m.is_float()) {
            float_tiles(m, pair * 2, 2, *hidden_, begin_row, count, [&](int64_t row, int64_t tile, f32x16 y) {
              if (tile == pair * 2) {
                gates[row - begin_row] = y;
              } else {
                write(row, gates[row - begin_row], y);
              }
            });
            continue;
          }
          tiles_of_rows<1, kRows<1>>(m, pair * 2, *hidden_, begin_row, count, [&](int64_t row, auto y) { gates[row - begin_row] = y(0); });
          tiles_of_rows<1, kRows<1>>(m, pair * 2 + 1, *hidden_, begin_row, count,
                                     [&](int64_t row, auto y) { write(row, gates[row - begin_row], y(0)); });
        }
      }
    });
  }

  // Normalises a head where the model does, and rotates it.
  void turn(float* x, const float* norm, int64_t token) {
    if (norm != nullptr) rms_norm(x, norm, shape_.head_dim, shape_.eps, x);
    rotate(x, angles_.get() + token * shape_.head_dim, shape_.head_dim);
  }

  static void rotate(float* x, const float* angles, int64_t d) {
    for (int64_t i = 0; i < d / 2; ++i) {
      const float a = x[i], b = x[i + d / 2];
      x[i] = a * angles[i] - b * angles[d / 2 + i];
      x[i + d / 2] = b * angles[i] + a * angles[d / 2 + i];
    }
  }

  // Calls `before(head)` before a key head's first query.
  template <typename Before>
  void attention(int64_t window, const uint16_t* keys, const uint16_t* values, int thread, Before before) {
    const auto n = static_cast<int64_t>(tokens_.size());
    const int64_t d = shape_.head_dim, h = shape_.heads, k = shape_.key_value_heads, group = h / k;
    const int64_t width = (h + 2 * k) * d;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    float* scores = scores_.get() + thread * attention_scratch(cache_, capacity());
    // A piece: one key head and some tokens; those of one sequence share what is read.
    const int64_t part = n >= 64 * team_.threads() ? 8 : n >= 4 * team_.threads() ? 4 : 1;
    const int64_t parts = (n + part - 1) / part;
    share(parts * k, 1, [&](int64_t piece, int64_t) {
      const int64_t head = piece % k, first = piece / k * part, end = std::min(first + part, n);
      before(head);
      Query queries[kQueries];
      int waiting = 0;
      const uint32_t* blocks = nullptr;
      const auto flush = [&] {
        attend_all(cache_, keys, values, blocks, head, scale, queries, waiting, scores, capacity());
        waiting = 0;
      };
      for (int64_t t = first; t < end; ++t) {
        const Token& token = tokens_[t];
        if (token.blocks != blocks) flush();
        blocks = token.blocks;
        for (int64_t g = 0; g < group; ++g) {
          const int64_t query = head * group + g;
          const int64_t visible = window > 0 ? std::max<int64_t>(0, token.position + 1 - window) : 0;
          queries[waiting++] = Query{qkv_.get() + t * width + query * d, context_.get() + (t * h + query) * d, visible, token.position + 1};
          if (waiting == kQueries) flush();
        }
      }
      flush();
    });
  }

  const Shape shape_;
  const Matrix embeddings_, head_;
  const float* norm_;
  const float* frequencies_;
  const std::vector<Layer> layers_;
  const CacheShape cache_;
  Zeros keys_, values_;
  std::vector<Token> tokens_;
  std::vector<int64_t> wanted_;
  // The largest rank of the step's adapters; 0 without adapters.
  int64_t rank_ = 0;
  Buffer<float> x_, angles_, qkv_, context_, inner_, scratch_, scores_;
  // Products of prepared rows with A, [rows, rank_].
  Buffer<float> low_;
  RoundedBuffer rounded_hidden_, rounded_context_, rounded_inner_;
  Rounded *hidden_ = nullptr, *attended_ = nullptr, *activated_ = nullptr;
  float* logits_ = nullptr;
};
