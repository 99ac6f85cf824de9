// Binding of the products with 8-bit rows, for arbllm/kernels/rows.py.
#include <nanobind/ndarray.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "parallel.h"
#include "processor.h"
#include "rows.h"

namespace nb = nanobind;

namespace arbllm {
namespace {

constexpr int64_t PIECE = 256;  // rows that a thread claims at a time

template <class T, int DIMENSIONS>
using Array = nb::ndarray<T, nb::ndim<DIMENSIONS>, nb::c_contig, nb::device::cpu>;

// Kernels by their number in instruction_sets().
MultiplyRows& chosen(size_t number) {
    static const std::vector<std::string> sets = instruction_sets();
    if (number >= sets.size()) throw std::invalid_argument("no such instruction set: see instruction_sets()");
    return *multiply_rows_named(sets[number]);
}

struct Job {
    const RowsProduct& product;
    MultiplyRows& multiply;
    Claims pieces;

    static void run(void* argument) {
        Job& job = *static_cast<Job*>(argument);
        for (int64_t piece; (piece = job.pieces.next()) >= 0;) {
            job.multiply(job.product, piece * PIECE, std::min((piece + 1) * PIECE, job.product.rows));
        }
    }
};

void multiply_rows(Array<const float, 2> x, Array<const int8_t, 2> codes, Array<const float, 1> scales,
                   Array<float, 2> y, size_t instruction_set, int threads) {
    const RowsProduct product{static_cast<int64_t>(codes.shape(0)), static_cast<int64_t>(codes.shape(1)),
                              static_cast<int64_t>(x.shape(0)), codes.data(), scales.data(), x.data(), y.data()};
    if (x.shape(1) != codes.shape(1)) {
        throw std::invalid_argument("inputs have " + std::to_string(x.shape(1)) + " columns, the rows of codes have " +
                                    std::to_string(codes.shape(1)));
    }
    if (scales.shape(0) != codes.shape(0) || y.shape(0) != x.shape(0) || y.shape(1) != codes.shape(0)) {
        throw std::invalid_argument("multiply_rows: shapes do not agree");
    }
    const int64_t pieces = (product.rows + PIECE - 1) / PIECE;
    Job job{product, chosen(instruction_set), Claims(pieces)};
    nb::gil_scoped_release release;
    in_parallel(static_cast<int>(std::min<int64_t>(threads, pieces)), &Job::run, &job);
}

}  // namespace
}  // namespace arbllm

void bind_rows(nb::module_& module) {
    module.def("multiply_rows", &arbllm::multiply_rows, nb::arg("x"), nb::arg("codes"), nb::arg("scales"),
               nb::arg("y").noconvert(), nb::arg("instruction_set"), nb::arg("threads"),
               "y = x (scale * code)^T: see arbllm.kernels.rows.");
}
