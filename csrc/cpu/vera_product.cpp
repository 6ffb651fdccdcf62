// Products of bfloat16 with sums in float32, for fmkernels/ops/vera_*/cpp.py.
#include "vera_product_kernel.h"

#include <cstdlib>
#include <memory>

#include "cpu_isa.h"
#include "scratch.h"
#include "tensors.h"

namespace fmkernels {
namespace {

const VeraProductKernels& kernels() { return FMKERNELS_FOR_CPU_ISA(vera_products); }

bool takes() {
#if defined(__x86_64__)
  return kernels().there && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

void check(const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(
      x.dim() == 2 && x.is_contiguous() && x.scalar_type() == type,
      "vera_product: expected a dense matrix of bfloat16, the left one possibly of float32");
  STD_TORCH_CHECK(takes(), "vera_product: this CPU has no instruction for it");
}

// Memory for what is packed, aligned to a cache line.
class Packed {
 public:
  explicit Packed(int64_t count)
      : words_(static_cast<uint32_t*>(
            std::aligned_alloc(64, static_cast<size_t>(rounded_up(4 * count + 1, 64))))) {
    if (!words_) throw std::bad_alloc();
  }
  uint32_t* words() const { return words_.get(); }

 private:
  struct Free {
    void operator()(uint32_t* words) const { std::free(words); }
  };
  std::unique_ptr<uint32_t, Free> words_;
};

// (tiles · 6, stride), with what is padding, by a function of the tiles [first, last), a thread's
// strip and the result.
template <class Function>
Tensor by_tiles(int64_t rows, int64_t stride, const Function& function) {
  const int64_t tiles = rounded_up(rows, vera_tile_rows) / vera_tile_rows;
  const Tensor result = empty<float>({tiles * vera_tile_rows, stride});
  float* to = data_of<float>(result);
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    const ThreadScratch strip(vera_strip_words * sizeof(uint32_t));
    function(first, last, static_cast<uint32_t*>(strip.memory()), to);
  });
  return result;
}

// Gᵀ U of (T, n) and (T, r): (n, r), and padding.
Tensor sum_of_outer(const Tensor& g, const Tensor& u) {
  check(g, ScalarType::BFloat16);
  check(u, ScalarType::BFloat16);
  STD_TORCH_CHECK(g.size(0) == u.size(0), "vera_product: expected as many rows in both");
  const int64_t inner = g.size(0), rows = g.size(1), columns = u.size(1);
  const int64_t pairs = (inner + 1) / 2, stride = rounded_up(columns, vera_tile_columns);
  const Packed right(pairs * stride);
  const auto *of_g = data_of<const uint16_t>(g), *of_u = data_of<const uint16_t>(u);
  torch::stable::parallel_for(0, pairs, 16, [&](int64_t first, int64_t last) {
    kernels().pack_right(of_u, inner, columns, first, last, right.words());
  });
  return by_tiles(rows, stride, [&](int64_t first, int64_t last, uint32_t* strip, float* to) {
    kernels().sum_of_outer(of_g, right.words(), inner, rows, stride, first, last, strip, to);
  });
}

// S Aᵀ of (n, m) in float32 and (r, m): (n, r), and padding.
Tensor product_of_rows(const Tensor& s, const Tensor& a) {
  check(s, ScalarType::Float);
  check(a, ScalarType::BFloat16);
  STD_TORCH_CHECK(s.size(1) == a.size(1), "vera_product: expected rows of one length");
  const int64_t rows = s.size(0), inner = s.size(1), columns = a.size(0);
  const int64_t pairs = (inner + 1) / 2, stride = rounded_up(columns, vera_tile_columns);
  const Packed right(pairs * stride);
  const float* of_s = data_of<const float>(s);
  const auto* of_a = data_of<const uint16_t>(a);
  torch::stable::parallel_for(0, pairs, 16, [&](int64_t first, int64_t last) {
    kernels().pack_right_of_rows(of_a, columns, inner, first, last, right.words());
  });
  return by_tiles(rows, stride, [&](int64_t first, int64_t last, uint32_t* strip, float* to) {
    kernels().product_of_rows(of_s, right.words(), rows, inner, stride, first, last, strip, to);
  });
}

}  // namespace
}  // namespace fmkernels

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("vera_sum_of_outer", TORCH_BOX(&fmkernels::sum_of_outer));
  m.impl("vera_product_of_rows", TORCH_BOX(&fmkernels::product_of_rows));
}
