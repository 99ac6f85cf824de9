#include "prepare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "bfloat16.h"
#include "memory.h"
#include "parallel.h"

namespace arbllm {

namespace {

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The passes of a matrix, and what belongs to each.
struct Plan {
    Header header{};
    std::vector<Pass> passes;
    std::vector<const Place*> places;  // of each pass
    std::vector<int> terms;  // of each pass: 0 or 1
    std::vector<const Place*> dense;
};

int per_nibble(const Place& place) { return place.groups == 1 ? 4 : place.groups == 2 ? 2 : 1; }

int64_t pass_bytes(const Place& place) {
    const int64_t columns = 2 * per_nibble(place);
    return (place.width + columns - 1) / columns;
}

// Whether a row's scales and codes take no less memory than its weights as floats.
bool is_narrow(const Place& place, bool means) {
    const int64_t factors = place.slots() + (means ? place.groups : 0);
    return place.terms * pass_bytes(place) + 4 * factors >= 4 * place.width;
}

// Where a product of signs stands among those that the kernels know.
ptrdiff_t place_of(int32_t mask, int terms) {
    const int* const masks = MASKS[terms - 1];
    const int* const found = std::find(masks, masks + SUMMANDS[terms - 1], mask);
    if (found == masks + SUMMANDS[terms - 1]) {
        throw std::invalid_argument("the kernels do not know levels with such a product of signs");
    }
    return found - masks;
}

// Between 1/2 and 1, since bfloat16 has as many numbers between any two powers of 2.
void find_half_unit(Pass& pass, int count) {
    constexpr int TRIED = 64;
    float least = std::numeric_limits<float>::infinity();
    for (int i = 0; i < TRIED; ++i) {
        const float unit = 1.0f - 0.5f * static_cast<float>(i) / TRIED;
        float error = 0.0f;
        for (int number = 0; number < count; ++number) {
            const float lost = pass.levels[number] - unit * widened(narrowed(pass.levels[number] / unit));
            error += lost * lost;
        }
        if (error < least) {
            least = error;
            pass.half_unit = unit;
        }
    }
}

// The levels of weights with a trellis, and bytes for them. The largest level need not be 127: from 95 on, that is chosen
// which leaves all levels nearest to whole numbers.
void find_levels(Pass& pass) {
    const int count = 2 << pass.planes;
    float largest = 0.0f;
    for (int number = 0; number < count; ++number) {
        for (int s = 0; s < SUMMANDS[pass.planes - 1]; ++s) {
            const bool positive = __builtin_parity(number & MASKS[pass.planes - 1][s]);
            pass.levels[number] += positive ? pass.coefficients[s] : -pass.coefficients[s];
        }
        largest = std::max(largest, std::fabs(pass.levels[number]));
    }
    float least = std::numeric_limits<float>::infinity();
    for (float most = 127.0f; most > 95.0f; most -= 0.25f) {
        float error = 0.0f;
        for (int number = 0; number < count; ++number) {
            const float scaled = pass.levels[number] * most / largest;
            error += (scaled - std::nearbyint(scaled)) * (scaled - std::nearbyint(scaled)) / (most * most);
        }
        if (error < least) {
            least = error;
            pass.level_unit = largest / most;
        }
    }
    for (int number = 0; number < count; ++number) {
        pass.level_bytes[number] = static_cast<int8_t>(std::nearbyint(pass.levels[number] / pass.level_unit));
    }
    find_half_unit(pass, count);
}

Plan planned(const Packed& packed) {
    Plan plan;
    Header& header = plan.header;
    int64_t column = 0, column_factors = 0;
    for (const Place& place : packed.places) {
        if (is_narrow(place, packed.row_means)) {
            plan.dense.push_back(&place);
            header.dense += place.width;
            continue;
        }
        for (int term = 0; term < (place.trellis ? 1 : place.terms); ++term) {
            Pass pass{};
            pass.column = static_cast<int32_t>(column);
            pass.width = static_cast<int32_t>(place.width);
            pass.per_nibble = per_nibble(place);
            pass.bytes = static_cast<int32_t>(pass_bytes(place));
            pass.planes = 1;
            if (place.trellis) {
                const auto& level = packed.levels.at(place.terms - 1);
                pass.planes = static_cast<int32_t>(place.terms);
                pass.trellis = 1;
                for (const Summand& summand : level) {
                    pass.coefficients[place_of(summand.mask, pass.planes)] = summand.coefficient;
                }
                find_levels(pass);
            }
            pass.signed_sums = static_cast<int32_t>(place.groups);
            pass.accumulators = static_cast<int32_t>(place.groups * (packed.row_means && term == 0 ? 2 : 1));
            pass.codes_before = static_cast<int32_t>(header.lane_bytes);
            pass.factors_before = static_cast<int32_t>(header.row_factors);
            pass.column_factors = column_factors;
            header.lane_bytes += pass.planes * pass.bytes;
            header.row_factors += pass.accumulators;
            column_factors += place.groups * place.width;
            plan.passes.push_back(pass);
            plan.places.push_back(&place);
            plan.terms.push_back(term);
        }
        column += place.width;
    }
    const int64_t lanes = (packed.rows + LANES - 1) / LANES * LANES;
    header.magic = MAGIC;
    header.rows = packed.rows;
    header.columns = packed.columns;
    header.passes = static_cast<int64_t>(plan.passes.size());
    header.dense_column = column;
    header.order_at = rounded(sizeof(Header) + plan.passes.size() * sizeof(Pass));
    header.column_factors_at = header.order_at + rounded(4 * packed.columns);
    header.row_factors_at = header.column_factors_at + rounded(4 * column_factors);
    header.dense_at = header.row_factors_at + 4 * lanes * header.row_factors;
    header.codes_at = header.dense_at + 4 * lanes * header.dense;
    header.bytes = header.codes_at + lanes * header.lane_bytes;
    return plan;
}

float column_scale(const Packed& packed, const Place& place, int64_t group, int term, int64_t j) {
    const int64_t slot = place.trellis ? 0 : group * place.terms + term;
    return packed.column_scales ? packed.column_scales[place.column_scale + slot * place.width + j] : 1.0f;
}

int group_of(const Packed& packed, const Place& place, int64_t row, int64_t j) {
    int group = place.groups >= 2 ? packed.low.bit(row, place.low + j) : 0;
    return place.groups == 4 ? group + 2 * packed.high.bit(row, place.high + j) : group;
}

int sign_of(const Packed& packed, const Place& place, int term, int64_t row, int64_t j) {
    switch (term) {
        case 0: return packed.signs.bit(row, place.column + j);
        case 1: return packed.second.bit(row, place.second + j);
        case 2: return packed.third.bit(row, place.third + j);
        default: return packed.fourth.bit(row, place.fourth + j);
    }
}

// A weight in a trellis without its scales.
float level(const Packed& packed, const Place& place, int64_t row, int64_t j) {
    const auto above = [&](int64_t lag) { return lag <= row ? sign_of(packed, place, 0, row - lag, j) : 0; };
    int bits = 0, terms = static_cast<int>(place.terms);
    for (int term = 1; term < terms; ++term) {
        bits |= sign_of(packed, place, term, row, j) << (term - 1);
    }
    bits |= (above(0) ^ above(LAGS[0]) ^ above(LAGS[1])) << (terms - 1) | above(LAG) << terms;
    float sum = 0.0f;
    for (const Summand& summand : packed.levels.at(place.terms - 1)) {
        sum += __builtin_parity(bits & summand.mask) ? summand.coefficient : -summand.coefficient;
    }
    return sum;
}

float weight(const Packed& packed, const Place& place, int64_t row, int64_t j) {
    const int group = group_of(packed, place, row, j);
    const float* scales = packed.row_scales + row * packed.row_scale_slots + place.row_scale;
    if (place.trellis) {
        return level(packed, place, row, j) * scales[0] * column_scale(packed, place, 0, 0, j);
    }
    float value = 0.0f;
    for (int term = 0; term < place.terms; ++term) {
        const float size = scales[group * place.terms + term] * column_scale(packed, place, group, term, j);
        value += sign_of(packed, place, term, row, j) ? size : -size;
    }
    const float* means = packed.row_means ? packed.row_means + row * packed.row_mean_slots : nullptr;
    return means ? value + means[place.row_mean + group] : value;
}

// The four bits of columns j and following: see lookup.h.
int nibble(const Packed& packed, const Place& place, int term, int per, int64_t row, int64_t j) {
    int bits = 0;
    for (int c = 0; c < per && j + c < place.width; ++c) {
        bits |= sign_of(packed, place, term, row, j + c) << c;
        bits |= per == 4 ? 0 : group_of(packed, place, row, j + c) << (per == 2 ? 2 + c : 1);
    }
    return bits;
}

// A pass with a trellis: eight signs of a plane to a byte, rows in order, planes of a byte beside each other.
void write_trellis(const Packed& packed, const Plan& plan, size_t p, int64_t tile, int64_t block, const Prepared& to) {
    const Pass& pass = plan.passes[p];
    const Place& place = *plan.places[p];
    auto* factors = const_cast<float*>(to.factors_of(tile, block, pass));
    for (int r = 0; r < LANES; ++r) {
        const int64_t row = LANES * (tile * TILE_BLOCKS + block) + r;
        if (row >= packed.rows) {
            break;
        }
        factors[LANES / 2 * (r % 2) + r / 2] = packed.row_scales[row * packed.row_scale_slots + place.row_scale];
        for (int64_t j = 0; j < place.width; ++j) {
            const auto* stretch = to.stretch_of(tile, block, pass, static_cast<int>(j / 8 / STRETCH_BYTES));
            auto* codes = const_cast<uint8_t*>(stretch) + LANES * pass.planes * (j / 8 % STRETCH_BYTES);
            for (int term = 0; term < pass.planes; ++term) {
                codes[LANES * term + r] |=
                    static_cast<uint8_t>(sign_of(packed, place, term, row, j) << (j % 8));
            }
        }
    }
}

void write_pass(const Packed& packed, const Plan& plan, size_t p, int64_t tile, int64_t block, const Prepared& to) {
    const Pass& pass = plan.passes[p];
    const Place& place = *plan.places[p];
    const int term = plan.terms[p], per = pass.per_nibble;
    auto* codes = const_cast<uint8_t*>(to.codes_of(tile, block, pass));
    auto* factors = const_cast<float*>(to.factors_of(tile, block, pass));
    for (int r = 0; r < LANES; ++r) {
        const int64_t row = LANES * (tile * TILE_BLOCKS + block) + r;
        if (row >= packed.rows) {
            break;  // what is left stays 0
        }
        for (int a = 0; a < pass.accumulators; ++a) {
            const int64_t slot = place.row_scale + a * place.terms + term;
            factors[LANES * a + r] = a < pass.signed_sums
                                         ? packed.row_scales[row * packed.row_scale_slots + slot]
                                         : packed.row_means[row * packed.row_mean_slots + place.row_mean + a - pass.signed_sums];
        }
        const int lane = 2 * (r % (LANES / 2)) + r / (LANES / 2);
        for (int b = 0; b < pass.bytes; ++b) {
            const int low = nibble(packed, place, term, per, row, int64_t{2 * b} * per);
            const int high = nibble(packed, place, term, per, row, int64_t{2 * b + 1} * per);
            codes[LANES * b + lane] = static_cast<uint8_t>(low | high << 4);
        }
    }
}

void write_dense(const Packed& packed, const Plan& plan, int64_t tile, int64_t block, const Prepared& to) {
    auto* dense = const_cast<float*>(to.dense_of(tile, block));
    for (const Place* place : plan.dense) {
        for (int64_t j = 0; j < place->width; ++j, dense += LANES) {
            for (int r = 0; r < LANES; ++r) {
                const int64_t row = LANES * (tile * TILE_BLOCKS + block) + r;
                dense[r] = row < packed.rows ? weight(packed, *place, row, j) : 0.0f;
            }
        }
    }
}

void write_columns(const Packed& packed, const Plan& plan, const Prepared& to) {
    auto* order = const_cast<int32_t*>(to.order);
    const auto list = [&](const Place& place) {
        for (int64_t j = place.column; j < place.column + place.width; ++j) {
            *order++ = static_cast<int32_t>(packed.order ? packed.order[j] : j);
        }
    };
    for (const Place& place : packed.places) {
        if (!is_narrow(place, packed.row_means)) {
            list(place);
        }
    }
    for (const Place* place : plan.dense) {
        list(*place);
    }
    auto* factors = const_cast<float*>(to.column_factors);
    for (size_t p = 0; p < plan.passes.size(); ++p) {
        const Place& place = *plan.places[p];
        for (int64_t group = 0; group < place.groups; ++group) {
            for (int64_t j = 0; j < place.width; ++j) {
                *factors++ = column_scale(packed, place, group, plan.terms[p], j);
            }
        }
    }
}

struct Writing {
    const Packed& packed;
    const Plan& plan;
    const Prepared& to;
    Claims blocks;

