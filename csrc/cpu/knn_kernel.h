// What the instruction-set builds of knn_kernel.cpp offer. Plain data and functions of raw pointers:
// nothing in here may be inline, because all builds share it.
#pragma once

#include <cstdint>

namespace fmkernels {

// Rows that are compared with a threshold together.
constexpr int64_t knn_bucket = 512;
struct KnnBucket {
  float sigma, slack, half;  // the largest, the largest, the smallest
};

enum class Metric : int { cosine, inner_product, l2 };

// A tile of the bank, the queries' products with it, and what has been found so far.
template <class T>
struct KnnTile {
  Metric metric;
  bool rescored;           // else the products themselves are the scores
  int64_t dim, row_count;
  const T* rows;           // (row_count, dim)
  const double* row_norms; // (row_count)
  const float *sigma, *slack, *half;  // (row_count), see fmkernels/knn.h
  const KnnBucket* buckets;
  double scale;            // S: the largest norm of the tile, for l2
  int64_t first_row;       // its number in the bank

  const void* products;    // (queries, row_count) in bfloat16 or float32
  bool half_products;      // bfloat16
  const int64_t* order;    // of which query they are; null: in a row
  const T* queries;        // (…, dim)
  const double* query_norms;

  int64_t k;
  double* best_scores;     // (…, k), larger first, then the lower index
  int64_t* best_indices;   // (…, k), −1 where there is none
  const double* floor;     // (…) or null: what does not exceed it may be left out
  int64_t* candidates;     // (…)
  bool* crowded;           // (…) or null: whether a query was left out for too many candidates
  int64_t crowd;
};

// The best k of what was found and `count` new ones, which come in the order of their indices.
struct Found {
  double* scores;
  int64_t* indices;
};
void merge_found(Found best, int64_t k, Found found, int64_t count, Found spare);

// The k-th largest of n numbers, which change places.
float kth_largest(float* values, int64_t n, int64_t k);

template <class T>
struct KnnKernels {
  void (*norms)(const T* rows, int64_t first, int64_t last, int64_t dim, double* norms);
  // rows of norm 1 in low precision, bfloat16 if `half`
  void (*shadow)(
      const T* rows, bool half, int64_t first, int64_t last, int64_t dim, void* shadow,
      double* norms, float* residuals);
  int64_t (*scratch_bytes)(int64_t row_count, int64_t k);
  // rows [first, last) of the products
  void (*select)(const KnnTile<T>&, int64_t first, int64_t last, void* scratch);
};

#define FMKERNELS_DECLARE(isa)                \
  namespace isa {                             \
  extern const KnnKernels<float> knn_f32;     \
  extern const KnnKernels<double> knn_f64;    \
  }
FMKERNELS_DECLARE(baseline)
FMKERNELS_DECLARE(avx2)
FMKERNELS_DECLARE(avx512)
#undef FMKERNELS_DECLARE

}  // namespace fmkernels
