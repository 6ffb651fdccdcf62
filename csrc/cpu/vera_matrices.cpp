// VeRA's shared matrices by position on the CPU, for fmkernels/ops/vera_matrices/cpp.py.
#include "vera_matrices_kernel.h"

#include "cpu_isa.h"
#include "tensors.h"

namespace fmkernels {
namespace {

// Below this many entries a second thread takes longer to start than to help.
constexpr int64_t entries_per_thread = int64_t{1} << 15;

Tensor vera_uniform(const Tensor& seed, int64_t stream, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(
      seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
      "vera_matrices: seed: expected one number of int64");
  STD_TORCH_CHECK(
      rows >= 0 && columns >= 0 && rows <= UINT32_MAX && columns <= UINT32_MAX,
      "vera_matrices: expected sizes of 32 bits, got (", rows, ", ", columns, ")");
  const auto key = static_cast<uint64_t>(*data_of<const int64_t>(seed));
  const Tensor result = empty<float>({rows, columns});
  float* matrix = data_of<float>(result);
  const VeraUniform fill = FMKERNELS_FOR_CPU_ISA(vera_uniform);
  torch::stable::parallel_for(
      0, rows, entries_per_thread / (columns + 1) + 1, [&](int64_t first, int64_t last) {
        fill(key, static_cast<uint32_t>(stream), first, last, columns, matrix);
      });
  return result;
}

}  // namespace
}  // namespace fmkernels

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("vera_uniform", TORCH_BOX(&fmkernels::vera_uniform));
}
