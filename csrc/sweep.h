// One pass over the columns of a segment of ARB-RCX; what it computes is in arbllm/binarize/sweep.py.
#pragma once

#include <cstdint>

namespace arbllm {

struct Sweep {
    int64_t columns, rows;       // K, n
    int groups, terms;           // slots = groups * terms
    const float* row_scales;     // (slots, n)
    const float* column_scales;  // (slots, K)
    const float* influence;      // (K, K)
    const float* steps;          // (K)
    const float* state;          // (K, n)
    const float* values;         // (K, n), or null
    uint8_t* choices;            // (K, n), written
    float* chosen;               // (K, n), written
};

constexpr int MOST_LANES = 64;  // rows solved at a time, at most

// Each for one instruction set. `memory` holds columns * MOST_LANES floats and begins at a multiple of 64 bytes.
void sweep_avx512(const Sweep& task, float* memory);
void sweep_avx2(const Sweep& task, float* memory);
void sweep_portable(const Sweep& task, float* memory);

}  // namespace arbllm
