// The header-only numerics of csrc/include for NumPy, without torch in between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"
#include "fmkernels/networks.h"
#include "lanes.h"
#include "philox.h"

namespace py = pybind11;
using namespace fmkernels;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
const Numerics<T>& numerics(int register_bytes) {
  if constexpr (sizeof(T) == 4) {
    if (register_bytes == 0) return scalar::float32;
    if (register_bytes == 16) return bytes16::float32;
    if (register_bytes == 32) return bytes32::float32;
    if (register_bytes == 64) return bytes64::float32;
  } else {
    if (register_bytes == 0) return scalar::float64;
    if (register_bytes == 16) return bytes16::float64;
    if (register_bytes == 32) return bytes32::float64;
    if (register_bytes == 64) return bytes64::float64;
  }
  throw std::invalid_argument("register_bytes: expected 0, 16, 32 or 64");
}

Distribution parse(const std::string& name) {
#define PARSE(known) \
  if (name == #known) return Distribution::known;
  FMKERNELS_DISTRIBUTIONS(PARSE)
#undef PARSE
  throw std::invalid_argument("unknown distribution " + name);
}

// NaN everywhere: what a kernel reads before it writes, or never writes, shows in the result.
template <class T>
Array<T> poisoned(const std::vector<py::ssize_t>& shape) {
  Array<T> array(shape);
  std::fill_n(array.mutable_data(), array.size(), std::numeric_limits<T>::quiet_NaN());
  return array;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Runs kernel(args, …) over all groups with poisoned scratch of exactly the size that it asks for.
template <class T, class Args>
void run(
    const SoftSortKernels<T>& kernels,
    void (*SoftSortKernels<T>::*kernel)(const Args&, int64_t, int64_t, void*), const Args& args,
    const SoftSortArgs<T>& sort) {
  const size_t bytes = kernels.scratch_bytes(sort.plan);
  std::unique_ptr<T, Free> scratch(
      static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
  std::fill_n(scratch.get(), bytes / sizeof(T), std::numeric_limits<T>::quiet_NaN());
  (kernels.*kernel)(args, 0, (sort.queries + kernels.lanes - 1) / kernels.lanes, scratch.get());
}

template <class T>
struct Problem {
  SortingNetwork network;
  SortingPlan plan;
  SoftSortArgs<T> args;

  Problem(
      const Array<T>& scores, double steepness, const std::string& name,
      const std::string& distribution, double art_lambda)
      : network(name, static_cast<int32_t>(scores.shape(1))),
        plan(network.plan()),
        args{plan, parse(distribution), T(steepness), T(art_lambda), scores.shape(0),
             scores.data()} {}
};

template <class T>
py::tuple soft_sort(
    const Array<T>& scores, int register_bytes, double steepness, const std::string& network,
    const std::string& distribution, double art_lambda) {
  const Problem<T> problem(scores, steepness, network, distribution, art_lambda);
  const auto queries = scores.shape(0), n = scores.shape(1);
  Array<T> values = poisoned<T>({queries, n}), permutation = poisoned<T>({queries, n, n});
  const auto& kernels = numerics<T>(register_bytes).soft_sort;
  const SoftSortForward<T> args{problem.args, values.mutable_data(), permutation.mutable_data()};
  run(kernels, &SoftSortKernels<T>::forward, args, problem.args);
  return py::make_tuple(values, permutation);
}

template <class T>
Array<T> soft_sort_backward(
    const Array<T>& grad_values, const Array<T>& grad_permutation, const Array<T>& scores,
    int register_bytes, double steepness, const std::string& network,
    const std::string& distribution, double art_lambda) {
  const Problem<T> problem(scores, steepness, network, distribution, art_lambda);
  const auto queries = scores.shape(0), n = scores.shape(1);
  Array<T> grad = poisoned<T>({queries, n});
  const auto& kernels = numerics<T>(register_bytes).soft_sort;
  const SoftSortBackward<T> args{
      problem.args, grad_values.data(), grad_permutation.data(), grad.mutable_data()};
  run(kernels, &SoftSortKernels<T>::backward, args, problem.args);
  return grad;
}

template <class T>
py::tuple cross_entropy(
    const Array<T>& student, const Array<T>& teacher, const Array<T>& mask, int register_bytes,
    double steepness, const std::string& network, const std::string& distribution,
    double art_lambda) {
  const Problem<T> problem(student, steepness, network, distribution, art_lambda);
  const auto queries = student.shape(0), n = student.shape(1);
  Array<T> losses = poisoned<T>({queries}), grad = poisoned<T>({queries, n});
  const auto& kernels = numerics<T>(register_bytes).soft_sort;
  const CrossEntropyForward<T> args{
      problem.args, teacher.data(),        T(steepness),       mask.data(),
      T(1),         losses.mutable_data(), grad.mutable_data()};
  run(kernels, &SoftSortKernels<T>::cross_entropy, args, problem.args);
  return py::make_tuple(losses, grad);
}

template <class T>
Array<T> elementwise(const std::string& name, const Array<T>& x, int register_bytes) {
  const Numerics<T>& functions = numerics<T>(register_bytes);
  if (x.size() % functions.soft_sort.lanes != 0) throw std::invalid_argument("x: ragged length");
  const ElementwiseFunction<T> function = name == "log"           ? functions.log
                                          : name == "exp"         ? functions.exp
                                          : name == "cauchy_tail" ? functions.cauchy_tail
                                          : name == "erfc"        ? functions.erfc
                                          : name == "power"       ? functions.fourth_root_inverse
                                                                  : nullptr;
  if (function == nullptr) throw std::invalid_argument("unknown function " + name);
  Array<T> y = poisoned<T>({x.size()});
  function(x.data(), y.mutable_data(), x.size());
  return y;
}

// All that the CUDA kernels compute, `rows` rows of X at a time: values, permutation, gradient of the
// scores, losses, gradient of the student, losses without a gradient. The queries are numbered from
// first_query on, and all arrays moved down by as much: a 32-bit offset would leave them.
py::tuple by_block(
    const Array<float>& student, const Array<float>& teacher, const Array<float>& mask,
    const Array<float>& grad_values, const Array<float>& grad_permutation, int32_t rows,
    double steepness, double teacher_steepness, const std::string& network,
    const std::string& distribution, double art_lambda, int64_t first_query) {
  Problem<float> problem(student, steepness, network, distribution, art_lambda);
  const auto queries = student.shape(0), n = student.shape(1);
  Array<float> values = poisoned<float>({queries, n}), grad = poisoned<float>({queries, n});
  Array<float> permutation = poisoned<float>({queries, n, n});
  Array<float> losses = poisoned<float>({queries}), only_losses = poisoned<float>({queries});
  Array<float> grad_student = poisoned<float>({queries, n});
  const auto size = static_cast<int32_t>(n);
  const auto moved = [&](auto* memory, int64_t length) { return memory - first_query * length; };
  problem.args.scores = moved(student.data(), n);
  block_forward(
      {problem.args, moved(values.mutable_data(), n), moved(permutation.mutable_data(), n * n)},
      network, size, rows, first_query);
  block_backward(
      {problem.args, moved(grad_values.data(), n), moved(grad_permutation.data(), n * n),
       moved(grad.mutable_data(), n)},
      network, size, rows, first_query);
  CrossEntropyForward<float> args{
      problem.args,
      moved(teacher.data(), n),
      float(teacher_steepness),
      moved(mask.data(), 1),
      1.0f,
      moved(losses.mutable_data(), 1),
      moved(grad_student.mutable_data(), n)};
  block_cross_entropy(args, network, size, rows, first_query);
  args.losses = moved(only_losses.mutable_data(), 1);
  args.grad_student = nullptr;
  block_cross_entropy(args, network, size, rows, first_query);
  return py::make_tuple(values, permutation, grad, losses, grad_student, only_losses);
}

const Signs& signs(int register_bytes) {
  if (register_bytes == 0) return scalar::signs;
  if (register_bytes == 16) return bytes16::signs;
  if (register_bytes == 32) return bytes32::signs;
  if (register_bytes == 64) return bytes64::signs;
  throw std::invalid_argument("register_bytes: expected 0, 16, 32 or 64");
}

Array<uint32_t> philox_words(
    const Array<uint32_t>& counters, uint32_t low, uint32_t high, int register_bytes) {
  if (counters.ndim() != 2 || counters.shape(0) % 32 != 0 || counters.shape(1) != 4) {
    throw std::invalid_argument("counters: expected (a multiple of 32, 4)");
  }
  Array<uint32_t> words({counters.shape(0), counters.shape(1)});
  std::copy_n(counters.data(), counters.size(), words.mutable_data());
  const uint32_t key[2] = {low, high};
  signs(register_bytes).philox(key, words.mutable_data(), counters.shape(0));
  return words;
}

Array<float> flipped(
    const Array<float>& values, const Array<uint32_t>& words, bool highest, int register_bytes) {
  if (values.size() % 32 != 0 || words.size() != values.size() / (highest ? 1 : 32)) {
    throw std::invalid_argument("words: expected a bit, or a word, for each of 32 · n values");
  }
  Array<float> result(values.size());
  std::copy_n(values.data(), values.size(), result.mutable_data());
  const Signs& functions = signs(register_bytes);
  const FlipFunction flip = highest ? functions.flip_by_highest : functions.flip;
  flip(words.data(), result.mutable_data(), values.size());
  return result;
}

Array<float> entries(const Array<uint32_t>& words, int register_bytes) {
  if (words.size() % 32 != 0) throw std::invalid_argument("words: expected 32 · n");
  Array<float> result(words.size());
  signs(register_bytes).uniform(words.data(), result.mutable_data(), words.size());
  return result;
}

template <class T>
void define(py::module_& module) {
  module.def("soft_sort", soft_sort<T>);
  module.def("soft_sort_backward", soft_sort_backward<T>);
  module.def("cross_entropy", cross_entropy<T>);
  module.def("elementwise", elementwise<T>);
}

PYBIND11_MODULE(fmkernels_native, module) {
  define<float>(module);
  define<double>(module);
  module.def("by_block", by_block);
  module.def("philox", philox_words);
  module.def("flip", flipped);
  module.def("vera_entries", entries);

  // all comparators as (lo, hi), layer after layer, and the number of them in each layer
  module.def("layers", [](const std::string& network, int32_t n) {
    std::vector<int32_t> lo, hi, sizes;
    for (const Layer& layer : network_layers(network, n)) {
      sizes.push_back(static_cast<int32_t>(layer.size()));
      for (const Wires& wires : layer) {
        lo.push_back(wires.first);
        hi.push_back(wires.second);
      }
    }
    const auto array = [](const std::vector<int32_t>& v) { return Array<int32_t>(v.size(), v.data()); };
    return py::make_tuple(array(lo), array(hi), sizes);
  });
  module.def("packed_plan", [](const std::string& network, int32_t n, int32_t group_rows) {
    return SortingNetwork(network, n, group_rows).packed();
  });
  module.def("scratch_bytes", [](const std::string& network, int32_t n, int register_bytes) {
    const SortingNetwork wired(network, n);
    return numerics<float>(register_bytes).soft_sort.scratch_bytes(wired.plan());
  });
}
