// Bindings of the look-up kernels: arbllm/kernels/cpu.py calls them with the addresses of tensors that it has checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings.h"
#include "memory.h"
#include "prepare.h"
#include "processor.h"

namespace nb = nanobind;
using namespace arbllm;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Kernels by their number in instruction_sets().
const Kernel& chosen(int number) {
    static const std::vector<const Kernel*> kernels = [] {
        std::vector<const Kernel*> found;
        for (const auto& name : instruction_sets()) {
            found.push_back(kernel_named(name.c_str()));
        }
        return found;
    }();
    if (number < 0 || number >= static_cast<int>(kernels.size()) || !kernels[number]) {
        throw std::invalid_argument("no such instruction set: see instruction_sets()");
    }
    return *kernels[number];
}

Number number(bool bfloat16) { return bfloat16 ? Number::bfloat16 : Number::float32; }

Activations activations(uintptr_t x, uintptr_t y, int64_t tokens, int64_t stride, bool bfloat16, bool halves = false) {
    return {at<const void>(x), at<void>(y), tokens, stride, number(bfloat16), halves};
}

Prepared opened(uintptr_t address, int64_t columns) {
    const auto* header = at<const Header>(address);
    if (header->magic != MAGIC) {
        throw std::invalid_argument("not a prepared matrix");
    }
    if (header->columns != columns) {
        throw std::invalid_argument("inputs have " + std::to_string(columns) + " columns, the packed weight has " +
                                    std::to_string(header->columns));
    }
    return Prepared(at<const uint8_t>(address));
}

void check(bool fits) {
    if (!fits) {
        throw std::invalid_argument("outputs do not fit the packed weight");
    }
}

Packed packed_from(int64_t rows, int64_t columns, const std::vector<std::array<int64_t, 13>>& places,
                   const std::array<uintptr_t, 6>& planes, const std::array<int64_t, 6>& plane_bytes,
                   const std::vector<std::vector<std::pair<int, float>>>& levels, uintptr_t row_scales,
                   uintptr_t row_means, uintptr_t column_scales, uintptr_t order) {
    Packed packed{};
    packed.rows = rows;
    packed.columns = columns;
    for (const auto& p : places) {
        packed.places.push_back(
            {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12]});
        packed.row_scale_slots += packed.places.back().slots();
        packed.row_mean_slots += p[1];
    }
    Plane* const into[] = {&packed.signs,  &packed.low,   &packed.high,
                           &packed.second, &packed.third, &packed.fourth};
    for (int i = 0; i < 6; ++i) {
        *into[i] = {at<const uint8_t>(planes[i]), plane_bytes[i]};
    }
    for (const auto& summands : levels) {
        packed.levels.emplace_back();
        for (const auto& [mask, coefficient] : summands) {
            packed.levels.back().push_back({mask, coefficient});
        }
    }
    packed.row_scales = at<const float>(row_scales);
    packed.row_means = at<const float>(row_means);
    packed.column_scales = at<const float>(column_scales);
    packed.order = at<const int64_t>(order);
    return packed;
}

}  // namespace

void bind_lookup(nb::module_& module) {
    module.attr("LANES") = LANES;
    module.attr("MULTIPLIES_BFLOAT16") = multiplies_bfloat16();

    nb::class_<Packed>(module, "Packed", "A packed matrix in memory that its owner keeps.")
        .def_static("at", &packed_from, nb::arg("rows"), nb::arg("columns"), nb::arg("places"), nb::arg("planes"),
                    nb::arg("plane_bytes"), nb::arg("levels"), nb::arg("row_scales"), nb::arg("row_means"), nb::arg("column_scales"),
                    nb::arg("order"), "From addresses, 0 for what is absent.")
        .def("prepared_bytes", &prepared_bytes, "Bytes that `prepare` writes.")
        .def(
            "prepare", [](const Packed& self, uintptr_t to, int threads) { prepare(self, at<uint8_t>(to), threads); },
            nb::arg("to"), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(),
            "Write the matrix as the kernels want it, to an address divisible by 64.");

    module.def("most_tokens", [](int set) { return chosen(set).most_tokens; }, nb::arg("instruction_set"),
               "That `multiply` multiplies in 8 bits.");

    module.def("takes_more", [](int set) { return chosen(set).takes_more; }, nb::arg("instruction_set"),
               "Whether `multiply` takes more tokens than that, if these may be in bfloat16.");

    module.def(
        "multiply",
        [](uintptr_t prepared, uintptr_t x, uintptr_t y, int64_t tokens, int64_t columns, int64_t rows, int64_t stride,
           bool bfloat16, bool halves, int set, int threads) {
            const Kernel& kernel = chosen(set);
            const Prepared matrix = opened(prepared, columns);
            check(matrix.header->rows == rows);
            if (tokens > kernel.most_tokens && !(kernel.takes_more && halves)) {
                throw std::invalid_argument("too many tokens at a time: see most_tokens()");
            }
            kernel.multiply(matrix, activations(x, y, tokens, stride, bfloat16, halves), threads);
        },
        nb::arg("prepared"), nb::arg("x"), nb::arg("y"), nb::arg("tokens"), nb::arg("columns"), nb::arg("rows"),
        nb::arg("stride"), nb::arg("bfloat16"), nb::arg("halves"), nb::arg("instruction_set"), nb::arg("threads"),
        nb::call_guard<nb::gil_scoped_release>(),
        "y = x W^T in 8 bits, for at most `most_tokens` tokens. With `halves`, in bfloat16 where that is faster, and where "
        "the kernel `takes_more` for any number of them.");

    module.def(
        "put_in_order",
        [](uintptr_t prepared, uintptr_t x, uintptr_t y, int64_t tokens, int64_t columns, int64_t stride, bool bfloat16,
           int threads) {
            put_in_order(opened(prepared, columns), activations(x, y, tokens, stride, bfloat16), threads);
        },
        nb::arg("prepared"), nb::arg("x"), nb::arg("y"), nb::arg("tokens"), nb::arg("columns"), nb::arg("stride"),
        nb::arg("bfloat16"), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(),
        "y (tokens, columns) = x with its columns in the prepared order.");

    module.def(
        "unpack",
        [](uintptr_t prepared, int64_t columns, int64_t first, int64_t last, uintptr_t to, bool bfloat16, int set,
           int threads) {
            const Prepared matrix = opened(prepared, columns);
            check(0 <= first && first <= last && last <= matrix.blocks());
            chosen(set).unpack(matrix, first, last, at<void>(to), number(bfloat16), threads);
        },
        nb::arg("prepared"), nb::arg("columns"), nb::arg("first"), nb::arg("last"), nb::arg("to"), nb::arg("bfloat16"),
        nb::arg("instruction_set"), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(),
        "Blocks of LANES rows of W, transposed, in the prepared order: (columns, LANES * (last - first)).");

    module.def(
        "order",
        [](uintptr_t prepared, int64_t columns) {
            return reinterpret_cast<uintptr_t>(opened(prepared, columns).order);
        },
        nb::arg("prepared"), nb::arg("columns"), "Address of the natural column, int32, of each prepared one.");

    module.def(
        "give_back", [](uintptr_t start, int64_t bytes) { return give_back(at<uint8_t>(start), bytes); },
        nb::arg("start"), nb::arg("bytes"), nb::call_guard<nb::gil_scoped_release>(),
        "Give back memory that is as a mapped file has it; the bytes that were.");
}
