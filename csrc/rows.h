// Products of a few tokens with a matrix in 8-bit rows, y = x (scale * code)^T; see arbllm/format/rows.py.
#pragma once

#include <cstdint>
#include <string>

namespace arbllm {

struct RowsProduct {
    int64_t rows, columns, tokens;  // V, d, t
    const int8_t* codes;            // (V, d)
    const float* scales;            // (V)
    const float* x;                 // (t, d)
    float* y;                       // (t, V), written
};

// Each writes what rows [first, last) of the matrix give, in float32 throughout.
using MultiplyRows = void(const RowsProduct& product, int64_t first, int64_t last);
MultiplyRows multiply_rows_avx512, multiply_rows_avx2, multiply_rows_portable;

// The one for an instruction set, which on ARM is the portable one; null for a name that there is not.
MultiplyRows* multiply_rows_named(const std::string& name);

}  // namespace arbllm
