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

// To the nearest bfloat16, ties to even. Without branches, so that loops of it become vectors.
inline uint16_t narrowed(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const uint32_t rounded = word + 0x7fff + (word >> 16 & 1), quiet = word | 0x400000;
    return static_cast<uint16_t>((value != value ? quiet : rounded) >> 16);
}

}  // namespace
}  // namespace arbllm
