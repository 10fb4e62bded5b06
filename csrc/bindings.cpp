// The Python module: facts about this build, and the choice of instruction set. Tensors cross the
// dispatcher, never this file, so it includes no torch header. It keeps to the stable ABI of
// Python 3.10, as the ops keep to torch's, so that one build serves every later Python too.
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED  // A free-threaded Python has no stable ABI.
#undef Py_LIMITED_API    // torch's own choice
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include <stdexcept>

#include "cpu/simd/foreach_isa.h"

namespace {

// What `body` returns; ValueError for a name of an instruction set that it does not take.
template <class Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* compiled_isas() {
  using ppo::Isa;
  const char* scalar = isa_name(Isa::scalar);
  if (PPO_ARM) return Py_BuildValue("(ss)", scalar, isa_name(Isa::neon));
  if (!PPO_X86) return Py_BuildValue("(s)", scalar);
  return Py_BuildValue("(sss)", scalar, isa_name(Isa::avx2), isa_name(Isa::avx512));
}

// {"architectures": ["80", ...]}, or None.
PyObject* cuda_facts() {
#ifdef PPO_FAST_CUDA
  PyObject* names = PyUnicode_FromString(PPO_FAST_CUDA);
  if (!names) return nullptr;
  PyObject* split = PyUnicode_Split(names, nullptr, -1);
  Py_DECREF(names);
  return Py_BuildValue("{s:N}", "architectures", split);
#else
  return Py_BuildValue("");
#endif
}

PyObject* build_info(PyObject*, PyObject*) {
#ifdef __clang__
  const char* compiler = __VERSION__;
#else
  const char* compiler = "GCC " __VERSION__;
#endif
  return guarded([&] {
    const char* active = isa_name(ppo::active_isa());
    return Py_BuildValue("{s:s,s:s,s:N,s:s,s:s,s:O,s:(ii),s:N}", "compiler", compiler, "flags",
                         PPO_FAST_FLAGS, "isa_compiled", compiled_isas(), "isa_best",
                         isa_name(ppo::best_isa()), "isa", active, "bf16_dot",
                         ppo::bf16_dot() ? Py_True : Py_False, "torch_target",
                         int(TORCH_TARGET_VERSION >> 56), int((TORCH_TARGET_VERSION >> 48) & 0xff),
                         "cuda", cuda_facts());
  });
}

PyObject* set_isa(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s:set_isa", &name)) return nullptr;
  return guarded([&] {
    ppo::set_isa(name);
    return Py_BuildValue("");
  });
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "Compiler, flags, instruction sets and torch target of this build."},
    {"set_isa", set_isa, METH_VARARGS,
     "Run the kernels on 'scalar', 'neon', 'avx2' or 'avx512'; 'auto' is the CPU's best."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "ppo_fast._C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

#define PPO_CONCATENATED(a, b) a##b
#define PPO_INIT(name) PPO_CONCATENATED(PyInit_, name)
PyMODINIT_FUNC PPO_INIT(TORCH_EXTENSION_NAME)() { return PyModuleDef_Init(&definition); }
