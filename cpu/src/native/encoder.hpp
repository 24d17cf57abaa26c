// An encoder of BERT's kind: one call computes the outputs of many texts, which follow each other without padding. Included
// once for each instruction set.
//
// N tokens of all texts, T of one of them, C hidden size, H heads of D numbers, I the inner size.
#pragma once

static inline f32x16 hyperbolic_tangent(f32x16 x) {
  const f32x16 none{};
  const f32x16 size = x < none ? -x : x;
  const f32x16 y = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return x < none ? -y : y;
}

// x Phi(x); the error function by formula 7.1.26 of Abramowitz and Stegun, with an error below 2e-7.
static inline f32x16 gelu(f32x16 x) {
  const f32x16 none{};
  const f32x16 z = x * 0.70710678f, size = z < none ? -z : z;
  const f32x16 t = 1.0f / (0.3275911f * size + 1.0f);
  f32x16 p = 1.061405429f * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const f32x16 tail = p * t * exponential(-size * size);
  return x * (z < none ? tail : 2.0f - tail) * 0.5f;
}

static inline f32x16 gelu_tanh(f32x16 x) {
  return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
}

static inline f32x16 activate(int32_t kind, f32x16 x) {
  switch (kind) {
    case kGelu: return gelu(x);
    case kGeluTanh: return gelu_tanh(x);
    case kRelu: return larger(x, f32x16{});
    case kTanh: return hyperbolic_tangent(x);
    default: return x;
  }
}

// x to (x - mean) / deviation * weight + shift, in place.
static inline void layer_norm(float* x, const float* weight, const float* shift, int64_t count, float eps) {
  f32x16 total{};
  float rest = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) total += load<f32x16>(x + i);
  for (; i < count; ++i) rest += x[i];
  const float mean = (sum(total) + rest) / static_cast<float>(count);
  f32x16 squares{};
  rest = 0;
  for (i = 0; i + 16 <= count; i += 16) {
    const f32x16 v = load<f32x16>(x + i) - mean;
    squares = fused(v, v, squares);
  }
  for (; i < count; ++i) rest += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt((sum(squares) + rest) / static_cast<float>(count) + eps);
  for (i = 0; i + 16 <= count; i += 16) {
    store(x + i, (load<f32x16>(x + i) - mean) * scale * load<f32x16>(weight + i) + load<f32x16>(shift + i));
  }
  for (; i < count; ++i) x[i] = (x[i] - mean) * scale * weight[i] + shift[i];
}

// Queries of a head that are computed together.
constexpr int kAsking = 4;

class Encoder final : public athanor::Encoder, Machine {
 public:
  Encoder(const EncoderShape& shape, const EncoderLayer* layers, const EncoderEmbeddings& embeddings, const Dense* head, int64_t heads)
      : Machine(shape.threads), shape_(shape), layers_(layers, layers + shape.layers), embeddings_(embeddings), head_(head, head + heads) {}

  void encode(const Text* texts, int64_t count, float* outputs) override {
    tokens_.clear();
    texts_.clear();
    longest_ = 0;
    for (int64_t text = 0; text < count; ++text) {
      texts_.push_back(Range{static_cast<int64_t>(tokens_.size()), texts[text].length});
      longest_ = std::max(longest_, texts[text].length);
      for (int64_t place = 0; place < texts[text].length; ++place) tokens_.push_back(Token{texts[text].tokens[place], place});
    }
    const auto n = static_cast<int64_t>(tokens_.size());
    const int64_t c = shape_.hidden;
    x_.of(n * c);
    qkv_.of(n * 3 * c);
    context_.of(n * c);
    inner_.of(n * shape_.intermediate);
    hidden_ = &rounded_hidden_.of(n, c, format());
    activated_ = &rounded_inner_.of(n, shape_.intermediate, format());
    scratch_.of(team_.threads() * scratch_size());
    outputs_ = outputs;
    team_.run([this](int thread) { compute(thread); });
  }

 private:
  struct Token {
    uint32_t id;
    int64_t place;
  };
  struct Range {
    int64_t first, length;
  };

  // All matrices of the layers have whole numbers, or all have one other format.
  int32_t format() const { return layers_.empty() ? kInt8 : layers_[0].qkv.tiles[0].format; }
  int64_t head_dim() const { return shape_.hidden / shape_.heads; }
  int64_t padded() const { return (longest_ + 15) / 16 * 16; }
  // Keys of a head with the tokens side by side, and the scores of some queries; or two layers of the head.
  int64_t scratch_size() const {
    int64_t widest = shape_.hidden;
    for (const Dense& dense : head_) widest = std::max(widest, dense.outputs);
    return std::max((head_dim() + kAsking) * padded(), 2 * (widest + 15) / 16 * 16) + 64;
  }

