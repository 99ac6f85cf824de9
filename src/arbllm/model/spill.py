"""Activations in a memory-mapped file: what is not at hand lies on the disk, as the system sees fit."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from arbllm.errors import ArbllmError, ConfigError


def spill(tensor: Tensor, directory: Path) -> Tensor:
    """A copy of a tensor in a file that has no name, so that nothing stays of it however the job ends.

    Pages of it count as resident memory while they are in use; the system may write them out at any time.

    Args:
        tensor: on the CPU.
        directory: for the file; made if it is not there.

    Raises:
        ConfigError: the tensor is on another device.
        ArbllmError: the directory cannot be made, or its disk is full.
    """
    if tensor.device.type != "cpu":
        raise ConfigError("activations can be kept in --offload-dir only when computing on the CPU (--device cpu)")
    file = directory / f"activations-{uuid4().hex[:8]}.bin"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            if hasattr(os, "posix_fallocate"):  # a full disk shows now rather than later
                os.posix_fallocate(stream.fileno(), 0, max(tensor.nbytes, 1))
            else:
                stream.truncate(max(tensor.nbytes, 1))
        mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            file.unlink()
        raise ArbllmError(
            f"{directory}: activations cannot be kept there ({error}); choose another --offload-dir"
        ) from error
    file.unlink()
    return mapped.reshape(tensor.shape).copy_(tensor)
