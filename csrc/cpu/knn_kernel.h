// What the instruction-set builds of knn_kernel.cpp offer. Plain data and functions of raw pointers:
// nothing in here may be inline, because all builds share it.
#pragma once

#include <cstdint>

namespace fmkernels {

enum class Metric : int { cosine, inner_product, l2 };

// Of a shadow, of units, or of their products: float32, bfloat16, or int8 with products in int32.
enum class Low : int { float32, bfloat16, int8 };

// Rows that are compared with a threshold together.
constexpr int64_t knn_bucket = 256;
struct KnnBucket {
  float sigma, slack, half;  // the largest, the largest, the smallest
};

// What is known of the rows of a part.
struct KnnRows {
  const double* norms;
  const float *residuals, *scales;  // or null: see fmkernels/ops/knn/cpp.py
};

// What a product may lose, apart from what each row does.
struct KnnErrors {
  Metric metric;
  bool rescored;
  double dim, query_residual, factor_rounding;
};

// To be written, see fmkernels/knn.h.
struct KnnRowBounds {
  float *sigma, *slack, *half;
};

// A row that may be among the nearest: between which ends its score lies, and then the score.
struct KnnCandidate {
  union {
    struct {
      float lower, upper;
    };
    double score;
  };
  int64_t row;
};

// A query's threshold and pool.
struct KnnState {
  float threshold;
  int64_t count, kept;  // candidates that wait, and how many did when they were last looked at
  int64_t scored;       // of this part's
};

struct KnnFound {
  double* scores;
  int64_t* indices;
};

// A part of the bank, some queries, and what they have found so far.
template <class T>
struct KnnPart {
  Metric metric;
  bool rescored;                      // else the products themselves are the scores
  bool score_early;                   // the ends of a product tell too little of the order
  int64_t dim, k;

  int64_t row_count, first_row;       // and the number of the first in the bank
  const T* rows;                      // (row_count, dim)
  const double* row_norms;            // (row_count)
  const float *sigma, *slack, *half;  // (row_count), see fmkernels/knn.h
  const KnnBucket* buckets;
  double scale;                       // S, the largest norm, for l2

  const double* wide_queries;         // (queries, dim), exactly as they are
  const double* query_norms;          // (queries)
  const float* query_residuals;       // (queries)
  double largest_residual;            // for which slack is; and, over rows, the least that a slack
  double least_weight;                // falls by for each unit that a residual is less
  const float* query_scales;          // (queries) or null: what a product in int32 is multiplied by
  const double* floor;                // (queries) or null: what does not exceed it may be left out
  double* best_scores;                // (queries, k), larger first, then the lower index
  int64_t* best_indices;              // (queries, k), −1 where there is none
  int64_t* candidates;                // (queries), how many rows were scored in float64
  bool* crowded;                      // (queries) or null: who has more than `crowd` candidates
  int64_t crowd;

  // candidates that wait to be scored
  int64_t capacity;
  KnnCandidate* pools;                // (queries, capacity)
  KnnState* states;                   // (queries)
};

// The products of all queries with `count` rows of a part, from `start` on.
struct KnnProducts {
  const void* values;  // (queries, count)
  Low type;
  int64_t start, count;
};

// The best k of what was found and `count` new ones, larger first, then the lower index.
void merge_found(KnnFound best, int64_t k, KnnFound found, int64_t count, KnnFound spare);

template <class T>
struct KnnKernels {
  void (*norms)(const T* rows, int64_t first, int64_t last, int64_t dim, double* norms);
  // rows of norm 1 in low precision; those in int8 are to be multiplied by their scales
  void (*shadow)(
      const T* rows, Low type, int64_t first, int64_t last, int64_t dim, void* shadow,
      double* norms, float* residuals, float* scales);
  // products (queries, stride) of units in float32 with rows [first, last) of a shadow
  void (*multiply_few)(
      const float* units, int64_t queries, const void* shadow, Low type, int64_t first,
      int64_t last, int64_t dim, int64_t stride, float* products);
  double (*largest_norm)(KnnRows, int64_t count);
  KnnBucket (*row_bounds)(
      KnnRows, KnnErrors, double scale, int64_t start, int64_t stop, KnnRowBounds,
      double* least_weight);
  int64_t (*scratch_bytes)(int64_t k, int64_t capacity, int64_t count);
  // for queries [first, last): before, for, and after the products with a part
  void (*begin)(const KnnPart<T>&, int64_t first, int64_t last);
  void (*collect)(
      const KnnPart<T>&, const KnnProducts&, int64_t first, int64_t last, void* scratch);
  // the same with no products in memory, where there are such of a type: queries come in groups of
  // so many registers of so many lanes, and rows from `start` on, where a bucket begins
  bool (*fuses)(Low type);
  int lanes, most_vectors;
  int64_t (*fused_bytes)(const KnnPart<T>&, Low type, int64_t queries, int vectors);
  void (*search_fused)(
      const KnnPart<T>&, const void* units, const void* shadow, Low type, int64_t start,
      int vectors, int64_t first, int64_t last, void* scratch);
  void (*finish)(const KnnPart<T>&, int64_t first, int64_t last, void* scratch);
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
