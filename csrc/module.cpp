// The Python module arbllm._native. A source file with bindings declares a bind_ function in bindings.h; it is called
// here. Tensors come as nanobind arrays; work that takes longer than a few microseconds releases the GIL.
#include "bindings.h"

NB_MODULE(_native, module) {
    module.doc() = "Kernels of arbllm in C++.";
    bind_lookup(module);
    bind_processor(module);
    bind_sweep(module);
}
