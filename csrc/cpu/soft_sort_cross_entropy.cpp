// fmkernels::soft_sort_cross_entropy on the CPU: the loss and the student's gradient, or only the
// loss.
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

struct Settings {
  double steepness, teacher_steepness;
  const std::string &network, &distribution;
  double art_lambda;
  const std::string& reduction;
};

// The reduced loss; writes the student's gradient if there is a tensor for it.
template <class T>
Tensor run(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
    const Settings& settings, const Tensor* grad_student) {
  const bool reduce = settings.reduction != "none";
  std::vector<int64_t> shape;
  if (!reduce) {
    shape = shape_of(student);
    shape.pop_back();
  }
  const Tensor result = empty<T>(shape);
  const SoftSortArgs<T> sort = soft_sort_args<T>(
      student, settings.steepness, settings.network, settings.distribution, settings.art_lambda);
  std::vector<T> reduced_losses(reduce ? sort.queries : 0);
  T* losses = reduce ? reduced_losses.data() : data_of<T>(result);
  const T* weights = mask ? data_of<const T>(*mask) : nullptr;
  const double scale = reduction_scale(weights, sort.queries, settings.reduction == "mean");
  const CrossEntropyForward<T> args{
      sort,   data_of<const T>(teacher), static_cast<T>(settings.teacher_steepness),
      weights, static_cast<T>(scale),    losses,
      grad_student != nullptr ? data_of<T>(*grad_student) : nullptr};
  for_query_groups(&SoftSortKernels<T>::cross_entropy, args, args.sort);

  if (reduce) {  // in a fixed order, whatever the number of threads
    double sum = 0;
    for (int64_t q = 0; q < sort.queries; ++q) sum += losses[q];
    *data_of<T>(result) = static_cast<T>(sum);
  }
  return result;
}

// Any dtype and strides; loss and gradient are in the dtype of the arithmetic.
std::tuple<Tensor, std::optional<Tensor>> cross_entropy(
    const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
    const Settings& settings, bool with_grad) {
  const ScalarType arithmetic = compute_type(student.scalar_type());
  const Tensor x = dense(student, arithmetic), y = dense(teacher, arithmetic);
  check_count("teacher", y, x.numel());
  if (mask) {
    check_count("mask", *mask, x.numel() / x.size(-1));
    mask = dense(*mask, arithmetic);
  }
  std::optional<Tensor> grad;
  const auto run_in = [&](auto zero) {
    using T = decltype(zero);
    if (with_grad) grad = empty<T>(shape_of(x));
    return run<T>(x, y, mask, settings, grad ? &*grad : nullptr);
  };
  const Tensor loss = arithmetic == ScalarType::Double ? run_in(0.0) : run_in(0.0f);
  return {loss, grad};
}

std::tuple<Tensor, Tensor> soft_sort_cross_entropy(
    const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask, double steepness,
    std::optional<double> teacher_steepness, std::string network, std::string distribution,
    double art_lambda, std::string reduction) {
  if (exceeds_kernel(student)) {
    return call_reference<std::tuple<Tensor, Tensor>>(
        "soft_sort_cross_entropy", student, teacher, mask, steepness, teacher_steepness, network,
        distribution, art_lambda, reduction);
  }
  const Settings settings{steepness,    teacher_steepness.value_or(steepness), network,
                          distribution, art_lambda,                            reduction};
  auto [loss, grad] = cross_entropy(student, teacher, mask, settings, true);
  return {loss, *grad};
}

Tensor soft_sort_cross_entropy_loss(
    const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask, double steepness,
    std::optional<double> teacher_steepness, std::string network, std::string distribution,
    double art_lambda, std::string reduction) {
  if (exceeds_kernel(student)) {
    return call_reference<Tensor>(
        "soft_sort_cross_entropy_loss", student, teacher, mask, steepness, teacher_steepness,
        network, distribution, art_lambda, reduction);
  }
  const Settings settings{steepness,    teacher_steepness.value_or(steepness), network,
                          distribution, art_lambda,                            reduction};
  return std::get<0>(cross_entropy(student, teacher, mask, settings, false));
}

}  // namespace
}  // namespace fmkernels

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("soft_sort_cross_entropy", TORCH_BOX(&fmkernels::soft_sort_cross_entropy));
  m.impl("soft_sort_cross_entropy_loss", TORCH_BOX(&fmkernels::soft_sort_cross_entropy_loss));
}
