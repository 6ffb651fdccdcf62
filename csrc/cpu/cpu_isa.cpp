#include "cpu_isa.h"

#include <cstdlib>
#include <stdexcept>

namespace fmkernels {
namespace {

bool can_run(CpuIsa isa) {
  if (isa == CpuIsa::baseline) return true;
#ifdef FMKERNELS_ONLY_BASELINE
  return false;
#else
  if (isa == CpuIsa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
}

CpuIsa choose() {
  const std::vector<CpuIsa> runnable = runnable_cpu_isas();
  const char* wanted = std::getenv("FMKERNELS_CPU_ISA");
  const std::string name = wanted == nullptr || *wanted == '\0' ? "auto" : wanted;
  if (name == "auto") return runnable.back();
  std::string choices = "auto";
  for (CpuIsa isa : runnable) {
    if (name == cpu_isa_name(isa)) return isa;
    choices += std::string(", ") + cpu_isa_name(isa);
  }
  throw std::runtime_error(
      "FMKERNELS_CPU_ISA: expected one that runs on this machine (" + choices + "), got '" + name +
      "'");
}

}  // namespace

std::vector<CpuIsa> runnable_cpu_isas() {
  std::vector<CpuIsa> runnable;
  for (CpuIsa isa : {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512}) {
    if (can_run(isa)) runnable.push_back(isa);
  }
  return runnable;
}

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::baseline:
      return "baseline";
    case CpuIsa::avx2:
      return "avx2";
    case CpuIsa::avx512:
      return "avx512";
  }
  return "unknown";
}

CpuIsa cpu_isa() {
  static const CpuIsa chosen = choose();
  return chosen;
}

}  // namespace fmkernels
