#include "rows.h"

namespace arbllm {

MultiplyRows* multiply_rows_named(const std::string& name) {
#if defined(__x86_64__)
    if (name == "avx512") return multiply_rows_avx512;
    if (name == "avx2") return multiply_rows_avx2;
#endif
    return name == "portable" || name == "neon" ? multiply_rows_portable : nullptr;
}

}  // namespace arbllm
