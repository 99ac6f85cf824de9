// y = x W^T for many tokens, in bfloat16, where that is quicker than to unpack W for a product of others.
#pragma once

#include "lookup.h"

namespace arbllm {

using Multiply = void (*)(const Prepared&, const Activations&, int threads);

// For any number of tokens. Null where it was not built, this processor cannot run it, or has units that multiply whole
// tiles of bfloat16, which libraries use.
Multiply many_tokens();

}  // namespace arbllm
