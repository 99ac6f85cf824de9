#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace arbllm {

std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni")) {
        found.push_back("avx512");
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back("avx2");
    }
#elif defined(__aarch64__)
    found.push_back("neon");
#endif
    found.push_back("portable");
    return found;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool multiplies_tiles() {
#if defined(__x86_64__)
    constexpr unsigned AMX_BF16 = 1u << 22;  // of the features in leaf 7, register D
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16);
#else
    return false;
#endif
}

}  // namespace arbllm
