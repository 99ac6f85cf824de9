#define INSTRUCTION_SET portable
#include "rows_kernel.h"

void arbllm::multiply_rows_portable(const RowsProduct& product, int64_t first, int64_t last) {
    portable::multiply(product, first, last);
}
