// The tables that look-ups read: lookup.h says what they hold.
//
// In an anonymous namespace as lookup_kernel.h, which includes this.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "lookup.h"
#include "own_vector.h"

namespace arbllm {
namespace {

constexpr int ZERO = 128;  // table entries are unsigned: this stands for 0
constexpr float LARGEST = 127.0f;
constexpr float SMALLEST = 1e-30f;  // inputs no larger count as 0: what they would be multiplied by must stay finite
constexpr int FINE = 7;  // bits that entries have beyond the point before they are rounded
constexpr int SHARE = 32767;  // the greatest share of a block
constexpr int BLOCK_NIBBLES = 2 * BLOCK_BYTES;
constexpr int STRETCH_NIBBLES = STRETCH * BLOCK_NIBBLES;

// What an entry's index says of the columns of four bits: [kind of accumulator][column][index] -> -1, 0 or 1. Kinds are
// the groups of signs, then the groups of means.
typedef uint16_t Entries __attribute__((vector_size(32)));
typedef uint8_t EntryBytes __attribute__((vector_size(16)));

struct Patterns {
    Entries of[MOST_ACCUMULATORS][4];

    Patterns(int per, int groups) {
        for (int a = 0; a < 2 * groups; ++a) {
            for (int c = 0; c < per; ++c) {
                for (int i = 0; i < 16; ++i) {
                    const int own = per == 4 ? 0 : per == 2 ? i >> (2 + c) & 1 : i >> 1 & 3;
                    const int sign = a >= groups || i >> c & 1 ? 1 : -1;
                    of[a][c][i] = static_cast<uint16_t>(own == a % groups ? sign : 0);
                }
            }
        }
    }
};

// The tables of one pass, for one token.
struct Tables {
    const uint8_t* entries;  // [nibble][accumulator][16]
    const float* scales;  // [stretch][accumulator]
    const float* zeros;  // likewise: the sum of look-ups where every entry stands for 0
    const float* averaged_zeros;  // likewise, of look-ups averaged in pairs, with what averages are rounded up by
    const int32_t* shares;  // [block][accumulator]: of the scale of its stretch
};

struct Stretch {
    int pass, number;
};

OwnVector<Stretch> stretches_of(const Prepared& prepared) {
    OwnVector<Stretch> all;
    for (int p = 0; p < prepared.header->passes; ++p) {
        for (int number = 0; number < stretches_of(prepared.passes[p]); ++number) {
            all.push_back({p, number});
        }
    }
    return all;
}

// Where in a token's work space the tables of each pass are.
class Space {
  public:
    explicit Space(const Prepared& prepared) {
        int64_t bytes = 0, numbers = 0;
        for (int64_t p = 0; p < prepared.header->passes; ++p) {
            const Pass& pass = prepared.passes[p];
            entries_.push_back(bytes);
            numbers_.push_back(numbers);
            bytes += 2 * int64_t{pass.bytes} * pass.accumulators * 16;
            numbers += (blocks_of(pass) + 3 * stretches_of(pass)) * int64_t{pass.accumulators};
        }
        entry_bytes_ = bytes;
        bytes_ = bytes + 64 * ((4 * numbers + 63) / 64);
    }

    int64_t bytes() const { return bytes_; }

    Tables tables(uint8_t* space, const Prepared& prepared, int64_t p) const {
        const Pass& pass = prepared.passes[p];
        const float* scales = reinterpret_cast<const float*>(space + entry_bytes_) + numbers_[p];
        const int64_t count = stretches_of(pass) * pass.accumulators;
        const auto* shares = reinterpret_cast<const int32_t*>(scales + 3 * count);
        return {space + entries_[p], scales, scales + count, scales + 2 * count, shares};
    }

