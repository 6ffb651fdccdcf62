// Relaxed sorting networks: the arithmetic of fmkernels/ops/soft_sort/reference.py, where the
// formulas are derived, as templates over a value type V (one query per lane).
//
// Rows of the permutation matrix X are independent chains once the weights of the comparators are
// known, so a kernel takes a group of R of them at a time (R = 1, 2 or 4), all layers first to last
// and back; the matrix never exists.
#pragma once

#include "fmkernels/math.h"
#include "fmkernels/sorting_plan.h"

FMKERNELS_NAMESPACE_BEGIN

template <class V>
struct Weights {
  V keep, swap;
};

// What the backward pass needs of a comparator besides its weights.
template <class V>
struct Slope {
  V slope;    // ∂keep/∂Δ
  V elastic;  // Δ·∂keep/∂Δ, bounded
};

template <class V>
struct Settings {
  V steepness, art_lambda;
};

// The smaller weight of a comparator whose wires differ by delta = x_hi − x_lo, and its slopes. Both
// weights come from this tail, so neither is a difference of nearly equal numbers.
template <Distribution distribution, class V>
FMKERNELS_INLINE V soft_swap_tail(V delta, Settings<V> settings, Slope<V>* slope) {
  using S = typename Lanes<V>::Scalar;
  const V one(1);
  const V v = settings.steepness * delta;
  V a = absolute(v);
  V tail, density;  // density: dkeep/dv
  if constexpr (distribution == Distribution::cauchy) {
    tail = cauchy_tail(a);
    density = V(S(0.318309886183790672)) / (one + a * a);
  } else if constexpr (distribution == Distribution::reciprocal) {
    tail = one / (V(2) + a);
    density = tail * tail;
  } else if constexpr (distribution == Distribution::optimal) {
    const auto far = a > V(0.25f);
    const V far_tail = V(0.0625f) / a;
    tail = select(far, far_tail, V(0.5f) - a);
    density = select(far, far_tail / a, one);
  } else if constexpr (distribution == Distribution::gaussian) {
    tail = V(0.5f) * erfc(a * V(S(0.707106781186547524)));
    density = exp(V(-0.5f) * a * a) * V(S(0.398942280401432678));
  } else {
    V scale = one;
    if constexpr (distribution == Distribution::logistic_phi) {
      const V distance = absolute(delta) + V(S(1e-10));
      const V sharpness = power(distance, -settings.art_lambda);
      scale = sharpness * (one - settings.art_lambda * (absolute(delta) / distance));
      a = a * sharpness;
    }
    const V e = exp(-a);
    const V keep = one / (one + e);
    tail = e * keep;
    density = tail * keep * scale;
  }
  if (slope != nullptr) {
    *slope = {settings.steepness * density, v * density};
  }
  return tail;
}

// The comparator applied to two values; also to their gradients, since it is its own transpose.
template <class V>
FMKERNELS_INLINE void mix(V& a, V& b, Weights<V> w) {
  const V old_a = a;
  a = w.keep * a + w.swap * b;
  b = w.swap * old_a + w.keep * b;
}

// a + b = sum + rest, with sum the rounded one (Knuth's TwoSum).
template <class V>
FMKERNELS_INLINE void add_exactly(V a, V b, V& sum, V& rest) {
  sum = a + b;
  const V rounded_b = sum - a;
  rest = (a - (sum - rounded_b)) + (b - rounded_b);
}

