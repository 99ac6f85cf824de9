#if defined(__AVX2__)
#define INSTRUCTION_SET avx2
#include "rebuild_kernel.h"
#endif
