"""Every error that arbllm raises on purpose. Each message says what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ArbllmError(Exception):
    """Base class: the command line prints its message as one line and exits with code 2."""


class ConfigError(ArbllmError, ValueError):
    """An option or a combination of options that cannot be used."""


class ModelError(ArbllmError):
    """A model that cannot be found, read, walked or quantized; names the model, block or layer."""


class TextError(ArbllmError):
    """Calibration or evaluation text that is missing, unreachable, empty or too short."""


class CheckpointError(ArbllmError):
    """A packed checkpoint that is missing, damaged or from another version; names the file and tensor."""


class RankError(ArbllmError):
    """Another process of the same job has ended, or does not answer."""


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Inside, a `ModelError` gets the module's name before it."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{module}: {error}") from error
