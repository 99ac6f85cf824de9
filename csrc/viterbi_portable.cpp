#define INSTRUCTION_SET portable
#include "viterbi_kernel.h"

void arbllm::viterbi_portable(const Trellis& task, float* memory) { portable::viterbi(task, memory); }
