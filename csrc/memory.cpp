#include "memory.h"

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <vector>

namespace arbllm {

#ifdef __linux__

namespace {

constexpr uintptr_t LARGE_PAGE = 1 << 21;
// Of an entry of /proc/self/pagemap, see the kernel's Documentation/admin-guide/mm/pagemap.rst.
constexpr uint64_t PRESENT = uint64_t{1} << 63, SWAPPED = uint64_t{1} << 62, OF_A_FILE = uint64_t{1} << 61;

// The number of pages in memory, or -1 if one of them is not as its file has it, or that cannot be told.
int64_t unchanged_pages(uintptr_t first, int64_t pages, uintptr_t page) {
    const int table = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (table < 0) {
        return -1;
    }
    std::vector<uint64_t> entries(pages);
    const auto bytes = static_cast<ssize_t>(pages * sizeof(uint64_t));
    const ssize_t read = pread(table, entries.data(), bytes, static_cast<off_t>(first / page * sizeof(uint64_t)));
    close(table);
    if (read != bytes) {
        return -1;
    }
    int64_t present = 0;
    for (const uint64_t entry : entries) {
        if (entry & SWAPPED || (entry & PRESENT && !(entry & OF_A_FILE))) {
            return -1;
        }
        present += entry & PRESENT ? 1 : 0;
    }
    return present;
}

}  // namespace

void ask_for_large_pages(uint8_t* start, int64_t bytes) {
    const auto first = (reinterpret_cast<uintptr_t>(start) + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    const auto last = (reinterpret_cast<uintptr_t>(start) + bytes) / LARGE_PAGE * LARGE_PAGE;
    if (first < last) {
        madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a system without them says no
    }
}

int64_t give_back(uint8_t* start, int64_t bytes) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<uintptr_t>(start), first = (address + page - 1) / page * page;
    const auto last = (address + bytes) / page * page;  // what shares a page with others is theirs as well
    const int64_t pages = last > first ? static_cast<int64_t>((last - first) / page) : 0;
    const int64_t present = pages > 0 ? unchanged_pages(first, pages, page) : -1;
    if (present <= 0 || madvise(reinterpret_cast<void*>(first), pages * page, MADV_DONTNEED)) {
        return 0;
    }
    return present * static_cast<int64_t>(page);
}

#else

void ask_for_large_pages(uint8_t*, int64_t) {}

int64_t give_back(uint8_t*, int64_t) { return 0; }

#endif

}  // namespace arbllm
