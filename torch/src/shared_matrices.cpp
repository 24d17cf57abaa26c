#include "shared_matrices.hpp"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "kernels.hpp"

namespace athanor {

struct SharedMatrices::Matrix {
  const void* key;
  // In bfloat16, shaped like the parameter; undefined where products are of floats.
  at::Tensor half;
  // A copy that no layer has read is not kept up to date, and then not read any more. The same on all ranks.
  bool is_read = false, is_stale = false;
  // This rank's gradient, shaped like the parameter.
  at::Tensor own;
  // All ranks' gradients, this one's first and then the others' in their order.
  std::vector<const char*> of_ranks;
  // Their sum in floats; only the part that this rank sums is ever touched.
  at::Tensor sum;
  bool is_open = false, is_filled = false;
};

namespace {

// Numbers that are summed at a time: they stay in the first cache.
constexpr int64_t kBlock = 2048;

// All matrices of the process, which has several ranks in tests.
std::mutex mutex;
std::unordered_map<const void*, SharedMatrices::Matrix*> all;

}  // namespace

SharedMatrices::SharedMatrices(std::shared_ptr<SharedMemory> memory, const std::vector<at::Tensor>& matrices, at::ScalarType kind) {
  TORCH_CHECK(kind == at::kFloat || kind == at::kBFloat16, "products are of floats or bfloat16");
  const bool half = kind == at::kBFloat16;
  // Each in cache lines of its own.
  const auto bytes_of = [&](const at::Tensor& matrix) {
    return (matrix.numel() * static_cast<int64_t>(c10::elementSize(kind)) + 63) / 64 * 64;
  };
  int64_t bytes = 0;
  for (const auto& matrix : matrices) bytes += bytes_of(matrix);
  // The gradients of each rank, then the copies, which have the gradients' size.
  const int64_t world = memory->world();
  const auto region = memory->region(static_cast<std::size_t>(bytes * (world + (half ? 1 : 0))));
  int64_t at = 0;
  for (const auto& parameter : matrices) {
    const auto place = [&](int64_t block) { return region.get() + bytes * block + at; };
    const auto shared = [&](char* data) { return at::from_blob(data, parameter.sizes(), [region](void*) {}, at::TensorOptions(kind)); };
    auto matrix = std::make_unique<Matrix>();
    matrix->key = key_of(parameter);
    if (half) matrix->half = shared(place(world));
    matrix->own = shared(place(memory->rank()));
    matrix->of_ranks.push_back(place(memory->rank()));
    for (int64_t rank = 0; rank < world; rank++)
      if (rank != memory->rank()) matrix->of_ranks.push_back(place(rank));
    at += bytes_of(parameter);
    if (half && memory->rank() == 0)
      athanor::narrow(parameter.const_data_ptr<float>(), static_cast<uint16_t*>(matrix->half.mutable_data_ptr()), parameter.numel());
    matrices_.push_back(std::move(matrix));
  }
  memory->sync();
  const std::lock_guard lock(mutex);
  for (const auto& matrix : matrices_) all[matrix->key] = matrix.get();
}

SharedMatrices::~SharedMatrices() {
  const std::lock_guard lock(mutex);
  for (const auto& matrix : matrices_) all.erase(matrix->key);
}

SharedMatrices::Matrix* SharedMatrices::find(const at::Tensor& parameter) const {
  const std::lock_guard lock(mutex);
  const auto found = all.find(key_of(parameter));
  return found == all.end() ? nullptr : found->second;
}

void SharedMatrices::open(bool open) {
  const std::lock_guard lock(mutex);
  for (const auto& matrix : matrices_) {
    matrix->is_open = open;
    matrix->is_filled = false;
  }
}

bool SharedMatrices::has_gradient(const at::Tensor& parameter) const {
  const auto* matrix = find(parameter);
  return matrix != nullptr && matrix->is_filled;
}

void SharedMatrices::sum_gradient(const at::Tensor& parameter, int64_t begin, int64_t end) {
  auto* matrix = find(parameter);
  TORCH_CHECK(matrix != nullptr, "a parameter is no shared matrix");
  if (!matrix->sum.defined()) matrix->sum = at::empty(parameter.sizes(), at::kFloat);
  auto* sums = matrix->sum.mutable_data_ptr<float>();
  const bool half = matrix->own.scalar_type() == at::kBFloat16;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    for (std::size_t rank = 0; rank < matrix->of_ranks.size(); rank++) {
      const char* numbers = matrix->of_ranks[rank];
      if (half) {
        const auto* x = reinterpret_cast<const uint16_t*>(numbers) + at;
        rank == 0 ? widen(x, sums + at, count) : add_widened(x, sums + at, count);
      } else {
        const auto* x = reinterpret_cast<const float*>(numbers) + at;
        rank == 0 ? static_cast<void>(std::copy_n(x, count, sums + at)) : add_to(x, sums + at, count);
      }
    }
  }
  parameter.mutable_grad() = matrix->sum;
}

void SharedMatrices::narrow(const at::Tensor& parameter, int64_t begin, int64_t end) {
  auto* matrix = find(parameter);
  if (matrix == nullptr || !matrix->half.defined()) return;
  if (!matrix->is_read) {
    matrix->is_stale = true;
    return;
  }
  auto* to = static_cast<uint16_t*>(matrix->half.mutable_data_ptr());
  athanor::narrow(parameter.const_data_ptr<float>() + begin, to + begin, end - begin);
}

at::Tensor gradient_of(const void* key, at::ScalarType kind) {
  const std::lock_guard lock(mutex);
  const auto found = all.find(key);
  if (found == all.end() || !found->second->is_open || found->second->own.scalar_type() != kind) return {};
  TORCH_CHECK(!found->second->is_filled, "a layer's gradient has come twice in one backward pass");
  found->second->is_filled = true;
  return found->second->own;
}

at::Tensor narrowed(const void* key) {
  const std::lock_guard lock(mutex);
  const auto found = all.find(key);
  if (found == all.end() || found->second->is_stale) return {};
  found->second->is_read = true;
  return found->second->half;
}

}  // namespace athanor
