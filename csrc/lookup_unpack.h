// A prepared matrix as numbers again: W^T in float or bfloat16, for products of many tokens.
//
// Codes of eight columns are put together as one word a row, four bits a column, that all columns then shift: one
// instruction finds the levels of 8 or 16 rows. In an anonymous namespace as lookup_kernel.h, which includes this.
#pragma once

#include <algorithm>
#include <cstring>

#include "bfloat16.h"
#include "lookup.h"
#include "lookup_trellis.h"
#include "own_vector.h"
#include "parallel.h"

namespace arbllm {
namespace {

constexpr int PICKED = 16;  // levels that V::pick chooses among

// Bit b of a byte at bit 4 b.
inline uint32_t spread(uint32_t byte) {
    uint32_t bits = (byte | byte << 12) & 0x000f000f;
    bits = (bits | bits << 6) & 0x03030303;
    return (bits | bits << 3) & 0x11111111;
}

// Numbers of the levels of eight columns' weights: bit t, but for the highest of four stored signs, at 4 column + t.
struct Numbers {
    alignas(64) uint32_t words[LANES] = {};
    uint8_t highest[LANES];

    Numbers(const StretchCodes& stretch, int terms, int byte) {
        const uint8_t* now = stretch.codes + stretch.step * byte;
        uint8_t first[LAGS[1] + LANES];  // signs of rows above, then of the block
        std::memcpy(first, stretch.above + stretch.above_step * byte + LANES - LAGS[1], LAGS[1]);
        std::memcpy(first + LAGS[1], now, LANES);
        for (int term = 1; term < terms; ++term) {
            for (int r = 0; r < LANES; ++r) {
                words[r] |= spread(now[LANES * term + r]) << (term - 1);
            }
        }
        const uint8_t* own = first + LAGS[1];
        for (int r = 0; r < LANES; ++r) {
            highest[r] = own[r - LAG];
            words[r] |= spread(own[r] ^ own[r - LAGS[0]] ^ own[r - LAGS[1]]) << (terms - 1);
        }
        if (terms < MOST_TERMS) {
            for (int r = 0; r < LANES; ++r) {
                words[r] |= spread(highest[r]) << terms;
            }
        }
    }
};

// Writes one pass with a trellis to W^T: rows of `stride` floats.
template <class V>
void unpack_trellis(const Prepared& prepared, const Pass& pass, int64_t tile, int64_t block, float* to,
                    int64_t stride) {
    float scales[LANES], found[LANES], others[LANES];
    const float* factors = prepared.factors_of(tile, block, pass);
    for (int r = 0; r < LANES; ++r) {
        scales[r] = factors[LANES / 2 * (r % 2) + r / 2];
    }
    for (int number = 0; number < stretches_of(pass); ++number) {
        const StretchCodes stretch(prepared, pass, tile, block, number);
        for (int byte = 0; byte < stretch.bytes; ++byte) {
            const Numbers numbers(stretch, pass.planes, byte);
            const int column = 8 * (STRETCH_BYTES * number + byte), columns = std::min(8, pass.width - column);
            for (int j = 0; j < columns; ++j) {
                V::pick(pass.levels, numbers.words, 4 * j, found);
                if (pass.planes == MOST_TERMS) {
                    V::pick(pass.levels + PICKED, numbers.words, 4 * j, others);
                    for (int r = 0; r < LANES; ++r) {
                        found[r] = numbers.highest[r] >> j & 1 ? others[r] : found[r];
                    }
                }
                const float factor = prepared.column_factors[pass.column_factors + column + j];
                float* row = to + (column + j) * stride;
                for (int r = 0; r < LANES; ++r) {
                    row[r] = scales[r] * factor * found[r];
                }
            }
        }
    }
}

// Adds one pass of one block, with G groups, to W^T: rows of `stride` floats.
template <int G, bool MEANS>
void unpack_groups(const Prepared& prepared, const Pass& pass, int64_t tile, int64_t block, float* to, int64_t stride) {
    const uint8_t* codes = prepared.codes_of(tile, block, pass);
    const float* factors = prepared.factors_of(tile, block, pass);
    const float* column_factors = prepared.column_factors + pass.column_factors;
    const int per = pass.per_nibble, columns = 2 * per;
    int words[LANES];
    for (int j = 0; j < pass.width; ++j) {
        const int first_bit = 4 * (j % columns / per), sign_bit = first_bit + j % per;
        const int group_bit = first_bit + (G == 2 ? 2 + j % per : 1);
        if (j % columns == 0) {
            const uint8_t* code = codes + LANES * (j / columns);
            for (int r = 0; r < LANES / 2; ++r) {
                words[r] = code[2 * r];
                words[LANES / 2 + r] = code[2 * r + 1];
            }
        }
        float candidates[G];
        for (int g = 0; g < G; ++g) {
            candidates[g] = column_factors[g * pass.width + j];
        }
        float* row = to + j * stride;
        // Products with 0, 1 and -1, since GCC makes branches of choices and comparisons, and then no vectors.
        for (int r = 0; r < LANES; ++r) {
            const int own = words[r], sign = 2 * (own >> sign_bit & 1) - 1;
            const int group = own >> group_bit & (G - 1);
            float value = 0.0f, mean = 0.0f;
            for (int g = 0; g < G; ++g) {
                const float chosen = static_cast<float>(1 - std::min(group ^ g, 1));
                value += chosen * (factors[LANES * g + r] * candidates[g]);
                mean += MEANS ? chosen * factors[LANES * (G + g) + r] : 0.0f;
            }
            row[r] += static_cast<float>(sign) * value + mean;
        }
    }
}

template <class V>
void unpack_pass(const Prepared& prepared, const Pass& pass, int64_t tile, int64_t block, float* to, int64_t stride) {
    if (pass.trellis) {
        return unpack_trellis<V>(prepared, pass, tile, block, to, stride);
    }
    const bool means = pass.accumulators > pass.signed_sums;
    auto* const chosen = pass.signed_sums == 1   ? (means ? unpack_groups<1, true> : unpack_groups<1, false>)
                         : pass.signed_sums == 2 ? (means ? unpack_groups<2, true> : unpack_groups<2, false>)
                                                 : (means ? unpack_groups<4, true> : unpack_groups<4, false>);
    chosen(prepared, pass, tile, block, to, stride);
}

// Writes W^T of one block: rows of `stride` floats.
template <class V>
void unpack_block(const Prepared& prepared, int64_t tile, int64_t block, float* to, int64_t stride) {
    const Header& header = *prepared.header;
    for (int64_t p = 0; p < header.passes; ++p) {
        const Pass& pass = prepared.passes[p];
        const bool begins = p == 0 || pass.column != prepared.passes[p - 1].column;
        for (int64_t j = 0; begins && !pass.trellis && j < pass.width; ++j) {
            std::fill_n(to + (pass.column + j) * stride, LANES, 0.0f);
        }
        unpack_pass<V>(prepared, pass, tile, block, to + pass.column * stride, stride);
    }
    const float* dense = prepared.dense_of(tile, block);
    for (int64_t j = 0; j < header.dense; ++j) {
        std::copy(dense + LANES * j, dense + LANES * (j + 1), to + (header.dense_column + j) * stride);
    }
}

template <class V>
struct Unpacking {
    const Prepared& prepared;
    int64_t first, last;
    void* to;
    Number number;
    Claims blocks;

