// The Python module arbllm._native. A source file with bindings declares a bind_ function in bindings.h; it is called
// here. Tensors come as nanobind arrays; work that takes longer than a few microseconds releases the GIL.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "processor.h"

NB_MODULE(_native, module) {
    module.doc() = "Kernels of arbllm in C++.";
    bind_lookup(module);
    module.def("instruction_sets", &arbllm::instruction_sets, "Instruction sets that can be chosen, the best first.");
    bind_rebuild(module);
    bind_rows(module);
    bind_sweep(module);
    bind_viterbi(module);
}
