#pragma once

// A std::vector whose functions belong to the file that includes this: such files are compiled for different instruction
// sets, and of functions that they share the linker keeps one file's, for a processor that may not have its instructions.

#include <memory>
#include <vector>

namespace arbllm {
namespace {

template <typename T>
struct OwnAllocator : std::allocator<T> {
    template <typename U>
    struct rebind {
        using other = OwnAllocator<U>;
    };
    OwnAllocator() = default;
    template <typename U>
    OwnAllocator(const OwnAllocator<U>&) {}
};

template <typename T>
using OwnVector = std::vector<T, OwnAllocator<T>>;

}  // namespace
}  // namespace arbllm
