// The product itself, compiled once for each instruction set by a file that defines INSTRUCTION_SET and includes this.
//
// The codes are one stream through memory, row by row, which is twice as fast as several rows side by side; that many
// sums of a row are under way that the time of an addition is hidden. As in sweep_kernel.h, nothing is used that the
// linker might give to code for other processors.

#include <cstring>

#include "rows.h"
#include "vectors.h"

namespace arbllm {
namespace INSTRUCTION_SET {

constexpr int LANES = VECTOR_BYTES / 4;
constexpr int64_t AHEAD = 2048;  // bytes of codes that are fetched before they are needed
typedef float Value __attribute__((vector_size(VECTOR_BYTES)));

INLINE Value load(const float* from) {
    Value value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// LANES codes as numbers. GCC widens bytes one at a time, if left to itself.
INLINE Value widen(const int8_t* codes) {
#if defined(__AVX512F__)
    return (Value)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#elif defined(__AVX2__)
    return (Value)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
#else
    return Value{float(codes[0]), float(codes[1]), float(codes[2]), float(codes[3])};
#endif
}

INLINE float total(Value value) {
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) sum += value[lane];
    return sum;
}

// One row times TOKENS tokens, with STEPS sums for each.
template <int TOKENS, int STEPS>
INLINE void multiply_row(const RowsProduct& product, int64_t row, int64_t token) {
    constexpr int TOGETHER = STEPS * LANES;
    const int64_t columns = product.columns, whole = columns - columns % TOGETHER;
    const int8_t* codes = product.codes + row * columns;
    const float* x = product.x + token * columns;
    Value sums[STEPS][TOKENS] = {};
    for (int64_t j = 0; j < whole; j += TOGETHER) {
        __builtin_prefetch(codes + j + AHEAD);
        for (int step = 0; step < STEPS; ++step) {
            const int64_t at = j + step * LANES;
            const Value code = widen(codes + at);
            for (int t = 0; t < TOKENS; ++t) sums[step][t] += code * load(x + t * columns + at);
        }
    }
    for (int t = 0; t < TOKENS; ++t) {
        Value value = sums[0][t];
        for (int step = 1; step < STEPS; ++step) value += sums[step][t];
        float sum = total(value);
        for (int64_t j = whole; j < columns; ++j) sum += float(codes[j]) * x[t * columns + j];
        product.y[(token + t) * product.rows + row] = product.scales[row] * sum;
    }
}

inline void multiply(const RowsProduct& product, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        int64_t token = 0;
        for (; token + 4 <= product.tokens; token += 4) multiply_row<4, 2>(product, row, token);
        for (; token + 2 <= product.tokens; token += 2) multiply_row<2, 4>(product, row, token);
        if (token < product.tokens) multiply_row<1, 4>(product, row, token);
    }
}

}  // namespace INSTRUCTION_SET
}  // namespace arbllm
