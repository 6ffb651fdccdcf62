// What a task of the projections works with: included by project_gradients_kernel.cpp alone.
#pragma once

#include "project_gradients_kernel.h"
#include "project_gradients_signs.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

constexpr int64_t group = projection_group;

constexpr int64_t up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// A tile of the result for a group of samples. The signs of a part of the random matrix are drawn,
// or read, and every row of the group is taken past them. All sums are in one order, whatever the
// batch and the threads: of a sample's rows, those of 32 at a time; for them part by part of the
// matrix; for each part row by row. A part is summed in float, and the parts in double.
template <class T>
struct Task {
  // CountSketch
  static constexpr int64_t buckets = group_bits;  // of a tile
  static constexpr int64_t blocks = 256;          // whose signs are in memory at a time
  static constexpr int64_t windows = 16;          // and whose entries are
  static constexpr int64_t window = buckets + W;
  // Rademacher
  static constexpr int64_t matrix_rows = 64;      // and words of each, whose signs are
  static constexpr int64_t matrix_words = 24;
  static constexpr int together = 4;              // rows that share them in registers

  const ProjectionArgs<T>& args;
  PhiloxKey key;
  int64_t out_stride, in_stride;  // of the rows below, which zeros fill up to whole words
  int64_t columns, extended;      // blocks of a row, if they fill it, and the size of each below
  double* sums;                   // (samples of the group, width)
  float *delta, *a, *extensions;  // (rows of the group, …), all near 1
  float* spare;
  uint32_t* words;
  int64_t first_sample = 0, last_sample = 0, first_row = -1, count = 0;
  int32_t starts[blocks], rows[blocks];  // of CountSketch blocks: see draw_blocks
  int64_t places[blocks];
  float one[group];       // what the bias is multiplied with
  int64_t sample[group];  // in the group

  Task(const ProjectionArgs<T>& args, void* scratch)
      : args(args), key{args.key_low, args.key_high}, out_stride(up(args.out, 32) + W),
        in_stride(up(args.in + 1, 32) + W),
        columns(is_sketch() && args.in % args.dim == 0 ? args.in / args.dim : 0),
        extended(args.dim + buckets + W), sums(static_cast<double*>(scratch)),
        delta(reinterpret_cast<float*>(sums + group * width())), a(delta + group * out_stride),
        extensions(a + group * in_stride),
        spare(extensions + group * columns * extended),
        words(reinterpret_cast<uint32_t*>(spare + spare_size())) {}

  bool is_sketch() const { return args.kind == Kind::count_sketch; }
  bool is_dense() const { return args.kind == Kind::rademacher; }
  bool is_kronecker() const { return args.kind == Kind::kronecker; }

  // Numbers of one sample's part of the result.
  int64_t width() const {
    if (is_sketch()) return buckets;
    return is_kronecker() ? drawn * (args.dim / args.left) : drawn;
  }
  int64_t tiles() const { return (args.dim + width() - 1) / width(); }

  // Outputs of the right factor for each of the left one.
  int64_t right() const { return width() / drawn; }
  int64_t spare_size() const {
    if (is_sketch()) return windows * window;
    if (is_dense()) return together * matrix_words * nibbles * drawn;
    return 2 * group * (drawn + up(right(), drawn));  // in double
  }
  int64_t words_size() const {
    if (is_sketch()) return blocks / 32 * buckets;
    if (is_dense()) return matrix_rows * matrix_words * drawn;
    return up(args.in + 1 > args.out ? args.in + 1 : args.out, group_bits) / 32 * drawn;
  }
  static int64_t bytes(const ProjectionArgs<T>& args) {
    const Task task(args, nullptr);
    return 4 * (task.words_size() + task.spare_size()) +
           4 * group * (task.out_stride + task.in_stride + task.columns * task.extended) +
           8 * group * task.width();
  }

  uint32_t stream(uint32_t number) const { return (number << 24) + args.layer; }
  const float* delta_of(int64_t n) const { return delta + n * out_stride; }
  const float* a_of(int64_t n) const { return a + n * in_stride; }
  double* sums_of(int64_t n) const { return sums + sample[n] * width(); }
  float* extension(int64_t n, int64_t column) const {
    return extensions + (n * columns + column) * extended;
  }

  void begin(int64_t group_number) {
    first_sample = args.groups[group_number];
    last_sample = args.groups[group_number + 1];
    memset(sums, 0, (last_sample - first_sample) * width() * sizeof(double));
  }

  // Brings rows [first, last) of the group near 1.
  void prepare(int64_t first, int64_t last) {
    int64_t b = first_sample;
    count = last - first;
    for (int64_t n = 0; n < count; ++n) {
      while (args.offsets[b + 1] <= first + n) ++b;
      sample[n] = b - first_sample;
      if (first != first_row) prepare_row(n, first + n, b);  // else the tile before had the same
    }
    first_row = first;
  }

  void prepare_row(int64_t n, int64_t row, int64_t b) {
    const Scaling<T> of_delta(args.delta_exponents[b]), of_a(args.exponents[b]);
    float *const to_delta = delta + n * out_stride, *const to_a = a + n * in_stride;
    scale_row(args.delta + row * args.out, args.out, of_delta, to_delta, out_stride);
    scale_row(args.a + row * args.in, args.in, of_a, to_a, in_stride);
    one[n] = args.bias ? of_a(1) : 0;
    if (!is_sketch() && !is_dense()) to_a[args.in] = one[n];  // one more input
    for (int64_t column = 0; column < columns; ++column) {
      extend(to_a + column * args.dim, extension(n, column));
    }
  }

  static void scale_row(
      const T* values, int64_t count, const Scaling<T>& scaling, float* row, int64_t stride) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) row[i] = scaling(values[i]);
    for (int64_t i = count; i < stride; ++i) row[i] = 0;
  }

  // A block, periodically continued: a rotated one starts anywhere in it.
  void extend(const float* block, float* to) const {
    for (int64_t x = 0; x < extended; x += args.dim) {
      const int64_t length = extended - x < args.dim ? extended - x : args.dim;
      memcpy(to + x, block, length * sizeof(float));
    }
  }

  void finish(int64_t tile) const {
    const int64_t left = args.dim - tile * width(), length = left < width() ? left : width();
    for (int64_t b = first_sample; b < last_sample; ++b) {
      const double factor = factor_of(args.scale, args.delta_exponents[b], args.exponents[b]);
      const double* const from = sums + (b - first_sample) * width();
      float* const to = args.result + b * args.dim + tile * width();
      for (int64_t k = 0; k < length; ++k) to[k] = static_cast<float>(from[k] * factor);
    }
  }
};

}  // namespace
FMKERNELS_NAMESPACE_END
