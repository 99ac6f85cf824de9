// Signs of a trellis code, chosen column by column; what is computed is in arbllm/binarize/viterbi.py.
#pragma once

#include <cstdint>

namespace arbllm {

struct Trellis {
    int64_t columns, rows;       // T, of one tile, and n
    int level_count;             // 4 to 32
    const float* state;          // (T, n)
    const float* values;         // (T, n), or null
    const float* influence;      // (T, T)
    const float* steps;          // (T)
    const float* column_scales;  // (T)
    const float* row_scales;     // (n)
    const float* levels;         // (level_count), ascending
    uint8_t* choices;            // (T, n), written: the level's number, plus 128 where the first sign is +
    float* changes;              // (T, n), written
};

constexpr int SEQUENCES = 8;  // rows that lie side by side, each in a sequence of its own

// Floats that the caller lends, from a multiple of 64 bytes on.
inline int64_t viterbi_memory(int64_t rows) { return 4 * ((rows + SEQUENCES - 1) / SEQUENCES) * SEQUENCES; }

// Each for one instruction set.
void viterbi_avx2(const Trellis& task, float* memory);
void viterbi_portable(const Trellis& task, float* memory);

}  // namespace arbllm
