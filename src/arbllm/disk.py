"""Room on the disk, asked for before hours of work and not after."""

from __future__ import annotations

import shutil
from pathlib import Path

from arbllm.errors import ArbllmError


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
            f"no space left on the disk: the checkpoint can take {needed / 1e6:,.0f} MB, {directory.parent} has "
            f"{free / 1e6:,.0f} MB free; free some, or choose an output directory on another disk"
        )
