"""The optional folder of real evaluation data, matrices and reference figures."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("ARBLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))


def needs(*names: str) -> Path:
    """The path of a file or folder of the data, or a skip that says what is missing."""
    path = ROOT.joinpath(*names)
    if not path.exists():
        pytest.skip(f"{path} is absent: set ARBLLM_DATA to the folder that holds {'/'.join(names)}")
    return path
