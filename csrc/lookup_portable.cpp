#include "lookup_kernel.h"

namespace arbllm {
namespace {

struct Portable {
    static constexpr int lanes = 16, together = 1, fetched_to = 3;
    struct Bytes {
        uint16_t pairs[lanes / 2];
    };
    struct Table {
        uint8_t entries[16];
    };

    // f applied to the numbers of 16 bits of one or two vectors.
    template <class F>
    static Bytes each(F f) {
        Bytes result;
        for (int i = 0; i < lanes / 2; ++i) {
            result.pairs[i] = static_cast<uint16_t>(f(i));
        }
        return result;
    }

    static Bytes zero() { return {}; }
    static Bytes load(const uint8_t* from) {
        return each([&](int i) { return from[2 * i] | from[2 * i + 1] << 8; });
    }
    static Table table(const uint8_t* from) {
        Table table;
        std::memcpy(table.entries, from, 16);
        return table;
    }
    static Bytes low(Bytes a) {
        return each([&](int i) { return a.pairs[i] & 0x0f0f; });
    }
    static Bytes high(Bytes a) {
        return each([&](int i) { return a.pairs[i] >> 4 & 0x0f0f; });
    }
    static Bytes lookup(const Table& table, Bytes index) {
        return each([&](int i) {
            return table.entries[index.pairs[i] & 255] | table.entries[index.pairs[i] >> 8] << 8;
        });
    }
    static Bytes differ(Bytes a, Bytes b) {
        return each([&](int i) { return a.pairs[i] ^ b.pairs[i]; });
    }
    template <int words>
    static Bytes join(const uint8_t* end, const uint8_t* next) {
        uint8_t joined[lanes];
        std::memcpy(joined, end - 8 * words, 8 * words);
        std::memcpy(joined + 8 * words, next, lanes - 8 * words);
        return load(joined);
    }
    static Bytes average8(Bytes a, Bytes b) {
        return each([&](int i) {
            const uint16_t p = a.pairs[i], q = b.pairs[i];
            return ((p & 255) + (q & 255) + 1) >> 1 | ((p >> 8) + (q >> 8) + 1) >> 1 << 8;
        });
    }
    static Bytes add16(Bytes a, Bytes b) {
        return each([&](int i) { return a.pairs[i] + b.pairs[i]; });
    }
    static Bytes sub16(Bytes a, Bytes b) {
        return each([&](int i) { return a.pairs[i] - b.pairs[i]; });
    }
    static Bytes up8(Bytes a) {
        return each([&](int i) { return a.pairs[i] << 8; });
    }
    static Bytes down8(Bytes a) {
        return each([&](int i) { return a.pairs[i] >> 8; });
    }
    static Bytes share16(Bytes a, int share) {
        return each([&](int i) { return (a.pairs[i] * share + (1 << 14)) >> 15; });
    }
    static void add_scaled(float* to, Bytes numbers, float scale) {
        for (int i = 0; i < lanes / 2; ++i) {
            to[i] += scale * static_cast<float>(numbers.pairs[i]);
        }
    }
    static void pick(const float* table, const uint32_t* words, int shift, float* to) {
        for (int i = 0; i < LANES; ++i) {
            to[i] = table[words[i] >> shift & 15];
        }
    }
};

}  // namespace

const Kernel* kernel_portable() {
    static const Kernel kernel{"portable", MOST_TOKENS, false, multiply<Lookups<Portable>>, unpack<Portable>};
    return &kernel;
}

}  // namespace arbllm
