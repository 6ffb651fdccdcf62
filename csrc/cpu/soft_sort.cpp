// fmkernels::soft_sort and its backward on the CPU.
#include <optional>
#include <string>
#include <tuple>

#include "soft_sort_common.h"

namespace fmkernels {
namespace {

template <class T>
std::tuple<Tensor, Tensor> forward(
    const Tensor& scores, double steepness, const std::string& network,
    const std::string& distribution, double art_lambda) {
  std::vector<int64_t> shape = shape_of(scores);
  Tensor values = empty<T>(shape);
  shape.push_back(shape.back());
  Tensor permutation = empty<T>(shape);
  const SoftSortForward<T> args{
      soft_sort_args<T>(scores, steepness, network, distribution, art_lambda), data_of<T>(values),
      data_of<T>(permutation)};
  for_query_groups(&SoftSortKernels<T>::forward, args, args.sort);
  return {values, permutation};
}

template <class T>
Tensor backward(
    const std::optional<Tensor>& grad_values, const std::optional<Tensor>& grad_permutation,
    const Tensor& scores, double steepness, const std::string& network,
    const std::string& distribution, double art_lambda) {
  Tensor grad_scores = empty<T>(shape_of(scores));
  const SoftSortBackward<T> args{
      soft_sort_args<T>(scores, steepness, network, distribution, art_lambda),
      grad_values ? data_of<const T>(*grad_values) : nullptr,
      grad_permutation ? data_of<const T>(*grad_permutation) : nullptr, data_of<T>(grad_scores)};
  for_query_groups(&SoftSortKernels<T>::backward, args, args.sort);
  return grad_scores;
}

std::tuple<Tensor, Tensor> soft_sort(
    const Tensor& scores, double steepness, std::string network, std::string distribution,
    double art_lambda) {
  if (exceeds_kernel(scores)) {
    return call_reference<std::tuple<Tensor, Tensor>>(
        "soft_sort", scores, steepness, network, distribution, art_lambda);
  }
  const ScalarType type = scores.scalar_type();
  const Tensor x = dense(scores, compute_type(type));
  auto [values, permutation] =
      type == ScalarType::Double ? forward<double>(x, steepness, network, distribution, art_lambda)
                                 : forward<float>(x, steepness, network, distribution, art_lambda);
  return {in_type(values, type), in_type(permutation, type)};
}

Tensor soft_sort_backward(
    std::optional<Tensor> grad_values, std::optional<Tensor> grad_permutation,
    const Tensor& scores, double steepness, std::string network, std::string distribution,
    double art_lambda) {
  if (exceeds_kernel(scores)) {
    return call_reference<Tensor>(
        "soft_sort_backward", grad_values, grad_permutation, scores, steepness, network,
        distribution, art_lambda);
  }
  const ScalarType type = scores.scalar_type();
  const Tensor x = dense(scores, compute_type(type));
  if (grad_values) {
    check_count("grad_values", *grad_values, x.numel());
    grad_values = dense(*grad_values, compute_type(type));
  }
  if (grad_permutation) {
    check_count("grad_permutation", *grad_permutation, x.numel() * x.size(-1));
    grad_permutation = dense(*grad_permutation, compute_type(type));
  }
  const Tensor grad_scores =
      type == ScalarType::Double
          ? backward<double>(
                grad_values, grad_permutation, x, steepness, network, distribution, art_lambda)
          : backward<float>(
                grad_values, grad_permutation, x, steepness, network, distribution, art_lambda);
  return in_type(grad_scores, type);
}

}  // namespace
}  // namespace fmkernels

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("soft_sort", TORCH_BOX(&fmkernels::soft_sort));
  m.impl("soft_sort_backward", TORCH_BOX(&fmkernels::soft_sort_backward));
}
