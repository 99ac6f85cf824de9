#include "sweep.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "aligned.h"
#include "bindings.h"
#include "processor.h"

namespace nb = nanobind;

namespace arbllm {
namespace {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void run(const Sweep& task) {
    const Floats memory = aligned_floats(task.columns * MOST_LANES);
#if defined(__x86_64__)
    static const std::string best = instruction_sets().front();
    if (best == "avx512") return sweep_avx512(task, memory.get());
    if (best == "avx2") return sweep_avx2(task, memory.get());
#endif
    sweep_portable(task, memory.get());
}

void sweep(int terms, Matrix rows, Matrix columns, Matrix influence, Row steps, Matrix state,
           std::optional<Matrix> values, nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> choices,
           nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> chosen) {
    const size_t K = state.shape(0), n = state.shape(1), slots = rows.shape(0);
    const size_t groups = terms == 1 || terms == 2 ? slots / terms : 0;
    const bool kind = (groups == 1 || groups == 2 || groups == 4) && groups * terms == slots;
    const auto fits = [](const auto& array, size_t first, size_t second) {
        return array.shape(0) == first && array.shape(1) == second;
    };
    if (!kind || !fits(rows, slots, n) || !fits(columns, slots, K) || !fits(influence, K, K) || steps.shape(0) != K ||
        (values && !fits(*values, K, n)) || !fits(choices, K, n) || !fits(chosen, K, n)) {
        throw std::invalid_argument("sweep: shapes do not agree");
    }
    if (K == 0) return;
    const Sweep task{static_cast<int64_t>(K), static_cast<int64_t>(n), static_cast<int>(groups), terms, rows.data(),
                     columns.data(), influence.data(), steps.data(), state.data(), values ? values->data() : nullptr,
                     choices.data(), chosen.data()};
    nb::gil_scoped_release release;
    run(task);
}

}  // namespace
}  // namespace arbllm

void bind_sweep(nb::module_& module) {
    module.def("sweep", &arbllm::sweep, nb::arg("terms"), nb::arg("rows"), nb::arg("columns"), nb::arg("influence"),
               nb::arg("steps"), nb::arg("state"), nb::arg("values").none(),
               nb::arg("choices").noconvert(), nb::arg("chosen").noconvert(),
               "One pass over the columns of a segment: see arbllm.binarize.sweep.");
}
