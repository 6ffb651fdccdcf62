// The launchers of soft_sort.cu: all pointers are of the device, `table` is a packed plan there.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fmkernels/soft_sort_args.h"

namespace fmkernels {

// How a launch is cut: sizes of the network, what block_plan() of ops/soft_sort/config.py chose, and
// the stream's address. The types of the last two are those that Python's arguments are parsed into.
struct BlockLaunch {
  int32_t n, comparator_count, tape_count;
  int32_t rows;  // of X that a block carries at the same time
  int32_t threads;
  long long grid;
  unsigned long long stream;
};

// A plan as one array of numbers for the device, one row of X a group: sizes, then the arrays.
std::vector<int32_t> pack_plan(const std::string& network, int32_t n);

// Bytes of shared memory that a block may take, and that a multiprocessor has. Null, or what went
// wrong.
const char* shared_limits(int device, int* block, int* multiprocessor);

// Bytes of shared memory that a block needs.
int64_t shared_bytes(const BlockLaunch& launch, bool with_teacher, bool with_grad);

// Each returns null, or what went wrong. args.plan is filled in from the table, on the device.
const char* launch_forward(const BlockLaunch&, const int32_t* table, SoftSortForward<float> args);
const char* launch_backward(const BlockLaunch&, const int32_t* table, SoftSortBackward<float> args);
const char* launch_cross_entropy(
    const BlockLaunch&, const int32_t* table, CrossEntropyForward<float> args);

}  // namespace fmkernels
