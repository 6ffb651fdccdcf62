// The CPU loops over queries, compiled once per instruction set: a group of queries fills the lanes
// of a register, and everything a group needs stays in the thread's caches (about 140 KB at n = 49
// with eight lanes).
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

// The scratch of one group, cut into arrays of registers.
template <class V>
struct Scratch {
  V *scores, *grad;                     // (n)
  V *student_rows, *teacher_rows;       // (n, 2)
  Weights<V> *student, *teacher;        // (comparators)
  Slope<V>* slopes;                     // (comparators)
  V *grad_keep, *tape;                  // (comparators), (comparators, 2)

  Scratch(const SortingPlan& plan, typename Lanes<V>::Scalar* memory) {
    const int64_t n = plan.size, c = plan.comparator_count;
    V* next = reinterpret_cast<V*>(memory);
    const auto take = [&next](int64_t count) {
      V* taken = next;
      next += count;
      return taken;
    };
    scores = take(n);
    grad = take(n);
    student_rows = take(2 * n);
    teacher_rows = take(2 * n);
    student = reinterpret_cast<Weights<V>*>(take(2 * c));
    teacher = reinterpret_cast<Weights<V>*>(take(2 * c));
    slopes = reinterpret_cast<Slope<V>*>(take(2 * c));
    grad_keep = take(c);
    tape = take(2 * c);
  }
};

// Memory (lanes, …) with `stride` numbers between queries <-> registers with a query per lane.
// Lanes past the last query repeat it, and are not stored.
template <class V>
struct Group {
  using T = typename Lanes<V>::Scalar;
  int64_t first;
  int count;

  Group(int64_t index, int64_t queries) : first(index * Lanes<V>::count) {
    const int64_t left = queries - first;
    count = left < Lanes<V>::count ? static_cast<int>(left) : Lanes<V>::count;
  }

  void load(const T* source, int64_t stride, int64_t length, int64_t step, V* target) const {
    T* lanes = reinterpret_cast<T*>(target);
    for (int lane = 0; lane < Lanes<V>::count; ++lane) {
      const T* row = source + (first + (lane < count ? lane : count - 1)) * stride;
      for (int64_t j = 0; j < length; ++j) lanes[j * step * Lanes<V>::count + lane] = row[j];
    }
  }

  void store(const V* source, int64_t step, int64_t length, T* target, int64_t stride) const {
    const T* lanes = reinterpret_cast<const T*>(source);
    for (int lane = 0; lane < count; ++lane) {
      T* row = target + (first + lane) * stride;
      for (int64_t j = 0; j < length; ++j) row[j] = lanes[j * step * Lanes<V>::count + lane];
    }
  }
};

template <class V, class T>
void sort_group(
    const SoftSortArgs<T>& args, T steepness, V* x, Weights<V>* weights, Slope<V>* slopes) {
  const Settings<V> settings{V(steepness), V(args.art_lambda)};
#define FMKERNELS_CASE(name)                                                    \
  case Distribution::name:                                                      \
    return sort_values<Distribution::name>(args.plan, settings, x, weights, slopes);
  switch (args.distribution) {
    FMKERNELS_CASE(logistic)
    FMKERNELS_CASE(logistic_phi)
    FMKERNELS_CASE(gaussian)
    FMKERNELS_CASE(reciprocal)
    FMKERNELS_CASE(cauchy)
    FMKERNELS_CASE(optimal)
  }
#undef FMKERNELS_CASE
}

template <class V>
void clear(V* array, int64_t count) {
  for (int64_t index = 0; index < count; ++index) array[index] = V(0);
}

template <int R>
struct RowCount {
  static constexpr int value = R;
};

// Calls body(first row, RowCount<R>) for all rows of X, two at a time.
template <class Body>
FMKERNELS_INLINE void for_rows(int32_t n, Body body) {
  for (int32_t row = 0; row + 1 < n; row += 2) body(row, RowCount<2>{});
  if (n % 2 == 1) body(n - 1, RowCount<1>{});
}

template <class V, class T>
void forward(const SoftSortForward<T>& args, int64_t first, int64_t last, T* memory) {
  const SortingPlan& plan = args.sort.plan;
  const int64_t n = plan.size;
  const Scratch<V> s(plan, memory);
  for (int64_t index = first; index < last; ++index) {
    const Group<V> group(index, args.sort.queries);
    group.load(args.sort.scores, n, n, 1, s.scores);
    sort_group<V>(args.sort, args.sort.steepness, s.scores, s.student, nullptr);
    group.store(s.scores, 1, n, args.values, n);
    for_rows(plan.size, [&](int32_t row, auto rows) {
      constexpr int R = decltype(rows)::value;
      sort_rows<R, false>(plan, row, V(1), s.student, s.student_rows, s.tape);
      for (int r = 0; r < R; ++r) {
        group.store(s.student_rows + r, R, n, args.permutation + (row + r) * n, n * n);
      }
    });
  }
}

