// Weights of a block of rows in bfloat16, as products of many tokens read them: four columns of eight rows in a vector, a
// word of 64 bits a row. AVX-512 with BF16, and what lookup_levels_avx512.h needs.
//
// Of a trellis these are levels over their unit: that and column factors are in the inputs, row factors wait for sums.
// Of columns with groups they are whole weights, all signs and means of a column together, computed in float32 and
// rounded once.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "bfloat16.h"
#include "lookup.h"
#include "lookup_levels_avx512.h"

namespace arbllm {
namespace {

constexpr int PANEL_OCTETS = 64;  // so that half a panel fills the first cache
static_assert(STRETCH_BYTES % PANEL_OCTETS == 0);
constexpr int HALVES = 2;  // of an octet: its first four columns, its last four

// Passes of the same columns: all signs of columns with groups, or a trellis.
struct Columns {
    const Pass* passes;
    int count;
    int octets() const { return (passes->width + OCTET - 1) / OCTET; }
};

// Where a block of rows is.
struct BlockPlace {
    int64_t tile, block;
};

constexpr int TOGETHER = 4;  // vectors, whose rows are multiplied at once

// Weights of half the rows of a block, octet by octet: so that they share no lines of the cache with other rows.
using HalfPanel = __m512i[PANEL_OCTETS][HALVES][TOGETHER];

// Fills a panel with the levels of some octets of a trellis, all in one stretch.
template <int TERMS>
void fill_trellis(const Prepared& prepared, const Pass& pass, BlockPlace at, int first, int octets, HalfPanel* panel,
                  int to) {
    constexpr int ENTRIES = 32;
    // Bytes alternate between both halves, so that each word of 16 bits has an index of one half, then of the other.
    constexpr auto ALTERNATING = static_cast<int64_t>(0x8008400420021001);
    alignas(64) uint16_t entries[ENTRIES];
    for (int i = 0; i < ENTRIES; ++i) {
        entries[i] = narrowed(pass.levels[level_number(pass, i)] / pass.half_unit);
    }
    const __m512i table = _mm512_load_si512(entries);
    const StretchCodes stretch(prepared, pass, at.tile, at.block, first / STRETCH_BYTES);
    for (int i = 0; i < octets; ++i) {
        __m512i indices[VECTORS];
        find_indices<TERMS>(stretch, first % STRETCH_BYTES + i, ALTERNATING, indices);
        for (int v = 0; v < VECTORS; ++v) {
            auto& halves = panel[v / TOGETHER][to + i];
            halves[0][v % TOGETHER] = _mm512_permutexvar_epi16(indices[v], table);
            halves[1][v % TOGETHER] = _mm512_permutexvar_epi16(_mm512_srli_epi16(indices[v], 8), table);
        }
    }
}

void fill_trellis(const Prepared& prepared, const Pass& pass, BlockPlace at, int first, int octets, HalfPanel* panel,
                  int to) {
    auto* const chosen = pass.planes == 1   ? fill_trellis<1>
                         : pass.planes == 2 ? fill_trellis<2>
                         : pass.planes == 3 ? fill_trellis<3>
                                            : fill_trellis<4>;
    chosen(prepared, pass, at, first, octets, panel, to);
}

// Words of a vector whose two rows are computed together: in this order, unpacking words of 64 bits from the first four
// and the last four brings them back into theirs.
constexpr int PAIRED[] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr int PAIRS = 4;
constexpr int MOST_SIGNS = 4;  // of a weight

// Row factors of a block, eight times each, as vectors of two rows and eight columns.
struct WideFactors {
    alignas(64) __m512 of[MOST_ACCUMULATORS][VECTORS][PAIRS];

    void read(const float* factors, int accumulators) {
        for (int a = 0; a < accumulators; ++a) {
            for (int v = 0; v < VECTORS; ++v) {
                for (int k = 0; k < PAIRS; ++k) {
                    const auto wide = [&](int word) {
                        const int lane = 16 * (word / 2) + 4 * (v / 2) + 2 * (v % 2) + word % 2;
                        return _mm256_set1_ps(factors[LANES * a + lane / 2 + LANES / 2 * (lane % 2)]);
                    };
                    const __m256 first = wide(PAIRED[2 * k]), second = wide(PAIRED[2 * k + 1]);
                    of[a][v][k] = _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
                }
            }
        }
    }
};

// Of four candidates for 16 weights, those of their groups.
template <int GROUPS, class Candidate>
__m512 of_group(const Candidate& candidate, __mmask16 low, __mmask16 high) {
    __m512 found = candidate(0);
    if constexpr (GROUPS > 1) {
        found = _mm512_mask_mov_ps(found, low, candidate(1));
    }
    if constexpr (GROUPS > 2) {
        found = _mm512_mask_mov_ps(found, high, _mm512_mask_mov_ps(candidate(2), low, candidate(3)));
    }
    return found;
}

// Column factors of eight columns, twice each, of all groups.
template <int GROUPS>
struct OctetFactors {
    __m512 of[GROUPS];

