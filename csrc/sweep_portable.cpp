#define INSTRUCTION_SET portable
#include "sweep_kernel.h"

void arbllm::sweep_portable(const Sweep& task, float* memory) { portable::sweep(task, memory); }
