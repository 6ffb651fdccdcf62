// A SortingPlan as one array of 32-bit numbers, so that it can be copied to a device: the sizes, then
// the arrays one behind the other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fmkernels/config.h"
#include "fmkernels/sorting_plan.h"

FMKERNELS_NAMESPACE_BEGIN

constexpr int32_t plan_sizes = 8;

// The plan whose arrays lie in `table`, behind its sizes.
FMKERNELS_INLINE SortingPlan unpack_plan(const int32_t* table) {
  SortingPlan plan;
  plan.size = table[0];
  plan.comparator_count = table[1];
  plan.layer_count = table[2];
  plan.segment_count = table[3];
  plan.group_count = table[4];
  plan.tape_count = table[5];
  const int32_t quads = table[6], pairs = table[7];
  const int32_t* next = table + plan_sizes;
  const auto take = [&next](int32_t count, size_t bytes) {
    const int32_t* taken = next;
    next += count * static_cast<int32_t>(bytes / sizeof(int32_t));
    return static_cast<const void*>(taken);
  };
  plan.comparators =
      static_cast<const Comparator*>(take(plan.comparator_count, sizeof(Comparator)));
  plan.layers = static_cast<const int32_t*>(take(plan.layer_count + 1, sizeof(int32_t)));
  plan.quads = static_cast<const Quad*>(take(quads, sizeof(Quad)));
  plan.pairs = static_cast<const Pair*>(take(pairs, sizeof(Pair)));
  plan.segments = static_cast<const Segment*>(take(plan.segment_count, sizeof(Segment)));
  plan.segment_of_slot = static_cast<const int32_t*>(take(plan.comparator_count, sizeof(int32_t)));
  plan.groups = static_cast<const RowGroup*>(take(plan.group_count, sizeof(RowGroup)));
  plan.active =
      static_cast<const Active*>(take(plan.group_count * plan.segment_count, sizeof(Active)));
  return plan;
}

FMKERNELS_NAMESPACE_END