    static void run(void* argument) {
        auto& job = *static_cast<Writing*>(argument);
        for (int64_t i; (i = job.blocks.next()) >= 0;) {
            const int64_t tile = i / TILE_BLOCKS, block = i % TILE_BLOCKS;
            for (size_t p = 0; p < job.plan.passes.size(); ++p) {
                auto* const write = job.plan.passes[p].trellis ? write_trellis : write_pass;
                write(job.packed, job.plan, p, tile, block, job.to);
            }
            write_dense(job.packed, job.plan, tile, block, job.to);
        }
    }
};

}  // namespace

int64_t prepared_bytes(const Packed& packed) { return planned(packed).header.bytes; }

void prepare(const Packed& packed, uint8_t* to, int threads) {
    const Plan plan = planned(packed);
    ask_for_large_pages(to, plan.header.bytes);
    std::memset(to, 0, plan.header.bytes);
    std::memcpy(to, &plan.header, sizeof(Header));
    if (!plan.passes.empty()) {
        std::memcpy(to + sizeof(Header), plan.passes.data(), plan.passes.size() * sizeof(Pass));
    }
    const Prepared prepared(to);
    write_columns(packed, plan, prepared);
    Writing job{packed, plan, prepared, Claims(prepared.blocks())};
    in_parallel(threads, &Writing::run, &job);
}

}  // namespace arbllm
