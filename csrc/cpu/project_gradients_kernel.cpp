// The CPU loops of gradient projections, compiled once per instruction set. A task is a tile of the
// result for a group of samples: the signs of a part of the random matrix are drawn, or read, and
// every row of the group is taken past them. All sums are in one order, whatever the batch and the
// threads: rows of a sample come in chunks, for each chunk parts of the matrix, for each part rows.
#include "project_gradients_kernel.h"

#include "fmkernels/project_gradients.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
using V = Vec<float, W>;
using Words = WordVec<4 * W>::Words;

constexpr int parts = 32 / W;    // registers for the signs of a word
constexpr int64_t drawn = 16;    // counters that are drawn at once
constexpr int64_t group = projection_group;

constexpr int64_t up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Word w of 16 counters, of which number `rising` goes up by one each, at words[w · stride].
void draw(
    PhiloxKey key, const uint32_t (&start)[4], int rising, uint32_t* words, int64_t stride) {
  Words lanes{};
  for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
  for (uint32_t first = 0; first < drawn; first += W) {
    Words x[4];
    for (int d = 0; d < 4; ++d) x[d] = Words{} + start[d] + (d == rising ? lanes + first : Words{});
    philox(key, x);
    for (int w = 0; w < 4; ++w) memcpy(words + w * stride + first, &x[w], sizeof x[w]);
  }
}

// The signs of some outputs for one or several rows of the matrix.
template <int outputs>
struct SignWords {
  const uint32_t* words;
  int64_t output[outputs];  // where the words of each begin
  int64_t word_stride, row_stride;
};

// sums[n][k] += Σ_row coefficient[n][row] (Σ_j ±x[n][j]), lane by lane, for `rows` vectors of signs.
template <int outputs, int count>
void add_signed(
    const SignWords<outputs>& signs, int64_t rows, int64_t words, const float* const (&x)[count],
    const float* const (&coefficient)[count], V* const (&sums)[count]) {
  for (int64_t row = 0; row < rows; ++row) {
    const uint32_t* const of_row = signs.words + row * signs.row_stride;
    V total[outputs][count];
    for (int k = 0; k < outputs; ++k) {
      for (int n = 0; n < count; ++n) total[k][n] = V(0.0f);
    }
    for (int64_t w = 0; w < words; ++w) {
      for (int part = 0; part < parts; ++part) {
        V values[count];
        for (int n = 0; n < count; ++n) values[n] = load<V>(x[n] + 32 * w + W * part);
#pragma GCC unroll 8
        for (int k = 0; k < outputs; ++k) {
          const SignBits<W> bits(of_row[signs.output[k] + w * signs.word_stride], part);
          for (int n = 0; n < count; ++n) total[k][n] += flip(values[n], bits);
        }
      }
    }
    for (int n = 0; n < count; ++n) {
      for (int k = 0; k < outputs; ++k) sums[n][k] += V(coefficient[n][row]) * total[k][n];
    }
  }
}

// The memory of a task, and the group of rows that it holds.
template <class T>
struct Task {
  static constexpr int64_t buckets = group_bits;  // of a CountSketch
  static constexpr int64_t blocks = 256;          // whose signs are in memory at a time
  static constexpr int64_t windows = 16;          // and whose entries are
  static constexpr int64_t window = buckets + W;
  static constexpr int outputs = W == 16 ? 8 : 4;  // of the dense matrix
  static constexpr int together = W == 16 ? 2 : 1; // rows that share the signs in registers
  static constexpr int64_t factor_outputs = drawn;

  const ProjectionArgs<T>& args;
  PhiloxKey key;
  int64_t out_stride, in_stride, extended, columns;
  float *delta, *a, *extensions, *sums, *spare;
  uint32_t* words;
  int64_t first_sample = 0, last_sample = 0, first_row = -1, count = 0;
  float one[group];
  int64_t sample[group];  // in the group

  Task(const ProjectionArgs<T>& args, void* scratch)
      : args(args), key{args.key_low, args.key_high}, out_stride(up(args.out, 32) + W),
        in_stride(up(args.in + 1, 32) + W), extended(args.dim + buckets + W),
        columns(aligned(args) ? args.in / args.dim : 0), delta(static_cast<float*>(scratch)),
        a(delta + group * out_stride), extensions(a + group * in_stride),
        sums(extensions + group * columns * extended), spare(sums + sums_size(args)),
        words(reinterpret_cast<uint32_t*>(spare + spare_size(args))) {}

  static int64_t bytes(const ProjectionArgs<T>& args) {
    const Task task(args, nullptr);
    return 4 * (task.words - static_cast<uint32_t*>(nullptr) + words_size(args));
  }