    void read(const float* factors, int width, int first) {
        const int left = std::min(OCTET, width - first);
        const auto present = static_cast<__mmask8>((1 << left) - 1);
        for (int g = 0; g < GROUPS; ++g) {
            of[g] = _mm512_broadcast_f32x8(_mm256_maskz_loadu_ps(present, factors + g * width + first));
        }
    }
};

// What one sign adds to the weights (8 rows, 8 columns) of a vector; `indices` are those of GroupBits.
template <int GROUPS, bool MEANS>
inline __attribute__((always_inline)) void add_sign(__m512i indices, const OctetFactors<GROUPS>& columns,
                                                    const WideFactors& rows, int v, __m512* weights) {
    constexpr int GROUP_BIT = GROUPS == 4 ? 2 : 4;
    const __mmask64 minus = _mm512_testn_epi8_mask(indices, _mm512_set1_epi8(1));
    const __mmask64 low = _mm512_test_epi8_mask(indices, _mm512_set1_epi8(GROUP_BIT));
    const __mmask64 high = _mm512_test_epi8_mask(indices, _mm512_set1_epi8(2 * GROUP_BIT));
    for (int k = 0; k < PAIRS; ++k) {
        const auto low_k = static_cast<__mmask16>(low >> 16 * k), high_k = static_cast<__mmask16>(high >> 16 * k);
        const auto chosen = [&](const auto& candidate) { return of_group<GROUPS>(candidate, low_k, high_k); };
        const __m512 size = _mm512_mul_ps(chosen([&](int g) { return rows.of[g][v][k]; }),
                                          chosen([&](int g) { return columns.of[g]; }));
        const auto minus_k = static_cast<__mmask16>(minus >> 16 * k);
        weights[k] = _mm512_add_ps(weights[k], _mm512_mask_xor_ps(size, minus_k, size, _mm512_set1_ps(-0.0f)));
        if constexpr (MEANS) {
            weights[k] = _mm512_add_ps(weights[k], chosen([&](int g) { return rows.of[GROUPS + g][v][k]; }));
        }
    }
}

// Fills a panel with the weights of some octets of columns with groups; `first` is a multiple of 8.
template <int GROUPS>
void fill_groups(const Prepared& prepared, const Columns& columns, BlockPlace at, int first, int octets,
                 WideFactors* rows, HalfPanel* panel, int to) {
    constexpr int PER = 4 / GROUPS, STEP = 2 * PER;
    static const GroupBits bits(PER);
    const __m512i paired = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
    for (int sign = 0; sign < columns.count; ++sign) {
        const Pass& pass = columns.passes[sign];
        rows[sign].read(prepared.factors_of(at.tile, at.block, pass), pass.accumulators);
    }
    for (int step = 0; step < octets; step += STEP) {
        __m512i words[MOST_SIGNS][VECTORS];
        for (int sign = 0; sign < columns.count; ++sign) {
            const Pass& pass = columns.passes[sign];
            read_words(prepared.codes_of(at.tile, at.block, pass), pass, 4 / PER * (first + step), words[sign]);
        }
        for (int i = 0; i < std::min(STEP, octets - step); ++i) {
            OctetFactors<GROUPS> factors[MOST_SIGNS];
            for (int sign = 0; sign < columns.count; ++sign) {
                const Pass& pass = columns.passes[sign];
                factors[sign].read(prepared.column_factors + pass.column_factors, pass.width, OCTET * (first + step + i));
            }
            for (int v = 0; v < VECTORS; ++v) {
                __m512 weights[PAIRS];
                std::fill_n(weights, PAIRS, _mm512_setzero_ps());
                for (int sign = 0; sign < columns.count; ++sign) {
                    const Pass& pass = columns.passes[sign];
                    const __m512i indices = _mm512_permutexvar_epi64(
                        paired, _mm512_multishift_epi64_epi8(bits.of[i], words[sign][v]));
                    if (pass.accumulators > GROUPS) {
                        add_sign<GROUPS, true>(indices, factors[sign], rows[sign], v, weights);
                    } else {
                        add_sign<GROUPS, false>(indices, factors[sign], rows[sign], v, weights);
                    }
                }
                const auto low = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weights[1], weights[0]));
                const auto high = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weights[3], weights[2]));
                auto& halves = panel[v / TOGETHER][to + step + i];
                halves[0][v % TOGETHER] = _mm512_unpacklo_epi64(low, high);
                halves[1][v % TOGETHER] = _mm512_unpackhi_epi64(low, high);
            }
        }
    }
}

}  // namespace
}  // namespace arbllm
