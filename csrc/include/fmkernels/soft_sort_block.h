// One query of the sort by a block of threads that share a fast memory: what a CUDA block does, and,
// with another Block, what a test does on the CPU.
//
// Block::each(count, body) calls body(0) … body(count − 1), in any order and at the same time, and
// returns when all are done. The phases of a query:
//
//     values   the comparators of a layer at the same time, layer by layer: weights and slopes
//     rows     a row of X per thread, the student's and the teacher's in warps of their own: alone
//              through all layers, its state in a column of its own
//     back     the same row back; Σ e·d replaces the difference on the tape
//     sums     a comparator per thread: adds its products over the rows
//     values   back through the layers
//
// Rows are taken `rows` at a time, which bounds the tape. All threads of a warp are at the same place
// of their own tapes, and a wire of all of them is one line of the memory: no bank conflicts.
#pragma once

#include "fmkernels/soft_sort.h"
#include "fmkernels/soft_sort_args.h"

FMKERNELS_NAMESPACE_BEGIN

#ifdef __CUDACC__
#define FMKERNELS_BLOCK __device__ __forceinline__
#else
#define FMKERNELS_BLOCK inline
#endif

// Every stride-th number from `first` on; indexed and moved like a pointer.
struct Column {
  float* first;
  int32_t stride;

  FMKERNELS_INLINE float& operator[](int32_t index) const { return first[index * stride]; }
  FMKERNELS_INLINE Column operator+(int64_t count) const {
    return {first + static_cast<int32_t>(count) * stride, stride};
  }
};

// A value chain: the student's or the teacher's.
struct Chain {
  float *x, *rest;         // (n)
  Weights<float>* weights;  // (comparators)
};

// The block's memory, cut into arrays. What a kernel does without takes no place: the teacher, and
// everything that only gradients need.
struct BlockMemory {
  Weights<float>* weights;     // of the student, then of the teacher (comparators)
  Slope<float>* slopes;        // (comparators)
  float *grad_keep, *tape;     // (comparators), (tape_count, tape_stride)
  float *state, *teacher;      // (n, state_stride)
  float *x, *row_loss;         // (4n): x and rest of both chains; (n)
  int32_t state_stride, tape_stride;
  int64_t floats;              // in all

  // first may be null, to learn the size. Wires of different lanes fall on different banks if
  // state_stride is a multiple of 32; the sums, down a column of the tape, if tape_stride is odd.
  FMKERNELS_INLINE BlockMemory(
      float* first, int32_t n, int32_t comparators, int32_t tape_count, int32_t rows,
      bool with_teacher, bool with_grad)
      : state_stride((rows + 31) / 32 * 32), tape_stride(rows | 1) {
    int64_t next = 0;
    const auto take = [&](int64_t count) {
      float* taken = first + next;
      next += count;
      return taken;
    };
    weights = reinterpret_cast<Weights<float>*>(take((with_teacher ? 4 : 2) * int64_t{comparators}));
    slopes = reinterpret_cast<Slope<float>*>(take(with_grad ? 2 * int64_t{comparators} : 0));
    grad_keep = take(with_grad ? comparators : 0);
    tape = take(with_grad ? int64_t{tape_count} * tape_stride : 0);
    state = take(int64_t{n} * state_stride);
    teacher = take(with_teacher ? int64_t{n} * state_stride : 0);
    x = take(4 * int64_t{n});
    row_loss = take(n);
    floats = next;
  }

  FMKERNELS_INLINE Chain chain(const SortingPlan& plan, int32_t which) const {
    return {x + 2 * which * plan.size, x + (2 * which + 1) * plan.size,
            weights + which * plan.comparator_count};
  }
  FMKERNELS_INLINE Column state_of(int32_t row) const { return {state + row, state_stride}; }
  FMKERNELS_INLINE Column teacher_of(int32_t row) const { return {teacher + row, state_stride}; }
  FMKERNELS_INLINE Column tape_of(int32_t row) const { return {tape + row, tape_stride}; }
};

template <Distribution distribution, class Block>
FMKERNELS_BLOCK void sort_layers(
    const Block& block, const SortingPlan& plan, const BlockMemory& memory, int32_t chains,
    Settings<float> student, Settings<float> teacher, bool with_slopes) {
  for (int32_t layer = 0; layer < plan.layer_count; ++layer) {
    const int32_t first = plan.layers[layer], count = plan.layers[layer + 1] - first;
    block.each(chains * count, [&](int32_t item) {
      const bool is_teacher = item >= count;
      const Chain chain = memory.chain(plan, is_teacher);
      sort_pair<distribution>(
          plan.comparators[first + item - (is_teacher ? count : 0)],
          is_teacher ? teacher : student, chain.x, chain.rest, chain.weights,
          with_slopes && !is_teacher ? memory.slopes : nullptr);
    });
  }
}

