// Which instruction sets this processor has.
#pragma once

#include <string>
#include <vector>

namespace arbllm {

// Names of those that the kernels know, the best first; "portable" is always the last.
std::vector<std::string> instruction_sets();

// Whether it has instructions that multiply bfloat16, so that PyTorch's matrix products are faster in it than in float32.
bool multiplies_bfloat16();

// Whether it has units that multiply whole tiles of bfloat16 (AMX).
bool multiplies_tiles();

}  // namespace arbllm
