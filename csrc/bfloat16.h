// Numbers in bfloat16, the upper halves of floats.
//
// In an anonymous namespace, since each file that includes this is compiled for its own instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace arbllm {
namespace {

inline float widened(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// To the nearest bfloat16, ties to even.
inline uint16_t narrowed(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (value != value) {
        return static_cast<uint16_t>(word >> 16 | 0x40);
    }
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

}  // namespace
}  // namespace arbllm
