#include "lookup.h"

#ifdef __aarch64__
#include "lookup_kernel.h"

#include <arm_neon.h>

namespace arbllm {
namespace {

struct Neon {
    static constexpr int lanes = 16, together = 2, fetched_to = 3;
    using Bytes = uint8x16_t;

    static Bytes zero() { return vdupq_n_u8(0); }
    static Bytes load(const uint8_t* from) { return vld1q_u8(from); }
    static Bytes table(const uint8_t* from) { return vld1q_u8(from); }
    static Bytes low(Bytes a) { return vandq_u8(a, vdupq_n_u8(15)); }
    static Bytes high(Bytes a) { return vshrq_n_u8(a, 4); }
    static Bytes lookup(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }
    static Bytes differ(Bytes a, Bytes b) { return veorq_u8(a, b); }
    template <int words>
    static Bytes join(const uint8_t* end, const uint8_t* next) {
        static_assert(words == 1);
        return vcombine_u8(vld1_u8(end - 8), vld1_u8(next));
    }
    static Bytes average8(Bytes a, Bytes b) { return vrhaddq_u8(a, b); }
    static Bytes add16(Bytes a, Bytes b) { return bytes(vaddq_u16(pairs(a), pairs(b))); }
    static Bytes sub16(Bytes a, Bytes b) { return bytes(vsubq_u16(pairs(a), pairs(b))); }
    static Bytes up8(Bytes a) { return bytes(vshlq_n_u16(pairs(a), 8)); }
    static Bytes down8(Bytes a) { return bytes(vshrq_n_u16(pairs(a), 8)); }
    static Bytes share16(Bytes a, int share) {
        return vreinterpretq_u8_s16(vqrdmulhq_n_s16(vreinterpretq_s16_u8(a), static_cast<int16_t>(share)));
    }
    static void add_scaled(float* to, Bytes numbers, float scale) {
        add_four(to, vget_low_u16(pairs(numbers)), scale);
        add_four(to + 4, vget_high_u16(pairs(numbers)), scale);
    }
    static void pick(const float* table, const uint32_t* words, int shift, float* to) {
        for (int i = 0; i < LANES; ++i) {
            to[i] = table[words[i] >> shift & 15];
        }
    }

  private:
    static uint16x8_t pairs(Bytes a) { return vreinterpretq_u16_u8(a); }
    static Bytes bytes(uint16x8_t a) { return vreinterpretq_u8_u16(a); }
    static void add_four(float* to, uint16x4_t numbers, float scale) {
        vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), vcvtq_f32_u32(vmovl_u16(numbers)), scale));
    }
};

}  // namespace

const Kernel* kernel_neon() {
    static const Kernel kernel{"neon", MOST_TOKENS, false, multiply<Lookups<Neon>>, unpack<Neon>};
    return &kernel;
}

}  // namespace arbllm
#else
const arbllm::Kernel* arbllm::kernel_neon() { return nullptr; }
#endif
