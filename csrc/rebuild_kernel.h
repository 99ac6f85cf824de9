// Both directions, compiled once for each instruction set by a file that defines INSTRUCTION_SET and includes this.
//
// A row goes through memory that stays in the cache, in stored order, where a segment's columns follow each other. As
// in sweep_kernel.h, nothing is used that the linker might give to code for other processors.

#include <cstring>

#include "rebuild.h"
#include "vectors.h"

namespace arbllm {
namespace INSTRUCTION_SET {

// As many weights as a register holds.
struct Many {
    static constexpr int LANES = VECTOR_BYTES / 4;
    typedef float Value __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Bits __attribute__((vector_size(VECTOR_BYTES)));

    // GCC widens bytes one at a time, if left to itself.
    static INLINE Bits widen(const uint8_t* codes) {
#if defined(__AVX512F__)
        return (Bits)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
#elif defined(__AVX2__)
        return (Bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
#else
        return Bits{codes[0], codes[1], codes[2], codes[3]};
#endif
    }

    static INLINE Value look_up(const float* table, const uint8_t* codes) {
#if defined(__AVX512F__)
        return (Value)_mm512_i32gather_ps((__m512i)widen(codes), table, 4);
#elif defined(__AVX2__)
        return (Value)_mm256_i32gather_ps(table, (__m256i)widen(codes), 4);
#else
        return Value{table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]]};
#endif
    }
};

// One, for what is left of a segment.
struct One {
    static constexpr int LANES = 1;
    typedef float Value __attribute__((vector_size(4)));
    typedef int32_t Bits __attribute__((vector_size(4)));

    static INLINE Bits widen(const uint8_t* codes) { return Bits{*codes}; }

