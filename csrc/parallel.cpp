#include "parallel.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace arbllm {

namespace {

// The entry point of GNU's OpenMP runtime, which LLVM's has too; PyTorch loads one of them for all to see.
using Start = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Start openmp() {
    static const Start start = reinterpret_cast<Start>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return start;
}

constexpr int SPINS = 2000;

}  // namespace

void in_parallel(int threads, void (*work)(void*), void* argument) {
    if (threads <= 1) {
        work(argument);
    } else if (openmp()) {
        openmp()(work, argument, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; ++i) {
            others.emplace_back(work, argument);
        }
        work(argument);
        for (auto& other : others) {
            other.join();
        }
    }
}

void Claims::wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < total_; ++spins) {
        if (spins > SPINS) {  // the other thread may need this core
            std::this_thread::yield();
        }
    }
}

}  // namespace arbllm