  // Whether every block of a CountSketch lies in one row of the weight's gradient.
  static bool aligned(const ProjectionArgs<T>& args) {
    return args.kind == Kind::count_sketch && args.in % args.dim == 0;
  }
  // Numbers of one sample's part of the result; for the dense matrix each has all lanes.
  static int64_t width(const ProjectionArgs<T>& args) {
    if (args.kind == Kind::count_sketch) return buckets;
    if (args.kind == Kind::rademacher) return outputs * W;
    if (args.kind == Kind::khatri_rao) return factor_outputs;
    return factor_outputs * (args.dim / args.left);
  }
  static int64_t sums_size(const ProjectionArgs<T>& args) { return group * width(args); }
  static int64_t spare_size(const ProjectionArgs<T>& args) {
    if (args.kind == Kind::count_sketch) return windows * window;
    if (args.kind == Kind::rademacher) return 0;
    const int64_t right = args.kind == Kind::kronecker ? args.dim / args.left : 0;
    return outputs * W + group * (factor_outputs + up(right, factor_outputs) + factor_outputs);
  }
  static int64_t words_size(const ProjectionArgs<T>& args) {
    const int64_t longest = args.in + 1 > args.out ? args.in + 1 : args.out;
    const int64_t row = up(longest, group_bits) / 32;
    if (args.kind == Kind::count_sketch) return 5 * blocks + 4 * drawn;
    if (args.kind == Kind::rademacher) return args.packed == nullptr ? outputs * row * drawn : 0;
    return row * drawn;
  }
  static int64_t tiles(const ProjectionArgs<T>& args) {
    const auto in_parts = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
    if (args.kind == Kind::count_sketch) return in_parts(args.dim, buckets);
    if (args.kind == Kind::rademacher) return in_parts(args.dim, outputs);
    return in_parts(args.kind == Kind::kronecker ? args.left : args.dim, factor_outputs);
  }

  uint32_t stream(uint32_t number) const { return (number << 24) + args.layer; }
  float* sums_of(int64_t n) const { return sums + sample[n] * width(args); }
  V* lanes_of(int64_t n) const { return reinterpret_cast<V*>(sums_of(n)); }

  void begin(int64_t group_number) {
    first_sample = args.groups[group_number];
    last_sample = args.groups[group_number + 1];
    memset(sums, 0, (last_sample - first_sample) * width(args) * sizeof(float));
  }

  // Brings rows [first, last) of the group near 1.
  void prepare(int64_t first, int64_t last) {
    int64_t b = first_sample;
    for (int64_t row = first; row < last; ++row) {
      while (args.offsets[b + 1] <= row) ++b;
      const int64_t n = row - first;
      sample[n] = b - first_sample;
      if (first == first_row) continue;  // the tile before had the same rows
      const Scaling<T> of_delta(args.delta_exponents[b]), of_a(args.exponents[b]);
      one[n] = args.bias ? of_a(1) : 0;
      scale_row(args.delta + row * args.out, args.out, of_delta, delta + n * out_stride, out_stride);
      scale_row(args.a + row * args.in, args.in, of_a, a + n * in_stride, in_stride);
      const bool factored = args.kind == Kind::khatri_rao || args.kind == Kind::kronecker;
      if (factored) a[n * in_stride + args.in] = one[n];
      for (int64_t column = 0; column < columns; ++column) {
        extend(a + n * in_stride + column * args.dim, extension(n, column));
      }
    }
    first_row = first;
    count = last - first;
  }

  static void scale_row(
      const T* values, int64_t count, const Scaling<T>& scaling, float* row, int64_t stride) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) row[i] = scaling(values[i]);
    for (int64_t i = count; i < stride; ++i) row[i] = 0;
  }

  float* extension(int64_t n, int64_t column) const {
    return extensions + (n * columns + column) * extended;
  }
  // A block, periodically continued: a rotated one starts anywhere in it.
  void extend(const float* block, float* to) const {
    for (int64_t x = 0; x < extended; x += args.dim) {
      const int64_t length = extended - x < args.dim ? extended - x : args.dim;
      memcpy(to + x, block, length * sizeof(float));
    }
  }

  void dense(int64_t tile);
  void dense_rows(int64_t tile, int64_t row, int64_t rows);
  SignWords<outputs> dense_signs(int64_t tile, int64_t row, int64_t row_words);
  template <int shared>
  void add_dense(
      const SignWords<outputs>& signs, int64_t row, int64_t rows, int64_t n, int64_t row_words);

  void count_sketch(int64_t tile);
  void draw_blocks(int64_t tile, int64_t first, int64_t copy, uint32_t* starts);
  void gather(int64_t n, int64_t entry, int64_t length, float* to) const;
  void gather_window(int64_t n, int64_t block, int64_t start, int64_t length, float* to) const;
  template <class Source>
  void add_blocks(int64_t n, const uint32_t* signs, int64_t count, const Source& source) const;

  void factored(int64_t tile);
  void factor_sums(
      uint32_t of_stream, int64_t first, const float* x, int64_t stride, int64_t length, float* to,
      int64_t to_stride);

  void finish(int64_t tile) const;
};

