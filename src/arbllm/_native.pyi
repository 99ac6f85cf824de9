"""Kernels of arbllm in C++."""

def instruction_sets() -> list[str]:
    """Instruction sets that can be chosen, the best first."""
