// fmkernels::soft_sort_cross_entropy on the CPU: the loss and, if asked, the student's gradient.
#include <optional>
#include <string>
#include <tuple>

#include "soft_sort_common.h"

namespace fmkernels {
namespace {

// 1 / Σ mask for the mean, 1 otherwise: the factor of every loss besides its own mask.
template <class T>
double reduction_scale(const T* mask, int64_t queries, bool mean) {
  if (!mean) return 1;
  double total = static_cast<double>(queries);
  if (mask != nullptr) {
    total = 0;
    for (int64_t q = 0; q < queries; ++q) total += mask[q];
  }
  return total == 0 ? 0 : 1 / total;
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
  const bool reduce = reduction != "none";
  Tensor result = empty(reduce ? std::vector<int64_t>{} : shape, type);

  const SoftSortArgs<T> sort =
      soft_sort_args<T>(student, steepness, network, distribution, art_lambda);
  std::vector<T> reduced_losses(reduce ? sort.queries : 0);
  T* losses = reduce ? reduced_losses.data() : data_of<T>(result);
  const CrossEntropyForward<T> args{
      sort, data_of<const T>(teacher), static_cast<T>(teacher_steepness), mask,
      static_cast<T>(reduction_scale(mask, sort.queries, reduction == "mean")), losses,
      compute_grad ? data_of<T>(grad_student) : nullptr};
  for_query_groups(&SoftSortKernels<T>::cross_entropy, args, args.sort);

  if (reduce) {  // in a fixed order, whatever the number of threads
    double sum = 0;
    for (int64_t q = 0; q < sort.queries; ++q) sum += losses[q];
    *data_of<T>(result) = static_cast<T>(sum);
  }
  return {result, grad_student};
}

std::tuple<Tensor, Tensor> soft_sort_cross_entropy(
    const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask, double steepness,
    double teacher_steepness, std::string network, std::string distribution, double art_lambda,
    std::string reduction, bool compute_grad) {
  if (student.dim() > 0 && student.size(-1) > max_kernel_size) {
    return call_reference<std::tuple<Tensor, Tensor>>(
        "soft_sort_cross_entropy", student, teacher, mask, steepness, teacher_steepness, network,
        distribution, art_lambda, reduction, compute_grad);
  }
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