// The value chains of the student's scores and (if there is one) of the teacher's. What rounding
// took from the values is left in rest.
template <class Block>
FMKERNELS_BLOCK void sort_chains(
    const Block& block, const SoftSortArgs<float>& args, const BlockMemory& memory,
    const float* student, const float* teacher, float teacher_steepness, bool with_slopes) {
  const SortingPlan& plan = args.plan;
  const int32_t n = plan.size, chains = teacher == nullptr ? 1 : 2;
  block.each(chains * n, [&](int32_t item) {
    const Chain chain = memory.chain(plan, item >= n);
    const int32_t wire = item < n ? item : item - n;
    chain.x[wire] = item < n ? student[wire] : teacher[wire];
    chain.rest[wire] = 0;
  });
  const Settings<float> of_student{args.steepness, args.art_lambda};
  const Settings<float> of_teacher{teacher_steepness, args.art_lambda};
#define FMKERNELS_CASE(name)                                                      \
  case Distribution::name:                                                        \
    return sort_layers<Distribution::name>(                                       \
        block, plan, memory, chains, of_student, of_teacher, with_slopes);
  switch (args.distribution) { FMKERNELS_DISTRIBUTIONS(FMKERNELS_CASE) }
#undef FMKERNELS_CASE
}

// A row's share of the gradient of keep takes the difference's place on its tape.
struct KeepOnTape {
  Column tape;
  FMKERNELS_INLINE void operator()(int32_t, int32_t position, float share) const {
    tape[position] = share;
  }
};

// grad_keep from the tapes of rows [first, first + count); set for the first rows, added for others.
template <class Block>
FMKERNELS_BLOCK void sum_over_rows(
    const Block& block, const SortingPlan& plan, const BlockMemory& memory, int32_t first,
    int32_t count) {
  block.each(plan.comparator_count, [&](int32_t slot) {
    const int32_t s = plan.segment_of_slot[slot];
    const Segment segment = plan.segments[s];
    const int32_t offset = slot - segment.first_slot;
    const int32_t index = segment.first + (segment.is_quads ? offset / 4 : offset);
    float sum = 0;
    for (int32_t row = 0; row < count; ++row) {
      const Active part = plan.active[(first + row) * plan.segment_count + s];
      if (index >= part.first && index < part.last) {
        sum += memory.tape_of(row)[slot + part.tape_shift];
      }
    }
    memory.grad_keep[slot] = first == 0 ? sum : memory.grad_keep[slot] + sum;
  });
}

// The gradient of the scores in the student's x, which begins as that of the sorted values.
template <class Block>
FMKERNELS_BLOCK void sort_layers_backward(
    const Block& block, const SortingPlan& plan, const BlockMemory& memory) {
  for (int32_t layer = plan.layer_count - 1; layer >= 0; --layer) {
    const int32_t first = plan.layers[layer];
    block.each(plan.layers[layer + 1] - first, [&](int32_t item) {
      sort_pair_backward(
          plan.comparators[first + item], memory.weights, memory.slopes, memory.grad_keep,
          memory.x);
    });
  }
}

template <class Block>
FMKERNELS_BLOCK void soft_sort_query(
    const Block& block, const SoftSortForward<float>& args, const BlockMemory& memory,
    int32_t rows, int64_t query) {
  const SortingPlan& plan = args.sort.plan;
  const int32_t n = plan.size;
  sort_chains(block, args.sort, memory, args.sort.scores + query * n, nullptr, 0.0f, false);
  for (int32_t first = 0; first < n; first += rows) {
    block.each(rows < n - first ? rows : n - first, [&](int32_t row) {
      const Column p = memory.state_of(row);
      sort_rows<1, false>(plan, first + row, 1.0f, memory.weights, p, p);
      float* target = args.permutation + (query * n + first + row) * n;
      for (int32_t wire = 0; wire < n; ++wire) target[wire] = p[wire];
    });
  }
  block.each(n, [&](int32_t wire) {
    args.values[query * n + wire] = memory.x[wire] + memory.x[n + wire];
  });
}

