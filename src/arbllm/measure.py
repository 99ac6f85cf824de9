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
    """What a stretch of work cost.

    Attributes:
        seconds: wall-clock time.
        peak_memory_bytes: greatest resident memory of the process; where the system cannot reset its peak (anything but
            Linux), the greatest since the process began.
        peak_device_memory_bytes: greatest memory that tensors took on the GPU; None without one.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int | None = None

    def __add__(self, other: Measurement) -> Measurement:
        """What two stretches of one job cost together."""
        devices = [m.peak_device_memory_bytes for m in (self, other) if m.peak_device_memory_bytes is not None]
        return Measurement(
            self.seconds + other.seconds,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
            max(devices, default=None),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the GPU's peak where there is no GPU."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Meter:
    """Measures from its making on.

    >>> meter = Meter()
    >>> work()
    >>> meter.read().seconds
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Begin to measure, and the GPU `device`, by default the current one."""
        self._on_gpu = torch.cuda.is_available()
        self._device = device if device is not None and device.type == "cuda" else None
        reset_peak_memory()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._start = time.perf_counter()

    def read(self) -> Measurement:
        """What the work has cost so far."""
        seconds = time.perf_counter() - self._start
        device = torch.cuda.max_memory_allocated(self._device) if self._on_gpu else None
        return Measurement(seconds, peak_memory_bytes(), device)


@contextmanager
def measure(device: torch.device | None = None) -> Iterator[Measurement]:
    """Measure the block, see `Meter`; what is yielded is filled in when the block ends.

    >>> with measure() as measured:
    ...     work()
    >>> measured.seconds, measured.peak_memory_bytes
    """
    measurement, meter = Measurement(), Meter(device)
    try:
        yield measurement
    finally:
        vars(measurement).update(vars(meter.read()))
