// The CUDA kernels' algorithm on the CPU: the "threads" of a phase one after another in a random
// order, so that one which reads what another of the same phase writes is found out. Memory is
// exactly as large as the kernels say, and NaN at first.
#define FMKERNELS_ISA block
#include "block.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "fmkernels/networks.h"
#include "fmkernels/packed_plan.h"
#include "fmkernels/soft_sort_block.h"

namespace fmkernels {
namespace {

using namespace fmkernels::block;

struct ShuffledBlock {
  std::mt19937* random;

  template <class Body>
  void each(int32_t count, Body body) const {
    std::vector<int32_t> items(count);
    std::iota(items.begin(), items.end(), 0);
    std::shuffle(items.begin(), items.end(), *random);
    for (int32_t item : items) body(item);
  }
};

template <class Args, class Query>
void for_each_query(
    Args args, const std::string& network, int32_t n, int32_t rows, int64_t first_query,
    bool with_teacher, bool with_grad, Query query) {
  const std::vector<int32_t> table = SortingNetwork(network, n, 1).packed();
  args.sort.plan = unpack_plan(table.data());
  const SortingPlan& plan = args.sort.plan;
  const auto cut = [&](float* first) {
    return BlockMemory(
        first, plan.size, plan.comparator_count, plan.tape_count, rows, with_teacher, with_grad);
  };
  std::vector<float> shared(cut(nullptr).floats, std::numeric_limits<float>::quiet_NaN());
  std::mt19937 random(0);
  for (int64_t index = first_query; index < first_query + args.sort.queries; ++index) {
    query(ShuffledBlock{&random}, args, cut(shared.data()), index);
  }
}

}  // namespace

void block_forward(
    SoftSortForward<float> args, const std::string& network, int32_t n, int32_t rows,
    int64_t first_query) {
  for_each_query(
      args, network, n, rows, first_query, false, false,
      [&](auto block, const auto& args, const auto& memory, int64_t index) {
        soft_sort_query(block, args, memory, rows, index);
      });
}

void block_backward(
    SoftSortBackward<float> args, const std::string& network, int32_t n, int32_t rows,
    int64_t first_query) {
  for_each_query(
      args, network, n, rows, first_query, false, true,
      [&](auto block, const auto& args, const auto& memory, int64_t index) {
        soft_sort_backward_query(block, args, memory, rows, index);
      });
}

void block_cross_entropy(
    CrossEntropyForward<float> args, const std::string& network, int32_t n, int32_t rows,
    int64_t first_query) {
  const bool with_grad = args.grad_student != nullptr;
  for_each_query(
      args, network, n, rows, first_query, true, with_grad,
      [&](auto block, const auto& args, const auto& memory, int64_t index) {
        if (with_grad) {
          cross_entropy_query<true>(block, args, memory, rows, index);
        } else {
          cross_entropy_query<false>(block, args, memory, rows, index);
        }
      });
}

}  // namespace fmkernels
