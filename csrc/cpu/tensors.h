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

// A result of compute_type(type), in `type`. A tensor is not asked for its own dtype where it is
// known: that takes a dozen calls of the shim.
inline Tensor in_type(const Tensor& result, ScalarType type) {
  return type == compute_type(type) ? result : torch::stable::to(result, type);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// bfloat16, as its bits.
struct BFloat16 {
  uint16_t bits;
};

template <class T>
int32_t dtype_of() {
  if constexpr (std::is_same_v<T, double>) return aoti_torch_dtype_float64();
  if constexpr (std::is_same_v<T, BFloat16>) return aoti_torch_dtype_bfloat16();
  return aoti_torch_dtype_float32();
}

// An uninitialised dense CPU tensor of float, double or BFloat16. The C shim allocates without a trip through
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
      dtype_of<T>(), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  if (poisoning()) {
    poison(tensor.data_ptr(), static_cast<size_t>(tensor.numel()) * sizeof(T));
  }
  return tensor;
}

// The elements of a tensor of any strides, in a row.
template <class T>
void gather(const Tensor& tensor, T* dense) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const T* source = data_of<const T>(tensor);
  std::vector<int64_t> index(sizes.size());
  for (int64_t left = tensor.numel(); left > 0; --left) {
    *dense++ = *source;
    for (size_t d = sizes.size(); d-- > 0;) {
      source += strides[d];
      if (++index[d] < sizes[d]) break;
      source -= strides[d] * sizes[d];
      index[d] = 0;
    }
  }
}

// The same numbers, dense, in `type`, float or double; no copy where they already are.
inline Tensor dense(const Tensor& tensor, ScalarType type) {
  const Tensor converted = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  if (converted.is_contiguous()) return converted;
  // such as the gradient of a sum, one number with strides of 0: to copy 16 elements takes 4,000
  // instructions here and 10,000 through the dispatcher
  if (converted.numel() > 256) return torch::stable::contiguous(converted);
  const auto copy = [&](auto zero) {
    using T = decltype(zero);
    Tensor result = empty<T>(shape_of(converted));
    gather(converted, data_of<T>(result));
    return result;
  };
  return type == ScalarType::Double ? copy(0.0) : copy(0.0f);
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

}  // namespace fmkernels
