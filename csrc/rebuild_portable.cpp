#define INSTRUCTION_SET portable
#include "rebuild_kernel.h"
