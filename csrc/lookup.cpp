#include "lookup.h"

#include <cstring>

#include "processor.h"

namespace arbllm {

const Kernel* kernel_named(const char* name) {
    for (const auto& supported : instruction_sets()) {
        if (supported != name) {
            continue;
        }
        for (const Kernel* kernel : {kernel_avx512(), kernel_avx2(), kernel_neon(), kernel_portable()}) {
            if (kernel && !std::strcmp(kernel->name, name)) {
                return kernel;
            }
        }
    }
    return nullptr;
}

}  // namespace arbllm
