// Products with 8-bit rows by every kernel that this processor runs, against sums taken weight by weight.
#include "../rows.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../processor.h"
#include "checks.h"

using namespace arbllm;

namespace {

bool check(int64_t rows, int64_t columns, int64_t tokens, const std::string& set) {
    std::mt19937 generator(0);
    std::uniform_int_distribution<int> code(-127, 127);
    std::normal_distribution<float> normal;
    std::vector<int8_t> codes(rows * columns);
    std::vector<float> scales(rows), x(tokens * columns), y(tokens * rows);
    for (auto& number : codes) number = static_cast<int8_t>(code(generator));
    for (auto* numbers : {&scales, &x}) {
        for (auto& number : *numbers) number = normal(generator);
    }
    multiply_rows_named(set)({rows, columns, tokens, codes.data(), scales.data(), x.data(), y.data()}, 0, rows);
    double wrong = 0.0, size = 0.0;
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t row = 0; row < rows; ++row) {
            double expected = 0.0;
            for (int64_t j = 0; j < columns; ++j) {
                expected += double{scales[row]} * codes[row * columns + j] * x[token * columns + j];
            }
            wrong += std::pow(y[token * rows + row] - expected, 2);
            size += expected * expected;
        }
    }
    const double error = std::sqrt(wrong / size);
    const bool sound = error < 1e-5;
    std::printf("%s %-9s 8-bit rows, %lld tokens             %.1e\n", sound ? "ok  " : "FAIL", set.c_str(),
                static_cast<long long>(tokens), error);
    return sound;
}

}  // namespace

bool check_rows() {
    bool sound = true;
    for (const auto& set : instruction_sets()) {
        for (int64_t tokens : {1, 2, 3, 7}) sound &= check(37, 211, tokens, set);
    }
    return sound;
}
