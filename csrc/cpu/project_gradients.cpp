// fmkernels::project_gradients on the CPU.
#include "project_gradients_kernel.h"

#include <algorithm>
#include <optional>
#include <string>

#include "cpu_isa.h"
#include "scratch.h"
#include "tensors.h"

namespace fmkernels {
namespace {

template <class T>
const ProjectionKernels<T>& projection_kernels();
template <>
inline const ProjectionKernels<float>& projection_kernels<float>() {
  return FMKERNELS_FOR_CPU_ISA(projections_f32);
}
template <>
inline const ProjectionKernels<double>& projection_kernels<double>() {
  return FMKERNELS_FOR_CPU_ISA(projections_f64);
}

Kind parse_kind(const std::string& name) {
  if (name == "count_sketch") return Kind::count_sketch;
  if (name == "rademacher") return Kind::rademacher;
  if (name == "khatri_rao") return Kind::khatri_rao;
  STD_TORCH_CHECK(name == "kronecker", "project_gradients: kind: unknown ", name);
  return Kind::kronecker;
}

// Where the rows of each sample begin, and the end.
std::vector<int64_t> offsets_of(const std::optional<Tensor>& given, int64_t pairs, int64_t rows) {
  if (!given) {
    STD_TORCH_CHECK(
        rows > 0 && pairs % rows == 0, "project_gradients: rows: expected a divisor of ", pairs);
    std::vector<int64_t> offsets(pairs / rows + 1);
    for (size_t b = 0; b < offsets.size(); ++b) offsets[b] = static_cast<int64_t>(b) * rows;
    return offsets;
  }
  STD_TORCH_CHECK(
      given->scalar_type() == ScalarType::Long && given->numel() > 0,
      "project_gradients: offsets: expected int64, one more than there are samples");
  std::vector<int64_t> offsets(given->numel());
  gather(*given, offsets.data());
  STD_TORCH_CHECK(
      offsets.front() == 0 && offsets.back() == pairs &&
          std::is_sorted(offsets.begin(), offsets.end()),
      "project_gradients: offsets: expected numbers that rise from 0 to ", pairs);
  return offsets;
}

// The samples with which groups begin, and the end: of at most projection_group rows, or of one
// sample.
std::vector<int64_t> groups_of(const std::vector<int64_t>& offsets) {
  const int64_t samples = static_cast<int64_t>(offsets.size()) - 1;
  std::vector<int64_t> groups{0};
  for (int64_t b = 1; b < samples; ++b) {
    const bool full = b - groups.back() == projection_group;
    if (full || offsets[b + 1] - offsets[groups.back()] > projection_group) groups.push_back(b);
  }
  if (samples > 0) groups.push_back(samples);
  return groups;
}

// Below this many operations a second thread takes longer to start than to help.
constexpr int64_t operations_per_thread = int64_t{1} << 17;

int64_t operations_per_task(Kind kind, int64_t pairs, int64_t out, int64_t in, int64_t tiles) {
  pairs = std::min(pairs, projection_group);
  if (kind == Kind::count_sketch) return pairs * out * in / tiles;
  return pairs * (kind == Kind::rademacher ? out * in : out + in) * 16;
}

template <class T>
void run(ProjectionArgs<T>& args, int64_t samples, int64_t group_count) {
  const ProjectionKernels<T>& kernels = projection_kernels<T>();
  std::vector<int32_t> exponents(2 * samples);
  args.delta_exponents = exponents.data();
  args.exponents = exponents.data() + samples;
  const int64_t pairs = args.offsets[samples];
  const int64_t numbers = pairs * (args.out + args.in) / samples + 1;
  torch::stable::parallel_for(
      0, samples, operations_per_thread / numbers + 1, [&](int64_t first, int64_t last) {
        kernels.measure(args, first, last);
      });
  const int64_t tiles = kernels.tiles(args);
  const size_t bytes = static_cast<size_t>(kernels.scratch_bytes(args));
  const int64_t operations =
      operations_per_task(args.kind, pairs, args.out, args.in, tiles);
  torch::stable::parallel_for(
      0, group_count * tiles, operations_per_thread / (operations + 1) + 1,
      [&](int64_t first, int64_t last) {
        kernels.project(args, first, last, ThreadScratch(bytes).memory());
      });
}

Tensor project_gradients(
    const Tensor& grad_output, const Tensor& activation, std::optional<Tensor> offsets,
    int64_t rows, std::optional<Tensor> signs, std::string kind, int64_t dim, bool bias,
    double scale, int64_t seed, int64_t layer, int64_t repeats, int64_t left) {
  STD_TORCH_CHECK(
      grad_output.dim() == 2 && activation.dim() == 2 &&
          grad_output.size(0) == activation.size(0) && grad_output.size(1) > 0 &&
          activation.size(1) > 0 && dim > 0 && repeats > 0 && left >= 0,
      "project_gradients: expected (P, out) and (P, in)");
  const int64_t out = grad_output.size(1), in = activation.size(1);
  const std::vector<int64_t> all_offsets = offsets_of(offsets, grad_output.size(0), rows);
  const std::vector<int64_t> groups = groups_of(all_offsets);
  const int64_t samples = static_cast<int64_t>(all_offsets.size()) - 1;
  const Tensor result = empty<float>({samples, dim});
  if (samples == 0) return result;
  std::optional<Tensor> packed;
  if (signs) {
    const int64_t words = out * ((in + 31) / 32) + (bias ? (out + 31) / 32 : 0);
    STD_TORCH_CHECK(
        signs->scalar_type() == ScalarType::Int && signs->numel() == (dim + 15) / 16 * 16 * words,
        "project_gradients: signs: expected int32 of shape (", (dim + 15) / 16, ", ", words,
        ", 16)");
    packed = torch::stable::contiguous(*signs);
  }
  const auto project = [&](auto zero, ScalarType type) {
    using T = decltype(zero);
    const Tensor delta = dense(grad_output, type), a = dense(activation, type);
    ProjectionArgs<T> args{
        parse_kind(kind), out, in, dim, left, bias, scale, static_cast<uint32_t>(seed),
        static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), static_cast<uint32_t>(layer),
        repeats, packed ? data_of<const uint32_t>(*packed) : nullptr, data_of<const T>(delta),
        data_of<const T>(a), all_offsets.data(), groups.data(), nullptr, nullptr,
        data_of<float>(result)};
    run(args, samples, static_cast<int64_t>(groups.size()) - 1);
  };
  const bool wide = grad_output.scalar_type() == ScalarType::Double ||
                    activation.scalar_type() == ScalarType::Double;
  wide ? project(0.0, ScalarType::Double) : project(0.0f, ScalarType::Float);
  return result;
}

}  // namespace
}  // namespace fmkernels

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("project_gradients", TORCH_BOX(&fmkernels::project_gradients));
}
