// fmkernels._cuda: launches the CUDA kernels. It knows nothing of torch, only addresses and sizes, so
// it works with every torch; allocation, dtypes, devices and streams are the caller's.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "soft_sort.h"

namespace {

using namespace fmkernels;

template <class T>
T* pointer(unsigned long long address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

PyObject* finished(const char* error) {
  if (error == nullptr) Py_RETURN_NONE;
  PyErr_Format(PyExc_RuntimeError, "CUDA: %s", error);
  return nullptr;
}

// (network, n) -> the packed plan as bytes
PyObject* plan(PyObject*, PyObject* args) {
  const char* network;
  int n;
  if (!PyArg_ParseTuple(args, "si:plan", &network, &n)) return nullptr;
  const std::vector<int32_t> table = pack_plan(network, n);
  return PyBytes_FromStringAndSize(
      reinterpret_cast<const char*>(table.data()),
      static_cast<Py_ssize_t>(table.size() * sizeof(int32_t)));
}

// (n, comparators, tape, rows, with_teacher, with_grad) -> bytes
PyObject* block_bytes(PyObject*, PyObject* args) {
  BlockLaunch launch{};
  int with_teacher, with_grad;
  if (!PyArg_ParseTuple(
          args, "iiiipp:shared_bytes", &launch.n, &launch.comparator_count, &launch.tape_count,
          &launch.rows, &with_teacher, &with_grad)) {
    return nullptr;
  }
  return PyLong_FromLongLong(shared_bytes(launch, with_teacher != 0, with_grad != 0));
}

// (device) -> bytes of a block, bytes of a multiprocessor
PyObject* limits(PyObject*, PyObject* args) {
  int device, block = 0, multiprocessor = 0;
  if (!PyArg_ParseTuple(args, "i:shared_limits", &device)) return nullptr;
  if (const char* error = shared_limits(device, &block, &multiprocessor)) return finished(error);
  return Py_BuildValue("ii", block, multiprocessor);
}

// What every launch begins with: n, comparators, tape, rows, threads, grid, stream; the table;
// queries, distribution, steepness, art_lambda, scores. The rest is the kernel's own.
#define LAUNCH_FORMAT "(iiiiiLK)K(LiffK)"
struct Common {
  BlockLaunch launch{};
  unsigned long long table, scores;
  long long queries;
  int distribution;
  float steepness, art_lambda;

  SoftSortArgs<float> sort() const {
    return {{},        static_cast<Distribution>(distribution), steepness, art_lambda, queries,
            pointer<const float>(scores)};
  }
};
#define LAUNCH_ARGUMENTS(c)                                                            \
  &c.launch.n, &c.launch.comparator_count, &c.launch.tape_count, &c.launch.rows,       \
      &c.launch.threads, &c.launch.grid, &c.launch.stream, &c.table, &c.queries,       \
      &c.distribution, &c.steepness, &c.art_lambda, &c.scores

// … values, permutation
PyObject* forward(PyObject*, PyObject* args) {
  Common c;
  unsigned long long values, permutation;
  if (!PyArg_ParseTuple(
          args, LAUNCH_FORMAT "KK:soft_sort", LAUNCH_ARGUMENTS(c), &values, &permutation)) {
    return nullptr;
  }
  return finished(launch_forward(
      c.launch, pointer<const int32_t>(c.table),
      {c.sort(), pointer<float>(values), pointer<float>(permutation)}));
}

// … grad_values or 0, grad_permutation or 0, grad_scores
PyObject* backward(PyObject*, PyObject* args) {
  Common c;
  unsigned long long grad_values, grad_permutation, grad_scores;
  if (!PyArg_ParseTuple(
          args, LAUNCH_FORMAT "KKK:soft_sort_backward", LAUNCH_ARGUMENTS(c), &grad_values,
          &grad_permutation, &grad_scores)) {
    return nullptr;
  }
  return finished(launch_backward(
      c.launch, pointer<const int32_t>(c.table),
      {c.sort(), pointer<const float>(grad_values), pointer<const float>(grad_permutation),
       pointer<float>(grad_scores)}));
}

// … teacher, teacher_steepness, weights, losses, grad_student or 0
PyObject* cross_entropy(PyObject*, PyObject* args) {
  Common c;
  unsigned long long teacher, weights, losses, grad_student;
  float teacher_steepness;
  if (!PyArg_ParseTuple(
          args, LAUNCH_FORMAT "KfKKK:soft_sort_cross_entropy", LAUNCH_ARGUMENTS(c), &teacher,
          &teacher_steepness, &weights, &losses, &grad_student)) {
    return nullptr;
  }
  return finished(launch_cross_entropy(
      c.launch, pointer<const int32_t>(c.table),
      {c.sort(), pointer<const float>(teacher), teacher_steepness, pointer<const float>(weights),
       1.0f, pointer<float>(losses), pointer<float>(grad_student)}));
}

PyMethodDef methods[] = {
    {"plan", plan, METH_VARARGS, "A sorting network as the kernels read it, in bytes."},
    {"shared_limits", limits, METH_VARARGS, "Shared memory of a block and of a multiprocessor."},
    {"shared_bytes", block_bytes, METH_VARARGS, "Shared memory that a block needs."},
    {"soft_sort", forward, METH_VARARGS, "Launch the forward pass."},
    {"soft_sort_backward", backward, METH_VARARGS, "Launch the backward pass."},
    {"soft_sort_cross_entropy", cross_entropy, METH_VARARGS, "Launch the loss."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fmkernels._cuda", "CUDA kernels of fmkernels.", 0, methods,
    nullptr,               nullptr,           nullptr,                      nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
