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
    groups_.clear();
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
    hidden_ = &rounded_hidden_.of(n, c);
    attended_ = &rounded_context_.of(n, shape_.heads * d);
    activated_ = &rounded_inner_.of(n, shape_.intermediate);
    if (rank_ > 0) {
      normed_.of(n * c);
      low_.of(n * rank_);
      group_tokens();
    }
    scratch_.of(team_.threads() * scratch_size());
    scores_.of(team_.threads() * kQueries * capacity());
    logits_ = logits;
    team_.run([this](int thread) { compute(thread); });
  }

 private:
  struct Token {
    uint32_t id;
    int64_t position;
    const uint32_t* blocks;
    const AdapterLayer* adapter;
  };

  // Tokens that follow each other and have the same adapter.
  struct Group {
    int64_t first, count;
  };

  using Part = LowRank AdapterLayer::*;

  static CacheShape cache_shape(const Shape& shape) {
    return CacheShape{shape.key_value_heads, shape.head_dim, (shape.head_dim + 15) / 16 * 16};
  }

  // Of all layers' blocks of so many numbers.
  size_t blocks_bytes(int64_t numbers) const { return static_cast<size_t>(shape_.layers * shape_.blocks * numbers) * sizeof(uint16_t); }

  int64_t capacity() const { return (shape_.max_length + kBlock - 1) / kBlock * kBlock; }
  int64_t scratch_size() const { return (std::max(shape_.hidden, shape_.heads * shape_.head_dim) + 63) / 16 * 16; }

  // Few tokens are in groups of their own, so that every thread has some.
  void group_tokens() {
    const auto n = static_cast<int64_t>(tokens_.size());
    const int64_t most = n >= 4 * team_.threads() ? kLowRows : 1;
    for (int64_t t = 0; t < n;) {
      int64_t end = t + 1;
      while (end < n && end - t < most && tokens_[end].adapter == tokens_[t].adapter) ++end;
      if (tokens_[t].adapter != nullptr) groups_.push_back(Group{t, end - t});
      t = end;
    }
  }

  // Number of pieces of `lower`; 0 without adapters.
  int64_t low_pieces() const { return static_cast<int64_t>(groups_.size()) * (rank_ / kTile); }

  // Products with A of a group's tokens, for sixteen ranks. `x`: [N, inputs].
  void lower(Part part, int64_t layer, int64_t piece, const float* x, int64_t inputs) {
    const int64_t tiles = rank_ / kTile, tile = piece % tiles;
    const Group& group = groups_[piece / tiles];
    const LowRank& m = tokens_[group.first].adapter[layer].*part;
    if (tile * kTile >= m.rank) return;
    const float* from = x + group.first * inputs;
    float* to = low_.get() + group.first * rank_;
    if (group.count == kLowRows) {
      low_products<kLowRows>(m, tile, from, inputs, to, rank_);
      return;
    }
    for (int64_t i = 0; i < group.count; ++i) low_products<1>(m, tile, from + i * inputs, inputs, to + i * rank_, rank_);
  }

  // Adds what their adapters add to a tile's products with R tokens from `row` on.
  template <int R>
  void adapt(Part part, int64_t layer, int64_t tile, int64_t row, f32x16* result) const {
    const AdapterLayer* first = tokens_[row].adapter;
    bool same = true;
    for (int r = 1; r < R; ++r) same &= tokens_[row + r].adapter == first;
    if (same) {
      if (first != nullptr) raise<R>(first[layer].*part, tile, row, result);
      return;
    }
    for (int r = 0; r < R; ++r) {
      const AdapterLayer* adapter = tokens_[row + r].adapter;
      if (adapter != nullptr) raise<1>(adapter[layer].*part, tile, row + r, result + r);
    }
  }

  template <int R>
  void raise(const LowRank& m, int64_t tile, int64_t row, f32x16* result) const {
    if (m.rank > 0) add_low_rank<R>(m.tiles[tile], low_.get() + row * rank_, rank_, result);
  }

  // What is added to the products of a tile.
  auto adapting(Part part, int64_t layer, int64_t tile) const {
    return [this, part, layer, tile]<int R>(int64_t row, f32x16* result) {
      if (rank_ > 0) adapt<R>(part, layer, tile, row, result);
    };
  }

  void compute(int thread) {
    const auto n = static_cast<int64_t>(tokens_.size());
    const int64_t c = shape_.hidden, d = shape_.head_dim;
    float* x = x_.get();
    float* scratch = scratch_.get() + thread * scratch_size();
    share(n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        row(embeddings_, tokens_[t].id, x + t * c);
        for (int64_t i = 0; i < d / 2; ++i) {
          const float angle = static_cast<float>(tokens_[t].position) * frequencies_[i];
          angles_.get()[t * d + i] = std::cos(angle);
          angles_.get()[t * d + d / 2 + i] = std::sin(angle);
        }
      }
    });
    for (int64_t l = 0; l < shape_.layers; ++l) layer(l, thread, scratch);
    const auto wanted = static_cast<int64_t>(wanted_.size());
    share(wanted, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) {
        rms_norm(x + wanted_[w] * c, norm_, c, shape_.eps, scratch);
        round_row(scratch, c, *hidden_, w);
      }
    });
    multiply(head_, *hidden_, wanted, [&](int64_t row, int64_t at, f32x16 y) { put(logits_ + row * shape_.vocabulary, at, shape_.vocabulary, y); });
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

    const auto adapted = [&](Part part) {
      return [this, part, index](int64_t tile) { return adapting(part, index, tile); };
    };
    const auto normalise = [&](const float* weight, Part part) {
      share(n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          float* y = rank_ > 0 ? normed_.get() + t * c : scratch;
          rms_norm(x + t * c, weight, c, shape_.eps, y);
          round_row(y, c, *hidden_, t);
        }
      });
      if (rank_ > 0) share(low_pieces(), 1, [&](int64_t piece, int64_t) { lower(part, index, piece, normed_.get(), c); });
    };
    // Rounds what a product reads, [N, inputs], and computes its products with A.
    const auto round = [&](const float* y, int64_t inputs, Rounded& to, Part part) {
      share(n + low_pieces(), 1, [&](int64_t piece, int64_t) {
        if (piece < n) {
          round_row(y + piece * inputs, inputs, to, piece);
        } else {
          lower(part, index, piece - n, y, inputs);
        }
      });
    };

    normalise(layer.input_norm, &AdapterLayer::qkv);
    multiply(layer.qkv, *hidden_, n, adapted(&AdapterLayer::qkv),
             [&](int64_t row, int64_t at, f32x16 y) { put(qkv + row * width, at, width, y); });
    share(n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        float* row = qkv + t * width;
        for (int64_t head = 0; head < h + k; ++head) {
          const float* norm = head < h ? layer.query_norm : layer.key_norm;
          if (norm != nullptr) rms_norm(row + head * d, norm, d, shape_.eps, row + head * d);
          rotate(row + head * d, angles_.get() + t * d, d);
        }
        const Token& token = tokens_[t];
        const int64_t block = token.blocks[token.position / kBlock];
        for (int64_t head = 0; head < k; ++head) {
          store_key_value(cache_, keys + block * cache_.key_block(), values + block * cache_.value_block(), head, token.position % kBlock,
                          row + (h + head) * d, row + (h + k + head) * d);
        }
      }
    });
    attention(layer.window, keys, values, thread);
    const auto add_to_x = [&](int64_t row, int64_t at, f32x16 y) { add(x + row * c, at, c, y); };
    round(context_.get(), h * d, *attended_, &AdapterLayer::output);
    multiply(layer.output, *attended_, n, adapted(&AdapterLayer::output), add_to_x);
    normalise(layer.post_attention_norm, &AdapterLayer::gate_up);
    gate_and_up(layer.gate_up, n, index);
    round(inner_.get(), inner, *activated_, &AdapterLayer::down);
    multiply(layer.down, *activated_, n, adapted(&AdapterLayer::down), add_to_x);
  }

  // Tiles of gate and up take turns in their matrix, so that silu(gate) * up needs no memory between.
  void gate_and_up(const Matrix& m, int64_t rows, int64_t layer) {
    const int64_t pairs = m.count() / 2, inner = shape_.intermediate;
    const int64_t piece = std::max<int64_t>(1, pairs / (team_.threads() * 4));
    // Rows whose gates wait for their ups.
    constexpr int64_t kPart = 64;
    share(pairs, piece, [&](int64_t begin, int64_t end) {
      f32x16 gates[kPart];
      for (int64_t pair = begin; pair < end; ++pair) {
        for (int64_t first = 0; first < rows; first += kPart) {
          const int64_t count = std::min(kPart, rows - first);
          const auto gate_adapter = adapting(&AdapterLayer::gate_up, layer, pair * 2);
          adapted_tile_of_rows(m, pair * 2, *hidden_, first, count, gate_adapter, [&](int64_t row, f32x16 y) { gates[row - first] = y; });
          const auto up_adapter = adapting(&AdapterLayer::gate_up, layer, pair * 2 + 1);
          adapted_tile_of_rows(m, pair * 2 + 1, *hidden_, first, count, up_adapter, [&](int64_t row, f32x16 y) {
            const f32x16 gate = gates[row - first];
            put(inner_.get() + row * inner, pair * kTile, inner, gate / (exponential(-gate) + 1.0f) * y);
          });
        }
      }
    });
  }

  static void rotate(float* x, const float* angles, int64_t d) {
    for (int64_t i = 0; i < d / 2; ++i) {
      const float a = x[i], b = x[i + d / 2];
      x[i] = a * angles[i] - b * angles[d / 2 + i];
      x[i + d / 2] = b * angles[i] + a * angles[d / 2 + i];
    }
  }

  void attention(int64_t window, const uint16_t* keys, const uint16_t* values, int thread) {
    const auto n = static_cast<int64_t>(tokens_.size());
    const int64_t d = shape_.head_dim, h = shape_.heads, k = shape_.key_value_heads, group = h / k;
    const int64_t width = (h + 2 * k) * d;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    float* scores = scores_.get() + thread * kQueries * capacity();
    // A piece: one key head and some tokens; those of one sequence share what is read.
    const int64_t part = n >= 4 * team_.threads() ? 4 : 1;
    const int64_t parts = (n + part - 1) / part;
    share(parts * k, 1, [&](int64_t piece, int64_t) {
      const int64_t head = piece % k, first = piece / k * part, end = std::min(first + part, n);
      Query queries[kQueries];
      int waiting = 0;
      const uint32_t* blocks = nullptr;
      const auto flush = [&] {
        switch (waiting) {
          case 1: attend<1>(cache_, keys, values, blocks, head, scale, queries, scores, capacity()); break;
          case 2: attend<2>(cache_, keys, values, blocks, head, scale, queries, scores, capacity()); break;
          case 3: attend<3>(cache_, keys, values, blocks, head, scale, queries, scores, capacity()); break;
          case 4: attend<4>(cache_, keys, values, blocks, head, scale, queries, scores, capacity()); break;
          default: break;
        }
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
  std::vector<Group> groups_;
  // The largest rank of the step's adapters; 0 without adapters.
  int64_t rank_ = 0;
  Buffer<float> x_, angles_, qkv_, context_, inner_, scratch_, scores_;
  // Of a step with adapters: normalised hidden states [N, C], and products with A [N, rank].
  Buffer<float> normed_, low_;
  RoundedBuffer rounded_hidden_, rounded_context_, rounded_inner_;
  Rounded *hidden_ = nullptr, *attended_ = nullptr, *activated_ = nullptr;
  float* logits_ = nullptr;
};
