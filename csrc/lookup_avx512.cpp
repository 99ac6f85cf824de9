#include "lookup.h"

#ifdef __AVX512BW__
#include "lookup_kernel.h"

#include <immintrin.h>

namespace arbllm {
namespace {

struct Avx512 {
    static constexpr int lanes = 64, together = 1;
    using Bytes = __m512i;

    static Bytes zero() { return _mm512_setzero_si512(); }
    static Bytes load(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Bytes table(const uint8_t* from) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    // The table is there four times, so that other bits of an index choose among copies, or are ignored.
    static Bytes low(Bytes a) { return a; }
    static Bytes high(Bytes a) { return _mm512_srli_epi16(a, 4); }
    static Bytes lookup(Bytes table, Bytes index) { return _mm512_permutexvar_epi8(index, table); }
    static Bytes differ(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
    template <int words>
    static Bytes join(const uint8_t* end, const uint8_t* next) {
        return _mm512_alignr_epi64(load(next), load(end - lanes), 8 - words);
    }
    static Bytes average8(Bytes a, Bytes b) { return _mm512_avg_epu8(a, b); }
    static Bytes add16(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
    static Bytes sub16(Bytes a, Bytes b) { return _mm512_sub_epi16(a, b); }
    static Bytes up8(Bytes a) { return _mm512_slli_epi16(a, 8); }
    static Bytes down8(Bytes a) { return _mm512_srli_epi16(a, 8); }
    static Bytes share16(Bytes a, int share) { return _mm512_mulhrs_epi16(a, _mm512_set1_epi16(static_cast<short>(share))); }
    static void add_scaled(float* to, Bytes numbers, float scale) {
        add_sixteen(to, _mm512_castsi512_si256(numbers), scale);
        add_sixteen(to + 16, _mm512_extracti64x4_epi64(numbers, 1), scale);
    }
    static void pick(const float* table, const uint32_t* words, int shift, float* to) {
        const __m512 levels = _mm512_loadu_ps(table);
        for (int i = 0; i < LANES; i += 16) {
            const __m512i index = _mm512_srl_epi32(_mm512_loadu_si512(words + i), _mm_cvtsi32_si128(shift));
            _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(index, levels));
        }
    }

  private:
    static void add_sixteen(float* to, __m256i numbers, float scale) {
        const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(numbers));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(scale), wide, _mm512_loadu_ps(to)));
    }
};

}  // namespace
}  // namespace arbllm

#include "lookup_dots.h"

namespace arbllm {
namespace {

constexpr int MOST_LOOKED_UP = MOST_TOKENS;  // tokens whose look-ups take less time than finding all levels, if there are groups
constexpr int MOST_AT_ONCE = 2 * MOST_DOT_TOKENS;

bool has_groups(const Prepared& prepared) {
    return std::any_of(prepared.passes, prepared.passes + prepared.header->passes,
                       [](const Pass& pass) { return !pass.trellis; });
}

void multiply_tokens(const Prepared& prepared, const Activations& activations, int threads) {
    if (activations.tokens <= (has_groups(prepared) ? MOST_LOOKED_UP : 1)) {
        return multiply<Lookups<Avx512>>(prepared, activations, threads);
    }
    for (int64_t first = 0; first < activations.tokens; first += MOST_DOT_TOKENS) {
        multiply<Dots>(prepared, activations.from(first, MOST_DOT_TOKENS, prepared.header->rows), threads);
    }
}

}  // namespace

const Kernel* kernel_avx512() {
    static const Kernel kernel{"avx512", MOST_AT_ONCE, multiply_tokens, unpack<Avx512>};
    return &kernel;
}

}  // namespace arbllm
#else
const arbllm::Kernel* arbllm::kernel_avx512() { return nullptr; }
#endif
