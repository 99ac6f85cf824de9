"""Output directories, and files, that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from arbllm.errors import ArbllmError, ConfigError


def output_path(out: Path | str, *sources: Path | str) -> Path:
    """Where to write, `~` expanded, once it is known that this costs nothing that is read.

    Args:
        out: the directory to be.
        sources: what is read: local paths, or names on the hub, which are not there as paths.

    Raises:
        ConfigError: `out` is one of them, or a directory that holds it.
    """
    path = Path(out).expanduser()
    for source in sources:
        found = Path(source).expanduser()
        if found.exists() and found.resolve().is_relative_to(path.resolve()):
            what = "is itself" if found.resolve() == path.resolve() else f"holds {source},"
            raise ConfigError(f"{out} {what} what is read; choose another output directory")
    return path


@contextmanager
def output_directory(out: Path | str, overwrite: bool = False, work: Path | None = None) -> Iterator[Path]:
    """A directory to write in that becomes `out` when the block ends well, and vanishes when it does not.

    It lies beside `out`, on the same disk, and takes the place of an existing `out` only in the end.

    Args:
        out: the directory to be; an empty one may exist.
        overwrite: replace an `out` that holds a model (a config.json), but nothing else: a slip of the finger must not
            cost a home directory.
        work: where to write until then, on the same disk; None for a directory of its own beside `out`.

    Raises:
        ArbllmError: `out` exists and may not be replaced, or cannot be made or written; the disk is full.
    """
    out = Path(out).resolve()
    check_replaceable(out, overwrite)
    work = work or out.with_name(f".{out.name}.{uuid4().hex[:8]}.partial")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise ArbllmError(f"{out}: cannot be made ({error.strerror}); choose another output directory") from error
    try:
        yield work
        _replace(out, work)
    except Exception as error:
        if _disk_is_full(error):
            message = "no space left on the disk; free some, or choose an output directory on another disk"
        elif isinstance(error, OSError) and str(error.filename).startswith(str(out.parent)):
            message = f"cannot be written ({error.strerror}: {error.filename}); choose another output directory"
        else:
            raise
        raise ArbllmError(f"{out}: {message}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Refuse an `out` that holds what may not be lost.

    Raises:
        ArbllmError: it does; says what would help.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ArbllmError(f"{out} is a file; choose another output directory")
    if any(out.iterdir()) and not overwrite:
        raise ArbllmError(f"{out} exists and is not empty; choose another output directory, or pass --overwrite")
    if any(out.iterdir()) and not (out / "config.json").exists():
        raise ArbllmError(f"{out} holds files, but no model: --overwrite does not replace it; choose another directory")


def put_back(out: Path, work: Path) -> None:
    """Restore an `out` that had made way for `work` when the process was killed."""
    if not out.exists() and _old(work).exists():
        _old(work).rename(out)


def write_whole(file: Path, octets: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the machine stops.

    Raises:
        OSError: it cannot be written, and nothing is left of it; names the file.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(octets)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error
    sync_directory(file.parent)


def sync_directory(directory: Path) -> None:
    """Bring a rename to the disk, where the system lets directories be opened."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(out: Path, work: Path) -> None:
    """Put `work` in the place of `out`; should that fail, the old `out` stays."""
    for path in (*work.rglob("*"), work):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if out.exists():
        out.rename(_old(work))
    try:
        work.rename(out)
    except OSError:
        put_back(out, work)
        raise
    sync_directory(out.parent)
    if _old(work).exists():
        try:
            shutil.rmtree(_old(work))
        except OSError as error:  # that is no failure: the new one is in its place
            warnings.warn(f"what {out} held before is left in {_old(work)} ({error.strerror})", stacklevel=2)


def _old(work: Path) -> Path:
    """Where what `work` replaces is kept until that is done."""
    return work.with_suffix(".old")


def _disk_is_full(error: BaseException) -> bool:
    """Whether an error comes of a full disk; safetensors and tokenizers tell so in words alone."""
    full = {errno.ENOSPC, errno.EDQUOT}
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {code})" in str(error) for code in full)
