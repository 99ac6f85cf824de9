// Inputs in the prepared order of columns.
//
// In an anonymous namespace, since each file that includes this is compiled for its own instruction set.
#pragma once

#include "lookup.h"

namespace arbllm {
namespace {

// to[j] = convert(x[the natural column of j]).
template <class From, class To, class Convert>
void gather(const Prepared& prepared, const From* x, To* to, Convert convert) {
    const int32_t* order = prepared.order;
    for (int64_t j = 0; j < prepared.header->columns; ++j) {
        to[j] = convert(x[order[j]]);
    }
}

}  // namespace
}  // namespace arbllm
