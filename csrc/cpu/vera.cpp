// What VeRA does on the CPU beside matrix products, for fmkernels/ops/vera_*/cpp.py.
#include "vera_kernel.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "cpu_isa.h"
#include "scratch.h"
#include "tensors.h"

namespace fmkernels {
namespace {

template <class T>
const VeraKernels<T>& vera_kernels();
template <>
inline const VeraKernels<float>& vera_kernels<float>() {
  return FMKERNELS_FOR_CPU_ISA(vera_f32);
}
template <>
inline const VeraKernels<uint16_t>& vera_kernels<uint16_t>() {
  return FMKERNELS_FOR_CPU_ISA(vera_bf16);
}

// Below this many numbers a second thread takes longer to start than to help.
constexpr int64_t numbers_per_thread = int64_t{1} << 15;

// Calls function(first, last) on parts of the rows.
template <class Function>
void for_rows(int64_t rows, int64_t width, const Function& function) {
  torch::stable::parallel_for(0, rows, numbers_per_thread / (width + 1) + 1, function);
}

// Calls function(T{}) for a dense matrix of float32, or of bfloat16, of which T has the bits.
template <class Function>
Tensor for_type(const char* op, const Tensor& x, const Function& function) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), op, ": expected a dense matrix");
  if (x.scalar_type() == ScalarType::BFloat16) return function(uint16_t{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": expected float32 or bfloat16");
  return function(0.0f);
}

template <class T>
Tensor result_like(const Tensor& x) {
  if constexpr (std::is_same_v<T, uint16_t>) return empty<BFloat16>(shape_of(x));
  return empty<float>(shape_of(x));
}

void check_like(const char* op, const Tensor& tensor, const Tensor& other) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == other.scalar_type() && tensor.is_contiguous() &&
          tensor.dim() == 2 && tensor.size(0) == other.size(0) && tensor.size(1) == other.size(1),
      op, ": expected two dense matrices of one shape and dtype");
}

// Vectors (adapters, width) and the adapter of each row.
struct Adapters {
  const float* vectors;
  const int64_t* ids;

  Adapters(
      const char* op, const Tensor& x, const Tensor* given, const std::optional<Tensor>& ids_given,
      int64_t count)
      : vectors(given ? data_of<const float>(*given) : nullptr),
        ids(ids_given ? data_of<const int64_t>(*ids_given) : nullptr) {
    if (given) {
      STD_TORCH_CHECK(
          given->scalar_type() == ScalarType::Float && given->is_contiguous() &&
              given->dim() == 2 && given->size(1) == x.size(1) && count > 0,
          op, ": vectors: expected dense float32 of ", x.size(1), " columns");
    }
    if (!ids_given) return;
    STD_TORCH_CHECK(
        ids_given->scalar_type() == ScalarType::Long && ids_given->is_contiguous() &&
            ids_given->numel() == x.size(0),
        op, ": adapter_ids: expected dense int64, one per row");
    // a compiled call was not checked before
    const bool inside = std::all_of(ids, ids + x.size(0), [&](int64_t id) {
      return id >= -1 && id < count;
    });
    STD_TORCH_CHECK(inside, op, ": adapter_ids: expected integers from -1 to ", count - 1);
  }
};

Tensor scale_rows(const Tensor& x, const Tensor& vectors, std::optional<Tensor> ids) {
  return for_type("vera_expand", x, [&](auto zero) {
    using T = decltype(zero);
    const Adapters adapters("vera_expand", x, &vectors, ids, vectors.size(0));
    const Tensor result = result_like<T>(x);
    const int64_t width = x.size(1);
    const T* from = data_of<const T>(x);
    T* to = data_of<T>(result);
    for_rows(x.size(0), width, [&](int64_t first, int64_t last) {
      vera_kernels<T>().scale_rows(
          from, adapters.vectors, adapters.ids, first, last, width, to);
    });
    return result;
  });
}

Tensor add_scaled(
    const Tensor& base, const Tensor& z, const Tensor& vectors, std::optional<Tensor> ids) {
  check_like("vera_expand", z, base);
  return for_type("vera_expand", base, [&](auto zero) {
    using T = decltype(zero);
    const Adapters adapters("vera_expand", base, &vectors, ids, vectors.size(0));
    const Tensor result = result_like<T>(base);
    const int64_t width = base.size(1);
    const T *from = data_of<const T>(base), *added = data_of<const T>(z);
    T* to = data_of<T>(result);
    for_rows(base.size(0), width, [&](int64_t first, int64_t last) {
      vera_kernels<T>().add_scaled(
          from, added, adapters.vectors, adapters.ids, first, last, width, to);
    });
    return result;
  });
}

// Columns that a thread adds up at a time, so that the sums of all adapters stay in its cache: 1 MB
// of them. A column's sum does not depend on the others.
int64_t columns_of_a_part(int64_t adapters) {
  return std::clamp((int64_t{1} << 17) / adapters, int64_t{16}, int64_t{256});
}

