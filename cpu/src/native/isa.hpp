// The whole of the kernels, once for each file that includes this with a namespace of its own.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

#include "abi.hpp"
#include "team.hpp"

namespace athanor::ATHANOR_ISA {
namespace {
#include "vector.hpp"
#include "product.hpp"
#include "float_product.hpp"
#include "machine.hpp"
#include "attention.hpp"
#include "adapter.hpp"
#include "decoder.hpp"
#include "encoder.hpp"
}  // namespace

athanor::Decoder* decoder(const Shape& shape, const Layer* layers, const athanor::Matrix& embeddings, const athanor::Matrix& head,
                          const float* norm, const float* frequencies) {
  return new Decoder(shape, layers, embeddings, head, norm, frequencies);
}

athanor::Encoder* encoder(const EncoderShape& shape, const EncoderLayer* layers, const EncoderEmbeddings& embeddings, const Dense* head,
                          int64_t heads) {
  return new Encoder(shape, layers, embeddings, head, heads);
}

}  // namespace athanor::ATHANOR_ISA
