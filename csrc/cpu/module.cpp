// fmkernels._C: importing it registers the CPU kernels; the module itself only answers questions.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <exception>

#include "cpu_isa.h"
#include "poison.h"

namespace fmkernels {
std::atomic<bool> poison_allocations{false};
}

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(fmkernels::cpu_isa_name(fmkernels::cpu_isa()));
}

PyObject* cpu_isas(PyObject*, PyObject*) {
  const auto runnable = fmkernels::runnable_cpu_isas();
  PyObject* names = PyTuple_New(static_cast<Py_ssize_t>(runnable.size()));
  for (size_t index = 0; names != nullptr && index < runnable.size(); ++index) {
    PyObject* name = PyUnicode_FromString(fmkernels::cpu_isa_name(runnable[index]));
    if (name == nullptr || PyTuple_SetItem(names, static_cast<Py_ssize_t>(index), name) != 0) {
      Py_DECREF(names);
      return nullptr;
    }
  }
  return names;
}

PyObject* poison_allocations(PyObject*, PyObject* on) {
  const int truth = PyObject_IsTrue(on);
  if (truth < 0) return nullptr;
  return PyBool_FromLong(fmkernels::poison_allocations.exchange(truth != 0));
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Instruction set that the CPU kernels use."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "Instruction sets that this build can run here."},
    {"poison_allocations", poison_allocations, METH_O,
     "Fill fresh memory with NaN, or stop doing so; returns what it did before."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fmkernels._C", "Compiled kernels of fmkernels.", 0, methods,
    nullptr,               nullptr,        nullptr,                          nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  try {
    fmkernels::cpu_isa();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  return PyModule_Create(&module);
}
