#if defined(__AVX512F__)
#define INSTRUCTION_SET avx512
#include "sweep_kernel.h"

void arbllm::sweep_avx512(const Sweep& task, float* memory) { avx512::sweep(task, memory); }
#endif
