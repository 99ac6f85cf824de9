#include "viterbi.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "aligned.h"
#include "bindings.h"
#include "processor.h"

namespace nb = nanobind;

namespace arbllm {
namespace {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void run(const Trellis& task) {
    const Floats memory = aligned_floats(viterbi_memory(task.rows));
#if defined(__x86_64__)
    static const std::vector<std::string> known = instruction_sets();
    static const bool avx2 = std::find(known.begin(), known.end(), "avx2") != known.end();
    if (avx2) return viterbi_avx2(task, memory.get());
#endif
    viterbi_portable(task, memory.get());
}

void viterbi(Matrix state, std::optional<Matrix> values, Matrix influence, Row steps, Row columns, Row rows, Row levels,
             nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> choices,
             nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> changes) {
    const size_t T = state.shape(0), n = state.shape(1), count = levels.shape(0);
    const auto fits = [](const auto& array, size_t first, size_t second) {
        return array.shape(0) == first && array.shape(1) == second;
    };
    const bool known = count == 4 || count == 8 || count == 16 || count == 32;
    if (!known || (values && !fits(*values, T, n)) || !fits(influence, T, T) || steps.shape(0) != T ||
        columns.shape(0) != T || rows.shape(0) != n || !fits(choices, T, n) || !fits(changes, T, n)) {
        throw std::invalid_argument("viterbi: shapes do not agree");
    }
    if (T == 0 || n == 0) return;
    const Trellis task{static_cast<int64_t>(T), static_cast<int64_t>(n), static_cast<int>(count), state.data(),
                       values ? values->data() : nullptr, influence.data(), steps.data(), columns.data(), rows.data(),
                       levels.data(), choices.data(), changes.data()};
    nb::gil_scoped_release release;
    run(task);
}

}  // namespace
}  // namespace arbllm

void bind_viterbi(nb::module_& module) {
    module.def("viterbi", &arbllm::viterbi, nb::arg("state"), nb::arg("values").none(), nb::arg("influence"),
               nb::arg("steps"), nb::arg("columns"), nb::arg("rows"), nb::arg("levels"), nb::arg("choices").noconvert(),
               nb::arg("changes").noconvert(), "Signs of a trellis, a few columns: see arbllm.binarize.viterbi.");
}
