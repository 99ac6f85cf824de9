"""Every error that arbllm raises on purpose. Each message says what was wrong, where, and what to do."""

from __future__ import annotations


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
