// Memory for vectors, let go at the end of its scope.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace arbllm {

using Floats = std::unique_ptr<float, decltype(&std::free)>;

// So many numbers, aligned to 64 bytes; throws std::bad_alloc.
inline Floats aligned_floats(size_t count) {
    constexpr size_t ALIGNMENT = 64;
    const size_t bytes = (count * sizeof(float) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    Floats memory(static_cast<float*>(std::aligned_alloc(ALIGNMENT, bytes)), &std::free);
    if (!memory) throw std::bad_alloc();
    return memory;
}

}  // namespace arbllm
