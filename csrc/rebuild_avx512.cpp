#if defined(__AVX512F__)
#define INSTRUCTION_SET avx512
#include "rebuild_kernel.h"
#endif