// One comparator of the value chain: sorts two of the values x in place and records the weights and
// (if asked) the slopes. It leaves min + tail·|Δ| and max − tail·|Δ|; what rounding takes from these
// sums is kept in rest (n), because everything that follows depends on small differences of x.
template <Distribution distribution, class V>
FMKERNELS_INLINE void sort_pair(
    Comparator c, Settings<V> settings, V* x, V* rest, Weights<V>* weights, Slope<V>* slopes) {
  const V lo = x[c.lo], hi = x[c.hi], lo_rest = rest[c.lo], hi_rest = rest[c.hi];
  const V delta = (hi - lo) + (hi_rest - lo_rest);
  const V tail = soft_swap_tail<distribution>(
      delta, settings, slopes == nullptr ? nullptr : slopes + c.slot);
  const auto reversed = delta < V(0);
  weights[c.slot] = {select(reversed, tail, V(1) - tail), select(reversed, V(1) - tail, tail)};
  const V shift = rounded_product(tail, absolute(delta));
  add_exactly(select(reversed, hi, lo), shift, x[c.lo], rest[c.lo]);
  add_exactly(select(reversed, lo, hi), -shift, x[c.hi], rest[c.hi]);
  rest[c.lo] += select(reversed, hi_rest, lo_rest);
  rest[c.hi] += select(reversed, lo_rest, hi_rest);
}

// Back through one comparator: grad holds the gradient of the values after it and becomes that of
// the values before; grad_keep is what the rows of X add to the gradient of every keep.
template <class V>
FMKERNELS_INLINE void sort_pair_backward(
    Comparator c, const Weights<V>* weights, const Slope<V>* slopes, const V* grad_keep, V* grad) {
  V lo = grad[c.lo], hi = grad[c.hi];
  const V d_delta = grad_keep[c.slot] * slopes[c.slot].slope - (lo - hi) * slopes[c.slot].elastic;
  mix(lo, hi, weights[c.slot]);
  grad[c.lo] = lo - d_delta;
  grad[c.hi] = hi + d_delta;
}

// The whole value chain, and back.
template <Distribution distribution, class V>
FMKERNELS_INLINE void sort_values(
    const SortingPlan& plan, Settings<V> settings, V* x, V* rest, Weights<V>* weights,
    Slope<V>* slopes) {
  for (int32_t index = 0; index < plan.size; ++index) rest[index] = V(0);
  for (int32_t index = 0; index < plan.comparator_count; ++index) {
    sort_pair<distribution>(plan.comparators[index], settings, x, rest, weights, slopes);
  }
  for (int32_t index = 0; index < plan.size; ++index) x[index] += rest[index];
}
template <class V>
FMKERNELS_INLINE void sort_values_backward(
    const SortingPlan& plan, const Weights<V>* weights, const Slope<V>* slopes, const V* grad_keep,
    V* grad) {
  for (int32_t index = plan.comparator_count - 1; index >= 0; --index) {
    sort_pair_backward(plan.comparators[index], weights, slopes, grad_keep, grad);
  }
}

// The rows of a group that are in registers at the same time: a quad of two has 8 states, and 16
// registers hold no more beside its weights.
template <int R>
constexpr int rows_at_once = R < 2 ? R : 2;

// Quads, and pairs, of a segment that are in registers at the same time. A CPU's are full with one,
// and it looks ahead; a thread of a GPU has registers to spare, and stands still for every access.
template <class V>
constexpr int quads_at_once = Lanes<V>::count == 1 ? 2 : 1;
template <class V>
constexpr int pairs_at_once = Lanes<V>::count == 1 ? 4 : 1;

// The four wires of a quad. memory is (n, R) from the first of K rows on; like all arrays of rows
// below it is a pointer, or whatever else can be indexed and moved as one.
template <int R, int K, class Memory, class V>
FMKERNELS_INLINE void load_quad(const Quad& quad, Memory memory, V (&x)[4][K]) {
  for (int k = 0; k < 4; ++k) {
    const Memory wire = memory + static_cast<int64_t>(quad.wire[k]) * R;
    for (int r = 0; r < K; ++r) x[k][r] = wire[r];
  }
}
template <int R, int K, class Memory, class V>
FMKERNELS_INLINE void store_quad(const Quad& quad, const V (&x)[4][K], Memory memory) {
  for (int k = 0; k < 4; ++k) {
    const Memory wire = memory + static_cast<int64_t>(quad.wire[k]) * R;
    for (int r = 0; r < K; ++r) wire[r] = x[k][r];
  }
}

