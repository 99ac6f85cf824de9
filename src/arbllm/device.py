"""The machine: where to compute and in what, how much memory that took, how much room the disk has."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from arbllm.errors import ArbllmError, ConfigError

_STATUS = Path("/proc/self/status")
_CLEAR_PEAK = Path("/proc/self/clear_refs")


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
        raise ConfigError(
            f"device {name!r} is not known or not there; choose cpu, or cuda where there is a GPU"
        ) from error
    if device.type == "meta":
        raise ConfigError("device 'meta' holds no numbers; choose cpu, or cuda where there is a GPU")
    return device


def evaluation_dtype(dtype: str, device: torch.device) -> str:
    """`auto` means float32 on a CPU, where half precision is slow and coarse, and the stored dtype elsewhere."""
    return "float32" if dtype == "auto" and device.type == "cpu" else dtype


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Set PyTorch's precision of products in float32 (`torch.set_float32_matmul_precision`), and put it back.

    Args:
        precision: `highest`, `high` or `medium`, with which packed layers on a CPU multiply many tokens in bfloat16.

    Raises:
        RuntimeError: PyTorch's newer settings (`torch.backends.fp32_precision` and the like) were used before.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_disk_space(needed: int, directory: Path) -> None:
    """Refuse to begin what would not fit.

    Args:
        needed: bytes to write, at most.
        directory: an existing directory on the disk in question.

    Raises:
        ArbllmError: the disk has less room.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ArbllmError(
            f"no space left on the disk: the checkpoint can take {needed:,} bytes, {directory.parent} has {free:,} "
            "free; free some, or choose an output directory on another disk"
        )


@contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Run a job, and say what helps when the device has too little memory for it.

    Raises:
        ArbllmError: it has.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise ArbllmError(
            "the device is out of memory; use fewer or shorter windows (--windows, --window-length), --stream where "
            "the model is larger than memory, or another --device"
        ) from error


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has too little memory."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)  # as PyTorch says on a CPU


def release_memory() -> None:
    """Give the system back what this process has freed; does nothing where the C library cannot."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def reset_peak_memory() -> None:
    """Let the system forget the peak so far; does nothing where it cannot."""
    try:
        _CLEAR_PEAK.write_text("5")  # 5 resets the high-water mark alone, see proc(5)
    except OSError:
        return


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Peak resident memory of this process, in bytes, since the last reset; 0 where the system does not tell.

    On a GPU the peak that tensors took there.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
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
