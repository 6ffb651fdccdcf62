// The numerics as a CUDA kernel would use them: one thread, scalars. Compiled, never run.
#define FMKERNELS_ISA cuda
#include "fmkernels/soft_sort.h"

using namespace fmkernels;
using namespace fmkernels::cuda;

template <Distribution distribution, class T>
__device__ void sort_and_back(
    const SortingPlan& plan, T* scores, T* rest, Weights<T>* weights, Slope<T>* slopes, T* rows,
    T* tape, T* grad_keep, T* loss) {
  const Settings<T> settings{T(100), T(0.25)};
  sort_values<distribution>(plan, settings, scores, rest, weights, slopes);
  sort_rows<max_group_rows, true>(plan, 0, T(1), weights, rows, tape);
  loss[0] = cross_entropy(rows[0], rows[1], &rows[0]);
  sort_rows_backward<max_group_rows>(plan, 0, weights, tape, rows, grad_keep);
  sort_values_backward(plan, weights, slopes, grad_keep, scores);
}

template <class T>
__global__ void every_distribution(
    SortingPlan plan, T* scores, T* rest, Weights<T>* weights, Slope<T>* slopes, T* rows, T* tape,
    T* grad_keep, T* loss) {
#define RUN(name)                     \
  sort_and_back<Distribution::name>(  \
      plan, scores, rest, weights, slopes, rows, tape, grad_keep, loss);
  RUN(logistic)
  RUN(logistic_phi)
  RUN(gaussian)
  RUN(reciprocal)
  RUN(cauchy)
  RUN(optimal)
}

template __global__ void every_distribution(
    SortingPlan, float*, float*, Weights<float>*, Slope<float>*, float*, float*, float*, float*);
template __global__ void every_distribution(
    SortingPlan, double*, double*, Weights<double>*, Slope<double>*, double*, double*, double*,
    double*);
