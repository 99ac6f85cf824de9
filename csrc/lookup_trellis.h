// The planes of bits of a pass with a trellis (arbllm/binarize/code.py): stored signs, and what follows from them.
//
// In an anonymous namespace as lookup_kernel.h, which includes this.
#pragma once

#include <algorithm>

#include "lookup.h"

namespace arbllm {
namespace {

// A quarter of a block's rows in one byte of a plane, wherever it lies.
typedef uint64_t Quarter __attribute__((vector_size(LANES / 4), aligned(8), may_alias));

// Planes of bits of a few columns of a pass with a trellis, put together in the cache: [byte][row].
class Planes {
  public:
    static constexpr int BYTES = 64;

    // Bytes [first, first + bytes) of each plane.
    Planes(const Prepared& prepared, const Pass& pass, int64_t tile, int64_t block, int first, int bytes)
        : bytes_(bytes) {
        const uint8_t* codes = prepared.codes_of(tile, block, pass) + LANES * first;
        for (int plane = 1; plane < pass.planes; ++plane) {
            planes_[plane - 1] = codes + int64_t{LANES} * plane * pass.bytes;
        }
        planes_[pass.planes - 1] = z1_;
        planes_[pass.planes] = z0_;
        static const uint8_t nothing[LANES] = {};
        const int64_t before = tile * TILE_BLOCKS + block - 1;
        const int step = before < 0 ? 0 : LANES;
        const uint8_t* above = nothing;
        if (step) {
            above = prepared.codes_of(before / TILE_BLOCKS, before % TILE_BLOCKS, pass) + LANES * first;
        }
        for (int b = 0; b < bytes; ++b) {
            derive(codes + LANES * b, above + step * b, z1_ + LANES * b, z0_ + LANES * b);
        }
    }

    Planes(const Planes&) = delete;

    const uint8_t* plane(int number) const { return planes_[number]; }

    // The bits of a sign, or of a product of three.
    const uint8_t* product(int mask) {
        const uint8_t* first = planes_[__builtin_ctz(mask)];
        const int rest = mask & (mask - 1);
        if (!rest) {
            return first;
        }
        const uint8_t *second = planes_[__builtin_ctz(rest)], *third = planes_[__builtin_ctz(rest & (rest - 1))];
        for (int place = 0; place < LANES * bytes_; place += LANES / 4) {
            at(product_ + place) = at(first + place) ^ at(second + place) ^ at(third + place);
        }
        return product_;
    }

  private:
    static Quarter at(const uint8_t* rows) { return *reinterpret_cast<const Quarter*>(rows); }
    static Quarter& at(uint8_t* rows) { return *reinterpret_cast<Quarter*>(rows); }

    // From first signs of a block and of the block above, with z1 from 16 and 40 rows above, z0 from 24 rows above.
    static void derive(const uint8_t* now, const uint8_t* above, uint8_t* z1, uint8_t* z0) {
        const Quarter last = at(above + 40), across = {at(above + 48)[1], at(now)[0]}, later = at(now + 8);
        at(z1) = at(now) ^ at(above + 48) ^ at(above + 24);
        at(z1 + 16) = at(now + 16) ^ at(now) ^ last;
        at(z1 + 32) = at(now + 32) ^ at(now + 16) ^ across;
        at(z1 + 48) = at(now + 48) ^ at(now + 32) ^ later;
        at(z0) = last;
        at(z0 + 16) = across;
        at(z0 + 32) = later;
        at(z0 + 48) = at(now + 24);
    }

    const int bytes_;
    const uint8_t* planes_[5];
    alignas(64) uint8_t z1_[LANES * BYTES], z0_[LANES * BYTES], product_[LANES * BYTES];
};

// Adds one pass with a trellis.
void unpack_trellis(const Prepared& prepared, const Pass& pass, int64_t tile, int64_t block, float* to,
                    int64_t stride) {
    float levels[32];
    for (int number = 0; number < 2 << pass.planes; ++number) {  // bit t of a number: plane t
        levels[number] = 0.0f;
        for (int s = 0; s < pass.summands; ++s) {
            const bool positive = __builtin_parity(number & pass.masks[s]);
            levels[number] += positive ? pass.coefficients[s] : -pass.coefficients[s];
        }
    }
    const float* column_factors = prepared.column_factors + pass.column_factors;
    float scales[LANES];
    for (int r = 0; r < LANES; ++r) {
        scales[r] = prepared.factors_of(tile, block, pass)[LANES / 2 * (r % 2) + r / 2];
    }
    for (int first = 0; first < pass.bytes; first += Planes::BYTES) {
        const int bytes = std::min(Planes::BYTES, pass.bytes - first);
        const Planes planes(prepared, pass, tile, block, first, bytes);
        for (int j = 8 * first; j < std::min(8 * (first + bytes), pass.width); ++j) {
            const int64_t at = LANES * (j / 8 - first);
            int32_t numbers[LANES] = {};
            for (int plane = 0; plane <= pass.planes; ++plane) {
                const uint8_t* bits = planes.plane(plane) + at;
                for (int r = 0; r < LANES; ++r) {
                    numbers[r] |= (bits[r] >> (j % 8) & 1) << plane;
                }
            }
            float* row = to + j * stride;
            for (int r = 0; r < LANES; ++r) {
                row[r] = scales[r] * column_factors[j] * levels[numbers[r]];
            }
        }
    }
}

}  // namespace
}  // namespace arbllm
