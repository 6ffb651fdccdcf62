// The numerics at one register size, whatever the machine has: registers of 64 bytes become two of
// 32 or four of 16, so the code of the AVX-512 build is tested where there is no AVX-512; and a
// scalar is what a CUDA thread computes with. The kernels' own file is included, to instantiate the
// templates inside it. Compiled once per size: FMKERNELS_ISA names it, REGISTER_BYTES is it.
#include "lanes.h"

#include "fmkernels/soft_sort.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {
// the kernel of this name hides the function from scalars, for which there is no lookup by argument
using ::fmkernels::FMKERNELS_ISA::cross_entropy;
}  // namespace
FMKERNELS_NAMESPACE_END

#include "soft_sort_kernel.cpp"

FMKERNELS_NAMESPACE_BEGIN
namespace {

#if REGISTER_BYTES == 0
template <class T>
using Value = T;
#else
template <class T>
using Value = Vec<T, REGISTER_BYTES / sizeof(T)>;
#endif

// count is a multiple of the lanes
template <class V, V function(V)>
void elementwise(
    const typename Lanes<V>::Scalar* x, typename Lanes<V>::Scalar* y, int64_t count) {
  for (int64_t i = 0; i < count; i += Lanes<V>::count) {
    V value;
    memcpy(&value, x + i, sizeof value);
    value = function(value);
    memcpy(y + i, &value, sizeof value);
  }
}

template <class V>
V fourth_root_inverse(V x) {
  return power(x, V(-0.25f));
}

template <class V>
constexpr Numerics<typename Lanes<V>::Scalar> numerics{
    elementwise<V, log<V>>,
    elementwise<V, exp<V>>,
    elementwise<V, cauchy_tail<V>>,
    elementwise<V, erfc<V>>,
    elementwise<V, fourth_root_inverse<V>>,
    soft_sort_kernels<V>};

}  // namespace

const Numerics<float> float32 = numerics<Value<float>>;
const Numerics<double> float64 = numerics<Value<double>>;

FMKERNELS_NAMESPACE_END
