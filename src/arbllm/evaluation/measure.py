"""Seconds and peak memory of a stretch of work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_PEAK = Path("/proc/self/clear_refs")


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
def measure() -> Iterator[Measurement]:
    """Measure the block.

    >>> with measure() as measured:
    ...     work()
    >>> measured.seconds, measured.peak_memory_bytes
    """
    measurement = Measurement()
    reset_peak_memory()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        yield measurement
    finally:
        measurement.seconds = time.perf_counter() - start
        measurement.peak_memory_bytes = peak_memory_bytes()
        if on_gpu:
            measurement.peak_device_memory_bytes = torch.cuda.max_memory_allocated()


def reset_peak_memory() -> None:
    """Let the system forget the peak so far; does nothing where it cannot."""
    try:
        _CLEAR_PEAK.write_text("5")  # 5 resets the high-water mark alone, see proc(5)
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, in bytes, since the last reset; 0 where the system does not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return _lifetime_peak()


def _lifetime_peak() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
