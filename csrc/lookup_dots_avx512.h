// Products of several tokens, where a processor multiplies bytes: each weight's level is looked up once for all tokens,
// as a byte, and activations are bytes as well. AVX-512 with VNNI, and what lookup_levels_avx512.h needs.
//
// Activations, times what their columns are multiplied by, are rounded to 1/127 of the largest of a share of columns;
// sums are exact. A pass without a trellis has activations for each of its accumulators (lookup.h).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lookup.h"
#include "lookup_levels_avx512.h"
#include "lookup_tables.h"
#include "own_vector.h"

namespace arbllm {
namespace {

constexpr int MOST_DOT_TOKENS = 64;
constexpr int DOTS_TOGETHER = 4;  // tokens, and vectors, whose sums are in registers

int octets_of(const Pass& pass) { return (pass.width + OCTET - 1) / OCTET; }
int shares_of(const Pass& pass) { return (octets_of(pass) + OCTETS - 1) / OCTETS; }

using RowSums = float[16 * VECTORS];  // of the rows of a block, two for each, for one token

// What the bytes of one share of a token's activations are worth, and what unsigned levels add to its sums.
struct Worth {
    float scale;
    int32_t excess;
};

// A token's activations for an accumulator of a pass, bytes (8 octets) and a worth a share.
struct ByteActivations {
    int8_t* values;
    Worth* worths;
};

// sums (tokens, 8 vectors) += levels times the activations of TOKENS tokens, in one share.
template <int TOKENS>
void add_share(const LevelBytes& levels, int share, int octets, const ByteActivations* x, float* sums) {
    constexpr int TOGETHER = TOKENS < 3 ? VECTORS : DOTS_TOGETHER;
    const int8_t* values[TOKENS];
    for (int t = 0; t < TOKENS; ++t) {
        values[t] = x[t].values + OCTET * OCTETS * share;
    }
    for (int first = 0; first < VECTORS; first += TOGETHER) {
        __m512i dots[TOKENS][TOGETHER];
        for (int t = 0; t < TOKENS; ++t) {
            // Of the two sums of a row, one of four columns each, one has it all.
            std::fill_n(dots[t], TOGETHER, _mm512_set1_epi64(static_cast<uint32_t>(-x[t].worths[share].excess)));
        }
        for (int octet = 0; octet < octets; ++octet) {
            __m512i own[TOKENS];
            for (int t = 0; t < TOKENS; ++t) {
                int64_t word;
                std::memcpy(&word, values[t] + OCTET * octet, 8);
                own[t] = _mm512_set1_epi64(word);
            }
            for (int v = 0; v < TOGETHER; ++v) {
                for (int t = 0; t < TOKENS; ++t) {
                    dots[t][v] = _mm512_dpbusd_epi32(dots[t][v], levels.of[octet][first + v], own[t]);
                }
            }
        }
        for (int t = 0; t < TOKENS; ++t) {
            const __m512 scale = _mm512_set1_ps(x[t].worths[share].scale);
            for (int v = 0; v < TOGETHER; ++v) {
                float* const to = sums + 16 * (VECTORS * t + first + v);
                _mm512_store_ps(to, _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dots[t][v]), _mm512_load_ps(to)));
            }
        }
    }
}

// The same for any number of tokens.
void add_share(const LevelBytes& levels, int share, int octets, const ByteActivations* x, int64_t tokens, float* sums) {
    for (; tokens >= DOTS_TOGETHER; tokens -= DOTS_TOGETHER) {
        add_share<DOTS_TOGETHER>(levels, share, octets, x, sums);
        x += DOTS_TOGETHER;
        sums += 16 * VECTORS * DOTS_TOGETHER;
    }
    if (tokens) {
        (tokens == 1 ? add_share<1> : tokens == 2 ? add_share<2> : add_share<3>)(levels, share, octets, x, sums);
    }
}

// The numbers at places of 16 that two vectors have together, those from 16 on being the second one's.
__m512 both(const int* places, __m512 first, __m512 second) {
    return _mm512_permutex2var_ps(first, _mm512_loadu_si512(places), second);
}

