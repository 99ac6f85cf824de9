// Passes with a trellis (arbllm/binarize/code.py): their look-ups, for a few tokens.
//
// Stored signs are read, what follows from rows above is put together in registers, and all signs and products of signs
// of a weight look up in the same tables. In an anonymous namespace as lookup_kernel.h, which includes this and names
// what V must have.
#pragma once

#include <algorithm>

#include "lookup.h"
#include "lookup_tables.h"

namespace arbllm {
namespace {

constexpr int WORD = 8;  // bytes of a vector's words: lags are multiples
constexpr int BATCH = 4;  // summands that are added up at once, as many as registers hold
constexpr int EXACT = 2;  // summands, those of the largest coefficients, whose look-ups are not averaged

// Of other summands, what the two tables of a byte give is averaged, to 8 bits, so that there is half as much to add up.
constexpr bool is_averaged(int summand) { return summand >= EXACT; }

// The codes of a stretch of one block and of the block above, [byte][plane][lane].
struct StretchCodes {
    const uint8_t *codes, *above;
    const uint8_t* ahead;  // codes that are read later on, and asked for meanwhile
    int bytes, step, above_step;  // from one byte to the next; 0 where there is no block above

    // Of a job that reads each stretch of `together` blocks of the tile before the next.
    StretchCodes(const Prepared& prepared, const Pass& pass, int64_t tile, int64_t block, int number,
                 int64_t together = 1) {
        static const uint8_t nothing[LANES + WORD] = {};
        const int64_t before = tile * TILE_BLOCKS + block - 1;
        bytes = stretch_bytes(pass, number);
        codes = prepared.stretch_of(tile, block, pass, number);
        above = before < 0 ? nothing : prepared.stretch_of(before / TILE_BLOCKS, before % TILE_BLOCKS, pass, number);
        step = LANES * pass.planes;
        above_step = before < 0 ? 0 : step;
        // A tile is read from front to back; of one block alone, the next stretch lies behind those of the other blocks.
        ahead = codes + LANES * (together > 1 ? AHEAD : STRETCH_BYTES * pass.planes * prepared.tile_blocks(tile));
    }
};

// Lanes from V::lanes * PART - DISTANCE on, of which those before 0 are in the block above.
template <class V, int PART, int DISTANCE>
typename V::Bytes lanes_above(const uint8_t* now, const uint8_t* above) {
    constexpr int START = V::lanes * PART - DISTANCE;
    if constexpr (START >= 0) {
        return V::load(now + START);
    } else if constexpr (START + V::lanes <= 0) {
        return V::load(above + LANES + START);
    } else {
        return V::template join<-START / WORD>(above + LANES, now);
    }
}

// All signs of the weights of eight columns and V::lanes rows.
template <class V, int TERMS, int PART>
struct Signs {
    typename V::Bytes planes[TERMS + 1];

    Signs(const StretchCodes& stretch, int byte) {
        const uint8_t* now = stretch.codes + LANES * TERMS * byte;
        const uint8_t* above = stretch.above + stretch.above_step * byte;
        for (int term = 1; term < TERMS; ++term) {
            planes[term - 1] = V::load(now + LANES * term + V::lanes * PART);
        }
        planes[TERMS - 1] = V::differ(V::load(now + V::lanes * PART),
                                      V::differ(lanes_above<V, PART, LAGS[0]>(now, above),
                                                lanes_above<V, PART, LAGS[1]>(now, above)));
        planes[TERMS] = lanes_above<V, PART, LAG>(now, above);
    }

    template <int MASK>
    typename V::Bytes product() const {
        constexpr int FIRST = __builtin_ctz(MASK), REST = MASK & (MASK - 1);
        if constexpr (REST) {
            constexpr int SECOND = __builtin_ctz(REST), THIRD = __builtin_ctz(REST & (REST - 1));
            return V::differ(V::differ(planes[FIRST], planes[SECOND]), planes[THIRD]);
        } else {
            return planes[FIRST];
        }
    }
};

// Sums of what COUNT summands of the levels look up; `all` and `odd` as in lookup_groups.h.
template <class V, int TERMS, int FIRST, int PART>
struct TrellisSums {
    static constexpr int COUNT = std::min(BATCH, SUMMANDS[TERMS - 1] - FIRST);
    typename V::Bytes all[COUNT], odd[COUNT];

    TrellisSums() {
        std::fill_n(all, COUNT, V::zero());
        std::fill_n(odd, COUNT, V::zero());
    }

    void add(const StretchCodes& stretch, int byte, const uint8_t* tables) {
        const Signs<V, TERMS, PART> signs(stretch, byte);
        const auto low = V::table(tables), high = V::table(tables + 16);
        add_from<0>(signs, low, high);
    }

  private:
    template <int K, class Table>
    void add_from(const Signs<V, TERMS, PART>& signs, const Table& low, const Table& high) {
        if constexpr (K < COUNT) {
            const auto code = signs.template product<MASKS[TERMS - 1][FIRST + K]>();
            const auto first = V::lookup(low, V::low(code)), second = V::lookup(high, V::high(code));
            if constexpr (is_averaged(FIRST + K)) {
                add_found(K, V::average8(first, second));
            } else {
                add_found(K, first);
                add_found(K, second);
            }
            add_from<K + 1>(signs, low, high);
        }
    }

