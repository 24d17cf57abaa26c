// What the ranks of one machine's CPU share of layers' matrices besides the matrices: their gradients, which a layer's backward pass writes
// where the rank that sums them reads them, in the numbers that products come in, and copies in bfloat16, which the rank that updates a
// part makes for all. So no rank widens or narrows what another one owns.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "shared_memory.hpp"

namespace athanor {

class SharedMatrices {
 public:
  // For contiguous matrices of floats on the CPU, in the same order and with the same numbers on all ranks, whose products have the kind
  // `kind`, float or bfloat16. A collective; throws c10::Error.
  SharedMatrices(std::shared_ptr<SharedMemory> memory, const std::vector<at::Tensor>& matrices, at::ScalarType kind);
  ~SharedMatrices();
  SharedMatrices(const SharedMatrices&) = delete;
  SharedMatrices& operator=(const SharedMatrices&) = delete;

  // Before a backward pass: whether gradients may come here. A layer that is called more than once in it must not find them open.
  void open(bool open);
  // After it: whether a parameter's gradient has come here.
  bool has_gradient(const at::Tensor& parameter) const;
  // Once all ranks are so far: the sum over the ranks of the numbers from `begin` to `end` becomes that part of the parameter's gradient,
  // whose other parts are not said. Others may be summed on other threads.
  void sum_gradient(const at::Tensor& parameter, int64_t begin, int64_t end);
  // Brings a part of the copy in bfloat16 up to date, if the parameter is one of the matrices and there are copies. All ranks call it for
  // all parameters, whether they have a part or not.
  void narrow(const at::Tensor& parameter, int64_t begin, int64_t end);

  struct Matrix;

 private:
  Matrix* find(const at::Tensor& parameter) const;

  std::vector<std::unique_ptr<Matrix>> matrices_;
};

// What a parameter is known by below.
inline const void* key_of(const at::Tensor& parameter) { return parameter.unsafeGetTensorImpl(); }
// For a layer's backward pass: where to write the gradient of a parameter, shaped like it; undefined if it goes to autograd. Throws
// c10::Error when it has been written before in this pass.
at::Tensor gradient_of(const void* key, at::ScalarType kind);
// A parameter in bfloat16, not to be changed; undefined if there is no copy.
at::Tensor narrowed(const void* key);

}  // namespace athanor