constexpr int EVENS[] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
constexpr int ODDS[] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
constexpr int TURNS[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
constexpr int LATER_TURNS[] = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// Lanes (4 vectors), in order, of sums of a block (8 vectors), both sums of a lane together.
template <bool WORDS_OF_TWO>
void add_pairs(const float* sums, __m512* lanes) {
    // Where the sums of words 2 g and 2 g + 1 of two vectors are: in turns, or one vector's before the other's.
    constexpr int IN_TURN[] = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    constexpr int ONE_BY_ONE[] = {0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30};
    int even[16], odd[16];
    for (int i = 0; i < 16; ++i) {
        even[i] = WORDS_OF_TWO ? IN_TURN[i] : ONE_BY_ONE[i];
        odd[i] = even[i] + 1;
    }
    __m512 found[4];  // four lanes of each sixteen
    for (int q = 0; q < 4; ++q) {
        const __m512 first = _mm512_load_ps(sums + 32 * q), second = _mm512_load_ps(sums + 32 * q + 16);
        found[q] = _mm512_add_ps(both(even, first, second), both(odd, first, second));
    }
    constexpr int LOW = 0x44, HIGH = 0xee, EVEN = 0x88, ODD = 0xdd;  // quarters of two vectors
    const __m512 low[] = {_mm512_shuffle_f32x4(found[0], found[1], LOW), _mm512_shuffle_f32x4(found[2], found[3], LOW)};
    const __m512 high[] = {_mm512_shuffle_f32x4(found[0], found[1], HIGH),
                           _mm512_shuffle_f32x4(found[2], found[3], HIGH)};
    lanes[0] = _mm512_shuffle_f32x4(low[0], low[1], EVEN);
    lanes[1] = _mm512_shuffle_f32x4(low[0], low[1], ODD);
    lanes[2] = _mm512_shuffle_f32x4(high[0], high[1], EVEN);
    lanes[3] = _mm512_shuffle_f32x4(high[0], high[1], ODD);
}

// y (64) += row factors times sums (8 vectors), both sums of a row together. Lanes are rows as Pass has it.
template <bool TRELLIS, bool WORDS_OF_TWO>
void add_rows(const float* sums, const float* factors, float* y) {
    __m512 lanes[4];
    add_pairs<WORDS_OF_TWO>(sums, lanes);
    for (int i = 0; i < 4; ++i) {
        __m512 own, factor;
        if constexpr (TRELLIS) {  // factors of even rows, then of odd ones
            const float* const of_even = factors + 16 * (i / 2);
            const __m512 even = _mm512_loadu_ps(of_even), odd = _mm512_loadu_ps(of_even + LANES / 2);
            own = lanes[i];
            factor = both(i % 2 ? LATER_TURNS : TURNS, even, odd);
        } else {
            own = both(i < 2 ? EVENS : ODDS, lanes[2 * (i % 2)], lanes[2 * (i % 2) + 1]);
            factor = _mm512_loadu_ps(factors + 16 * i);
        }
        _mm512_storeu_ps(y + 16 * i, _mm512_fmadd_ps(factor, own, _mm512_loadu_ps(y + 16 * i)));
    }
}

// Activations of a share in bytes; x are those of the columns, `factors` what they are multiplied by, if anything.
void write_share(const float* x, const float* factors, int columns, float unit, int zero, int8_t* values, Worth& worth) {
    constexpr int PARTS = OCTET * OCTETS / 16;
    __m512 read[PARTS], largest = _mm512_setzero_ps(), total = _mm512_setzero_ps();
    for (int i = 0; i < PARTS; ++i) {
        const int left = std::clamp(columns - 16 * i, 0, 16);
        const auto present = static_cast<__mmask16>((1 << left) - 1);
        read[i] = _mm512_maskz_loadu_ps(present, x + 16 * i);
        if (factors) {
            read[i] = _mm512_mul_ps(read[i], _mm512_maskz_loadu_ps(present, factors + 16 * i));
        }
        const __m512 size = _mm512_abs_ps(read[i]);
        largest = _mm512_max_ps(largest, size);
        total = _mm512_add_ps(total, size);
    }
    const float most = _mm512_reduce_max_ps(largest);
    const __m512 inverse = _mm512_set1_ps(most > SMALLEST ? LARGEST / most : 0.0f);
    __m512i sums = _mm512_setzero_si512();
    for (int i = 0; i < PARTS; ++i) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(read[i], inverse));
        sums = _mm512_add_epi32(sums, rounded);
        _mm_store_si128(reinterpret_cast<__m128i*>(values + 16 * i), _mm512_cvtepi32_epi8(rounded));
    }
    if (std::isfinite(_mm512_reduce_add_ps(total))) {
        worth = {unit * most / LARGEST, zero * _mm512_reduce_add_epi32(sums)};
    } else {  // bytes cannot say so, but all sums are not a number
        worth = {std::numeric_limits<float>::quiet_NaN(), 0};
    }
}

