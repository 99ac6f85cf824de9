"""Large language models at one to three true bits per weight.

>>> import arbllm
>>> arbllm.quantize("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-packed")
>>> model = arbllm.load("smollm2-packed")

The names below are imported when first used, so that `import arbllm` stays cheap; all that it does is to let
`transformers.AutoModelForCausalLM.from_pretrained` read packed checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from arbllm.integrations import register_with_transformers

if TYPE_CHECKING:
    from arbllm.config import BinarizationConfig
    from arbllm.distillation import distill
    from arbllm.errors import ArbllmError, CheckpointError, ConfigError, ModelError, TextError
    from arbllm.format.matrix import BinaryMatrix
    from arbllm.integrations.load import load
    from arbllm.pipeline import quantize
    from arbllm.solver import quantize_matrix

__version__ = "0.1.0"

_HOMES = {
    "ArbllmError": "arbllm.errors",
    "BinarizationConfig": "arbllm.config",
    "BinaryMatrix": "arbllm.format.matrix",
    "CheckpointError": "arbllm.errors",
    "ConfigError": "arbllm.errors",
    "ModelError": "arbllm.errors",
    "TextError": "arbllm.errors",
    "distill": "arbllm.distillation",
    "load": "arbllm.integrations.load",
    "quantize": "arbllm.pipeline",
    "quantize_matrix": "arbllm.solver",
}

__all__ = [
    "ArbllmError",
    "BinarizationConfig",
    "BinaryMatrix",
    "CheckpointError",
    "ConfigError",
    "ModelError",
    "TextError",
    "distill",
    "load",
    "quantize",
    "quantize_matrix",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'arbllm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


register_with_transformers()
