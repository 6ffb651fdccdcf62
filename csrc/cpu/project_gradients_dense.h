// Rademacher, KhatriRao and Kronecker: included by project_gradients_kernel.cpp alone.
#pragma once

#include "project_gradients_task.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

// Some rows of the matrix for 16 outputs, and some words of each: those of a given matrix, or
// drawn. Row `out` is that of the bias.
template <class T>
SignRows sign_rows(Task<T>& task, int64_t tile, int64_t row, int64_t rows, int64_t word) {
  const ProjectionArgs<T>& args = task.args;
  const int64_t weight_words = up(args.in, 32) / 32, bias_words = up(args.out, 32) / 32;
  const int64_t left = (row < args.out ? weight_words : bias_words) - word;
  const int64_t count = left < Task<T>::matrix_words ? left : Task<T>::matrix_words;
  if (args.packed != nullptr) {
    const int64_t all = args.out * weight_words + args.bias * bias_words;
    const int64_t first = tile * all + row * weight_words + word;
    return {args.packed + first * drawn, weight_words * drawn, rows, count};
  }
  constexpr int64_t row_stride = Task<T>::matrix_words * drawn;
  const auto groups = [&](int64_t r, int64_t w) -> Draw {
    return {{static_cast<uint32_t>((word + w) / 4), static_cast<uint32_t>(row + r),
             static_cast<uint32_t>(tile * drawn), task.stream(dense_stream)},
            task.words + r * row_stride + w * drawn};
  };
  for (int64_t r = 0; r < rows; ++r) {
    int64_t w = 0;
    for (; w + 4 < count; w += 8) draw<2>(task.key, 2, drawn, {groups(r, w), groups(r, w + 4)});
    for (; w < count; w += 4) draw<1>(task.key, 2, drawn, {groups(r, w)});
  }
  return {task.words, row_stride, rows, count};
}

#if defined(__AVX512F__)
template <class T, int count>
void add_together(
    Task<T>& task, const SignRows& signs, int64_t n, const float* const (&x)[count],
    const float* const (&coefficient)[count]) {
  const float* tables[count];
  double* sums[count];
  for (int m = 0; m < count; ++m) {
    float* const made = task.spare + m * Task<T>::matrix_words * table_size;
    make_tables(x[m], signs.row_words, made);
    tables[m] = made;
    sums[m] = task.sums_of(n + m);  // of one sample, or of several
  }
  add_from_tables<count>(signs, tables, coefficient, sums);
}
#endif

// Adds what a part of the matrix gives for every row of the group.
template <class T>
void add_part(Task<T>& task, const SignRows& signs, int64_t row, int64_t word) {
  const bool is_bias = row >= task.args.out;
  const auto x = [&](int64_t n) { return (is_bias ? task.delta_of(n) : task.a_of(n)) + 32 * word; };
  const auto coefficient = [&](int64_t n) {
    return is_bias ? task.one + n : task.delta_of(n) + row;
  };
  int64_t n = 0;
#if defined(__AVX512F__)
  static_assert(Task<T>::together == 4);
  for (; n + 4 <= task.count; n += 4) {
    add_together<T, 4>(
        task, signs, n, {x(n), x(n + 1), x(n + 2), x(n + 3)},
        {coefficient(n), coefficient(n + 1), coefficient(n + 2), coefficient(n + 3)});
  }
  for (; n < task.count; ++n) add_together<T, 1>(task, signs, n, {x(n)}, {coefficient(n)});
#else
  for (; n + 2 <= task.count; n += 2) {
    add_signed<2>(
        signs, {x(n), x(n + 1)}, {coefficient(n), coefficient(n + 1)},
        {task.sums_of(n), task.sums_of(n + 1)});
  }
  for (; n < task.count; ++n) add_signed<1>(signs, {x(n)}, {coefficient(n)}, {task.sums_of(n)});
#endif
}

template <class T>
void dense_tile(Task<T>& task, int64_t tile) {
  const ProjectionArgs<T>& args = task.args;
  for (int64_t row = 0; row < args.out; row += Task<T>::matrix_rows) {
    const int64_t left = args.out - row;
    const int64_t rows = left < Task<T>::matrix_rows ? left : Task<T>::matrix_rows;
    for (int64_t word = 0; 32 * word < args.in; word += Task<T>::matrix_words) {
      add_part(task, sign_rows(task, tile, row, rows, word), row, word);
    }
  }
  for (int64_t word = 0; args.bias && 32 * word < args.out; word += Task<T>::matrix_words) {
    add_part(task, sign_rows(task, tile, args.out, 1, word), args.out, word);
  }
}

// The sums of every row of the group with 16 rows of a factor's signs.
template <class T>
void factor_sums(
    Task<T>& task, uint32_t stream, int64_t first, const float* x, int64_t stride, int64_t length,
    double* to, int64_t to_stride) {
  const int64_t row_words = up(length, 32) / 32;
  for (int64_t w = 0; w < row_words; w += 4) {
    const Draw of_words{{static_cast<uint32_t>(w / 4), 0, static_cast<uint32_t>(first),
                         task.stream(stream)},
                        task.words + w * drawn};
    draw<1>(task.key, 2, drawn, {of_words});
  }
  const SignRows signs{task.words, 0, 1, row_words};
  const float unit = 1;
  for (int64_t n = 0; n < task.count; ++n) memset(to + n * to_stride, 0, drawn * sizeof(double));
  int64_t n = 0;
  for (; n + 2 <= task.count; n += 2) {
    const float* const from = x + n * stride;
    double* const sums = to + n * to_stride;
    add_signed<2>(signs, {from, from + stride}, {&unit, &unit}, {sums, sums + to_stride});
  }
  for (; n < task.count; ++n) add_signed<1>(signs, {x + n * stride}, {&unit}, {to + n * to_stride});
}

// KhatriRao and Kronecker: 16 outputs of the left factor, with as many of the right one or all.
template <class T>
void factored_tile(Task<T>& task, int64_t tile) {
  const ProjectionArgs<T>& args = task.args;
  const int64_t first = tile * drawn, right = task.right(), v_stride = up(right, drawn);
  double *const u = reinterpret_cast<double*>(task.spare), *const v = u + group * drawn;
  factor_sums(task, left_stream, first, task.delta, task.out_stride, args.out, u, drawn);
  for (int64_t k = 0; k < right; k += drawn) {
    factor_sums(
        task, right_stream, task.is_kronecker() ? k : first, task.a, task.in_stride,
        args.in + args.bias, v + k, v_stride);
  }
  for (int64_t n = 0; n < task.count; ++n) {
    const double *const of_left = u + n * drawn, *const of_right = v + n * v_stride;
    double* to = task.sums_of(n);
    for (int64_t k = 0; k < drawn; ++k) {
      if (!task.is_kronecker()) {
        to[k] += of_left[k] * of_right[k];
        continue;
      }
      for (int64_t m = 0; m < right; ++m) *to++ += of_left[k] * of_right[m];
    }
  }
}

}  // namespace
FMKERNELS_NAMESPACE_END
