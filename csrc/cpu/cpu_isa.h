// Which instruction set the kernels of this process run on.
#pragma once

#include <string>
#include <vector>

namespace fmkernels {

enum class CpuIsa { baseline, avx2, avx512 };

// The best that this CPU can run and this build has, or the one that FMKERNELS_CPU_ISA names.
// Decided once; throws std::runtime_error if that one cannot run here.
CpuIsa cpu_isa();

const char* cpu_isa_name(CpuIsa isa);
std::vector<CpuIsa> runnable_cpu_isas();

// Picks the entry of the chosen instruction set.
template <class Kernels>
const Kernels& for_cpu_isa(const Kernels& baseline, const Kernels& avx2, const Kernels& avx512) {
  switch (cpu_isa()) {
    case CpuIsa::avx512:
      return avx512;
    case CpuIsa::avx2:
      return avx2;
    case CpuIsa::baseline:
      return baseline;
  }
  return baseline;
}

#ifdef FMKERNELS_ONLY_BASELINE
#define FMKERNELS_FOR_CPU_ISA(kernels) (::fmkernels::baseline::kernels)
#else
#define FMKERNELS_FOR_CPU_ISA(kernels)                                             \
  ::fmkernels::for_cpu_isa(                                                        \
      ::fmkernels::baseline::kernels, ::fmkernels::avx2::kernels, ::fmkernels::avx512::kernels)
#endif

}  // namespace fmkernels
