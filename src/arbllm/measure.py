"""Seconds and peak memory of a stretch of work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from arbllm.device import peak_memory_bytes, reset_peak_memory


@dataclass
class Measurement:
    """Filled in when the `measure` block ends.

    Attributes:
        seconds: wall-clock time.
        peak_memory_bytes: greatest resident memory of the process; where the system cannot reset its peak (anything but
            Linux), the greatest since the process began.
        peak_device_memory_bytes: greatest memory that tensors took on the GPU; None without one.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the GPU's peak where there is no GPU."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@contextmanager
def measure(device: torch.device | None = None) -> Iterator[Measurement]:
    """Measure the block, and the GPU `device`, by default the current one.

    >>> with measure() as measured:
    ...     work()
    >>> measured.seconds, measured.peak_memory_bytes
    """
    measurement = Measurement()
    reset_peak_memory()
    on_gpu = torch.cuda.is_available()
    place = device if device is not None and device.type == "cuda" else None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(place)
    start = time.perf_counter()
    try:
        yield measurement
    finally:
        measurement.seconds = time.perf_counter() - start
        measurement.peak_memory_bytes = peak_memory_bytes()
        if on_gpu:
            measurement.peak_device_memory_bytes = torch.cuda.max_memory_allocated(place)