template <class Block>
FMKERNELS_BLOCK void soft_sort_backward_query(
    const Block& block, const SoftSortBackward<float>& args, const BlockMemory& memory,
    int32_t rows, int64_t query) {
  const SortingPlan& plan = args.sort.plan;
  const int32_t n = plan.size;
  sort_chains(block, args.sort, memory, args.sort.scores + query * n, nullptr, 0.0f, true);
  if (args.grad_permutation == nullptr) {
    block.each(plan.comparator_count, [&](int32_t slot) { memory.grad_keep[slot] = 0; });
  } else {
    for (int32_t first = 0; first < n; first += rows) {
      const int32_t count = rows < n - first ? rows : n - first;
      block.each(count, [&](int32_t row) {
        const Column p = memory.state_of(row), tape = memory.tape_of(row);
        sort_rows<1, true>(plan, first + row, 1.0f, memory.weights, p, tape);
        const float* source = args.grad_permutation + (query * n + first + row) * n;
        for (int32_t wire = 0; wire < n; ++wire) p[wire] = source[wire];
        sort_rows_backward<1>(plan, first + row, memory.weights, tape, p, KeepOnTape{tape});
      });
      sum_over_rows(block, plan, memory, first, count);
    }
  }
  block.each(n, [&](int32_t wire) {
    memory.x[wire] = args.grad_values == nullptr ? 0.0f : args.grad_values[query * n + wire];
  });
  sort_layers_backward(block, plan, memory);
  block.each(n, [&](int32_t wire) { args.grad_scores[query * n + wire] = memory.x[wire]; });
}

template <bool with_grad, class Block>
FMKERNELS_BLOCK void cross_entropy_query(
    const Block& block, const CrossEntropyForward<float>& args, const BlockMemory& memory,
    int32_t rows, int64_t query) {
  const SortingPlan& plan = args.sort.plan;
  const int32_t n = plan.size;
  sort_chains(
      block, args.sort, memory, args.sort.scores + query * n, args.teacher + query * n,
      args.teacher_steepness, with_grad);
  const Weights<float>* teacher_weights = memory.weights + plan.comparator_count;
  for (int32_t first = 0; first < n; first += rows) {
    const int32_t count = rows < n - first ? rows : n - first;
    const int32_t lanes = memory.state_stride;  // so that no warp has rows of both
    block.each(lanes + count, [&](int32_t item) {
      const int32_t row = item < lanes ? item : item - lanes;
      if (row >= count) return;
      const Column tape = memory.tape_of(row);
      if (item < lanes) {
        const Column p = memory.state_of(row);
        sort_rows<1, with_grad>(plan, first + row, 1.0f, memory.weights, p, tape);
      } else {
        const Column q = memory.teacher_of(row);
        sort_rows<1, false>(plan, first + row, 1.0f / n, teacher_weights, q, tape);
      }
    });
    block.each(count, [&](int32_t row) {
      const Column p = memory.state_of(row), q = memory.teacher_of(row);
      const Column tape = memory.tape_of(row);
      float loss = 0;
      for (int32_t wire = 0; wire < n; ++wire) {
        float grad;
        loss += cross_entropy(p[wire], q[wire], with_grad ? &grad : nullptr);
        if constexpr (with_grad) p[wire] = grad;
      }
      memory.row_loss[first + row] = loss;
      if constexpr (with_grad) {
        sort_rows_backward<1>(plan, first + row, memory.weights, tape, p, KeepOnTape{tape});
      }
    });
    if constexpr (with_grad) sum_over_rows(block, plan, memory, first, count);
  }
  const float weight = args.scale * (args.mask == nullptr ? 1.0f : args.mask[query]);
  block.each(n, [&](int32_t wire) {
    memory.x[wire] = 0;
    if (wire > 0) return;
    float loss = 0, lost = 0;  // Kahan, in a fixed order
    for (int32_t row = 0; row < n; ++row) {
      const float addend = memory.row_loss[row] - lost, sum = loss + addend;
      lost = (sum - loss) - addend;
      loss = sum;
    }
    args.losses[query] = weighted(weight, loss);
  });
  if constexpr (with_grad) {
    sort_layers_backward(block, plan, memory);
    block.each(n, [&](int32_t wire) {
      args.grad_student[query * n + wire] = weighted(weight, memory.x[wire]);
    });
  }
}

FMKERNELS_NAMESPACE_END