    static INLINE Value look_up(const float* table, const uint8_t* codes) { return Value{table[*codes]}; }
};

template <class Lanes>
INLINE typename Lanes::Value load(const float* from) {
    typename Lanes::Value value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class Value>
INLINE void store(float* to, Value value) {
    std::memcpy(to, &value, sizeof value);
}

// Groups and signs of the weights from `codes` on.
template <class Lanes>
struct Decoded {
    typename Lanes::Bits group, signs[2];

    INLINE explicit Decoded(const uint8_t* codes) {
        const auto wide = Lanes::widen(codes);
        group = wide & 3;
        signs[0] = (wide << 29) & INT32_MIN;
        signs[1] = (wide << 28) & INT32_MIN;
    }

    // `value` with a weight's sign in a slot, 0 where the slot is another group's.
    template <int GROUPS, int TERMS>
    INLINE typename Lanes::Value in_slot(int slot, typename Lanes::Value value) const {
        using Bits = typename Lanes::Bits;
        Bits bits = (Bits)value ^ signs[slot % TERMS];
        if (GROUPS > 1) bits &= group == slot / TERMS;
        return (typename Lanes::Value)bits;
    }
};

// A segment of a row, `columns` being its column scales.
template <class Lanes, int GROUPS, int TERMS>
INLINE void rebuild_columns(const Span& span, int64_t begin, int64_t end, const uint8_t* codes, const float* rows,
                            const float* columns, float* values) {
    for (int64_t j = begin; j < end; j += Lanes::LANES) {
        const Decoded<Lanes> code(codes + j);
        typename Lanes::Value value{};
        for (int slot = 0; slot < GROUPS * TERMS; ++slot) {
            const auto scale = rows[slot] * load<Lanes>(columns + slot * span.width + j);
            value += code.template in_slot<GROUPS, TERMS>(slot, scale);
        }
        store(values + j, value);
    }
}

template <int GROUPS, int TERMS>
void rebuild_segment(const Scaled& matrix, const Span& span, int64_t row, float* memory) {
    const uint8_t* codes = matrix.codes + row * matrix.columns + span.column;
    const float* rows = matrix.row_scales + row * matrix.row_slots + span.row_scale;
    const float* columns = matrix.column_scales + span.column_scale;
    const int64_t whole = span.width - span.width % Many::LANES;
    rebuild_columns<Many, GROUPS, TERMS>(span, 0, whole, codes, rows, columns, memory + span.column);
    rebuild_columns<One, GROUPS, TERMS>(span, whole, span.width, codes, rows, columns, memory + span.column);
}

// Gradients of the column scales are added to `sums`, those of the row scales to `totals`.
template <class Lanes, int GROUPS, int TERMS>
INLINE void contract_columns(const Span& span, int64_t begin, int64_t end, const uint8_t* codes, const float* rows,
                             const float* columns, const float* gradient, float* sums, float* totals) {
    constexpr int SLOTS = GROUPS * TERMS;
    typename Lanes::Value own[SLOTS] = {};
    for (int64_t j = begin; j < end; j += Lanes::LANES) {
        const Decoded<Lanes> code(codes + j);
        const auto here = load<Lanes>(gradient + j);
        for (int slot = 0; slot < SLOTS; ++slot) {
            const auto share = code.template in_slot<GROUPS, TERMS>(slot, here);
            const int64_t place = slot * span.width + j;
            own[slot] += share * load<Lanes>(columns + place);
            store(sums + place, load<Lanes>(sums + place) + rows[slot] * share);
        }
    }
    for (int slot = 0; slot < SLOTS; ++slot) {
        for (int lane = 0; lane < Lanes::LANES; ++lane) totals[slot] += own[slot][lane];
    }
}

template <int GROUPS, int TERMS>
void contract_segment(const Scaled& matrix, const Span& span, int64_t row, const float* memory, float* row_gradients,
                      float* column_gradients) {
    const uint8_t* codes = matrix.codes + row * matrix.columns + span.column;
    const float* rows = matrix.row_scales + row * matrix.row_slots + span.row_scale;
    const float *columns = matrix.column_scales + span.column_scale, *gradient = memory + span.column;
    float *sums = column_gradients + span.column_scale, totals[GROUPS * TERMS] = {};
    const int64_t whole = span.width - span.width % Many::LANES;
    contract_columns<Many, GROUPS, TERMS>(span, 0, whole, codes, rows, columns, gradient, sums, totals);
    contract_columns<One, GROUPS, TERMS>(span, whole, span.width, codes, rows, columns, gradient, sums, totals);
    std::memcpy(row_gradients + row * matrix.row_slots + span.row_scale, totals, sizeof totals);
}

// The same for weights that are levels, with one slot.
template <class Lanes>
INLINE void rebuild_levels(const float* levels, int64_t begin, int64_t end, const uint8_t* codes, float row,
                           const float* columns, float* values) {
    for (int64_t j = begin; j < end; j += Lanes::LANES) {
        store(values + j, row * load<Lanes>(columns + j) * Lanes::look_up(levels, codes + j));
    }
}

template <class Lanes>
INLINE float contract_levels(const float* levels, int64_t begin, int64_t end, const uint8_t* codes, float row,
                             const float* columns, const float* gradient, float* sums) {
    typename Lanes::Value own{};
    for (int64_t j = begin; j < end; j += Lanes::LANES) {
        const auto share = load<Lanes>(gradient + j) * Lanes::look_up(levels, codes + j);
        own += share * load<Lanes>(columns + j);
        store(sums + j, load<Lanes>(sums + j) + row * share);
    }
    float total = 0.0f;
    for (int lane = 0; lane < Lanes::LANES; ++lane) total += own[lane];
    return total;
}

inline void rebuild_trellis(const Scaled& matrix, const Span& span, int64_t row, float* memory) {
    const uint8_t* codes = matrix.codes + row * matrix.columns + span.column;
    const float scale = matrix.row_scales[row * matrix.row_slots + span.row_scale];
    const float* columns = matrix.column_scales + span.column_scale;
    const int64_t whole = span.width - span.width % Many::LANES;
    rebuild_levels<Many>(matrix.levels, 0, whole, codes, scale, columns, memory + span.column);
    rebuild_levels<One>(matrix.levels, whole, span.width, codes, scale, columns, memory + span.column);
}

inline void contract_trellis(const Scaled& matrix, const Span& span, int64_t row, const float* memory,
                             float* row_gradients, float* column_gradients) {
    const uint8_t* codes = matrix.codes + row * matrix.columns + span.column;
    const int64_t slot = row * matrix.row_slots + span.row_scale, whole = span.width - span.width % Many::LANES;
    const float scale = matrix.row_scales[slot];
    const float *columns = matrix.column_scales + span.column_scale, *gradient = memory + span.column;
    float* sums = column_gradients + span.column_scale;
    row_gradients[slot] =
        contract_levels<Many>(matrix.levels, 0, whole, codes, scale, columns, gradient, sums) +
        contract_levels<One>(matrix.levels, whole, span.width, codes, scale, columns, gradient, sums);
}

#define FOR_KIND(function, ...)                                         \
    switch (span.groups * 10 + span.terms) {                            \
        case 11: function<1, 1>(matrix, span, row, __VA_ARGS__); break; \
        case 21: function<2, 1>(matrix, span, row, __VA_ARGS__); break; \
        case 41: function<4, 1>(matrix, span, row, __VA_ARGS__); break; \
        case 12: function<1, 2>(matrix, span, row, __VA_ARGS__); break; \
        case 22: function<2, 2>(matrix, span, row, __VA_ARGS__); break; \
        case 42: function<4, 2>(matrix, span, row, __VA_ARGS__); break; \
    }

inline void rebuild(const Scaled& matrix, int64_t first, int64_t last, float* memory, float* weight) {
    for (int64_t row = first; row < last; ++row) {
        for (int64_t i = 0; i < matrix.span_count; ++i) {
            const Span& span = matrix.spans[i];
            if (span.trellis) {
                rebuild_trellis(matrix, span, row, memory);
                continue;
            }
            FOR_KIND(rebuild_segment, memory)
        }
        float* to = weight + row * matrix.columns;
        for (int64_t j = 0; j < matrix.columns; ++j) to[matrix.order[j]] = memory[j];
    }
}

inline void contract(const Scaled& matrix, int64_t first, int64_t last, const float* gradient, float* memory,
                     float* row_gradients, float* column_gradients) {
    for (int64_t row = first; row < last; ++row) {
        const float* from = gradient + row * matrix.columns;
        for (int64_t j = 0; j < matrix.columns; ++j) memory[j] = from[matrix.order[j]];
        for (int64_t i = 0; i < matrix.span_count; ++i) {
            const Span& span = matrix.spans[i];
            if (span.trellis) {
                contract_trellis(matrix, span, row, memory, row_gradients, column_gradients);
                continue;
            }
            FOR_KIND(contract_segment, memory, row_gradients, column_gradients)
        }
    }
}

}  // namespace INSTRUCTION_SET

#define CONCATENATE(name, set) name##_##set
#define FOR_SET(name, set) CONCATENATE(name, set)

void FOR_SET(rebuild, INSTRUCTION_SET)(const Scaled& matrix, int64_t first, int64_t last, float* memory,
                                       float* weight) {
    INSTRUCTION_SET::rebuild(matrix, first, last, memory, weight);
}

void FOR_SET(contract, INSTRUCTION_SET)(const Scaled& matrix, int64_t first, int64_t last, const float* gradient,
                                        float* memory, float* row_gradients, float* column_gradients) {
    INSTRUCTION_SET::contract(matrix, first, last, gradient, memory, row_gradients, column_gradients);
}

}  // namespace arbllm
