// Passes of columns with groups: their look-ups, for one token.
//
// In an anonymous namespace as lookup_kernel.h, which includes this and names what V must have.
#pragma once

#include <algorithm>

#include "lookup.h"
#include "lookup_tables.h"

namespace arbllm {
namespace {

// Sums of what the codes of V::together vectors look up in K of COUNT tables: of all bytes, seen as numbers of 16 bits,
// and of the upper ones, which tell the lower ones' sums from the former.
template <class V, int COUNT>
struct Sums {
    static constexpr int K = COUNT < 2 ? 1 : 2, G = V::together;
    typename V::Bytes all[K][G], odd[K][G];

    Sums() {
        for (int k = 0; k < K; ++k) {
            for (int g = 0; g < G; ++g) {
                all[k][g] = odd[k][g] = V::zero();
            }
        }
    }

    // One byte of codes, so the tables of two nibbles.
    void add(const uint8_t* codes, const uint8_t* tables) {
        typename V::Bytes code[G];
        for (int g = 0; g < G; ++g) {
            code[g] = V::load(codes + V::lanes * g);
        }
        for (int half = 0; half < 2; ++half) {
            typename V::Bytes index[G];
            for (int g = 0; g < G; ++g) {
                index[g] = half ? V::high(code[g]) : V::low(code[g]);
            }
            for (int k = 0; k < K; ++k) {
                const auto table = V::table(tables + 16 * (COUNT * half + k));
                for (int g = 0; g < G; ++g) {
                    const auto found = V::lookup(table, index[g]);
                    all[k][g] = V::add16(all[k][g], found);
                    odd[k][g] = V::add16(odd[k][g], V::down8(found));
                }
            }
        }
    }
};

// Adds to sums (K, 64) what one stretch of codes looks up in K of COUNT neighbouring tables.
template <class V, int COUNT>
void add_stretch(const uint8_t* codes, const uint8_t* tables, int bytes, const int32_t* shares, const float* scales,
                 float* sums) {
    constexpr int K = Sums<V, COUNT>::K, G = Sums<V, COUNT>::G, STRIDE = 32 * COUNT;
    for (int lane = 0; lane < LANES; lane += V::lanes * G) {
        typename V::Bytes totals[K][G][2];
        for (int i = 0; i < K * G; ++i) {
            totals[i / G][i % G][0] = totals[i / G][i % G][1] = V::zero();
        }
        for (int first = 0; first < bytes; first += BLOCK_BYTES) {
            const uint8_t* code = codes + LANES * first + lane;
            const uint8_t* table = tables + int64_t{STRIDE} * first;
            Sums<V, COUNT> found;
            if (first + BLOCK_BYTES <= bytes) {
#pragma GCC unroll 8
                for (int b = 0; b < BLOCK_BYTES; ++b) {
                    __builtin_prefetch(code + LANES * (b + AHEAD), 0, 2);
                    found.add(code + LANES * b, table + STRIDE * b);
                }
            } else {
                for (int b = 0; b < bytes - first; ++b) {
                    found.add(code + LANES * b, table + STRIDE * b);
                }
            }
            for (int k = 0; k < K; ++k) {
                const int share = shares[first / BLOCK_BYTES * COUNT + k];
                for (int g = 0; g < G; ++g) {
                    const auto odd = found.odd[k][g], even = V::sub16(found.all[k][g], V::up8(odd));
                    totals[k][g][0] = V::add16(totals[k][g][0], V::share16(V::add16(even, even), share));
                    totals[k][g][1] = V::add16(totals[k][g][1], V::share16(V::add16(odd, odd), share));
                }
            }
        }
        for (int k = 0; k < K; ++k) {
            for (int g = 0; g < G; ++g) {
                for (int half = 0; half < 2; ++half) {
                    float* to = sums + LANES * k + LANES / 2 * half + (lane + V::lanes * g) / 2;
                    V::add_scaled(to, totals[k][g][half], scales[k]);
                }
            }
        }
    }
}

// y (64) += what one pass with COUNT accumulators adds to the rows of one block.
template <class V, int COUNT>
void add_accumulators(const Prepared& prepared, const Pass& pass, const Tables& tables, int64_t tile, int64_t block,
                      float* y) {
    constexpr int K = Sums<V, COUNT>::K;
    const uint8_t* codes = prepared.codes_of(tile, block, pass);
    const float* factors = prepared.factors_of(tile, block, pass);
    for (int a = 0; a < COUNT; a += K) {
        alignas(64) float sums[K * LANES] = {};
        for (int stretch = 0; stretch < stretches_of(pass); ++stretch) {
            const int first = STRETCH_BYTES * stretch, at = stretch * COUNT + a;
            for (int k = 0; k < K; ++k) {
                const float zero = tables.zeros[at + k];
                for (int r = 0; r < LANES; ++r) {
                    sums[LANES * k + r] -= zero;
                }
            }
            add_stretch<V, COUNT>(codes + LANES * first, tables.entries + 16 * (int64_t{2 * COUNT} * first + a),
                                  std::min(STRETCH_BYTES, pass.bytes - first),
                                  tables.shares + STRETCH * stretch * COUNT + a, tables.scales + at, sums);
        }
        for (int k = 0; k < K; ++k) {
            for (int r = 0; r < LANES; ++r) {
                y[r] += factors[LANES * (a + k) + r] * sums[LANES * k + r];
            }
        }
    }
}

template <class V>
void add_pass(const Prepared& prepared, const Pass& pass, const Tables& tables, int64_t tile, int64_t block, float* y) {
    auto* const chosen = pass.accumulators == 1   ? add_accumulators<V, 1>
                         : pass.accumulators == 2 ? add_accumulators<V, 2>
                         : pass.accumulators == 4 ? add_accumulators<V, 4>
                                                  : add_accumulators<V, 8>;
    chosen(prepared, pass, tables, tile, block, y);
}

}  // namespace
}  // namespace arbllm
