// Levels of weights as bytes, eight columns of eight rows in a vector, a word of 64 bits a row: what lookup_dots_avx512.h
// multiplies. AVX-512 with VBMI and GFNI.
//
// The bits that tell a weight's level are brought together as an index, of which one instruction finds the levels of a
// whole vector. A pass without a trellis has levels for each of its accumulators (lookup.h): 1 with the sign of the
// weight, or 0 where it is of another group.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "lookup.h"
#include "lookup_avx512.h"
#include "lookup_tables.h"
#include "lookup_trellis.h"

namespace arbllm {
namespace {

constexpr int OCTET = 8;  // columns of a vector
constexpr int VECTORS = LANES / 8;  // of an octet of a block
constexpr int OCTETS = 8;  // that are found at once: a share

static_assert(STRETCH_BYTES % OCTETS == 0);

// Levels of a block of rows, for the columns of a share; unsigned, as their table has them.
struct LevelBytes {
    alignas(64) __m512i of[OCTETS][VECTORS];
};

// Levels of an accumulator as bytes, at all indices.
struct LevelTable {
    alignas(64) uint8_t entries[64];
    int zero;  // the entry that stands for 0
    float unit;  // what 1 stands for
};

// The number of the level at an index: indices have the lowest four bits in reverse.
int level_number(const Pass& pass, int index) {
    const int number = (index >> 3 & 1) | (index >> 1 & 2) | (index << 1 & 4) | (index << 3 & 8) | (index & 16);
    return number % (2 << pass.planes);
}

// The table of a trellis.
LevelTable trellis_table(const Pass& pass) {
    LevelTable table{{}, ZERO, pass.level_unit};
    for (int i = 0; i < 64; ++i) {
        table.entries[i] = static_cast<uint8_t>(ZERO + pass.level_bytes[level_number(pass, i)]);
    }
    return table;
}

// The table of an accumulator of a pass with groups: indices have a weight's sign at bit 0 and its group at 1 or 2.
LevelTable group_table(const Pass& pass, int accumulator) {
    const int groups = pass.signed_sums;
    LevelTable table{{}, 1, 1.0f};
    for (int i = 0; i < 64; ++i) {
        const int own = groups == 1 ? 0 : groups == 2 ? i >> 2 & 1 : i >> 1 & 3;
        const int sign = accumulator >= groups || (i & 1) ? 1 : -1;
        table.entries[i] = static_cast<uint8_t>(1 + (own == accumulator % groups ? sign : 0));
    }
    return table;
}

// Words of 32 bits (4 vectors) of the bytes that four vectors have in one lane: word 4 g + i of vector q is lane
// 16 g + 4 q + i.
void interleave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* to) {
    const __m512i low[] = {_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d)};
    const __m512i high[] = {_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d)};
    to[0] = _mm512_unpacklo_epi16(low[0], low[1]);
    to[1] = _mm512_unpackhi_epi16(low[0], low[1]);
    to[2] = _mm512_unpacklo_epi16(high[0], high[1]);
    to[3] = _mm512_unpackhi_epi16(high[0], high[1]);
}

// Words of 64 bits (8 vectors) of two such: word 2 g + b of vector 2 q + h is lane 16 g + 4 q + 2 h + b.
void interleave(const __m512i* first, const __m512i* last, __m512i* to) {
    for (int q = 0; q < 4; ++q) {
        to[2 * q] = _mm512_unpacklo_epi32(first[q], last[q]);
        to[2 * q + 1] = _mm512_unpackhi_epi32(first[q], last[q]);
    }
}

// Bit j of a byte, for bytes in this order of columns.
constexpr int64_t NATURAL = static_cast<int64_t>(0x8040201008040201);

