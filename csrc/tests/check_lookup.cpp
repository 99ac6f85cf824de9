// Every kernel that this processor runs, against sums taken weight by weight. For sanitizers, and for processors that
// an emulator stands in for: see `make sanitize` and `make test-arm`.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "../bfloat16.h"
#include "../prepare.h"
#include "../processor.h"
#include "checks.h"

using namespace arbllm;

namespace {

constexpr double LARGEST_ERROR = 0.012;  // of the output, with normally distributed inputs
constexpr int TOKENS[] = {1, 3, 16, 63, 65, 260};  // each multiplied in another way by some kernel
constexpr int LEAST_TOKENS = 16;  // that an error is the mean of

std::mt19937 generator(0);

// A random packed matrix, with its memory.
struct Example {
    Packed packed{};
    std::vector<uint8_t> bits[6];
    std::vector<float> row_scales, row_means, column_scales;
    std::vector<int64_t> order;

    Example(int64_t rows, const std::vector<std::array<int64_t, 4>>& segments, bool means, bool scaled) {
        Place at{};
        for (const auto& [width, groups, terms, trellis] : segments) {
            at.width = width;
            at.groups = groups;
            at.terms = terms;
            at.trellis = trellis;
            packed.places.push_back(at);
            at.column += width;
            at.row_scale += at.slots();
            at.row_mean += groups;
            at.column_scale += at.slots() * width;
            at.low += groups >= 2 ? width : 0;
            at.high += groups == 4 ? width : 0;
            at.second += terms >= 2 ? width : 0;
            at.third += terms >= 3 ? width : 0;
            at.fourth += terms >= 4 ? width : 0;
        }
        packed.rows = rows;
        packed.columns = at.column;
        const int64_t widths[6] = {at.column, at.low, at.high, at.second, at.third, at.fourth};
        Plane* const planes[6] = {&packed.signs,  &packed.low,   &packed.high,
                                  &packed.second, &packed.third, &packed.fourth};
        for (int i = 0; i < 6; ++i) {
            const int64_t bytes = (widths[i] + 7) / 8;
            bits[i].resize(rows * bytes);
            for (auto& byte : bits[i]) {
                byte = static_cast<uint8_t>(generator());
            }
            *planes[i] = {bits[i].data(), bytes};
        }
        fill(row_scales, rows * at.row_scale);
        packed.row_scales = row_scales.data();
        packed.row_scale_slots = at.row_scale;
        if (means) {
            fill(row_means, rows * at.row_mean);
            packed.row_means = row_means.data();
        }
        packed.row_mean_slots = at.row_mean;
        if (scaled) {
            fill(column_scales, at.column_scale);
            packed.column_scales = column_scales.data();
        }
        for (int64_t j = 0; j < at.column; ++j) {
            order.push_back(at.column - 1 - j);
        }
        packed.order = order.data();
        for (int terms = 1; terms <= 4; ++terms) {  // signs, each half as large as the one before, and some products
            std::vector<Summand> level;
            for (int sign = 0; sign <= terms; ++sign) {
                level.push_back({1 << sign, std::ldexp(1.1f, -sign)});
            }
            for (int last = 2; last <= terms; ++last) {
                level.push_back({3 | 1 << last, 0.1f / static_cast<float>(last)});
            }
            packed.levels.push_back(level);
        }
    }

    static void fill(std::vector<float>& numbers, int64_t count) {
        std::uniform_real_distribution<float> size(0.5f, 1.5f);
        for (int64_t i = 0; i < count; ++i) {
            numbers.push_back(size(generator));
        }
    }

    // What a weight in a trellis is without its scales.
    double level(const Place& place, int64_t row, int64_t j) const {
        const auto first = [&](int64_t i) { return i < 0 ? 0 : packed.signs.bit(i, place.column + j); };
        const Plane* const planes[3] = {&packed.second, &packed.third, &packed.fourth};
        const int64_t starts[3] = {place.second, place.third, place.fourth};
        std::vector<int> bits;
        for (int64_t term = 1; term < place.terms; ++term) {
            bits.push_back(planes[term - 1]->bit(row, starts[term - 1] + j));
        }
        bits.push_back(first(row) ^ first(row - 16) ^ first(row - 40));
        bits.push_back(first(row - 24));
        double value = 0.0;
        for (const Summand& summand : packed.levels[place.terms - 1]) {
            int sign = 1;
            for (size_t i = 0; i < bits.size(); ++i) {
                sign *= summand.mask >> i & 1 && !bits[i] ? -1 : 1;
            }
            value += sign * summand.coefficient;
        }
        return value;
    }

