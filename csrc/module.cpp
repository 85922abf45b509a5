// The shell: what was built and what this CPU offers. Ops go through the dispatcher, not through
// here.
#include <pybind11/pybind11.h>

#include "isa.h"

#ifndef U2A_CUDA_ARCHS
#define U2A_CUDA_ARCHS ""
#define U2A_CUDA_TOOLKIT ""
#endif

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target") = "2.11";
  m.attr("cuda_archs") = U2A_CUDA_ARCHS;
  m.attr("cuda_toolkit") = U2A_CUDA_TOOLKIT;
  m.def("cpu_capability", &u2a::isa_name, "Instruction set the CPU kernels use on this machine.");
}
