// What the Rust side calls, and what the instruction sets implement. `ffi.rs` declares the same structures.
#pragma once

#include <cstdint>

namespace athanor {

enum Format : int32_t { kInt8 = 0, kInt4 = 1, kBF16 = 2, kFP32 = 3 };

// Sixteen outputs of a matrix; see pack.rs.
struct Tile {
  const uint8_t* data;
  int32_t format;
};

// A packed matrix [outputs, inputs]. `bias` is null or has a number for each output of each tile.
struct Matrix {
  int64_t outputs, inputs;
  const Tile* tiles;
  const float* bias;

  int64_t count() const { return (outputs + 15) / 16; }
  int64_t groups() const { return (inputs + 31) / 32; }
  // BF16 or FP32; all tiles of such a matrix have one format.
  bool is_float() const { return tiles[0].format == kBF16 || tiles[0].format == kFP32; }
};

struct Layer {
  Matrix qkv, output, gate_up, down;
  const float *input_norm, *post_attention_norm, *query_norm, *key_norm;
  // Tokens that a query sees, itself included; 0: all before it.
  int64_t window;
};

// Sixteen outputs of a low-rank update: B as BF16 [count, 16], for the products with A from `first` on.
struct LowRankTile {
  const uint16_t* b;
  int32_t first, count;
};

// What an adapter adds to the products of a matrix, scale * (x A^T) B^T. The ranks of a matrix' parts, such as queries,
// keys and values, follow each other. See adapter.rs.
struct LowRank {
  // All ranks, rounded up to 16; 0: nothing is added.
  int64_t rank;
  // BF16 [rank / 16, inputs, 16].
  const uint16_t* a;
  // [rank].
  const float* scales;
  // One for each tile of the matrix.
  const LowRankTile* tiles;
};

struct AdapterLayer {
  LowRank qkv, output, gate_up, down;
};

struct Shape {
  int64_t layers, hidden, intermediate, heads, key_value_heads, head_dim, vocabulary, max_length, blocks, threads;
  float eps;
};

struct Row {
  const uint32_t* tokens;
  int64_t length, start;
  const uint32_t* blocks;
  // Last tokens whose logits are wanted.
  int64_t logits;
  // One for each layer of the decoder; null: no adapter. `rank`: the largest of a matrix.
  const AdapterLayer* adapter;
  int64_t rank;
};

class Decoder {
 public:
  virtual ~Decoder() = default;
  virtual void step(const Row* rows, int64_t count, float* logits) = 0;
};

enum Activation : int32_t { kNone = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kTanh = 4 };

struct EncoderLayer {
  Matrix qkv, output, up, down;
  const float *attention_weight, *attention_shift, *output_weight, *output_shift;
};

struct EncoderEmbeddings {
  Matrix words;
  // [max_length, C].
  const float* positions;
  const float *weight, *shift;
  // Added to scores by the distance of key and query, [H, 2 max_length - 1]; null: nothing.
  const float* relative;
};

// A layer of a head in FP32: weight [outputs, inputs].
struct Dense {
  int64_t outputs, inputs;
  const float *weight, *bias;
  int32_t activation;
};

struct EncoderShape {
  int64_t layers, hidden, intermediate, heads, max_length, threads;
  float eps;
  int32_t activation;
  // Whether outputs are those of the first token alone.
  int32_t first_token;
};

struct Text {
  const uint32_t* tokens;
  int64_t length;
};

class Encoder {
 public:
  virtual ~Encoder() = default;
  // `outputs`: [count, outputs of the head], or [count, C] without a head.
  virtual void encode(const Text* texts, int64_t count, float* outputs) = 0;
};

namespace avx2 {
Decoder* decoder(const Shape&, const Layer*, const Matrix&, const Matrix&, const float*, const float*);
Encoder* encoder(const EncoderShape&, const EncoderLayer*, const EncoderEmbeddings&, const Dense*, int64_t);
}  // namespace avx2
namespace avx512 {
Decoder* decoder(const Shape&, const Layer*, const Matrix&, const Matrix&, const float*, const float*);
Encoder* encoder(const EncoderShape&, const EncoderLayer*, const EncoderEmbeddings&, const Dense*, int64_t);
}  // namespace avx512
namespace avx512bf16 {
Decoder* decoder(const Shape&, const Layer*, const Matrix&, const Matrix&, const float*, const float*);
Encoder* encoder(const EncoderShape&, const EncoderLayer*, const EncoderEmbeddings&, const Dense*, int64_t);
}  // namespace avx512bf16

}  // namespace athanor
