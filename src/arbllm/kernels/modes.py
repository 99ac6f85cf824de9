"""Where PyTorch follows what is computed, and our operators would hide it."""

from __future__ import annotations

# By their own names, as every product of a layer asks them: that saves a third of a microsecond.
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from arbllm.errors import ConfigError


def is_followed() -> bool:
    """Whether inputs have to go through PyTorch's own operators.

    They can be recorded, transformed (`torch.func`) and derived in forward mode, and take tensors without data, as an
    export that is not strict has them; a prepared weight is none that they know. `torch.compile` is no such case.

    Raises:
        ConfigError: `torch.jit.trace` follows, which cannot record how bits are unpacked.
    """
    if is_dynamo_compiling():
        return False
    if _is_tracing():
        raise ConfigError("torch.jit.trace cannot follow packed layers; use torch.compile or torch.export")
    return _len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None or forward_ad._current_level >= 0
