// CountSketch: included by project_gradients_kernel.cpp alone. A tile of buckets stays in registers
// while blocks of the gradient are rotated past it.
#pragma once

#include "project_gradients_task.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

// What is the same for all rows of the group: for every block the signs of the tile's buckets,
// which entry of the block the first of them gets, and where the block is.
template <class T>
void draw_blocks(Task<T>& task, int64_t tile, int64_t first, int64_t count, int64_t copy) {
  constexpr int64_t buckets = Task<T>::buckets;
  const int64_t dim = task.args.dim;
  const uint32_t repeat = static_cast<uint32_t>(copy);
  for (int64_t block = 0; block < count; block += group_bits) {
    const auto of_buckets = [&](int64_t bucket) -> Draw {
      const auto number = static_cast<uint32_t>((first + block) / group_bits);
      return {{number, static_cast<uint32_t>(tile * buckets + bucket), repeat,
               task.stream(sketch_stream)},
              task.words + block / 32 * buckets + bucket};
    };
    for (int64_t bucket = 0; bucket < buckets; bucket += 2 * drawn) {
      draw<2>(task.key, 1, buckets, {of_buckets(bucket), of_buckets(bucket + drawn)});
    }
  }
  uint32_t shifts[4 * drawn];
  for (int64_t block = 0; block < count; block += 4 * drawn) {
    const auto number = static_cast<uint32_t>((first + block) / 4);
    draw<1>(task.key, 0, drawn, {{{number, 0, repeat, task.stream(shift_stream)}, shifts}});
    for (int64_t c = block; c < block + 4 * drawn; ++c) {
      const uint32_t word = shifts[c % 4 * drawn + (c - block) / 4];
      const int64_t entry = tile * buckets - shift_of(word, dim);
      task.starts[c] = static_cast<int32_t>(entry < 0 ? entry + dim : entry);
    }
  }
  if (task.columns == 0) return;
  int64_t row = first / task.columns, column = first % task.columns;  // a division is slow
  for (int64_t c = 0; c < count; ++c) {
    task.rows[c] = static_cast<int32_t>(row);
    task.places[c] = task.starts[c] + column * task.extended;
    if (++column == task.columns) column = 0, ++row;
  }
}

// Entries of a row's gradient, the weight's and then the bias's; zeros past its end.
template <class T>
void gather(const Task<T>& task, int64_t n, int64_t entry, int64_t length, float* to) {
  const ProjectionArgs<T>& args = task.args;
  const float *const delta = task.delta_of(n), *const a = task.a_of(n);
  const int64_t weights = args.out * args.in;
  while (length > 0) {
    const bool is_weight = entry < weights;
    const int64_t row = entry / args.in, column = entry - row * args.in;
    const int64_t left = is_weight ? args.in - column : weights + args.bias * args.out - entry;
    if (left <= 0) {
      memset(to, 0, length * sizeof(float));
      return;
    }
    const int64_t run = left < length ? left : length;
    const float* const from = is_weight ? a + column : delta + (entry - weights);
    const V coefficient(is_weight ? delta[row] : task.one[n]);
    for (int64_t i = 0; i < run; i += W) store(coefficient * load<V>(from + i), to + i);
    entry += run;
    length -= run;
    to += run;
  }
}

// What the first `length` buckets of the tile get of a block, from its entry `start` on and around.
template <class T>
void gather_window(
    const Task<T>& task, int64_t n, int64_t block, int64_t start, int64_t length, float* to) {
  const int64_t dim = task.args.dim, run = dim - start < length ? dim - start : length;
  gather(task, n, block * dim + start, run, to);
  if (run < length) gather(task, n, block * dim, length - run, to + run);
  memset(to + length, 0, (Task<T>::buckets - length) * sizeof(float));
}

