// A sorting network laid out for the kernels: plain data, shared by host and device.
#pragma once

#include <cstdint>

namespace fmkernels {

struct Comparator {
  int32_t lo, hi;  // wires
  int32_t slot;    // where its weights are kept; slots follow the order of the segments below
};

// Four wires through two layers: comparators (0,1), (2,3), then (0,2), (1,3), in slots first_slot…
// + 3. Mixing is symmetric in its two wires, so lo and hi no longer matter here. Two layers per
// visit halve the traffic of the states.
struct Quad {
  int32_t wire[4];
  int32_t first_slot;
};

// One comparator that is in no quad.
struct Pair {
  int32_t wire[2];
  int32_t slot;
};

// A run of quads or of pairs that may be done in any order.
struct Segment {
  int32_t is_quads;
  int32_t first, count;  // in quads or in pairs
  int32_t first_slot;    // of the first of them; the others follow
};

// The part [first, last) of a segment, in quads or in pairs. Only their differences are on the tape:
// that of the comparator in `slot` at slot + tape_shift.
struct Active {
  int32_t first, last;
  int32_t tape_shift;
};

// Rows first … first + count − 1 of X, taken through the network together: they share every load of
// a weight and one addition to its gradient. count is a power of two, at most max_group_rows.
struct RowGroup {
  int32_t first, count;
};
constexpr int32_t max_group_rows = 4;

struct SortingPlan {
  int32_t size;  // n, the wires
  int32_t comparator_count;
  int32_t layer_count;
  int32_t segment_count;
  int32_t group_count;
  int32_t tape_count;             // the longest tape of a group
  const Comparator* comparators;  // in the order of the layers
  const int32_t* layers;          // layer l has comparators [layers[l], layers[l + 1])
  const Quad* quads;
  const Pair* pairs;
  const Segment* segments;
  const int32_t* segment_of_slot;
  const RowGroup* groups;
  // active[group · segment_count + segment]: the part of the segment in which the group's rows of X
  // are not zero on all wires. A row starts on one wire and spreads as blocks are merged; about
  // half of all the work is on zeros, and skipped.
  const Active* active;
};

// X(name) for every distribution, in the order of DISTRIBUTIONS in ops/soft_sort/reference.py.
#define FMKERNELS_DISTRIBUTIONS(X) \
  X(logistic) X(logistic_phi) X(gaussian) X(reciprocal) X(cauchy) X(optimal)

#define FMKERNELS_NAME(name) name,
enum class Distribution : int32_t { FMKERNELS_DISTRIBUTIONS(FMKERNELS_NAME) };
#undef FMKERNELS_NAME

}  // namespace fmkernels
