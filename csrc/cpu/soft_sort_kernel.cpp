// The CPU loops over queries, compiled once per instruction set: a group of queries fills the lanes
// of a register, and everything a group needs stays in the thread's caches; docs/kernels/cpu.md counts
// it.
#include "soft_sort_kernel.h"

#include "fmkernels/soft_sort.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

template <class T>
using Register = Vec<T, register_bytes / sizeof(T)>;

// The working memory of one group of queries, cut into arrays of registers.
template <class V>
struct Scratch {
  V *scores, *grad;                // (n)
  V *student_rows, *teacher_rows;  // (n, rows)
  Weights<V> *student, *teacher;   // (comparators)
  Slope<V>* slopes;                // (comparators)
  V *grad_keep, *tape;             // (comparators), (tape_count, rows)

  static size_t bytes(const SortingPlan& plan) {
    const size_t n = plan.size, c = plan.comparator_count, t = plan.tape_count;
    return sizeof(V) * ((2 + 2 * max_group_rows) * n + 7 * c + max_group_rows * t);
  }

  Scratch(const SortingPlan& plan, void* memory) {
    const int64_t n = plan.size, c = plan.comparator_count;
    V* next = static_cast<V*>(memory);
    const auto take = [&next](int64_t count) {
      V* taken = next;
      next += count;
      return taken;
    };
    scores = take(n);
    grad = take(n);
    student_rows = take(max_group_rows * n);
    teacher_rows = take(max_group_rows * n);
    student = reinterpret_cast<Weights<V>*>(take(2 * c));
    teacher = reinterpret_cast<Weights<V>*>(take(2 * c));
    slopes = reinterpret_cast<Slope<V>*>(take(2 * c));
    grad_keep = take(c);
    tape = take(max_group_rows * int64_t{plan.tape_count});
  }
};

// Memory (lanes, …) with `stride` numbers between queries <-> registers with a query per lane and
// `step` registers between elements. Lanes past the last query repeat it, and are not stored.
template <class V>
struct Group {
  using T = typename Lanes<V>::Scalar;
  static constexpr int lanes = Lanes<V>::count;
  int64_t first;
  int count;

  Group(int64_t index, int64_t queries) : first(index * lanes) {
    const int64_t left = queries - first;
    count = left < lanes ? static_cast<int>(left) : lanes;
  }

  const T* row(const T* memory, int64_t stride, int lane) const {
    return memory + (first + (lane < count ? lane : count - 1)) * stride;
  }

  void load(const T* source, int64_t stride, int64_t length, int64_t step, V* target) const {
    int64_t done = 0;
    if constexpr (lanes > 1) {
      for (; done + lanes <= length; done += lanes) {
        V block[lanes];
        for (int k = 0; k < lanes; ++k) {
          block[k] = fmkernels::FMKERNELS_ISA::load<V>(row(source, stride, k) + done);
        }
        transpose(block);
        for (int k = 0; k < lanes; ++k) target[(done + k) * step] = block[k];
      }
    }
    T* elements = reinterpret_cast<T*>(target);
    for (; done < length; ++done) {
      for (int k = 0; k < lanes; ++k) {
        elements[done * step * lanes + k] = row(source, stride, k)[done];
      }
    }
  }

  void store(const V* source, int64_t step, int64_t length, T* target, int64_t stride) const {
    T* rows = target + first * stride;
    int64_t done = 0;
    if constexpr (lanes > 1) {
      for (; done + lanes <= length; done += lanes) {
        V block[lanes];
        for (int k = 0; k < lanes; ++k) block[k] = source[(done + k) * step];
        transpose(block);
        for (int k = 0; k < count; ++k) {
          fmkernels::FMKERNELS_ISA::store(block[k], rows + k * stride + done);
        }
      }
    }
    const T* elements = reinterpret_cast<const T*>(source);
    for (; done < length; ++done) {
      for (int k = 0; k < count; ++k) rows[k * stride + done] = elements[done * step * lanes + k];
    }
  }
};

template <class V, class T>
void sort_group(
    const SoftSortArgs<T>& args, T steepness, V* x, V* rest, Weights<V>* weights,
    Slope<V>* slopes) {
  const Settings<V> settings{V(steepness), V(args.art_lambda)};
#define FMKERNELS_CASE(name)                                                    \
  case Distribution::name:                                                      \
    return sort_values<Distribution::name>(args.plan, settings, x, rest, weights, slopes);
  switch (args.distribution) { FMKERNELS_DISTRIBUTIONS(FMKERNELS_CASE) }
#undef FMKERNELS_CASE
}

template <class V>
void clear(V* array, int64_t count) {
  for (int64_t index = 0; index < count; ++index) array[index] = V(0);
}

// The rows' shares of the gradient of keep are added group by group: a long column in two levels.
template <class V>
struct AddTo {
  V* grad_keep;
  FMKERNELS_INLINE void operator()(int32_t slot, int32_t, V share) const {
    grad_keep[slot] += share;
  }
};

template <int R>
struct RowCount {
  static constexpr int value = R;
};

// Calls body(index, RowCount<R>) for all groups of rows of X.
template <class Body>
FMKERNELS_INLINE void for_row_groups(const SortingPlan& plan, Body body) {
  for (int32_t group = 0; group < plan.group_count; ++group) {
    const int32_t count = plan.groups[group].count;
    if (count == 1) body(group, RowCount<1>{});
    if (count == 2) body(group, RowCount<2>{});
    if (count == 4) body(group, RowCount<4>{});
  }
}

