// A matrix from its row scales, its column scales and the codes of its weights; and back, from the gradient of a loss
// by the matrix to the gradients by the scales. What is computed is in arbllm/rebuild.py.
#pragma once

#include <cstdint>

namespace arbllm {

// A segment and where it begins, as arbllm.format.layout.Place has it.
struct Span {
    int64_t width, groups, terms, trellis;
    int64_t column, row_scale, column_scale;

    int64_t slots() const { return trellis ? 1 : groups * terms; }
};

struct Scaled {
    int64_t rows, columns;  // n, m
    const Span* spans;
    int64_t span_count, row_slots;
    const uint8_t* codes;        // (n, m) in stored order: bits 0 and 1 the group, 2 and 3 set where a sign is -1;
                                 // with a trellis the number of the level
    const float* levels;
    const int32_t* order;        // (m), the natural column of each stored one
    const float* row_scales;     // (n, row_slots)
    const float* column_scales;  // flat
};

// Rows [first, last) of W, float (n, m), columns in natural order. `memory` holds m floats.
using Rebuild = void(const Scaled& matrix, int64_t first, int64_t last, float* memory, float* weight);
Rebuild rebuild_avx512, rebuild_avx2, rebuild_portable;

// What rows [first, last) of dL/dW, laid out as W is, contribute: row gradients (n, row_slots) are written, column
// gradients (flat) added to. `memory` holds m floats.
using Contract = void(const Scaled& matrix, int64_t first, int64_t last, const float* gradient, float* memory,
                      float* row_gradients, float* column_gradients);
Contract contract_avx512, contract_avx2, contract_portable;

}  // namespace arbllm
