#if defined(__AVX2__)
#define INSTRUCTION_SET avx2
#include "sweep_kernel.h"

void arbllm::sweep_avx2(const Sweep& task, float* memory) { avx2::sweep(task, memory); }
#endif
