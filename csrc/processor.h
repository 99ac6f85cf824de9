// Which instruction sets this processor has.
#pragma once

#include <string>
#include <vector>

namespace arbllm {

// Names of those that the kernels know, the best first; "portable" is always the last.
std::vector<std::string> instruction_sets();

}  // namespace arbllm
