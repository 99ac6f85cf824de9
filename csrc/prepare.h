// The layout step at load: from the packed tensors of docs/format.md to the array that lookup.h describes.
#pragma once

#include <cstdint>
#include <vector>

#include "lookup.h"

namespace arbllm {

// Where a segment begins, as arbllm.format.layout.Place has it.
struct Place {
    int64_t width, groups, terms, trellis;
    int64_t column, row_scale, row_mean, column_scale, low, high, second, third, fourth;

    int64_t slots() const { return trellis ? 1 : groups * terms; }
};

// One summand of the levels of a trellis: see MASKS in lookup.h.
struct Summand {
    int32_t mask;
    float coefficient;
};

// Rows of bits, `bytes` bytes apart, lowest bits first; no data where the matrix has none.
struct Plane {
    const uint8_t* data = nullptr;
    int64_t bytes = 0;

    int bit(int64_t row, int64_t column) const { return data[row * bytes + column / 8] >> (column % 8) & 1; }
};

// A packed matrix with its scales as numbers.
struct Packed {
    int64_t rows, columns;
    std::vector<Place> places;
    Plane signs, low, high, second, third, fourth;
    const float* row_scales;  // (rows, row_scale_slots)
    int64_t row_scale_slots;
    const float* row_means;  // (rows, row_mean_slots), or null
    int64_t row_mean_slots;
    const float* column_scales;  // flat, or null
    std::vector<std::vector<Summand>> levels;  // of weights of 1, 2, ... stored signs in a trellis
    const int64_t* order;  // the natural column of each stored one, or null where they are the same
};

// Bytes that prepare will write.
int64_t prepared_bytes(const Packed& packed);

// Writes the array; `to` is aligned to 64 bytes.
void prepare(const Packed& packed, uint8_t* to, int threads);

}  // namespace arbllm
