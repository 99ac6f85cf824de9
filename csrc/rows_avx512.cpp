#if defined(__AVX512F__)
#define INSTRUCTION_SET avx512
#include "rows_kernel.h"

void arbllm::multiply_rows_avx512(const RowsProduct& product, int64_t first, int64_t last) {
    avx512::multiply(product, first, last);
}
#endif
