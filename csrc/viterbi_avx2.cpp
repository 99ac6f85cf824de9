#if defined(__AVX2__)
#define INSTRUCTION_SET avx2
#include "viterbi_kernel.h"

void arbllm::viterbi_avx2(const Trellis& task, float* memory) { avx2::viterbi(task, memory); }
#endif