// What Product wants to know of several tokens' activations: see lookup_kernel.h.
class Dots {
  public:
    static constexpr int MOST = MOST_DOT_TOKENS;

    explicit Dots(const Prepared& prepared) : prepared_(prepared) {
        for (int p = 0; p < prepared.header->passes; ++p) {
            const Pass& pass = prepared.passes[p];
            at_.push_back(bytes_);
            bytes_ += 64 * ((pass.accumulators * accumulator_bytes(pass) + 63) / 64);
            first_table_.push_back(static_cast<int>(tables_.size()));
            for (int a = 0; a < pass.accumulators; ++a) {
                tables_.push_back(pass.trellis ? trellis_table(pass) : group_table(pass, a));
                tasks_.push_back({p, a});
            }
        }
    }

    int64_t bytes() const { return bytes_; }
    int64_t tasks() const { return static_cast<int64_t>(tasks_.size()); }

    void build(int64_t task, const float* x, uint8_t* space) const {
        const auto& [p, a] = tasks_[task];
        const LevelTable& table = tables_[task];
        const Pass& pass = prepared_.passes[p];
        const ByteActivations to = activations(space, p, a);
        const float* factors = prepared_.column_factors + pass.column_factors + int64_t{a} * pass.width;
        for (int share = 0; share < shares_of(pass); ++share) {
            const int first = OCTET * OCTETS * share;
            write_share(x + pass.column + first, a < pass.signed_sums ? factors + first : nullptr, pass.width - first,
                        table.unit, table.zero, to.values + first, to.worths[share]);
        }
    }

    // y (tokens, TILE_ROWS) += what a pass adds to the rows of some blocks of a tile.
    void add(int p, uint8_t* const* spaces, int64_t tokens, int64_t tile, int64_t first, int64_t blocks,
             float (*y)[TILE_ROWS]) const {
        const Pass& pass = prepared_.passes[p];
        if (!pass.trellis) {
            return add_groups(p, spaces, tokens, tile, first, blocks, y);
        }
        const auto chosen = pass.planes == 1   ? &Dots::add_trellis<1>
                            : pass.planes == 2 ? &Dots::add_trellis<2>
                            : pass.planes == 3 ? &Dots::add_trellis<3>
                                               : &Dots::add_trellis<4>;
        (this->*chosen)(p, spaces, tokens, tile, first, blocks, y);
    }

  private:
    struct Task {
        int pass, accumulator;
    };
    static int64_t value_bytes(const Pass& pass) { return int64_t{OCTET * OCTETS} * shares_of(pass); }
    static int64_t accumulator_bytes(const Pass& pass) {
        return value_bytes(pass) + static_cast<int64_t>(sizeof(Worth)) * shares_of(pass);
    }

    ByteActivations activations(uint8_t* space, int p, int a) const {
        const Pass& pass = prepared_.passes[p];
        uint8_t* const start = space + at_[p];
        int8_t* const values = reinterpret_cast<int8_t*>(start) + a * value_bytes(pass);
        auto* const worths = reinterpret_cast<Worth*>(start + pass.accumulators * value_bytes(pass));
        return {values, worths + a * shares_of(pass)};
    }

    void find_activations(uint8_t* const* spaces, int64_t tokens, int p, int a, ByteActivations* to) const {
        for (int64_t token = 0; token < tokens; ++token) {
            to[token] = activations(spaces[token], p, a);
        }
    }

