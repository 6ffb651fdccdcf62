// fmkernels::soft_sort_cross_entropy on the CPU: the loss and, if asked, the student's gradient.
#include <optional>
#include <string>
#include <tuple>

#include "soft_sort_common.h"

namespace fmkernels {
namespace {

// The factor of every query's loss in the reduced one.
template <class T>
std::vector<T> query_weights(const T* mask, int64_t queries, bool mean) {
  double total = static_cast<double>(queries);
  if (mask != nullptr) {
    total = 0;
    for (int64_t q = 0; q < queries; ++q) total += mask[q];
  }
  const double scale = !mean ? 1 : total == 0 ? 0 : 1 / total;
  std::vector<T> weights(queries);
  for (int64_t q = 0; q < queries; ++q) {
    weights[q] = static_cast<T>((mask != nullptr ? mask[q] : 1) * scale);
  }
  return weights;
}

template <class T>
std::tuple<Tensor, Tensor> cross_entropy(
    const Tensor& student, const Tensor& teacher, const T* mask, double steepness,
    double teacher_steepness, const std::string& network, const std::string& distribution,
    double art_lambda, const std::string& reduction, bool compute_grad) {
  const ScalarType type = student.scalar_type();
  std::vector<int64_t> shape = shape_of(student);
  Tensor grad_student = empty(compute_grad ? shape : std::vector<int64_t>{0}, type);
  shape.pop_back();
  Tensor losses = empty(shape, type);

  const SoftSortArgs<T> sort =
      soft_sort_args<T>(student, steepness, network, distribution, art_lambda);
  const std::vector<T> weights = query_weights(mask, sort.queries, reduction == "mean");
  const CrossEntropyForward<T> args{
      sort,           data_of<const T>(teacher),
      static_cast<T>(teacher_steepness),
      weights.data(), data_of<T>(losses),
      compute_grad ? data_of<T>(grad_student) : nullptr};
  const auto& kernels = soft_sort_kernels<T>();
  for_query_groups(kernels.cross_entropy, args, sort.plan, sort.queries, kernels.lanes);

  T* loss = data_of<T>(losses);
  double sum = 0;  // in a fixed order, whatever the number of threads
  for (int64_t q = 0; q < sort.queries; ++q) {
    loss[q] = weights[q] == 0 ? 0 : weights[q] * loss[q];  // a weight of zero removes even a NaN
    sum += loss[q];
  }
  if (reduction != "none") {
    losses = empty({}, type);
    *data_of<T>(losses) = static_cast<T>(sum);
  }
  return {losses, grad_student};
}

std::tuple<Tensor, Tensor> soft_sort_cross_entropy(
    const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask, double steepness,
    double teacher_steepness, std::string network, std::string distribution, double art_lambda,
    std::string reduction, bool compute_grad) {
  const ScalarType type = compute_type(student);
  const Tensor x = dense(student, type), y = dense(teacher, type);
  check_count("teacher", y, x.numel());
  if (mask) {
    check_count("mask", *mask, x.numel() / (x.size(-1) > 0 ? x.size(-1) : 1));
    mask = dense(*mask, type);
  }
  auto [loss, grad_student] =
      is_double(x)
          ? cross_entropy<double>(
                x, y, mask ? data_of<const double>(*mask) : nullptr, steepness, teacher_steepness,
                network, distribution, art_lambda, reduction, compute_grad)
          : cross_entropy<float>(
                x, y, mask ? data_of<const float>(*mask) : nullptr, steepness, teacher_steepness,
                network, distribution, art_lambda, reduction, compute_grad);
  return {in_type(loss, student.scalar_type()), grad_student};
}

}  // namespace
}  // namespace fmkernels

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("soft_sort_cross_entropy", TORCH_BOX(&fmkernels::soft_sort_cross_entropy));
}