// Adds rotated blocks to the buckets `to`, some registers of them at a time: source(block,
// coefficient) says where a block's entries are, and what they are multiplied with.
template <class T, class Source>
void add_blocks(
    const uint32_t* words, int64_t first, int64_t last, const Source& source, double* to) {
  constexpr int registers = W == 16 ? 8 : 4;  // of sums, and as many of signs
  for (int64_t bucket = 0; bucket < Task<T>::buckets; bucket += registers * W) {
    V total[registers];
    for (int r = 0; r < registers; ++r) total[r] = V(0.0f);
    for (int64_t stop, block = first; block < last; block = stop) {
      stop = block / 32 * 32 + 32 < last ? block / 32 * 32 + 32 : last;
      Words signs[registers];
      for (int r = 0; r < registers; ++r) {
        memcpy(&signs[r], words + block / 32 * Task<T>::buckets + bucket + r * W, sizeof signs[r]);
        signs[r] <<= 31 - (stop - 1) % 32;
      }
      for (int64_t c = stop - 1; c >= block; --c) {  // backwards: the highest bit is a sign
        float coefficient;
        const float* const from = source(c, coefficient) + bucket;
#pragma GCC unroll 8
        for (int r = 0; r < registers; ++r) {
          total[r] += flip_by_highest(V(coefficient), signs[r]) * load<V>(from + r * W);
          signs[r] += signs[r];
        }
      }
    }
    for (int r = 0; r < registers; ++r) add_to(to + bucket + r * W, total[r]);
  }
}

// Blocks that lie in one row of the weight's gradient are read where they are.
template <class T>
__attribute__((noinline)) void add_whole_blocks(const Task<T>& task, int64_t n, int64_t last) {
  const float *const delta = task.delta_of(n), *const source = task.extension(n, 0);
  const int32_t* const rows = task.rows;
  const int64_t* const places = task.places;
  const auto whole = [=](int64_t block, float& coefficient) {
    coefficient = delta[rows[block]];
    return source + places[block];
  };
  add_blocks<T>(task.words, 0, last, whole, task.sums_of(n));
}

// Others are put together before.
template <class T>
__attribute__((noinline)) void add_gathered_blocks(
    const Task<T>& task, int64_t n, int64_t tile, int64_t first, int64_t from, int64_t last) {
  constexpr int64_t windows = Task<T>::windows, window = Task<T>::window;
  const int64_t left = task.args.dim - tile * Task<T>::buckets;
  const int64_t length = left < Task<T>::buckets ? left : Task<T>::buckets;
  float* const spare = task.spare;
  const auto gathered = [=](int64_t block, float& coefficient) {
    coefficient = 1;
    return static_cast<const float*>(spare + block % windows * window);
  };
  for (int64_t stop, block = from; block < last; block = stop) {
    stop = block / windows * windows + windows < last ? block / windows * windows + windows : last;
    for (int64_t c = block; c < stop; ++c) {
      gather_window(task, n, first + c, task.starts[c], length, spare + c % windows * window);
    }
    add_blocks<T>(task.words, block, stop, gathered, task.sums_of(n));
  }
}

template <class T>
void sketch_tile(Task<T>& task, int64_t tile) {
  const ProjectionArgs<T>& args = task.args;
  const int64_t weights = args.out * args.in, entries = weights + args.bias * args.out;
  const int64_t block_count = (entries + args.dim - 1) / args.dim;
  const int64_t whole_count = task.columns > 0 ? weights / args.dim : 0;
  const auto in_part = [](int64_t end) {
    return end < 0 ? 0 : end < Task<T>::blocks ? end : Task<T>::blocks;
  };
  for (int64_t copy = 0; copy < args.repeats; ++copy) {
    for (int64_t first = 0; first < block_count; first += Task<T>::blocks) {
      const int64_t whole = in_part(whole_count - first), last = in_part(block_count - first);
      draw_blocks(task, tile, first, last, copy);
      for (int64_t n = 0; n < task.count; ++n) {
        if (whole > 0) add_whole_blocks(task, n, whole);
        add_gathered_blocks(task, n, tile, first, whole, last);
      }
    }
  }
}

}  // namespace
FMKERNELS_NAMESPACE_END