// Rademacher: 16 rows of the gradient at a time, and the bias as one more row.
template <class T>
void Task<T>::dense(int64_t tile) {
  for (int64_t row = 0; row < args.out; row += drawn) {
    dense_rows(tile, row, args.out - row < drawn ? args.out - row : drawn);
  }
  if (args.bias) dense_rows(tile, args.out, 1);
}

template <class T>
void Task<T>::dense_rows(int64_t tile, int64_t row, int64_t rows) {
  const int64_t row_words = up(row < args.out ? args.in : args.out, 32) / 32;
  const SignWords<outputs> signs = dense_signs(tile, row, row_words);
  int64_t n = 0;
  for (; n + together <= count; n += together) {
    add_dense<together>(signs, row, rows, n, row_words);
  }
  for (; n < count; ++n) add_dense<1>(signs, row, rows, n, row_words);
}

template <class T>
SignWords<Task<T>::outputs> Task<T>::dense_signs(int64_t tile, int64_t row, int64_t row_words) {
  SignWords<outputs> signs{words, {}, drawn, 1};
  const int64_t weight_words = up(args.in, 32) / 32;
  const int64_t all = args.out * weight_words + (args.bias ? up(args.out, 32) / 32 : 0);
  for (int k = 0; k < outputs; ++k) {
    int64_t output = tile * outputs + k;
    if (output >= args.dim) output = args.dim - 1;  // computed again, and left out
    if (args.packed != nullptr) {
      signs.output[k] = output * all;
      continue;
    }
    signs.output[k] = k * up(row_words, 4) * drawn;
    for (int64_t bits = 0; bits < row_words; bits += 4) {
      const uint32_t start[4] = {
          static_cast<uint32_t>(bits / 4), static_cast<uint32_t>(row),
          static_cast<uint32_t>(output), stream(dense_stream)};
      draw(key, start, 1, words + signs.output[k] + bits * drawn, drawn);
    }
  }
  if (args.packed != nullptr) {
    signs.words = args.packed + row * weight_words;
    signs.word_stride = 1;
    signs.row_stride = weight_words;
  }
  return signs;
}

template <class T>
template <int shared>
void Task<T>::add_dense(
    const SignWords<outputs>& signs, int64_t row, int64_t rows, int64_t n, int64_t row_words) {
  const bool is_bias = row >= args.out;
  const float *x[shared], *coefficient[shared];
  V* to[shared];
  for (int m = 0; m < shared; ++m) {
    x[m] = is_bias ? delta + (n + m) * out_stride : a + (n + m) * in_stride;
    coefficient[m] = is_bias ? one + n + m : delta + (n + m) * out_stride + row;
    to[m] = lanes_of(n + m);
  }
  add_signed<outputs, shared>(signs, rows, row_words, x, coefficient, to);
}

// CountSketch: a tile of buckets stays in registers while blocks of the gradient are rotated past it.
template <class T>
void Task<T>::count_sketch(int64_t tile) {
  const int64_t weights = args.out * args.in, entries = weights + args.bias * args.out;
  const int64_t block_count = (entries + args.dim - 1) / args.dim;
  const int64_t in_rows = columns > 0 ? weights / args.dim : 0;
  const int64_t first_bucket = tile * buckets, left = args.dim - first_bucket;
  const int64_t length = left < buckets ? left : buckets;
  uint32_t* const starts = words + 4 * blocks;
  for (int64_t copy = 0; copy < args.repeats; ++copy) {
    for (int64_t first = 0; first < block_count; first += blocks) {
      draw_blocks(tile, first, copy, starts);
      const int64_t last = first + blocks < block_count ? first + blocks : block_count;
      const int64_t whole = in_rows < first ? first : in_rows < last ? in_rows : last;
      for (int64_t n = 0; n < count; ++n) {
        const float* const rows = delta + n * out_stride;
        int64_t row = columns > 0 ? first / columns : 0, column = first - row * columns;
        const float* const source = extension(n, 0);
        add_blocks(n, words, whole - first, [&](int64_t block, float& coefficient) {
          coefficient = rows[row];
          const float* const from = source + column * extended + starts[block];
          if (++column == columns) column = 0, ++row;
          return from;
        });
        for (int64_t block = whole; block < last; block += windows) {
          const int64_t stop = block + windows < last ? block + windows : last;
          for (int64_t c = block; c < stop; ++c) {
            gather_window(n, c, starts[c - first], length, spare + (c - block) * window);
          }
          add_blocks(n, words + block - first, stop - block, [&](int64_t c, float& coefficient) {
            coefficient = 1;
            return spare + c * window;
          });
        }
      }
    }
  }
}