template <class V, class T>
void forward(const SoftSortForward<T>& args, int64_t first, int64_t last, void* memory) {
  const SortingPlan& plan = args.sort.plan;
  const int64_t n = plan.size;
  const Scratch<V> s(plan, memory);
  for (int64_t index = first; index < last; ++index) {
    const Group<V> group(index, args.sort.queries);
    group.load(args.sort.scores, n, n, 1, s.scores);
    sort_group<V>(args.sort, args.sort.steepness, s.scores, s.grad, s.student, nullptr);
    group.store(s.scores, 1, n, args.values, n);
    for_row_groups(plan, [&](int32_t row_group, auto rows) {
      constexpr int R = decltype(rows)::value;
      sort_rows<R, false>(plan, row_group, V(1), s.student, s.student_rows, s.tape);
      const int64_t row = plan.groups[row_group].first;
      for (int r = 0; r < R; ++r) {
        group.store(s.student_rows + r, R, n, args.permutation + (row + r) * n, n * n);
      }
    });
  }
}

template <class V, class T>
void backward(const SoftSortBackward<T>& args, int64_t first, int64_t last, void* memory) {
  const SortingPlan& plan = args.sort.plan;
  const int64_t n = plan.size;
  const Scratch<V> s(plan, memory);
  for (int64_t index = first; index < last; ++index) {
    const Group<V> group(index, args.sort.queries);
    group.load(args.sort.scores, n, n, 1, s.scores);
    sort_group<V>(args.sort, args.sort.steepness, s.scores, s.grad, s.student, s.slopes);
    clear(s.grad_keep, plan.comparator_count);
    if (args.grad_permutation != nullptr) {
      for_row_groups(plan, [&](int32_t row_group, auto rows) {
        constexpr int R = decltype(rows)::value;
        sort_rows<R, true>(plan, row_group, V(1), s.student, s.student_rows, s.tape);
        const int64_t row = plan.groups[row_group].first;
        for (int r = 0; r < R; ++r) {
          group.load(args.grad_permutation + (row + r) * n, n * n, n, R, s.student_rows + r);
        }
        sort_rows_backward<R>(
            plan, row_group, s.student, s.tape, s.student_rows, AddTo<V>{s.grad_keep});
      });
    }
    if (args.grad_values != nullptr) {
      group.load(args.grad_values, n, n, 1, s.grad);
    } else {
      clear(s.grad, n);
    }
    sort_values_backward(plan, s.student, s.slopes, s.grad_keep, s.grad);
    group.store(s.grad, 1, n, args.grad_scores, n);
  }
}

template <class V, class T>
void cross_entropy(const CrossEntropyForward<T>& args, int64_t first, int64_t last, void* memory) {
  const SortingPlan& plan = args.sort.plan;
  const int64_t n = plan.size;
  const Scratch<V> s(plan, memory);
  const bool with_grad = args.grad_student != nullptr;
  for (int64_t index = first; index < last; ++index) {
    const Group<V> group(index, args.sort.queries);
    group.load(args.teacher, n, n, 1, s.scores);
    sort_group<V>(args.sort, args.teacher_steepness, s.scores, s.grad, s.teacher, nullptr);
    group.load(args.sort.scores, n, n, 1, s.scores);
    sort_group<V>(
        args.sort, args.sort.steepness, s.scores, s.grad, s.student, with_grad ? s.slopes : nullptr);
    clear(s.grad_keep, plan.comparator_count);
    V loss(0), lost(0);
    for_row_groups(plan, [&](int32_t row_group, auto rows) {
      constexpr int R = decltype(rows)::value;
      sort_rows<R, false>(plan, row_group, V(T(1) / T(n)), s.teacher, s.teacher_rows, s.tape);
      V row_loss[R] = {};
      if (with_grad) {
        sort_rows<R, true>(plan, row_group, V(1), s.student, s.student_rows, s.tape);
        for (V *p = s.student_rows, *q = s.teacher_rows; p < s.student_rows + n * R; p += R, q += R) {
          for (int r = 0; r < R; ++r) row_loss[r] += cross_entropy(p[r], q[r], &p[r]);
        }
        sort_rows_backward<R>(
            plan, row_group, s.student, s.tape, s.student_rows, AddTo<V>{s.grad_keep});
      } else {
        sort_rows<R, false>(plan, row_group, V(1), s.student, s.student_rows, s.tape);
        for (V *p = s.student_rows, *q = s.teacher_rows; p < s.student_rows + n * R; p += R, q += R) {
          for (int r = 0; r < R; ++r) row_loss[r] += cross_entropy<V>(p[r], q[r], nullptr);
        }
      }
      for (int r = 0; r < R; ++r) {  // Kahan: n partial sums would cost log n bits otherwise
        const V addend = row_loss[r] - lost;
        const V sum = loss + addend;
        lost = (sum - loss) - addend;
        loss = sum;
      }
    });
    V weight(args.scale);
    if (args.mask != nullptr) {
      group.load(args.mask, 1, 1, 1, &weight);
      weight = weight * V(args.scale);
    }
    loss = weighted(weight, loss);
    group.store(&loss, 1, 1, args.losses, 1);
    if (with_grad) {
      clear(s.grad, n);
      sort_values_backward(plan, s.student, s.slopes, s.grad_keep, s.grad);
      for (int64_t j = 0; j < n; ++j) s.grad[j] = weighted(weight, s.grad[j]);
      group.store(s.grad, 1, n, args.grad_student, n);
    }
  }
}

template <class V>
constexpr SoftSortKernels<typename Lanes<V>::Scalar> soft_sort_kernels{
    Lanes<V>::count, Scratch<V>::bytes, forward<V>, backward<V>, cross_entropy<V>};

}  // namespace

extern const SoftSortKernels<float> soft_sort_f32 = soft_sort_kernels<Register<float>>;
extern const SoftSortKernels<double> soft_sort_f64 = soft_sort_kernels<Register<double>>;

FMKERNELS_NAMESPACE_END
