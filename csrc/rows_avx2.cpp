#if defined(__AVX2__)
#define INSTRUCTION_SET avx2
#include "rows_kernel.h"

void arbllm::multiply_rows_avx2(const RowsProduct& product, int64_t first, int64_t last) {
    avx2::multiply(product, first, last);
}
#endif
