// Threads: those of the process's OpenMP, which PyTorch uses, so that the two do not compete for cores.
#pragma once

#include <atomic>
#include <cstdint>

namespace arbllm {

// Calls work(argument) in up to `threads` threads at once and waits. How many there are is not promised: work is to be
// divided by claiming, as Claims does.
void in_parallel(int threads, void (*work)(void*), void* argument);

// Numbers 0 to total - 1, each given to one thread; and whether all are done.
class Claims {
  public:
    explicit Claims(int64_t total) : total_(total) {}

    // The next number, or -1 if there is none.
    int64_t next() {
        const int64_t claimed = claimed_.fetch_add(1, std::memory_order_relaxed);
        return claimed < total_ ? claimed : -1;
    }
    void done() { done_.fetch_add(1, std::memory_order_release); }

    // Returns when every claimed number is done.
    void wait() const;

  private:
    const int64_t total_;
    std::atomic<int64_t> claimed_{0}, done_{0};
};

}  // namespace arbllm