  void compute(int thread) {
    const auto n = static_cast<int64_t>(tokens_.size());
    const int64_t c = shape_.hidden;
    float* x = x_.get();
    float* scratch = scratch_.get() + thread * scratch_size();
    share(n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        row(embeddings_.words, tokens_[t].id, x + t * c);
        const float* position = embeddings_.positions + tokens_[t].place * c;
        for (int64_t i = 0; i < c; ++i) x[t * c + i] += position[i];
        layer_norm(x + t * c, embeddings_.weight, embeddings_.shift, c, shape_.eps);
        prepare_row(x + t * c, c, *hidden_, t);
      }
    });
    for (int64_t l = 0; l < shape_.layers; ++l) {
      const bool narrow = shape_.first_token && l + 1 == shape_.layers;
      layer(layers_[l], scratch, narrow);
    }
    const auto texts = static_cast<int64_t>(texts_.size());
    share(texts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t text = begin; text < end; ++text) output(text, scratch);
    });
  }

  // `narrow`: of each text only the first token's output is computed, and stored in its row of `x`.
  void layer(const EncoderLayer& layer, float* scratch, bool narrow) {
    const int64_t c = shape_.hidden, inner = shape_.intermediate;
    const auto texts = static_cast<int64_t>(texts_.size());
    const int64_t rows = narrow ? texts : static_cast<int64_t>(tokens_.size());
    const auto place = [&](int64_t row) { return narrow ? texts_[row].first : row; };
    float *x = x_.get(), *qkv = qkv_.get(), *context = context_.get();
    multiply(layer.qkv, *hidden_, static_cast<int64_t>(tokens_.size()),
             [&](int64_t row, int64_t at, f32x16 y) { put(qkv + row * 3 * c, at, 3 * c, y); });
    share(texts * shape_.heads, 1, [&](int64_t piece, int64_t) { attend(texts_[piece / shape_.heads], piece % shape_.heads, scratch, narrow); });
    share(rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) prepare_row(context + place(r) * c, c, *hidden_, r);
    });
    multiply(layer.output, *hidden_, rows, [&](int64_t row, int64_t at, f32x16 y) { add(x + place(row) * c, at, c, y); });
    const auto normalise = [&](const float* weight, const float* shift) {
      share(rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          layer_norm(x + place(r) * c, weight, shift, c, shape_.eps);
          prepare_row(x + place(r) * c, c, *hidden_, r);
        }
      });
    };
    normalise(layer.attention_weight, layer.attention_shift);
    multiply(layer.up, *hidden_, rows,
             [&](int64_t row, int64_t at, f32x16 y) { put(inner_.get() + row * inner, at, inner, activate(shape_.activation, y)); });
    share(rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) prepare_row(inner_.get() + r * inner, inner, *activated_, r);
    });
    multiply(layer.down, *activated_, rows, [&](int64_t row, int64_t at, f32x16 y) { add(x + place(row) * c, at, c, y); });
    normalise(layer.output_weight, layer.output_shift);
  }

  // One head of one text: [T, D] to its columns of `context`.
  void attend(const Range& text, int64_t head, float* scratch, bool narrow) {
    const int64_t c = shape_.hidden, d = head_dim(), t = text.length, width = (t + 15) / 16 * 16;
    float *keys = scratch, *scores = scratch + d * width;
    const float* qkv = qkv_.get() + text.first * 3 * c + head * d;
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t place = 0; place < width; ++place) keys[i * width + place] = place < t ? qkv[place * 3 * c + c + i] : 0.0f;
    }
    const int64_t queries = narrow ? 1 : t;
    int64_t first = 0;
    for (; first + kAsking <= queries; first += kAsking) attend_some<kAsking>(text, head, first, keys, scores);
    for (; first < queries; ++first) attend_some<1>(text, head, first, keys, scores);
  }

  // As `attend`, for N queries from `first` on: the sums of one query wait for each other. `keys`: [D, width], zeros behind
  // the text. `scores`: room for [N, width].
  template <int N>
  void attend_some(const Range& text, int64_t head, int64_t first, const float* keys, float* scores) {
    const int64_t c = shape_.hidden, d = head_dim(), t = text.length, width = (t + 15) / 16 * 16;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    const float* qkv = qkv_.get() + text.first * 3 * c + head * d;
    f32x16 most[N];
    for (int n = 0; n < N; ++n) most[n] = all(-INFINITY);
    for (int64_t place = 0; place < width; place += 16) {
      f32x16 dots[N] = {};
      for (int64_t i = 0; i < d; ++i) {
        const f32x16 key = load<f32x16>(keys + i * width + place);
        for (int n = 0; n < N; ++n) dots[n] = fused(key, all(qkv[(first + n) * 3 * c + i]), dots[n]);
      }
      for (int n = 0; n < N; ++n) {
        f32x16 score = dots[n] * scale;
        if (embeddings_.relative != nullptr || place + 16 > t) score = biased(score, text, head, first + n, place);
        store(scores + n * width + place, score);
        most[n] = larger(most[n], score);
      }
    }
    float inverse[N];
    for (int n = 0; n < N; ++n) {
      const f32x16 top = all(largest(most[n]));
      f32x16 total{};
      for (int64_t place = 0; place < width; place += 16) {
        const f32x16 weight = exponential(load<f32x16>(scores + n * width + place) - top);
        store(scores + n * width + place, weight);
        total += weight;
      }
      inverse[n] = 1.0f / sum(total);
    }
    float* out = context_.get() + (text.first + first) * c + head * d;
    int64_t column = 0;
    for (; column + 16 <= d; column += 16) {
      f32x16 values[N] = {};
      for (int64_t place = 0; place < t; ++place) {
        const f32x16 value = load<f32x16>(qkv + place * 3 * c + 2 * c + column);
        for (int n = 0; n < N; ++n) values[n] = fused(value, all(scores[n * width + place]), values[n]);
      }
      for (int n = 0; n < N; ++n) store(out + n * c + column, values[n] * inverse[n]);
    }
    for (; column < d; ++column) {
      for (int n = 0; n < N; ++n) {
        float value = 0;
        for (int64_t place = 0; place < t; ++place) value += qkv[place * 3 * c + 2 * c + column] * scores[n * width + place];
        out[n * c + column] = value * inverse[n];
      }
    }
  }

  // Sixteen scores of a query with the bias of their distances, and -inf behind the text.
  f32x16 biased(f32x16 score, const Range& text, int64_t head, int64_t asking, int64_t place) const {
    float whole[16];
    store(whole, score);
    for (int64_t i = 0; i < 16; ++i) {
      if (place + i >= text.length) {
        whole[i] = -INFINITY;
      } else if (embeddings_.relative != nullptr) {
        whole[i] += embeddings_.relative[head * (2 * shape_.max_length - 1) + place + i - asking + shape_.max_length - 1];
      }
    }
    return load<f32x16>(whole);
  }

  // A text's output: the head's layers over its first token, or without a head the mean of its tokens with length 1.
  void output(int64_t text, float* scratch) {
    const int64_t c = shape_.hidden;
    const Range& range = texts_[text];
    const float* x = x_.get() + range.first * c;
    if (head_.empty()) {
      float* to = outputs_ + text * c;
      float squares = 0;
      for (int64_t i = 0; i < c; ++i) {
        float total = 0;
        for (int64_t place = 0; place < range.length; ++place) total += x[place * c + i];
        to[i] = total / static_cast<float>(range.length);
        squares += to[i] * to[i];
      }
      const float length = std::max(std::sqrt(squares), 1e-12f);
      for (int64_t i = 0; i < c; ++i) to[i] /= length;
      return;
    }
    float* turns[2] = {scratch, scratch + scratch_size() / 2 / 16 * 16};
    for (size_t index = 0; index < head_.size(); ++index) {
      const Dense& dense = head_[index];
      float* y = index + 1 == head_.size() ? outputs_ + text * dense.outputs : turns[index % 2];
      for (int64_t output = 0; output < dense.outputs; ++output) {
        const float* weight = dense.weight + output * dense.inputs;
        f32x16 total{};
        float rest = 0;
        int64_t i = 0;
        for (; i + 16 <= dense.inputs; i += 16) total = fused(load<f32x16>(x + i), load<f32x16>(weight + i), total);
        for (; i < dense.inputs; ++i) rest += x[i] * weight[i];
        y[output] = sum(total) + rest + dense.bias[output];
      }
      int64_t done = 0;
      for (; done + 16 <= dense.outputs; done += 16) store(y + done, activate(dense.activation, load<f32x16>(y + done)));
      for (; done < dense.outputs; ++done) y[done] = activate(dense.activation, all(y[done]))[0];
      x = y;
    }
  }

  const EncoderShape shape_;
  const std::vector<EncoderLayer> layers_;
  const EncoderEmbeddings embeddings_;
  const std::vector<Dense> head_;
  std::vector<Token> tokens_;
  std::vector<Range> texts_;
  int64_t longest_ = 0;
  Buffer<float> x_, qkv_, context_, inner_, scratch_;
  RoundedBuffer rounded_hidden_, rounded_inner_;
  Rounded *hidden_ = nullptr, *activated_ = nullptr;
  float* outputs_ = nullptr;
};