// The two wires of a pair, of all R rows.
template <int R, class Memory, class V>
FMKERNELS_INLINE void load_pair(const Pair& pair, Memory memory, V (&x)[2][R]) {
  for (int k = 0; k < 2; ++k) {
    const Memory wire = memory + static_cast<int64_t>(pair.wire[k]) * R;
    for (int r = 0; r < R; ++r) x[k][r] = wire[r];
  }
}
template <int R, class Memory, class V>
FMKERNELS_INLINE void store_pair(const Pair& pair, const V (&x)[2][R], Memory memory) {
  for (int k = 0; k < 2; ++k) {
    const Memory wire = memory + static_cast<int64_t>(pair.wire[k]) * R;
    for (int r = 0; r < R; ++r) wire[r] = x[k][r];
  }
}
FMKERNELS_INLINE int32_t first_slot(const Quad& quad) { return quad.first_slot; }
FMKERNELS_INLINE int32_t first_slot(const Pair& pair) { return pair.slot; }

// One comparator on K rows.
template <int K, class V>
FMKERNELS_INLINE void mix(V (&a)[K], V (&b)[K], Weights<V> w) {
  for (int r = 0; r < K; ++r) mix(a[r], b[r], w);
}
template <int K, class Memory, class V>
FMKERNELS_INLINE void subtract(const V (&a)[K], const V (&b)[K], Memory difference) {
  for (int r = 0; r < K; ++r) difference[r] = a[r] - b[r];
}
// The comparator's share of the backward pass: adds Σ (a − b)·difference to the gradient of keep,
// then mixes the gradients. b + keep·(a − b) would be half the multiplications, but −Q/P spans
// thirty orders of magnitude, and the small gradients would be lost (measured: an error of 9e-2
// instead of 3e-5 for the gaussian).
template <int K, class Memory, class V>
FMKERNELS_INLINE void unmix(
    V (&a)[K], V (&b)[K], Weights<V> w, Memory difference, V& grad_keep) {
  for (int r = 0; r < K; ++r) grad_keep = grad_keep + (a[r] - b[r]) * difference[r];
  mix(a, b, w);
}

// Where the weights of Q members of a segment are read from. With several in flight they are loaded
// before anything is stored, because a load does not pass a store that might be to the same place.
template <int Q, int slots, class V>
struct WeightsOf {
  Weights<V> held[Q][slots];
  template <class Member>
  FMKERNELS_INLINE WeightsOf(const Member* members, const Weights<V>* weights) {
    for (int q = 0; q < Q; ++q) {
      for (int k = 0; k < slots; ++k) held[q][k] = weights[first_slot(members[q]) + k];
    }
  }
  FMKERNELS_INLINE const Weights<V>* operator[](int q) const { return held[q]; }
};
template <int slots, class V>
struct WeightsOf<1, slots, V> {
  const Weights<V>* first;
  template <class Member>
  FMKERNELS_INLINE WeightsOf(const Member* members, const Weights<V>* weights)
      : first(weights + first_slot(*members)) {}
  FMKERNELS_INLINE const Weights<V>* operator[](int) const { return first; }
};

// Q quads of a segment, forward. state is (n, R), tape (plan.tape_count, R).
template <int R, int Q, bool keep_tape, class Memory, class V>
FMKERNELS_INLINE void sort_members(
    const Quad* quads, int32_t tape_shift, const Weights<V>* weights, Memory state, Memory tape) {
  constexpr int K = rows_at_once<R>;
  const WeightsOf<Q, 4, V> w(quads, weights);
  for (int r = 0; r < R; r += K) {
    V x[Q][4][K];
    for (int q = 0; q < Q; ++q) load_quad<R>(quads[q], state + r, x[q]);
    for (int q = 0; q < Q; ++q) {
      const Memory t = tape + static_cast<int64_t>(quads[q].first_slot + tape_shift) * R + r;
      if constexpr (keep_tape) {
        subtract(x[q][0], x[q][1], t);
        subtract(x[q][2], x[q][3], t + R);
      }
      mix(x[q][0], x[q][1], w[q][0]);
      mix(x[q][2], x[q][3], w[q][1]);
      if constexpr (keep_tape) {
        subtract(x[q][0], x[q][2], t + 2 * R);
        subtract(x[q][1], x[q][3], t + 3 * R);
      }
      mix(x[q][0], x[q][2], w[q][2]);
      mix(x[q][1], x[q][3], w[q][3]);
    }
    for (int q = 0; q < Q; ++q) store_quad<R>(quads[q], x[q], state + r);
  }
}