// The signs of the tile's buckets, and which entry of its block each block's first bucket gets.
template <class T>
void Task<T>::draw_blocks(int64_t tile, int64_t first, int64_t copy, uint32_t* starts) {
  const uint32_t repeat = static_cast<uint32_t>(copy);
  for (int64_t block = 0; block < blocks; block += drawn) {
    const uint32_t start[4] = {
        static_cast<uint32_t>(tile), static_cast<uint32_t>(first + block), repeat,
        stream(sketch_stream)};
    draw(key, start, 1, words + block, blocks);
  }
  uint32_t* const shifts = starts + blocks;
  for (int64_t block = 0; block < blocks; block += 4 * drawn) {
    const uint32_t start[4] = {
        static_cast<uint32_t>((first + block) / 4), 0, repeat, stream(shift_stream)};
    draw(key, start, 0, shifts, drawn);
    for (int64_t n = 0; n < drawn; ++n) {
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t behind = tile * buckets - shift_of(shifts[w * drawn + n], args.dim);
        starts[block + 4 * n + w] = static_cast<uint32_t>(behind < 0 ? behind + args.dim : behind);
      }
    }
  }
}

// Entries of a row's gradient, the weight's and then the bias's; zeros past its end.
template <class T>
void Task<T>::gather(int64_t n, int64_t entry, int64_t length, float* to) const {
  const float *const rows = delta + n * out_stride, *const values = a + n * in_stride;
  const int64_t weights = args.out * args.in;
  while (length > 0) {
    const bool is_weight = entry < weights;
    const int64_t row = entry / args.in, column = entry - row * args.in;
    const int64_t left = is_weight ? args.in - column : weights + args.bias * args.out - entry;
    if (left <= 0) {
      for (int64_t i = 0; i < length; ++i) to[i] = 0;
      return;
    }
    const int64_t run = left < length ? left : length;
    const float* const from = is_weight ? values + column : rows + entry - weights;
    const V coefficient(is_weight ? rows[row] : one[n]);
    for (int64_t i = 0; i < run; i += W) store(coefficient * load<V>(from + i), to + i);
    entry += run;
    length -= run;
    to += run;
  }
}

// What the first `length` buckets of the tile get of a block, from its entry `start` on and around.
template <class T>
void Task<T>::gather_window(
    int64_t n, int64_t block, int64_t start, int64_t length, float* to) const {
  const int64_t left = args.dim - start, run = left < length ? left : length;
  gather(n, block * args.dim + start, run, to);
  if (run < length) gather(n, block * args.dim, length - run, to + run);
  for (int64_t i = length; i < buckets; ++i) to[i] = 0;
}

// Adds blocks, rotated already, to the buckets of row n: eight registers of them at a time.
template <class T>
template <class Source>
void Task<T>::add_blocks(
    int64_t n, const uint32_t* signs, int64_t count, const Source& source) const {
  constexpr int registers = 8;
  float* const to = sums_of(n);
  for (int64_t first = 0; first < buckets; first += registers * W) {
    Source next = source;
    V total[registers];
    for (int r = 0; r < registers; ++r) total[r] = load<V>(to + first + r * W);
    for (int64_t block = 0; block < count; ++block) {
      float coefficient;
      const float* const from = next(block, coefficient) + first;
#pragma GCC unroll 8
      for (int r = 0; r < registers; ++r) {
        const int64_t bit = first + r * W;
        const SignBits<W> bits(signs[bit / 32 * blocks + block], (r % parts));
        total[r] += flip(V(coefficient), bits) * load<V>(from + r * W);
      }
    }
    for (int r = 0; r < registers; ++r) store(total[r], to + first + r * W);
  }
}

