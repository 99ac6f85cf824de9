"""The native extension, where it was built."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch


def extension(device: torch.device) -> ModuleType | None:
    """`arbllm._native` for tensors in the CPU's memory; None for other devices, or if it was not built."""
    return load() if device.type == "cpu" else None


@cache
def load() -> ModuleType | None:
    """`arbllm._native`, or None if it was not built."""
    try:
        return import_module("arbllm._native")
    except ImportError:
        return None
