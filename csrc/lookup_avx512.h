// The vectors of AVX-512, with its instructions for bytes (BW, VBMI), as lookup_kernel.h wants them.
#pragma once

#include <immintrin.h>

#include "lookup.h"

namespace arbllm {
namespace {

struct Avx512 {
    static constexpr int lanes = 64, together = 1, fetched_to = 2;
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
