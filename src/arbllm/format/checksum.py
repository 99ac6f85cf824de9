"""Checksums of tensors and of plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

_CHANGEABLE = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache")
_CHANGEABLE_ENDS = ("token_id", "token_ids")


def checksum(tensor: Tensor) -> str:
    """XxHash (xxh3, 64 bits) of a tensor's bytes in row-major order, 16 hexadecimal digits."""
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_hexdigest(octets.numpy().data)


def config_checksum(config: Mapping[str, Any]) -> str:
    """Checksum of those values of config.json that say what the model computes.

    Left out, on every level, are the quantization, dtypes, token numbers and what else may be changed without harm.
    """
    return canonical_checksum(_essential({**config, "quantization_config": None}))


def canonical(values: Any) -> str:
    """JSON without spaces, keys sorted: the same text for the same values."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def canonical_checksum(values: Any) -> str:
    """XxHash (xxh3, 64 bits) of plain values as JSON without spaces, keys sorted."""
    return xxhash.xxh3_64_hexdigest(canonical(values).encode())


def _essential(value: Any) -> Any:
    """A value of config.json without what may be changed."""
    if isinstance(value, list):
        return [_essential(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _essential(item)
        for key, item in value.items()
        if key not in _CHANGEABLE and not key.startswith("_") and not key.endswith(_CHANGEABLE_ENDS)
    }
