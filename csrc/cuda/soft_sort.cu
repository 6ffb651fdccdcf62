// soft_sort and its loss on NVIDIA GPUs: a block sorts one query at a time, all of it in its shared
// memory; csrc/include/fmkernels/soft_sort_block.h is the algorithm.
//
// docs/kernels/cuda.md counts what it moves and does.
#define FMKERNELS_ISA cuda
#include "soft_sort.h"

#include <cuda_runtime.h>

#include "fmkernels/networks.h"
#include "fmkernels/packed_plan.h"
#include "fmkernels/soft_sort_block.h"

namespace fmkernels {
namespace {

using namespace fmkernels::cuda;

struct ThreadBlock {
  template <class Body>
  __device__ __forceinline__ void each(int32_t count, Body body) const {
    for (int32_t item = threadIdx.x; item < count; item += blockDim.x) body(item);
    __syncthreads();
  }
};

// MAX_THREADS of ops/soft_sort/config.py. The tapes leave room for a few warps on a multiprocessor, so
// a thread may have all the registers it wants: the 1 in the bounds below says so; without it ptxas
// aims at more blocks and spills.
constexpr int max_threads = 128;

template <class Args, class Query>
__device__ __forceinline__ void for_each_query(
    Args& args, const int32_t* table, int32_t rows, bool with_teacher, bool with_grad,
    Query query) {
  extern __shared__ float shared[];
  args.sort.plan = unpack_plan(table);
  const SortingPlan& plan = args.sort.plan;
  const BlockMemory memory(
      shared, plan.size, plan.comparator_count, plan.tape_count, rows, with_teacher, with_grad);
  for (int64_t index = blockIdx.x; index < args.sort.queries; index += gridDim.x) {
    query(memory, index);
  }
}

__global__ void __launch_bounds__(max_threads, 1) soft_sort_fwd_cuda(
    SoftSortForward<float> args, const int32_t* __restrict__ table, int32_t rows) {
  for_each_query(args, table, rows, false, false, [&](const BlockMemory& memory, int64_t index) {
    soft_sort_query(ThreadBlock{}, args, memory, rows, index);
  });
}

__global__ void __launch_bounds__(max_threads, 1) soft_sort_bwd_cuda(
    SoftSortBackward<float> args, const int32_t* __restrict__ table, int32_t rows) {
  for_each_query(args, table, rows, false, true, [&](const BlockMemory& memory, int64_t index) {
    soft_sort_backward_query(ThreadBlock{}, args, memory, rows, index);
  });
}

template <bool with_grad>
__global__ void __launch_bounds__(max_threads, 1) soft_sort_cross_entropy_cuda(
    CrossEntropyForward<float> args, const int32_t* __restrict__ table, int32_t rows) {
  for_each_query(args, table, rows, true, with_grad, [&](const BlockMemory& memory, int64_t index) {
    cross_entropy_query<with_grad>(ThreadBlock{}, args, memory, rows, index);
  });
}

template <class Args>
const char* launch(
    void (*kernel)(Args, const int32_t*, int32_t), const BlockLaunch& launch, const int32_t* table,
    Args& args, bool with_teacher, bool with_grad) {
  const auto bytes = static_cast<size_t>(shared_bytes(launch, with_teacher, with_grad));
  cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(launch.grid);
    config.blockDim = launch.threads;
    config.dynamicSmemBytes = bytes;
    config.stream = reinterpret_cast<cudaStream_t>(launch.stream);
    // its own error; the last error could be that of an earlier call
    error = cudaLaunchKernelEx(&config, kernel, args, table, launch.rows);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

std::vector<int32_t> pack_plan(const std::string& network, int32_t n) {
  return SortingNetwork(network, n, 1).packed();
}

const char* shared_limits(int device, int* block, int* multiprocessor) {
  cudaError_t error =
      cudaDeviceGetAttribute(block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(
        multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int64_t shared_bytes(const BlockLaunch& launch, bool with_teacher, bool with_grad) {
  const BlockMemory memory(
      nullptr, launch.n, launch.comparator_count, launch.tape_count, launch.rows, with_teacher,
      with_grad);
  return memory.floats * static_cast<int64_t>(sizeof(float));
}

const char* launch_forward(
    const BlockLaunch& plan, const int32_t* table, SoftSortForward<float> args) {
  return launch(soft_sort_fwd_cuda, plan, table, args, false, false);
}

const char* launch_backward(
    const BlockLaunch& plan, const int32_t* table, SoftSortBackward<float> args) {
  return launch(soft_sort_bwd_cuda, plan, table, args, false, true);
}

const char* launch_cross_entropy(
    const BlockLaunch& plan, const int32_t* table, CrossEntropyForward<float> args) {
  if (args.grad_student == nullptr) {
    return launch(soft_sort_cross_entropy_cuda<false>, plan, table, args, true, false);
  }
  return launch(soft_sort_cross_entropy_cuda<true>, plan, table, args, true, true);
}

}  // namespace fmkernels