// KhatriRao and Kronecker: sums with 16 rows of the left factor, and with those of the right one.
template <class T>
void Task<T>::factored(int64_t tile) {
  const int64_t first = tile * factor_outputs, right = width(args) / factor_outputs;
  float* const u = spare + outputs * W;
  float* const v = u + group * factor_outputs;
  const int64_t v_stride = up(right, factor_outputs);
  factor_sums(left_stream, first, delta, out_stride, args.out, u, factor_outputs);
  const bool khatri_rao = args.kind == Kind::khatri_rao;
  for (int64_t k = 0; k < right; k += factor_outputs) {
    factor_sums(
        right_stream, khatri_rao ? first : k, a, in_stride, args.in + args.bias, v + k, v_stride);
  }
  for (int64_t n = 0; n < count; ++n) {
    const float *const left_sums = u + n * factor_outputs, *const right_sums = v + n * v_stride;
    float* to = sums_of(n);
    for (int64_t k = 0; k < factor_outputs; ++k) {
      if (khatri_rao) {
        to[k] += left_sums[k] * right_sums[k];
        continue;
      }
      for (int64_t m = 0; m < right; ++m) *to++ += left_sums[k] * right_sums[m];
    }
  }
}

// The sums of every row of the group with 16 rows of signs.
template <class T>
void Task<T>::factor_sums(
    uint32_t of_stream, int64_t first, const float* x, int64_t stride, int64_t length, float* to,
    int64_t to_stride) {
  const int64_t row_words = up(length, 32) / 32;
  for (int64_t bits = 0; bits < row_words; bits += 4) {
    const uint32_t start[4] = {
        static_cast<uint32_t>(bits / 4), 0, static_cast<uint32_t>(first), stream(of_stream)};
    draw(key, start, 2, words + bits * drawn, drawn);
  }
  const float unit = 1;
  for (int64_t k = 0; k < factor_outputs; k += outputs) {
    SignWords<outputs> signs{words + k, {}, drawn, 0};
    for (int m = 0; m < outputs; ++m) signs.output[m] = m;
    for (int64_t n = 0; n < count; ++n) {
      V* const lanes = reinterpret_cast<V*>(spare);
      for (int m = 0; m < outputs; ++m) lanes[m] = V(0.0f);
      add_signed<outputs, 1>(signs, 1, row_words, {x + n * stride}, {&unit}, {lanes});
      for (int m = 0; m < outputs; ++m) to[n * to_stride + k + m] = sum_of_lanes(lanes[m]);
    }
  }
}

template <class T>
void Task<T>::finish(int64_t tile) const {
  const bool dense = args.kind == Kind::rademacher;
  const int64_t size = dense ? outputs : width(args), left = args.dim - tile * size;
  const int64_t length = left < size ? left : size;
  for (int64_t b = first_sample; b < last_sample; ++b) {
    const double factor = factor_of(args.scale, args.delta_exponents[b], args.exponents[b]);
    const float* const from = sums + (b - first_sample) * width(args);
    float* const to = args.result + b * args.dim + tile * size;
    for (int64_t k = 0; k < length; ++k) {
      const float sum = dense ? sum_of_lanes(load<V>(from + k * W)) : from[k];
      to[k] = static_cast<float>(sum * factor);
    }
  }
}

template <class T>
void measure(const ProjectionArgs<T>& args, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t row = args.offsets[b], rows = args.offsets[b + 1] - row;
    args.delta_exponents[b] = exponent_of<T>(args.delta + row * args.out, rows * args.out, 0);
    args.exponents[b] = exponent_of<T>(args.a + row * args.in, rows * args.in, args.bias);
  }
}

template <class T>
void project(const ProjectionArgs<T>& args, int64_t first, int64_t last, void* scratch) {
  Task<T> task(args, scratch);
  const int64_t tiles = Task<T>::tiles(args);
  for (int64_t number = first; number < last; ++number) {
    const int64_t tile = number % tiles;
    task.begin(number / tiles);
    const int64_t end = args.offsets[task.last_sample];
    for (int64_t row = args.offsets[task.first_sample]; row < end; row += group) {
      task.prepare(row, row + group < end ? row + group : end);
      if (args.kind == Kind::count_sketch) {
        task.count_sketch(tile);
      } else if (args.kind == Kind::rademacher) {
        task.dense(tile);
      } else {
        task.factored(tile);
      }
    }
    task.finish(tile);
  }
}

template <class T>
constexpr ProjectionKernels<T> kernels{
    measure<T>, Task<T>::tiles, Task<T>::bytes, project<T>};

}  // namespace

extern const ProjectionKernels<float> projections_f32 = kernels<float>;
extern const ProjectionKernels<double> projections_f64 = kernels<double>;

FMKERNELS_NAMESPACE_END