    template <int TERMS>
    void add_trellis(int p, uint8_t* const* spaces, int64_t tokens, int64_t tile, int64_t first, int64_t blocks,
                     float (*y)[TILE_ROWS]) const {
        const Pass& pass = prepared_.passes[p];
        const __m512i table = _mm512_load_si512(tables_[first_table_[p]].entries);
        ByteActivations x[MOST];
        find_activations(spaces, tokens, p, 0, x);
        alignas(64) RowSums sums[TILE_BLOCKS][MOST];
        for (int64_t block = 0; block < blocks; ++block) {
            std::memset(sums[block], 0, tokens * sizeof(RowSums));
        }
        LevelBytes levels;
        for (int number = 0; number < stretches_of(pass); ++number) {
            for (int64_t block = 0; block < blocks; ++block) {
                const StretchCodes stretch(prepared_, pass, tile, first + block, number, blocks);
                for (int byte = 0; byte < stretch.bytes; byte += OCTETS) {
                    const int octets = std::min(OCTETS, stretch.bytes - byte);
                    for (int i = 0; i < octets; ++i) {
                        for (int term = 0; term < TERMS; ++term) {
                            const uint8_t* const ahead = stretch.ahead + LANES * (TERMS * (byte + i) + term);
                            __builtin_prefetch(ahead, 0, Avx512::fetched_to);
                        }
                        find_trellis<TERMS>(stretch, byte + i, table, levels.of[i]);
                    }
                    add_share(levels, (STRETCH_BYTES * number + byte) / OCTETS, octets, x, tokens, sums[block][0]);
                }
            }
        }
        for (int64_t block = 0; block < blocks; ++block) {
            const float* factors = prepared_.factors_of(tile, first + block, pass);
            for (int64_t token = 0; token < tokens; ++token) {
                add_rows<true, TERMS < MOST_TERMS>(sums[block][token], factors, y[token] + LANES * block);
            }
        }
    }

    void add_groups(int p, uint8_t* const* spaces, int64_t tokens, int64_t tile, int64_t first, int64_t blocks,
                    float (*y)[TILE_ROWS]) const {
        const Pass& pass = prepared_.passes[p];
        for (int64_t block = 0; block < blocks; ++block) {
            add_block(p, spaces, tokens, prepared_.codes_of(tile, first + block, pass),
                      prepared_.factors_of(tile, first + block, pass), LANES * block, y);
        }
    }

    // Of one block with groups, whose rows are from `row` of y on.
    void add_block(int p, uint8_t* const* spaces, int64_t tokens, const uint8_t* codes, const float* factors, int64_t row,
                   float (*y)[TILE_ROWS]) const {
        const Pass& pass = prepared_.passes[p];
        const int accumulators = pass.accumulators;
        ByteActivations x[MOST_ACCUMULATORS][MOST];
        alignas(64) RowSums sums[MOST_ACCUMULATORS][MOST];
        for (int a = 0; a < accumulators; ++a) {
            find_activations(spaces, tokens, p, a, x[a]);
            std::memset(sums[a], 0, tokens * sizeof(RowSums));
        }
        const GroupBits bits(pass.per_nibble);
        auto* const find = pass.per_nibble == 4   ? find_groups<4>
                           : pass.per_nibble == 2 ? find_groups<2>
                                                  : find_groups<1>;
        const LevelTable* const tables = &tables_[first_table_[p]];
        LevelBytes levels[MOST_ACCUMULATORS];
        for (int share = 0; share < shares_of(pass); ++share) {
            const int octets = std::min(OCTETS, octets_of(pass) - OCTETS * share);
            find(codes, pass, share, octets, bits, tables, levels);
            for (int a = 0; a < accumulators; ++a) {
                add_share(levels[a], share, octets, x[a], tokens, sums[a][0]);
            }
        }
        for (int a = 0; a < accumulators; ++a) {
            for (int64_t token = 0; token < tokens; ++token) {
                add_rows<false, false>(sums[a][token], factors + LANES * a, y[token] + row);
            }
        }
    }

    const Prepared& prepared_;
    int64_t bytes_ = 0;
    OwnVector<int64_t> at_;  // where the activations of each pass are in a token's space
    OwnVector<int> first_table_;  // of each pass: its accumulators' tables
    OwnVector<LevelTable> tables_;
    OwnVector<Task> tasks_;
};

}  // namespace
}  // namespace arbllm
