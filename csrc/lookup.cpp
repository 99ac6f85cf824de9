#include "lookup.h"

#include <cstring>

#include "gather.h"
#include "parallel.h"
#include "processor.h"

namespace arbllm {
namespace {

struct Ordering {
    const Prepared& prepared;
    const Activations& activations;
    Claims tokens;

    template <class T>
    void order(int64_t token) const {
        const T* x = static_cast<const T*>(activations.x) + token * activations.stride;
        const int64_t columns = prepared.header->columns;
        gather(prepared, x, static_cast<T*>(activations.y) + token * columns, [](T value) { return value; });
    }

    static void run(void* argument) {
        auto& job = *static_cast<Ordering*>(argument);
        for (int64_t token; (token = job.tokens.next()) >= 0;) {
            if (job.activations.number == Number::float32) {
                job.order<float>(token);
            } else {
                job.order<uint16_t>(token);
            }
        }
    }
};

}  // namespace

void put_in_order(const Prepared& prepared, const Activations& activations, int threads) {
    Ordering job{prepared, activations, Claims(activations.tokens)};
    in_parallel(threads, &Ordering::run, &job);
}

const Kernel* kernel_named(const char* name) {
    for (const auto& supported : instruction_sets()) {
        if (supported != name) {
            continue;
        }
        for (const Kernel* kernel : {kernel_avx512(), kernel_avx2(), kernel_neon(), kernel_portable()}) {
            if (kernel && !std::strcmp(kernel->name, name)) {
                return kernel;
            }
        }
    }
    return nullptr;
}

}  // namespace arbllm
