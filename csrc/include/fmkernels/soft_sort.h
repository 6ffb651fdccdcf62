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

// The R rows of a group of X through all layers. state is (n, R); the start value is 1 (or the
// scale that all later entries should carry). tape, if kept, is (plan.tape_count, R): the
// differences that the backward pass multiplies with.
template <int R, bool keep_tape, class Memory, class V>
FMKERNELS_INLINE void sort_rows(
    const SortingPlan& plan, int32_t group, V start, const Weights<V>* weights, Memory state,
    Memory tape) {
  constexpr int K = rows_at_once<R>;
  const int32_t first = plan.groups[group].first;
  for (int32_t index = 0; index < plan.size * R; ++index) state[index] = V(0);
  for (int r = 0; r < R; ++r) state[(first + r) * R + r] = start;

  const Active* active = plan.active + static_cast<int64_t>(group) * plan.segment_count;
  for (int32_t s = 0; s < plan.segment_count; ++s) {
    const Active part = active[s];
    if (plan.segments[s].is_quads) {
      for (int32_t q = part.first; q < part.last; ++q) {
        const Quad quad = plan.quads[q];
        const Weights<V>* w = weights + quad.first_slot;
        for (int r = 0; r < R; r += K) {
          const Memory t = tape + static_cast<int64_t>(quad.first_slot + part.tape_shift) * R + r;
          V x[4][K];
          load_quad<R>(quad, state + r, x);
          if constexpr (keep_tape) {
            subtract(x[0], x[1], t);
            subtract(x[2], x[3], t + R);
          }
          mix(x[0], x[1], w[0]);
          mix(x[2], x[3], w[1]);
          if constexpr (keep_tape) {
            subtract(x[0], x[2], t + 2 * R);
            subtract(x[1], x[3], t + 3 * R);
          }
          mix(x[0], x[2], w[2]);
          mix(x[1], x[3], w[3]);
          store_quad<R>(quad, x, state + r);
        }
      }
    } else {
      for (int32_t p = part.first; p < part.last; ++p) {
        const Pair pair = plan.pairs[p];
        const Memory a = state + static_cast<int64_t>(pair.wire[0]) * R;
        const Memory b = state + static_cast<int64_t>(pair.wire[1]) * R;
        const Memory t = tape + static_cast<int64_t>(pair.slot + part.tape_shift) * R;
        for (int r = 0; r < R; ++r) {
          if constexpr (keep_tape) t[r] = a[r] - b[r];
          mix(a[r], b[r], weights[pair.slot]);
        }
      }
    }
  }
}

// Back through the layers with the gradient of a group's rows (n, R), which is used up. The group's
// share of the gradient of every keep, Σ e·d, goes to add(slot, position on the tape, share).
template <int R, class Memory, class V, class Add>
FMKERNELS_INLINE void sort_rows_backward(
    const SortingPlan& plan, int32_t group, const Weights<V>* weights, Memory tape, Memory grad,
    Add add) {
  constexpr int K = rows_at_once<R>;
  const Active* active = plan.active + static_cast<int64_t>(group) * plan.segment_count;
  for (int32_t s = plan.segment_count - 1; s >= 0; --s) {
    const Active part = active[s];
    if (plan.segments[s].is_quads) {
      for (int32_t q = part.first; q < part.last; ++q) {
        const Quad quad = plan.quads[q];
        const Weights<V>* w = weights + quad.first_slot;
        const int32_t position = quad.first_slot + part.tape_shift;
        V sum[4] = {V(0), V(0), V(0), V(0)};
        for (int r = 0; r < R; r += K) {
          const Memory t = tape + static_cast<int64_t>(position) * R + r;
          V g[4][K];
          load_quad<R>(quad, grad + r, g);
          unmix(g[0], g[2], w[2], t + 2 * R, sum[2]);
          unmix(g[1], g[3], w[3], t + 3 * R, sum[3]);
          unmix(g[0], g[1], w[0], t, sum[0]);
          unmix(g[2], g[3], w[1], t + R, sum[1]);
          store_quad<R>(quad, g, grad + r);
        }
        for (int k = 0; k < 4; ++k) add(quad.first_slot + k, position + k, sum[k]);
      }
    } else {
      for (int32_t p = part.first; p < part.last; ++p) {
        const Pair pair = plan.pairs[p];
        const int32_t position = pair.slot + part.tape_shift;
        const Memory a = grad + static_cast<int64_t>(pair.wire[0]) * R;
        const Memory b = grad + static_cast<int64_t>(pair.wire[1]) * R;
        const Memory t = tape + static_cast<int64_t>(position) * R;
        V sum(0);
        for (int r = 0; r < R; ++r) {
          sum = sum + (a[r] - b[r]) * t[r];
          mix(a[r], b[r], weights[pair.slot]);
        }
        add(pair.slot, position, sum);
      }
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
