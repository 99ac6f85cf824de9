#include "rebuild.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "parallel.h"
#include "processor.h"

namespace nb = nanobind;

namespace arbllm {
namespace {

template <class T, int DIMENSIONS>
using Array = nb::ndarray<T, nb::ndim<DIMENSIONS>, nb::c_contig, nb::device::cpu>;

struct Kernel {
    Rebuild* rebuild;
    Contract* contract;
};

const Kernel& kernel() {
    static const Kernel best = [] {
        const std::string name = instruction_sets().front();
#if defined(__x86_64__)
        if (name == "avx512") return Kernel{rebuild_avx512, contract_avx512};
        if (name == "avx2") return Kernel{rebuild_avx2, contract_avx2};
#endif
        return Kernel{rebuild_portable, contract_portable};
    }();
    return best;
}

using Places = std::vector<std::array<int64_t, 7>>;

void check(bool agree) {
    if (!agree) throw std::invalid_argument("rebuild: shapes do not agree");
}

template <class Found>
bool fits(const Found& array, size_t first, size_t second) {
    return array.shape(0) == first && array.shape(1) == second;
}

std::vector<Span> spans_of(const Places& places) {
    std::vector<Span> spans;
    for (const auto& p : places) spans.push_back({p[0], p[1], p[2], p[3], p[4], p[5], p[6]});
    return spans;
}

// The arrays and `spans` are the caller's, and outlive what is returned.
Scaled scaled(const std::vector<Span>& spans, const Array<const uint8_t, 2>& codes, const Array<const float, 1>& levels,
              const Array<const int32_t, 1>& order, const Array<const float, 2>& rows,
              const Array<const float, 1>& columns) {
    int64_t row_slots = 0, column_slots = 0, width = 0;
    for (const Span& span : spans) {
        const int64_t slots = span.slots();
        check(span.column == width && span.row_scale == row_slots && span.column_scale == column_slots);
        width += span.width;
        row_slots += slots;
        column_slots += slots * span.width;
    }
    check(fits(codes, rows.shape(0), width) && fits(rows, codes.shape(0), row_slots) &&
          static_cast<int64_t>(order.shape(0)) == width && static_cast<int64_t>(columns.shape(0)) == column_slots);
    return {static_cast<int64_t>(rows.shape(0)), width, spans.data(), static_cast<int64_t>(spans.size()), row_slots,
            codes.data(), levels.data(), order.data(), rows.data(), columns.data()};
}

// Calls work(part, first row, last row, memory of m floats) for each of `parts` parts of the rows, in so many threads.
template <class Work>
void by_rows(const Scaled& matrix, int parts, const Work& work) {
    struct Task {
        const Scaled& matrix;
        const Work& work;
        int64_t parts;
        Claims claims;
    } task{matrix, work, parts, Claims(parts)};
    const auto run = [](void* argument) {
        Task& task = *static_cast<Task*>(argument);
        std::vector<float> memory(task.matrix.columns);
        for (int64_t part; (part = task.claims.next()) >= 0;) {
            const int64_t rows = task.matrix.rows;
            task.work(part, rows * part / task.parts, rows * (part + 1) / task.parts, memory.data());
        }
    };
    in_parallel(parts, run, &task);
}

void rebuild(const Places& places, Array<const uint8_t, 2> codes, Array<const float, 1> levels,
             Array<const int32_t, 1> order, Array<const float, 2> rows, Array<const float, 1> columns,
             Array<float, 2> weight, int threads) {
    const std::vector<Span> spans = spans_of(places);
    const Scaled matrix = scaled(spans, codes, levels, order, rows, columns);
    check(fits(weight, codes.shape(0), codes.shape(1)));
    float* to = weight.data();
    nb::gil_scoped_release release;
    by_rows(matrix, threads, [&](int64_t, int64_t first, int64_t last, float* memory) {
        kernel().rebuild(matrix, first, last, memory, to);
    });
}

void contract(const Places& places, Array<const uint8_t, 2> codes, Array<const float, 1> levels,
              Array<const int32_t, 1> order, Array<const float, 2> rows, Array<const float, 1> columns,
              Array<const float, 2> gradient, Array<float, 2> row_gradients, Array<float, 2> column_gradients) {
    const std::vector<Span> spans = spans_of(places);
    const Scaled matrix = scaled(spans, codes, levels, order, rows, columns);
    const size_t parts = column_gradients.shape(0), slots = columns.shape(0);
    check(fits(gradient, codes.shape(0), codes.shape(1)) && fits(row_gradients, rows.shape(0), rows.shape(1)) &&
          fits(column_gradients, parts, slots));
    const float* from = gradient.data();
    float *to_rows = row_gradients.data(), *to_columns = column_gradients.data();
    nb::gil_scoped_release release;
    by_rows(matrix, static_cast<int>(parts), [&](int64_t part, int64_t first, int64_t last, float* memory) {
        float* sums = to_columns + part * slots;
        std::fill(sums, sums + slots, 0.0f);
        kernel().contract(matrix, first, last, from, memory, to_rows, sums);
    });
}

}  // namespace
}  // namespace arbllm

void bind_rebuild(nb::module_& module) {
    module.def("rebuild", &arbllm::rebuild, nb::arg("places"), nb::arg("codes"), nb::arg("levels"), nb::arg("order"),
               nb::arg("rows"), nb::arg("columns"), nb::arg("weight").noconvert(), nb::arg("threads"),
               "Write the weight: see arbllm.rebuild.");
    module.def("contract", &arbllm::contract, nb::arg("places"), nb::arg("codes"), nb::arg("levels"), nb::arg("order"),
               nb::arg("rows"), nb::arg("columns"), nb::arg("gradient"),
               nb::arg("row_gradients").noconvert(), nb::arg("column_gradients").noconvert(),
               "Write the gradients of the scales; those of the column scales as a row for each thread, to be added up.");
}