Tensor sum_rows(const Tensor& x, const Tensor& y, std::optional<Tensor> ids, int64_t count) {
  check_like("vera_expand", y, x);
  return for_type("vera_expand", x, [&](auto zero) {
    using T = decltype(zero);
    const Adapters adapters("vera_expand", x, nullptr, ids, count);
    const int64_t rows = x.size(0), width = x.size(1);
    const Tensor result = empty<float>({count, width});
    const T *a = data_of<const T>(x), *b = data_of<const T>(y);
    float* to = data_of<float>(result);
    const int64_t step = columns_of_a_part(count), parts = (width + step - 1) / step;
    torch::stable::parallel_for(
        0, parts, numbers_per_thread / (rows * step + 1) + 1, [&](int64_t first, int64_t last) {
          const ThreadScratch sums(static_cast<size_t>(count * step) * sizeof(double));
          for (int64_t part = first; part < last; ++part) {
            vera_kernels<T>().sum_rows(
                a, b, adapters.ids, rows, part * step, std::min(width, (part + 1) * step), width,
                count, static_cast<double*>(sums.memory()), to);
          }
        });
    return result;
  });
}

const float* vector_of(const Tensor& vector, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      vector.scalar_type() == ScalarType::Float && vector.is_contiguous() &&
          vector.numel() == size,
      "vera_expand: ", name, ": expected ", size, " dense numbers of float32");
  return data_of<const float>(vector);
}

Tensor scale_matrix(const Tensor& B, const Tensor& d, const Tensor& b) {
  return for_type("vera_expand", B, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = B.size(0), rank = B.size(1);
    const float *of_columns = vector_of(d, rank, "lambda_d"), *of_rows = vector_of(b, rows, "lambda_b");
    const Tensor result = result_like<T>(B);
    const T* from = data_of<const T>(B);
    T* to = data_of<T>(result);
    for_rows(rows, rank, [&](int64_t first, int64_t last) {
      vera_kernels<T>().scale_matrix(from, of_columns, of_rows, first, last, rank, to);
    });
    return result;
  });
}

std::tuple<Tensor, Tensor> contract(
    const Tensor& M, const Tensor& B, const Tensor& d, const Tensor& b) {
  STD_TORCH_CHECK(
      M.dim() == 2 && M.is_contiguous() && M.scalar_type() == ScalarType::Float &&
          M.size(0) == B.size(0) && M.size(1) == B.size(1),
      "vera_expand: M: expected dense float32 of the shape of B");
  const int64_t rows = B.size(0), rank = B.size(1), step = vera_rows_of_a_part;
  const int64_t parts = (rows + step - 1) / step;
  const Tensor grad_b = empty<float>({rows}), grad_d = empty<float>({rank});
  const Tensor of_parts = empty<double>({parts, rank});
  for_type("vera_expand", B, [&](auto zero) {
    using T = decltype(zero);
    const float *of_columns = vector_of(d, rank, "lambda_d"), *of_rows = vector_of(b, rows, "lambda_b");
    const float* m = data_of<const float>(M);
    const T* from = data_of<const T>(B);
    float* to_b = data_of<float>(grad_b);
    double* to_d = data_of<double>(of_parts);
    torch::stable::parallel_for(
        0, parts, numbers_per_thread / (rank * step) + 1, [&](int64_t first, int64_t last) {
          for (int64_t part = first; part < last; ++part) {
            vera_kernels<T>().contract(
                m, from, of_columns, of_rows, part * step, std::min(rows, (part + 1) * step),
                rank, to_b, to_d + part * rank);
          }
        });
    return grad_b;
  });
  const double* from = data_of<const double>(of_parts);
  float* to = data_of<float>(grad_d);
  for (int64_t k = 0; k < rank; ++k) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += from[part * rank + k];
    to[k] = static_cast<float>(sum);
  }
  return {grad_d, grad_b};
}

Tensor drop(const Tensor& x, const Tensor& seed, double p) {
  STD_TORCH_CHECK(
      seed.scalar_type() == ScalarType::Long && seed.numel() == 1 && p >= 0 && p <= 1,
      "vera_dropout: expected a seed of int64, and p from 0 to 1");
  return for_type("vera_dropout", x, [&](auto zero) {
    using T = decltype(zero);
    const Tensor result = result_like<T>(x);
    const int64_t width = x.size(1);
    const auto key = static_cast<uint64_t>(*data_of<const int64_t>(seed));
    const auto threshold = static_cast<uint64_t>(std::nearbyint(std::ldexp(p, 32)));
    const float scale = p < 1 ? static_cast<float>(1 / (1 - p)) : 0.0f;
    const T* from = data_of<const T>(x);
    T* to = data_of<T>(result);
    for_rows(x.size(0), width, [&](int64_t first, int64_t last) {
      vera_kernels<T>().drop(from, key, threshold, scale, first, last, width, to);
    });
    return result;
  });
}

}  // namespace
}  // namespace fmkernels

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("vera_scale_rows", TORCH_BOX(&fmkernels::scale_rows));
  m.impl("vera_add_scaled", TORCH_BOX(&fmkernels::add_scaled));
  m.impl("vera_sum_rows", TORCH_BOX(&fmkernels::sum_rows));
  m.impl("vera_scale_matrix", TORCH_BOX(&fmkernels::scale_matrix));
  m.impl("vera_contract", TORCH_BOX(&fmkernels::contract));
  m.impl("vera_drop", TORCH_BOX(&fmkernels::drop));
}
