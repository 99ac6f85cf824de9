"""How the Triton kernels are launched: tuned ahead and kept as data, one file a GPU, so that no call has to search.

`benchmarks/tune_triton.py` writes such a file. A GPU without one is served by `default.json`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "configurations"


@dataclass(frozen=True)
class Dense:
    """Launch of `triton_matmul.dequantize`.

    Attributes:
        rows: of a program, a power of two.
        scratch_megabytes: dense weights that exist at a time, in 10^6 bytes.
        warps: of a program.
    """

    rows: int
    scratch_megabytes: int
    warps: int


@dataclass(frozen=True)
class FewTokens:
    """Launch of `triton_matvec.few_tokens`.

    Attributes:
        most_tokens: with more tokens, another kernel runs.
        tokens: of a program, at most, a power of two; divided by `triton_plan.Plan.most_slots`.
        rows: of a program, a power of two of at least 64.
        words: words of columns that are read side by side, by warps of their own where there are enough.
        most_rows: of a program, where there would be far more programs than `programs` else, with fewer words.
        most_words: words of columns of a program, at most.
        programs: about how many programs to launch, if columns can be divided so.
        warps: of a program.
        early: whether programs may begin before those of the kernel before have ended; from capability 9.0 on.
    """

    most_tokens: int
    tokens: int
    rows: int
    words: int
    most_rows: int
    most_words: int
    programs: int
    warps: int
    early: bool


@dataclass(frozen=True)
class ManyTokens:
    """Launch of `triton_matmul.many_tokens`; fields as in `FewTokens`.

    Attributes:
        least_tokens: from so many on it runs, even where the kernel for a few tokens would take them.
        most_tokens: with more, the weight is written out in pieces.
        tokens: see `FewTokens`; likewise the others.
        stages: steps of the loop whose words are on their way at a time.
    """

    least_tokens: int
    most_tokens: int
    tokens: int
    rows: int
    programs: int
    warps: int
    stages: int
    early: bool


PARTS = ("few", "many", "dense")
"""Launches of `Configuration` that may differ by shape."""


@dataclass(frozen=True)
class Configuration:
    """All launches on one GPU.

    Attributes:
        device: the GPU's name, as PyTorch gives it.
        few: for a few tokens.
        many: for more, with a trellis.
        dense: for the most.
        shapes: what is better for some sizes: objects with `rows`, `columns`, `tokens` (the most that they are for),
            and fields of PARTS under these names.
    """

    device: str
    few: FewTokens
    many: ManyTokens
    dense: Dense
    shapes: list[dict[str, Any]] = field(default_factory=list)

    def of(self, rows: int, columns: int, tokens: int) -> Configuration:
        """This configuration with what is better for a matrix of this size and so many tokens."""
        better = {}
        for part in PARTS:
            fitting = [
                shape
                for shape in self.shapes
                if part in shape and (shape["rows"], shape["columns"]) == (rows, columns) and tokens <= shape["tokens"]
            ]
            if fitting:
                best = min(fitting, key=lambda shape: shape["tokens"])
                better[part] = replace(getattr(self, part), **best[part])
        return replace(self, **better)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Configuration:
        """From what a file holds."""
        return cls(
            device=values["device"],
            few=FewTokens(**values["few"]),
            many=ManyTokens(**values["many"]),
            dense=Dense(**values["dense"]),
            shapes=values["shapes"],
        )


def file_of(device: str) -> Path:
    """The file of a GPU, by its name as PyTorch gives it."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


@cache
def load(device: str) -> Configuration:
    """The configuration of a GPU, by its name; the default one where it has no file."""
    file = file_of(device)
    return Configuration.from_dict(json.loads((file if file.exists() else FOLDER / "default.json").read_text()))