    static void run(void* argument) {
        auto& job = *static_cast<Unpacking*>(argument);
        const int64_t columns = job.prepared.header->columns, stride = LANES * (job.last - job.first);
        static thread_local OwnVector<float> wide;
        if (job.number == Number::bfloat16) {
            wide.resize(LANES * columns);
        }
        for (int64_t i; (i = job.blocks.next()) >= 0;) {
            const int64_t tile = (job.first + i) / TILE_BLOCKS, block = (job.first + i) % TILE_BLOCKS;
            if (job.number == Number::float32) {
                unpack_block<V>(job.prepared, tile, block, static_cast<float*>(job.to) + LANES * i, stride);
                continue;
            }
            unpack_block<V>(job.prepared, tile, block, wide.data(), LANES);
            uint16_t* const to = static_cast<uint16_t*>(job.to) + LANES * i;
            for (int64_t j = 0; j < columns; ++j) {
                std::transform(&wide[LANES * j], &wide[LANES * j] + LANES, to + stride * j, narrowed);
            }
        }
    }
};

template <class V>
void unpack(const Prepared& prepared, int64_t first, int64_t last, void* to, Number number, int threads) {
    Unpacking<V> job{prepared, first, last, to, number, Claims(last - first)};
    in_parallel(threads, &Unpacking<V>::run, &job);
}

}  // namespace
}  // namespace arbllm
