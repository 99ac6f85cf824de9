"""How figures are written: JSON that holds whatever numbers come out, and tables in Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arbllm.format.output import write_whole


def to_json(values: Mapping[str, Any]) -> str:
    """JSON with null in place of numbers that it cannot hold, such as the perplexity of a collapsed model."""
    return json.dumps(_finite(values), indent=2, allow_nan=False)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write `to_json` so that an interruption leaves the old file or the new one."""
    write_whole(file, (to_json(values) + "\n").encode())


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown; the columns behind the first `left` ones are aligned to the right."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
