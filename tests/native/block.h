// What block.cpp offers.
#pragma once

#include <cstdint>
#include <string>

#include "fmkernels/soft_sort_args.h"

namespace fmkernels {

void block_forward(SoftSortForward<float>, const std::string& network, int32_t n, int32_t rows,
    int64_t first_query);
void block_backward(SoftSortBackward<float>, const std::string& network, int32_t n, int32_t rows,
    int64_t first_query);
void block_cross_entropy(
    CrossEntropyForward<float>, const std::string& network, int32_t n, int32_t rows,
    int64_t first_query);

}  // namespace fmkernels
