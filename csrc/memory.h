// Pages of memory: large ones asked for, and those given back that a file can give again.
#pragma once

#include <cstdint>

namespace arbllm {

// Asks for large pages: what is read once a token is not in the cache, and then neither are the tables of small pages.
void ask_for_large_pages(uint8_t* start, int64_t bytes);

// Gives back the pages of a mapped file, to be read from it again when they are next touched. Memory that is not of a
// file, or of which any page was written to since it was read, is left alone, as are pages that it shares. Returns the bytes given back.
int64_t give_back(uint8_t* start, int64_t bytes);

}  // namespace arbllm
