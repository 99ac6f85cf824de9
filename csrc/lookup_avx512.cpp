#include "lookup.h"

#ifdef __AVX512BW__
#include <algorithm>

#include "lookup_avx512.h"
#include "lookup_dots_avx512.h"
#include "lookup_kernel.h"
#include "lookup_many.h"

namespace arbllm {
namespace {

constexpr int MOST_GROUP_TOKENS = 11;  // in 8 bits, where bfloat16 is there for more

bool has_groups(const Prepared& prepared) {
    return std::any_of(prepared.passes, prepared.passes + prepared.header->passes,
                       [](const Pass& pass) { return !pass.trellis; });
}

// Look-ups take less time than finding all levels would: of one token, or, where each group has levels of its own, of as
// many as they may be.
void multiply_tokens(const Prepared& prepared, const Activations& activations, int threads) {
    static const Multiply many = many_tokens();
    const bool groups = has_groups(prepared);
    if (many && activations.halves && activations.tokens > (groups ? MOST_GROUP_TOKENS : MOST_DOT_TOKENS)) {
        return many(prepared, activations, threads);
    }
    const int looked_up = groups ? MOST_TOKENS : 1;
    (activations.tokens <= looked_up ? multiply<Lookups<Avx512>> : multiply<Dots>)(prepared, activations, threads);
}

}  // namespace

const Kernel* kernel_avx512() {
    static const Kernel kernel{"avx512", MOST_DOT_TOKENS, many_tokens() != nullptr, multiply_tokens, unpack<Avx512>};
    return &kernel;
}

}  // namespace arbllm
#else
const arbllm::Kernel* arbllm::kernel_avx512() { return nullptr; }
#endif
