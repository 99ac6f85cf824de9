"""Where to compute, and in what."""

from __future__ import annotations

import torch

from arbllm.errors import ConfigError


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the best one there is.

    Args:
        name: `cpu`, `cuda`, `cuda:1` and so on; None for the GPU where there is one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used here; `cpu` always can ({_first_line(error)})") from error
    if device.type == "meta":
        raise ConfigError("device 'meta' holds no numbers; choose `cpu` or `cuda`")
    return device


def evaluation_dtype(dtype: str, device: torch.device) -> str:
    """`auto` means float32 on a CPU, where half precision is slow and coarse, and the stored dtype elsewhere."""
    return "float32" if dtype == "auto" and device.type == "cpu" else dtype


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