    void add_found(int k, typename V::Bytes found) {
        all[k] = V::add16(all[k], found);
        odd[k] = V::add16(odd[k], V::down8(found));
    }
};

// Adds to sums (64) what a batch of summands, the first of them FIRST, looks up in one stretch, for V::lanes rows.
template <class V, int TERMS, int FIRST, int PART>
void add_part(const StretchCodes& stretch, const Pass& pass, const uint8_t* tables, const int32_t* shares, float scale,
              float* sums) {
    using Found = TrellisSums<V, TERMS, FIRST, PART>;
    // Each part asks for its share of the codes ahead, evenly, since memory can be asked for so much at a time.
    constexpr int PARTS = LANES / V::lanes, BATCHES = (SUMMANDS[TERMS - 1] + BATCH - 1) / BATCH;
    constexpr int FETCHED = (LANES * TERMS + PARTS * BATCHES - 1) / (PARTS * BATCHES);  // for each byte of the stretch
    const uint8_t* const ahead = stretch.ahead + (FIRST / BATCH * PARTS + PART) * FETCHED * stretch.bytes;
    typename V::Bytes totals[Found::COUNT][2];
    for (auto& halves : totals) {
        halves[0] = halves[1] = V::zero();
    }
    for (int first = 0; first < stretch.bytes; first += BLOCK_BYTES) {
        Found found;
        const int end = std::min(first + BLOCK_BYTES, stretch.bytes);
        for (int byte = first; byte < end; ++byte) {
            for (int line = 0; line < FETCHED; line += LANES) {
                __builtin_prefetch(ahead + FETCHED * byte + line, 0, V::fetched_to);
            }
            found.add(stretch, byte, tables + 32 * byte);
        }
        const int share = shares[first / BLOCK_BYTES];
        for (int k = 0; k < Found::COUNT; ++k) {
            const auto odd = found.odd[k], even = V::sub16(found.all[k], V::up8(odd));
            const auto to_share = [&](auto sum) { return is_averaged(FIRST + k) ? sum : V::add16(sum, sum); };
            totals[k][0] = V::add16(totals[k][0], V::share16(to_share(even), share));
            totals[k][1] = V::add16(totals[k][1], V::share16(to_share(odd), share));
        }
    }
    for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < Found::COUNT; ++k) {
            // An average is half of a sum, and was not doubled.
            const float coefficient = pass.coefficients[FIRST + k] * (is_averaged(FIRST + k) ? 4.0f : 1.0f);
            V::add_scaled(sums + LANES / 2 * half + V::lanes * PART / 2, totals[k][half], scale * coefficient);
        }
    }
}

// Adds to sums (64) what all summands from FIRST on look up in one stretch.
template <class V, int TERMS, int FIRST = 0, int PART = 0>
void add_parts(const StretchCodes& stretch, const Pass& pass, const uint8_t* tables, const int32_t* shares, float scale,
               float* sums) {
    if constexpr (FIRST < SUMMANDS[TERMS - 1]) {
        add_part<V, TERMS, FIRST, PART>(stretch, pass, tables, shares, scale, sums);
        constexpr bool LAST = V::lanes * (PART + 1) == LANES;
        add_parts<V, TERMS, LAST ? FIRST + BATCH : FIRST, LAST ? 0 : PART + 1>(stretch, pass, tables, shares, scale,
                                                                              sums);
    }
}

// y (64 blocks) of each token += what a pass with a trellis adds to the rows of some blocks of a tile.
template <class V, int TERMS>
void add_terms(const Prepared& prepared, const Pass& pass, const Tables* tables, int64_t tokens, int64_t tile,
               int64_t first, int64_t blocks, float (*y)[TILE_ROWS]) {
    alignas(64) float sums[MOST_TOKENS][TILE_ROWS];
    for (int64_t token = 0; token < tokens; ++token) {
        std::fill_n(sums[token], LANES * blocks, 0.0f);
    }
    float exact = 0.0f, averaged = 0.0f;  // coefficients
    for (int s = 0; s < SUMMANDS[TERMS - 1]; ++s) {
        (is_averaged(s) ? averaged : exact) += pass.coefficients[s];
    }
    for (int number = 0; number < stretches_of(pass); ++number) {
        for (int64_t block = 0; block < blocks; ++block) {
            const StretchCodes stretch(prepared, pass, tile, first + block, number, blocks);
            for (int64_t token = 0; token < tokens; ++token) {
                const Tables& own = tables[token];
                const float zero = exact * own.zeros[number] + averaged * own.averaged_zeros[number];
                float* const to = sums[token] + LANES * block;
                for (int r = 0; r < LANES; ++r) {
                    to[r] -= zero;
                }
                add_parts<V, TERMS>(stretch, pass, own.entries + 32 * int64_t{STRETCH_BYTES} * number,
                                    own.shares + STRETCH * number, own.scales[number], to);
            }
        }
    }
    for (int64_t block = 0; block < blocks; ++block) {
        const float* factors = prepared.factors_of(tile, first + block, pass);
        for (int64_t token = 0; token < tokens; ++token) {
            const float *even = sums[token] + LANES * block, *odd = even + LANES / 2;
            float* to = y[token] + LANES * block;
            for (int i = 0; i < LANES / 2; ++i) {
                to[2 * i] += factors[i] * even[i];
                to[2 * i + 1] += factors[LANES / 2 + i] * odd[i];
            }
        }
    }
}

template <class V>
void add_trellis(const Prepared& prepared, const Pass& pass, const Tables* tables, int64_t tokens, int64_t tile,
                 int64_t first, int64_t blocks, float (*y)[TILE_ROWS]) {
    auto* const chosen = pass.planes == 1   ? add_terms<V, 1>
                         : pass.planes == 2 ? add_terms<V, 2>
                         : pass.planes == 3 ? add_terms<V, 3>
                                            : add_terms<V, 4>;
    chosen(prepared, pass, tables, tokens, tile, first, blocks, y);
}

}  // namespace
}  // namespace arbllm