// Indices of the levels of the weights of a pass with a trellis, at an octet of columns, in the lowest bits of each byte,
// as many as tables of 16 levels read, or of 32 where a weight has four signs; other bits say nothing. Where four planes
// tell them, words are made of two rows, and so word 2 g + b of vector 2 q + h is lane 16 g + 4 q + 2 b + h.
template <int TERMS>
void find_indices(const StretchCodes& stretch, int byte, int64_t columns, __m512i* to) {
    const Signs<Avx512, TERMS, 0> signs(stretch, byte);
    const auto plane = [&](int p) { return p <= TERMS ? signs.planes[std::min(p, TERMS)] : _mm512_setzero_si512(); };
    const __m512i order = _mm512_set1_epi64(columns);
    __m512i fours[4];
    interleave(plane(0), plane(1), plane(2), plane(3), fours);
    if constexpr (TERMS < MOST_TERMS) {
        for (int q = 0; q < 4; ++q) {
            const __m512i index = _mm512_gf2p8affine_epi64_epi8(order, fours[q], 0);
            to[2 * q] = Avx512::high(index);
            to[2 * q + 1] = Avx512::low(index);
        }
    } else {
        __m512i last[4], words[VECTORS];
        interleave(plane(4), plane(4), plane(4), plane(4), last);
        interleave(last, fours, words);
        for (int v = 0; v < VECTORS; ++v) {
            to[v] = _mm512_gf2p8affine_epi64_epi8(order, words[v], 0);
        }
    }
}

// Levels of these weights.
template <int TERMS>
void find_trellis(const StretchCodes& stretch, int byte, __m512i table, __m512i* to) {
    __m512i indices[VECTORS];
    find_indices<TERMS>(stretch, byte, NATURAL, indices);
    for (int v = 0; v < VECTORS; ++v) {
        to[v] = Avx512::lookup(table, indices[v]);
    }
}

// Eight bytes of codes of a pass with groups, as words in the order of `interleave`: in which bits the indices of the
// levels begin, for each octet of columns.
struct GroupBits {
    __m512i of[8];

    explicit GroupBits(int per_nibble) {
        for (int octet = 0; octet < octets(per_nibble); ++octet) {
            uint64_t places = 0;
            for (int j = 0; j < OCTET; ++j) {
                const int column = OCTET * octet + j;
                places |= static_cast<uint64_t>(4 * (column / per_nibble) + column % per_nibble) << (8 * j);
            }
            of[octet] = _mm512_set1_epi64(static_cast<int64_t>(places));
        }
    }

    static int octets(int per_nibble) { return 2 * per_nibble; }
};

// Eight bytes of codes from one on, as such words. Bytes beyond the last one are read as the last one: inputs are 0
// there.
void read_words(const uint8_t* codes, const Pass& pass, int byte, __m512i* words) {
    __m512i read[8], first[4], last[4];
    for (int i = 0; i < 8; ++i) {
        read[i] = Avx512::load(codes + LANES * std::min(byte + i, pass.bytes - 1));
    }
    interleave(read[0], read[1], read[2], read[3], first);
    interleave(read[4], read[5], read[6], read[7], last);
    interleave(first, last, words);
}

// Levels of the weights of a pass with groups, of each accumulator, for the columns of a share.
template <int PER>
void find_groups(const uint8_t* codes, const Pass& pass, int share, int octets, const GroupBits& bits,
                 const LevelTable* tables, LevelBytes* to) {
    for (int octet = 0; octet < octets; octet += GroupBits::octets(PER)) {
        __m512i words[VECTORS];
        read_words(codes, pass, 4 / PER * (OCTETS * share + octet), words);
        for (int i = 0; i < GroupBits::octets(PER); ++i) {  // OCTETS are whole
            __m512i indices[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                indices[v] = _mm512_multishift_epi64_epi8(bits.of[i], words[v]);
            }
            for (int a = 0; a < pass.accumulators; ++a) {
                const __m512i table = _mm512_load_si512(tables[a].entries);
                for (int v = 0; v < VECTORS; ++v) {
                    to[a].of[octet + i][v] = Avx512::lookup(table, indices[v]);
                }
            }
        }
    }
}

}  // namespace
}  // namespace arbllm
