// The Python module: facts about this build, and the choice of instruction set. Tensors cross the
// dispatcher, never this file, so it includes no torch header.
#include <pybind11/pybind11.h>

#include "cpu/simd/foreach_isa.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::list compiled;
  compiled.append(ppo::isa_name(ppo::Isa::scalar));
  if (PPO_X86) {
    compiled.append(ppo::isa_name(ppo::Isa::avx2));
    compiled.append(ppo::isa_name(ppo::Isa::avx512));
  }
  py::dict info;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["flags"] = PPO_FAST_FLAGS;
  info["isa_compiled"] = py::tuple(compiled);
  info["isa_best"] = ppo::isa_name(ppo::best_isa());
  info["isa"] = ppo::isa_name(ppo::active_isa());
  info["bf16_dot"] = ppo::bf16_dot();
  info["torch_target"] =
      py::make_tuple(int(TORCH_TARGET_VERSION >> 56), int((TORCH_TARGET_VERSION >> 48) & 0xff));
#ifdef PPO_FAST_CUDA
  info["cuda"] = py::dict(py::arg("architectures") = py::str(PPO_FAST_CUDA).attr("split")());
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info,
        "Compiler, flags, instruction sets and torch target of this build.");
  m.def("set_isa", &ppo::set_isa, py::arg("name"),
        "Run the kernels on 'scalar', 'avx2' or 'avx512'; 'auto' goes back to the CPU's best.");
}
