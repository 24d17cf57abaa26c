// The entry points: takes the best instruction set that the machine has. No exception leaves.
#include <malloc.h>
#include <sys/mman.h>

#include <cstddef>
#include <exception>

#include "abi.hpp"

namespace {

// 0: too old a machine; 1: AVX2; 2: AVX512 with VNNI; 3: that with BF16.
int best() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (!avx2 || !avx512) return avx2 ? 1 : 0;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

}  // namespace

extern "C" {

int32_t athanor_cpu_instruction_set() { return best(); }

void athanor_cpu_use_few_heaps() { mallopt(M_ARENA_MAX, 2); }

void athanor_cpu_release_free_memory() { malloc_trim(0); }

void athanor_cpu_advise(uint8_t* data, size_t bytes) { madvise(data, bytes, MADV_HUGEPAGE); }

// `instruction_set`: 1 to 3, at most what the machine has. Null: no memory.
athanor::Decoder* athanor_cpu_decoder(int32_t instruction_set, const athanor::Shape* shape, const athanor::Layer* layers,
                                      const athanor::Matrix* embeddings, const athanor::Matrix* head, const float* norm,
                                      const float* frequencies) {
  try {
    switch (instruction_set) {
      case 3: return athanor::avx512bf16::decoder(*shape, layers, *embeddings, *head, norm, frequencies);
      case 2: return athanor::avx512::decoder(*shape, layers, *embeddings, *head, norm, frequencies);
      default: return athanor::avx2::decoder(*shape, layers, *embeddings, *head, norm, frequencies);
    }
  } catch (const std::exception&) {
    return nullptr;
  }
}

// 0, or 1 if there is no memory.
int32_t athanor_cpu_step(athanor::Decoder* decoder, const athanor::Row* rows, int64_t count, float* logits) {
  try {
    decoder->step(rows, count, logits);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

void athanor_cpu_free(athanor::Decoder* decoder) { delete decoder; }

// As `athanor_cpu_decoder`. `heads`: layers of the head; without one, outputs are means of length 1.
athanor::Encoder* athanor_cpu_encoder(int32_t instruction_set, const athanor::EncoderShape* shape, const athanor::EncoderLayer* layers,
                                      const athanor::EncoderEmbeddings* embeddings, const athanor::Dense* head, int64_t heads) {
  try {
    switch (instruction_set) {
      case 3: return athanor::avx512bf16::encoder(*shape, layers, *embeddings, head, heads);
      case 2: return athanor::avx512::encoder(*shape, layers, *embeddings, head, heads);
      default: return athanor::avx2::encoder(*shape, layers, *embeddings, head, heads);
    }
  } catch (const std::exception&) {
    return nullptr;
  }
}

// 0, or 1 if there is no memory.
int32_t athanor_cpu_encode(athanor::Encoder* encoder, const athanor::Text* texts, int64_t count, float* outputs) {
  try {
    encoder->encode(texts, count, outputs);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

void athanor_cpu_encoder_free(athanor::Encoder* encoder) { delete encoder; }

}  // extern "C"
