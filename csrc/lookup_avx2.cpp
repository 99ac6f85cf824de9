#include "lookup.h"

#ifdef __AVX2__
#include "lookup_kernel.h"

#include <immintrin.h>

namespace arbllm {
namespace {

struct Avx2 {
    static constexpr int lanes = 32, together = 2, fetched_to = 3;
    using Bytes = __m256i;

    static Bytes zero() { return _mm256_setzero_si256(); }
    static Bytes load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static Bytes table(const uint8_t* from) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(words_at(from)));
    }
    static Bytes low(Bytes a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
    static Bytes high(Bytes a) { return low(_mm256_srli_epi16(a, 4)); }
    static Bytes lookup(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
    static Bytes differ(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
    template <int words>
    static Bytes join(const uint8_t* end, const uint8_t* next) {
        const auto word = [](const uint8_t* from) { return _mm256_broadcastq_epi64(_mm_loadl_epi64(words_at(from))); };
        if constexpr (words == 1) {
            return _mm256_blend_epi32(load(next - 8), word(end - 8), 0x03);
        } else if constexpr (words == 2) {
            return _mm256_loadu2_m128i(words_at(next), words_at(end - 16));
        } else {
            return _mm256_blend_epi32(load(end - 24), word(next), 0xc0);
        }
    }
    static Bytes average8(Bytes a, Bytes b) { return _mm256_avg_epu8(a, b); }
    static Bytes add16(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
    static Bytes sub16(Bytes a, Bytes b) { return _mm256_sub_epi16(a, b); }
    static Bytes up8(Bytes a) { return _mm256_slli_epi16(a, 8); }
    static Bytes down8(Bytes a) { return _mm256_srli_epi16(a, 8); }
    static Bytes share16(Bytes a, int share) { return _mm256_mulhrs_epi16(a, _mm256_set1_epi16(static_cast<short>(share))); }
    static void add_scaled(float* to, Bytes numbers, float scale) {
        add_eight(to, _mm256_castsi256_si128(numbers), scale);
        add_eight(to + 8, _mm256_extracti128_si256(numbers, 1), scale);
    }
    static void pick(const float* table, const uint32_t* words, int shift, float* to) {
        const __m256 first = _mm256_loadu_ps(table), second = _mm256_loadu_ps(table + 8);
        for (int i = 0; i < LANES; i += 8) {
            const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i));
            const __m256i index = _mm256_srl_epi32(word, _mm_cvtsi32_si128(shift));
            const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            _mm256_storeu_ps(to + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, index),
                                                      _mm256_permutevar8x32_ps(second, index), upper));
        }
    }

  private:
    static const __m128i* words_at(const uint8_t* from) { return reinterpret_cast<const __m128i*>(from); }
    static void add_eight(float* to, __m128i numbers, float scale) {
        const __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(numbers));
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_set1_ps(scale), wide, _mm256_loadu_ps(to)));
    }
};

}  // namespace

const Kernel* kernel_avx2() {
    static const Kernel kernel{"avx2", MOST_TOKENS, false, multiply<Lookups<Avx2>>, unpack<Avx2>};
    return &kernel;
}

}  // namespace arbllm
#else
const arbllm::Kernel* arbllm::kernel_avx2() { return nullptr; }
#endif