  private:
    OwnVector<int64_t> entries_, numbers_;
    int64_t entry_bytes_, bytes_;
};

int share_of(int number, int share) { return (number * share + (1 << 14)) >> 15; }

int odd_entries(EntryBytes entries) {
    uint64_t words[2];
    std::memcpy(words, &entries, 16);
    constexpr uint64_t LOWEST = 0x0101010101010101;
    return __builtin_popcountll(words[0] & LOWEST) + __builtin_popcountll(words[1] & LOWEST);
}

// By how much averages of one entry each of two tables, rounded up, exceed the true ones: their mean over all entries, a
// half where the sum is odd.
float excess_of(int odd, int other_odd) {
    return static_cast<float>(odd * (16 - other_odd) + other_odd * (16 - odd)) * (0.5f / 256);
}

// The tables of one accumulator and stretch, from what its columns are multiplied by, 0 beyond the last one.
template <int PER>
void build_accumulator(const Pass& pass, int stretch, int a, const float* values, const Tables& tables) {
    static const Patterns patterns(PER, PER == 4 ? 1 : PER == 2 ? 2 : 4);
    const int count = pass.accumulators, first = STRETCH * stretch;
    const int nibbles = std::min(STRETCH_NIBBLES, 2 * pass.bytes - BLOCK_NIBBLES * first);
    const int blocks = (nibbles + BLOCK_NIBBLES - 1) / BLOCK_NIBBLES;
    auto* entries = const_cast<uint8_t*>(tables.entries) + 16 * (int64_t{count} * BLOCK_NIBBLES * first + a);
    auto* shares = const_cast<int32_t*>(tables.shares) + count * first + a;
    const auto& pattern = patterns.of[a];
    float largest[STRETCH] = {}, most = 0.0f, total = 0.0f;
    for (int block = 0; block < blocks; ++block) {
        const int end = std::min(BLOCK_NIBBLES * (block + 1), nibbles);
        for (int n = BLOCK_NIBBLES * block; n < end; ++n) {
            float sum = 0.0f;
            for (int c = 0; c < PER; ++c) {
                sum += std::fabs(values[PER * n + c]);
            }
            largest[block] = std::max(largest[block], sum);
            total += sum;
        }
        most = std::max(most, largest[block]);
    }
    float& scale = const_cast<float*>(tables.scales)[stretch * count + a];
    float& offset = const_cast<float*>(tables.zeros)[stretch * count + a];
    float& averaged_offset = const_cast<float*>(tables.averaged_zeros)[stretch * count + a];
    if (!std::isfinite(total)) {  // tables cannot say so, but all that they are for is not a number
        for (int block = 0; block < blocks; ++block) {
            shares[block * count] = 0;
        }
        scale = offset = averaged_offset = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    int zero = 0, averaged_zero = 0;
    float excess = 0.0f;
    for (int block = 0; block < blocks; ++block) {
        const float own = largest[block], inverse = own > SMALLEST ? LARGEST * (1 << FINE) / own : 0.0f;
        const int share = most > 0.0f ? static_cast<int>(std::ceil(own / most * SHARE)) : 0;
        const int begin = BLOCK_NIBBLES * block, inside = std::min(BLOCK_NIBBLES, nibbles - begin);
        // The share is a whole number, so the scale of the block is that which it makes exact.
        const float exact = share ? inverse * (own / most * SHARE) / static_cast<float>(share) : 0.0f;
        shares[block * count] = share;
        zero += share_of(2 * ZERO * inside, share);
        averaged_zero += share_of(ZERO * inside / 2, share);
        int16_t fine[PER * BLOCK_NIBBLES];
        for (int i = 0; i < PER * inside; ++i) {
            fine[i] = static_cast<int16_t>(static_cast<int32_t>(std::nearbyint(values[PER * begin + i] * exact)));
        }
        int odd[BLOCK_NIBBLES];
        for (int n = 0; n < inside; ++n) {
            Entries sums = Entries{} + static_cast<uint16_t>((ZERO << FINE) + (1 << (FINE - 1)));
            for (int c = 0; c < PER; ++c) {
                sums += pattern[c] * static_cast<uint16_t>(fine[PER * n + c]);
            }
            const EntryBytes rounded = __builtin_convertvector(sums >> FINE, EntryBytes);
            std::memcpy(entries + 16 * count * (begin + n), &rounded, 16);
            odd[n] = odd_entries(rounded);
        }
        for (int n = 0; n < inside; n += 2) {
            excess += excess_of(odd[n], odd[n + 1]) * static_cast<float>(share) / (1 << 15);
        }
    }
    scale = most / LARGEST * (static_cast<float>(1 << 14) / SHARE);
    offset = scale * static_cast<float>(zero);
    // In units of doubled sums, as the other: averages are halves of sums, and are not doubled.
    averaged_offset = 4.0f * scale * (static_cast<float>(averaged_zero) + excess);
}

// The tables of one stretch of a pass; x are the inputs of the whole pass.
void build_tables(const Prepared& prepared, const Pass& pass, int stretch, const float* x, const Tables& tables) {
    const int per = pass.per_nibble, first = per * STRETCH_NIBBLES * stretch;
    const int width = std::min(per * STRETCH_NIBBLES, pass.width - first);
    float values[4 * STRETCH_NIBBLES] = {};
    for (int a = 0; a < pass.accumulators; ++a) {
        if (a < pass.signed_sums) {
            const float* factors = prepared.column_factors + pass.column_factors + int64_t{a} * pass.width + first;
            std::transform(x + first, x + first + width, factors, values, std::multiplies<float>());
        } else {
            std::copy(x + first, x + first + width, values);
        }
        (per == 4   ? build_accumulator<4>
         : per == 2 ? build_accumulator<2>
                    : build_accumulator<1>)(pass, stretch, a, values, tables);
    }
}

}  // namespace
}  // namespace arbllm
