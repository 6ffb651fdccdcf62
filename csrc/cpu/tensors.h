// The few things that every CPU op does with tensors, on LibTorch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "poison.h"

namespace fmkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64 is computed in float64, everything narrower in float32.
inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? type : ScalarType::Float;
}

// The same numbers, dense, in `type`; no copy where they already are.
inline Tensor dense(const Tensor& tensor, ScalarType type) {
  Tensor converted = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

// A result of compute_type(type), in `type`. A tensor is not asked for its own dtype where it is
// known: that takes a dozen calls of the shim.
inline Tensor in_type(const Tensor& result, ScalarType type) {
  return type == compute_type(type) ? result : torch::stable::to(result, type);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// An uninitialised dense CPU tensor of float or double. The C shim allocates without a trip through
// the dispatcher, which would cost more than a small sort.
template <class T>
Tensor empty(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= shape[d] > 0 ? shape[d] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      std::is_same_v<T, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  if (poisoning()) {
    poison(tensor.data_ptr(), static_cast<size_t>(tensor.numel()) * sizeof(T));
  }
  return tensor;
}

// Calls fmkernels::<name>_reference, the op that has every shape and size, through the dispatcher.
template <class Result, class... Args>
Result call_reference(const char* name, const Args&... args) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::string full = std::string("fmkernels::") + name + "_reference";
  StableIValue stack[] = {from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(full.c_str(), "", stack, TORCH_ABI_VERSION));
  if constexpr (std::is_same_v<Result, Tensor>) {
    return to<Tensor>(stack[0]);
  } else {
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace fmkernels
