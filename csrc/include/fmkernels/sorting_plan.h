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
};

struct Range {
  int32_t first, last;  // [first, last)
};

// Rows first … first + count − 1 of X, taken through the network together: they share every load of
// a weight and one addition to its gradient. count is 1, 2 or max_group_rows.
struct RowGroup {
  int32_t first, count;
};
constexpr int32_t max_group_rows = 4;

struct SortingPlan {
  int32_t size;  // n, the wires
  int32_t comparator_count;
  int32_t segment_count;
  int32_t group_count;
  const Comparator* comparators;  // in the order of the layers
  const Quad* quads;
  const Pair* pairs;
  const Segment* segments;
  const RowGroup* groups;
  // active[group · segment_count + segment]: the part of the segment in which the group's rows of X
  // are not zero on all wires. A row starts on one wire and spreads as blocks are merged; about
  // half of all the work is on zeros, and skipped.
  const Range* active;
};

enum class Distribution : int32_t {
  logistic,
  logistic_phi,
  gaussian,
  reciprocal,
  cauchy,
  optimal,
};

}  // namespace fmkernels