    // W in stored order, by the definition of docs/format.md.
    double weight(const Place& place, int64_t row, int64_t j) const {
        if (place.trellis) {
            const double factor = packed.column_scales ? column_scales[place.column_scale + j] : 1.0;
            return level(place, row, j) * row_scales[row * packed.row_scale_slots + place.row_scale] * factor;
        }
        int64_t group = place.groups >= 2 ? packed.low.bit(row, place.low + j) : 0;
        group += place.groups == 4 ? 2 * packed.high.bit(row, place.high + j) : 0;
        double value = packed.row_means ? row_means[row * packed.row_mean_slots + place.row_mean + group] : 0.0;
        for (int64_t term = 0; term < place.terms; ++term) {
            const int64_t slot = group * place.terms + term;
            const bool plus = term ? packed.second.bit(row, place.second + j) : packed.signs.bit(row, place.column + j);
            const double factor = packed.column_scales ? column_scales[place.column_scale + slot * place.width + j] : 1.0;
            value += (plus ? 1 : -1) * row_scales[row * packed.row_scale_slots + place.row_scale + slot] * factor;
        }
        return value;
    }
};

struct alignas(64) Line {
    uint8_t bytes[64];
};

// W in the natural order of columns.
std::vector<double> weights(const Example& example) {
    const Packed& packed = example.packed;
    std::vector<double> all(packed.rows * packed.columns);
    for (int64_t row = 0; row < packed.rows; ++row) {
        for (const Place& place : packed.places) {
            for (int64_t j = 0; j < place.width; ++j) {
                all[row * packed.columns + example.order[place.column + j]] = example.weight(place, row, j);
            }
        }
    }
    return all;
}

// Relative error of products of so many tokens, with normally distributed inputs.
double product_error(const Packed& packed, const Prepared& prepared, const Kernel& kernel,
                     const std::vector<double>& weight, int tokens, bool halves) {
    std::normal_distribution<float> normal;
    std::vector<float> x(tokens * packed.columns), y(tokens * packed.rows);
    double wrong = 0.0, size = 0.0;
    for (int token = 0; token < LEAST_TOKENS; token += tokens) {
        for (auto& number : x) {
            number = normal(generator);
        }
        kernel.multiply(prepared, {x.data(), y.data(), tokens, packed.columns, Number::float32, halves}, 2);
        for (int64_t i = 0; i < tokens * packed.rows; ++i) {
            const double* row = &weight[i % packed.rows * packed.columns];
            const double expected = std::inner_product(row, row + packed.columns, &x[i / packed.rows * packed.columns], 0.0);
            wrong += std::pow(y[i] - expected, 2);
            size += expected * expected;
        }
    }
    return std::sqrt(wrong / size);
}

// Relative error of the unpacked weight.
template <class T>
double unpacked_error(const Packed& packed, const Prepared& prepared, const Kernel& kernel,
                      const std::vector<double>& weight) {
    constexpr Number number = sizeof(T) == 4 ? Number::float32 : Number::bfloat16;
    const int64_t lanes = LANES * prepared.blocks();
    std::vector<T> unpacked(packed.columns * lanes);
    kernel.unpack(prepared, 0, prepared.blocks(), unpacked.data(), number, 2);
    double wrong = 0.0, size = 0.0;
    for (int64_t row = 0; row < packed.rows; ++row) {
        for (int64_t j = 0; j < packed.columns; ++j) {
            const T found = unpacked[j * lanes + row];
            const double expected = weight[row * packed.columns + prepared.order[j]];
            wrong += std::pow((sizeof(T) == 4 ? found : widened(static_cast<uint16_t>(found))) - expected, 2);
            size += expected * expected;
        }
    }
    return std::sqrt(wrong / size);
}

bool check(const Example& example, const Kernel& kernel, const char* name) {
    const Packed& packed = example.packed;
    std::vector<Line> memory(prepared_bytes(packed) / 64 + 1);
    auto* start = memory.data()->bytes;
    prepare(packed, start, 2);
    const Prepared prepared(start);
    const auto weight = weights(example);
    double largest = 0.0;
    for (const bool halves : {false, true}) {
        for (const int tokens : TOKENS) {
            if (tokens <= kernel.most_tokens || (kernel.takes_more && halves)) {
                largest = std::max(largest, product_error(packed, prepared, kernel, weight, tokens, halves));
            }
        }
    }
    const double wide = unpacked_error<float>(packed, prepared, kernel, weight);
    const double half = unpacked_error<uint16_t>(packed, prepared, kernel, weight);
    const bool sound = largest < LARGEST_ERROR && wide < 1e-5 && half < 0x1p-8;
    std::printf("%s %-9s %-28s products %.5f  unpacked %.1e, in bfloat16 %.1e\n", sound ? "ok  " : "FAIL", kernel.name,
                name, largest, wide, half);
    return sound;
}

}  // namespace

int main() {
    struct Case {
        const char* name;
        int64_t rows;
        std::vector<std::array<int64_t, 4>> segments;  // width, groups, terms, trellis
        bool means, scaled;
    };
    const std::vector<Case> cases = {
        {"one group", 65, {{320, 1, 1}}, false, true},
        {"two groups", 300, {{576, 2, 1}}, false, true},
        {"two groups, several tiles", 2100, {{70, 2, 1}}, false, true},
        {"four groups", 129, {{70, 4, 1}, {250, 4, 2}}, false, true},
        {"two signs", 64, {{301, 2, 2}, {77, 1, 2}}, false, true},
        {"means", 90, {{130, 1, 1}, {131, 2, 1}, {61, 4, 2}}, true, false},
        {"narrow segments", 70, {{512, 2, 1}, {1, 1, 1}, {1, 4, 2}, {2, 2, 2}, {3, 2, 1}}, false, true},
        {"trellis", 300, {{320, 1, 2, 1}, {61, 1, 3, 1}}, false, true},
        {"trellis, several tiles", 2100, {{75, 1, 2, 1}}, false, true},
        {"trellis, several stretches", 129, {{1050, 1, 1, 1}, {520, 1, 4, 1}}, false, true},
        {"trellis, mixed", 65, {{77, 1, 4, 1}, {301, 2, 2}, {1, 1, 3, 1}, {70, 1, 1, 1}, {2, 1, 4, 1}}, false, true},
    };
    bool sound = check_rows();
    for (const auto& set : instruction_sets()) {
        const Kernel* kernel = kernel_named(set.c_str());
        if (!kernel) {
            std::printf("FAIL %s is not built\n", set.c_str());
            return 1;
        }
        for (const Case& each : cases) {
            sound &= check(Example(each.rows, each.segments, each.means, each.scaled), *kernel, each.name);
        }
    }
    return sound ? 0 : 1;
}
