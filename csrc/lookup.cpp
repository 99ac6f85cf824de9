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

struct Named {
    const char* name;
    const Kernel* (*kernel)();
};
constexpr Named KERNELS[] = {
    {"avx512", kernel_avx512}, {"avx2", kernel_avx2}, {"neon", kernel_neon}, {"portable", kernel_portable}};

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
        // Only those that this processor runs are asked for: what they say is compiled for it.
        for (const auto& [known, kernel] : KERNELS) {
            if (!std::strcmp(known, name)) {
                return kernel();
            }
        }
    }
    return nullptr;
}

}  // namespace arbllm