// Q pairs, likewise.
template <int R, int Q, bool keep_tape, class Memory, class V>
FMKERNELS_INLINE void sort_members(
    const Pair* pairs, int32_t tape_shift, const Weights<V>* weights, Memory state, Memory tape) {
  const WeightsOf<Q, 1, V> w(pairs, weights);
  V x[Q][2][R];
  for (int q = 0; q < Q; ++q) load_pair<R>(pairs[q], state, x[q]);
  for (int q = 0; q < Q; ++q) {
    if constexpr (keep_tape) {
      subtract(x[q][0], x[q][1], tape + static_cast<int64_t>(pairs[q].slot + tape_shift) * R);
    }
    mix(x[q][0], x[q][1], *w[q]);
  }
  for (int q = 0; q < Q; ++q) store_pair<R>(pairs[q], x[q], state);
}

// Q quads of a segment, backward: grad is (n, R). Their shares go to add(slot, position, share).
template <int R, int Q, class Memory, class V, class Add>
FMKERNELS_INLINE void unsort_members(
    const Quad* quads, int32_t tape_shift, const Weights<V>* weights, Memory tape, Memory grad,
    Add add) {
  constexpr int K = rows_at_once<R>;
  V sum[Q][4] = {};
  for (int r = 0; r < R; r += K) {
    V g[Q][4][K];
    for (int q = 0; q < Q; ++q) load_quad<R>(quads[q], grad + r, g[q]);
    for (int q = 0; q < Q; ++q) {
      const Weights<V>* w = weights + quads[q].first_slot;
      const Memory t = tape + static_cast<int64_t>(quads[q].first_slot + tape_shift) * R + r;
      unmix(g[q][0], g[q][2], w[2], t + 2 * R, sum[q][2]);
      unmix(g[q][1], g[q][3], w[3], t + 3 * R, sum[q][3]);
      unmix(g[q][0], g[q][1], w[0], t, sum[q][0]);
      unmix(g[q][2], g[q][3], w[1], t + R, sum[q][1]);
    }
    for (int q = 0; q < Q; ++q) store_quad<R>(quads[q], g[q], grad + r);
  }
  for (int q = 0; q < Q; ++q) {
    const int32_t slot = quads[q].first_slot;
    for (int k = 0; k < 4; ++k) add(slot + k, slot + tape_shift + k, sum[q][k]);
  }
}

// Q pairs, likewise.
template <int R, int Q, class Memory, class V, class Add>
FMKERNELS_INLINE void unsort_members(
    const Pair* pairs, int32_t tape_shift, const Weights<V>* weights, Memory tape, Memory grad,
    Add add) {
  V g[Q][2][R], sum[Q] = {};
  for (int q = 0; q < Q; ++q) load_pair<R>(pairs[q], grad, g[q]);
  for (int q = 0; q < Q; ++q) {
    const Memory t = tape + static_cast<int64_t>(pairs[q].slot + tape_shift) * R;
    unmix(g[q][0], g[q][1], weights[pairs[q].slot], t, sum[q]);
  }
  for (int q = 0; q < Q; ++q) store_pair<R>(pairs[q], g[q], grad);
  for (int q = 0; q < Q; ++q) add(pairs[q].slot, pairs[q].slot + tape_shift, sum[q]);
}