template <class V, class T>
void backward(const SoftSortBackward<T>& args, int64_t first, int64_t last, T* memory) {
  const SortingPlan& plan = args.sort.plan;
  const int64_t n = plan.size;
  const Scratch<V> s(plan, memory);
  for (int64_t index = first; index < last; ++index) {
    const Group<V> group(index, args.sort.queries);
    group.load(args.sort.scores, n, n, 1, s.scores);
    sort_group<V>(args.sort, args.sort.steepness, s.scores, s.student, s.slopes);
    clear(s.grad_keep, plan.comparator_count);
    if (args.grad_permutation != nullptr) {
      for_rows(plan.size, [&](int32_t row, auto rows) {
        constexpr int R = decltype(rows)::value;
        sort_rows<R, true>(plan, row, V(1), s.student, s.student_rows, s.tape);
        for (int r = 0; r < R; ++r) {
          group.load(args.grad_permutation + (row + r) * n, n * n, n, R, s.student_rows + r);
        }
        sort_rows_backward<R>(plan, row, s.student, s.tape, s.student_rows, s.grad_keep);
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
void cross_entropy(const CrossEntropyForward<T>& args, int64_t first, int64_t last, T* memory) {
  const SortingPlan& plan = args.sort.plan;
  const int64_t n = plan.size;
  const Scratch<V> s(plan, memory);
  const bool with_grad = args.grad_student != nullptr;
  for (int64_t index = first; index < last; ++index) {
    const Group<V> group(index, args.sort.queries);
    group.load(args.teacher, n, n, 1, s.scores);
    sort_group<V>(args.sort, args.teacher_steepness, s.scores, s.teacher, nullptr);
    group.load(args.sort.scores, n, n, 1, s.scores);
    sort_group<V>(
        args.sort, args.sort.steepness, s.scores, s.student, with_grad ? s.slopes : nullptr);
    clear(s.grad_keep, plan.comparator_count);
    V loss(0), lost(0);
    for_rows(plan.size, [&](int32_t row, auto rows) {
      constexpr int R = decltype(rows)::value;
      sort_rows<R, false>(plan, row, V(T(1) / T(n)), s.teacher, s.teacher_rows, s.tape);
      V row_loss(0);
      if (with_grad) {
        sort_rows<R, true>(plan, row, V(1), s.student, s.student_rows, s.tape);
        for (int64_t j = 0; j < n * R; ++j) {
          row_loss += cross_entropy(s.student_rows[j], s.teacher_rows[j], &s.student_rows[j]);
        }
        sort_rows_backward<R>(plan, row, s.student, s.tape, s.student_rows, s.grad_keep);
      } else {
        sort_rows<R, false>(plan, row, V(1), s.student, s.student_rows, s.tape);
        for (int64_t j = 0; j < n * R; ++j) {
          row_loss += cross_entropy<V>(s.student_rows[j], s.teacher_rows[j], nullptr);
        }
      }
      const V addend = row_loss - lost;  // Kahan: n/2 partial sums would cost log n bits otherwise
      const V sum = loss + addend;
      lost = (sum - loss) - addend;
      loss = sum;
    });
    V weight(args.scale);
    if (args.mask != nullptr) {
      group.load(args.mask, 1, 1, 1, &weight);
      weight = weight * V(args.scale);
    }
    const auto counts = absolute(weight) > V(0);  // a weight of zero removes even a NaN
    loss = select(counts, weight * loss, V(0));
    group.store(&loss, 1, 1, args.losses, 1);
    if (with_grad) {
      clear(s.grad, n);
      sort_values_backward(plan, s.student, s.slopes, s.grad_keep, s.grad);
      for (int64_t j = 0; j < n; ++j) s.grad[j] = select(counts, weight * s.grad[j], V(0));
      group.store(s.grad, 1, n, args.grad_student, n);
    }
  }
}

}  // namespace

extern const SoftSortKernels<float> soft_sort_f32{
    Lanes<Register<float>>::count, forward<Register<float>>, backward<Register<float>>,
    cross_entropy<Register<float>>};
extern const SoftSortKernels<double> soft_sort_f64{
    Lanes<Register<double>>::count, forward<Register<double>>, backward<Register<double>>,
    cross_entropy<Register<double>>};

FMKERNELS_NAMESPACE_END
