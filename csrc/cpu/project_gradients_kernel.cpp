// The CPU loops of gradient projections, compiled once per instruction set: which task does what.
#include "project_gradients_kernel.h"

#include "project_gradients_dense.h"
#include "project_gradients_sketch.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

template <class T>
void measure(const ProjectionArgs<T>& args, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t row = args.offsets[b], rows = args.offsets[b + 1] - row;
    args.delta_exponents[b] = exponent_of<T>(args.delta + row * args.out, rows * args.out, 0);
    args.exponents[b] = exponent_of<T>(args.a + row * args.in, rows * args.in, args.bias);
  }
}

template <class T>
int64_t tiles(const ProjectionArgs<T>& args) {
  return Task<T>(args, nullptr).tiles();
}

template <class T>
void project(const ProjectionArgs<T>& args, int64_t first, int64_t last, void* scratch) {
  Task<T> task(args, scratch);
  const int64_t tiles = task.tiles();
  for (int64_t number = first; number < last; ++number) {
    const int64_t tile = number % tiles;
    task.begin(number / tiles);
    const int64_t end = args.offsets[task.last_sample];
    for (int64_t row = args.offsets[task.first_sample]; row < end; row += group) {
      task.prepare(row, row + group < end ? row + group : end);
      if (task.is_sketch()) {
        sketch_tile(task, tile);
      } else if (task.is_dense()) {
        dense_tile(task, tile);
      } else {
        factored_tile(task, tile);
      }
    }
    task.finish(tile);
  }
}

template <class T>
constexpr ProjectionKernels<T> kernels{measure<T>, tiles<T>, Task<T>::bytes, project<T>};

}  // namespace

extern const ProjectionKernels<float> projections_f32 = kernels<float>;
extern const ProjectionKernels<double> projections_f64 = kernels<double>;

FMKERNELS_NAMESPACE_END