// A part of a segment, Q members at once and the rest one by one.
template <int R, bool keep_tape, int Q, class Member, class Memory, class V>
FMKERNELS_INLINE void sort_part(
    const Member* members, Active part, const Weights<V>* weights, Memory state, Memory tape) {
  int32_t m = part.first;
  if constexpr (Q > 1) {
    for (; m + Q <= part.last; m += Q) {
      sort_members<R, Q, keep_tape>(members + m, part.tape_shift, weights, state, tape);
    }
  }
  for (; m < part.last; ++m) {
    sort_members<R, 1, keep_tape>(members + m, part.tape_shift, weights, state, tape);
  }
}
template <int R, int Q, class Member, class Memory, class V, class Add>
FMKERNELS_INLINE void unsort_part(
    const Member* members, Active part, const Weights<V>* weights, Memory tape, Memory grad,
    Add add) {
  int32_t m = part.first;
  if constexpr (Q > 1) {
    for (; m + Q <= part.last; m += Q) {
      unsort_members<R, Q>(members + m, part.tape_shift, weights, tape, grad, add);
    }
  }
  for (; m < part.last; ++m) {
    unsort_members<R, 1>(members + m, part.tape_shift, weights, tape, grad, add);
  }
}

// The R rows of a group of X through all layers. state is (n, R); the start value is 1 (or the
// scale that all later entries should carry). tape, if kept, is (plan.tape_count, R): the
// differences that the backward pass multiplies with.
template <int R, bool keep_tape, class Memory, class V>
FMKERNELS_INLINE void sort_rows(
    const SortingPlan& plan, int32_t group, V start, const Weights<V>* weights, Memory state,
    Memory tape) {
  const int32_t row = plan.groups[group].first;
  for (int32_t index = 0; index < plan.size * R; ++index) state[index] = V(0);
  for (int r = 0; r < R; ++r) state[(row + r) * R + r] = start;

  const Active* active = plan.active + static_cast<int64_t>(group) * plan.segment_count;
  for (int32_t s = 0; s < plan.segment_count; ++s) {
    const Active part = active[s];
    if (plan.segments[s].is_quads) {
      sort_part<R, keep_tape, quads_at_once<V>>(plan.quads, part, weights, state, tape);
    } else {
      sort_part<R, keep_tape, pairs_at_once<V>>(plan.pairs, part, weights, state, tape);
    }
  }
}

// Back through the layers with the gradient of a group's rows (n, R), which is used up. The group's
// share of the gradient of every keep, Σ e·d, goes to add(slot, position on the tape, share).
template <int R, class Memory, class V, class Add>
FMKERNELS_INLINE void sort_rows_backward(
    const SortingPlan& plan, int32_t group, const Weights<V>* weights, Memory tape, Memory grad,
    Add add) {
  const Active* active = plan.active + static_cast<int64_t>(group) * plan.segment_count;
  for (int32_t s = plan.segment_count - 1; s >= 0; --s) {
    const Active part = active[s];
    if (plan.segments[s].is_quads) {
      unsort_part<R, quads_at_once<V>>(plan.quads, part, weights, tape, grad, add);
    } else {
      unsort_part<R, pairs_at_once<V>>(plan.pairs, part, weights, tape, grad, add);
    }
  }
}

// One entry of the cross entropy −q·log max(p, 2⁻¹⁰⁰), and its derivative in p. The teacher's
// rows start at 1/n, so q already carries the mean over the inputs.
template <class V>
FMKERNELS_INLINE V cross_entropy(V p, V q, V* grad) {
  const V floor(7.88860905221011805e-31f);
  const auto above = p > floor;
  if (grad != nullptr) {
    *grad = select(above, -q / p, V(0));
  }
  return -q * log(select(p < floor, floor, p));
}

// weight·value, in which a weight of zero removes even a NaN; a weight that is NaN shows.
template <class V>
FMKERNELS_INLINE V weighted(V weight, V value) {
  const V product = weight * value;
  return select(absolute(weight) > V(0), product, select(weight < V(1), V(0), product));
}

FMKERNELS_NAMESPACE_END
